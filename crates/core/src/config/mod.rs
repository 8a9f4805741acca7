//! YAML configuration: strict parsing, paths, and errors that name the line, the column and the nearest key.
//!
//! Every part of the program keeps its own config struct with `#[serde(deny_unknown_fields)]` and its defaults resolved
//! while parsing. This module only turns text into such structs, the same way everywhere.

mod path;

use std::fs::File;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_saphyr::options::NonFiniteFloatPolicy;
use serde_saphyr::{Error as YamlError, Options};

use crate::config::path::{Origin, reading};
use crate::paths::{open_regular, read_limited};
use crate::{Error, Result};

pub use crate::config::path::{ConfigPath, is_url};

/// Size limit of a YAML file in bytes, far above any handwritten one.
const LARGEST: u64 = 16 << 20;

/// Reads the YAML file at `path` into `T`. The user named the file, so its [paths](ConfigPath) may hold variables.
///
/// # Errors
/// Input: the file cannot be read or is above 16 MiB, or as [`parse`].
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(&read(path, File::open(path))?, path)
}

/// Reads a YAML file that was found in a folder, such as a run folder, whose author may be a stranger: like [`load`],
/// but expands no variables in paths and refuses a pipe or a device.
///
/// # Errors
/// As [`load`].
pub fn load_found<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read(path, open_regular(path))?;
    parse_from(&text, path, Origin::Found(path.into()))
}

fn read(path: &Path, file: io::Result<File>) -> Result<String> {
    let bytes = file.and_then(|file| read_limited(file, LARGEST)).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => {
            Error::file(path, format!("is not a YAML file: {source}"), "give a YAML file")
        }
        _ => Error::read(path, source),
    })?;
    String::from_utf8(bytes).map_err(|_| Error::file(path, "is not UTF-8 text", "give a YAML file"))
}

/// Reads YAML `text` into `T`. `origin` is the file that errors name, one that the user named.
///
/// # Errors
/// Input, with `origin:line:column`: malformed YAML, an unknown, missing or repeated key, a value of the wrong type, a
/// float that is not finite.
///
/// # Examples
/// ```
/// use std::path::Path;
/// use hyperlora_core::config::parse;
/// use serde::Deserialize;
///
/// #[derive(Debug, Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Training {
///     batch: u32,
/// }
///
/// let training: Training = parse("batch: 4", Path::new("train.yaml"))?;
/// assert_eq!(training.batch, 4);
///
/// let error = parse::<Training>("bacth: 4", Path::new("train.yaml")).unwrap_err();
/// assert!(error.to_string().starts_with("train.yaml:1:1: unknown key `bacth`: did you mean `batch`?"));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn parse<T: DeserializeOwned>(text: &str, origin: &Path) -> Result<T> {
    parse_from(text, origin, Origin::Started)
}

fn parse_from<T: DeserializeOwned>(text: &str, origin: &Path, of_paths: Origin) -> Result<T> {
    let typed = || reading(of_paths, || serde_saphyr::from_str_with_options(text, options()));
    reject_non_finite(text).and_then(|()| typed()).map_err(|error| {
        let error = error.without_snippet();
        let place = match error.location() {
            Some(at) => format!("{}:{}:{}", origin.display(), at.line(), at.column()),
            None => origin.display().to_string(),
        };
        let (problem, remedy) = explain(error);
        Error::input(place, problem, remedy)
    })
}

/// Writes `value` as YAML that [`parse`] reads back.
///
/// # Errors
/// Fault: YAML cannot express `value`.
pub fn to_yaml<T: Serialize>(value: &T) -> Result<String> {
    serde_saphyr::to_string(value)
        .map_err(|error| Error::Fault(format!("the config cannot be written as YAML: {error}")))
}

fn options() -> Options {
    serde_saphyr::options! { with_snippet: false, non_finite_float_policy: NonFiniteFloatPolicy::Reject }
}

/// Rejects non-finite floats in a first, untyped reading: the parser applies its float policy only if it does not know
/// the wanted type. Other errors are left to the typed reading, which explains them better.
fn reject_non_finite(text: &str) -> std::result::Result<(), YamlError> {
    match serde_saphyr::from_str_with_options::<serde_json::Value>(text, options()) {
        Err(error @ YamlError::NonFiniteFloat { .. }) => Err(error),
        _ => Ok(()),
    }
}

/// Returns the problem and the remedy of a YAML error.
fn explain(error: &YamlError) -> (String, String) {
    match error {
        YamlError::SerdeUnknownField { field, expected, .. } => suggest("key", field, expected),
        YamlError::SerdeUnknownVariant { variant, expected, .. } => suggest("value", variant, expected),
        YamlError::SerdeMissingField { field, .. } => {
            (format!("the key `{field}` is missing"), format!("add `{field}:` here"))
        }
        YamlError::DuplicateMappingKey { key, .. } => {
            let key = key.as_deref().unwrap_or("?");
            (format!("the key `{key}` appears a second time"), "keep one of the two".into())
        }
        YamlError::NonFiniteFloat { value, .. } => {
            (format!("`{value}` is not a finite number"), "give a finite number".into())
        }
        YamlError::SerdeInvalidType { unexpected, expected, .. }
        | YamlError::SerdeInvalidValue { unexpected, expected, .. } => {
            (format!("expected {expected}, found {unexpected}"), format!("give {expected}"))
        }
        YamlError::InvalidScalar { ty, .. } => {
            (format!("the value here is not a valid {ty}"), format!("give a value of type {ty}"))
        }
        YamlError::Eof { .. } => ("ends before the config is complete".into(), "add the missing keys".into()),
        other => (other.render(), "correct the YAML at this place".into()),
    }
}

fn suggest(kind: &str, given: &str, known: &[&str]) -> (String, String) {
    // A suggestion below this likeness would mislead.
    const ALIKE: f64 = 0.75;
    let nearest = known
        .iter()
        .map(|name| (strsim::jaro_winkler(given, name), name))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let problem = match nearest {
        Some((_, name)) => format!("unknown {kind} `{given}`: did you mean `{name}`?"),
        None => format!("unknown {kind} `{given}`"),
    };
    let remedy = match known {
        [] => format!("remove `{given}`: nothing is configured here"),
        known => format!("known here: {}", known.join(", ")),
    };
    (problem, remedy)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Training {
        learning_rate: f32,
        #[serde(default = "four")]
        batch: u32,
        #[serde(default)]
        schedule: Schedule,
        #[serde(default)]
        data: Option<ConfigPath>,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "snake_case")]
    enum Schedule {
        #[default]
        Constant,
        Cosine {
            warmup_steps: u32,
        },
    }

    fn four() -> u32 {
        4
    }

    fn failure(text: &str) -> String {
        let error = parse::<Training>(text, Path::new("train.yaml")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn defaults_are_resolved_and_survive_a_round_trip() {
        let text = "learning_rate: 1e-4\nschedule:\n  cosine:\n    warmup_steps: 10\ndata: ${X}/faces\n";
        let parsed: Training = parse(text, Path::new("train.yaml")).unwrap();
        assert_eq!(parsed.batch, 4);
        assert_eq!(parsed.schedule, Schedule::Cosine { warmup_steps: 10 });
        let yaml = to_yaml(&parsed).unwrap();
        assert!(yaml.contains("${X}/faces"), "{yaml}");
        assert_eq!(parse::<Training>(&yaml, Path::new("again.yaml")).unwrap(), parsed);
    }

    #[test]
    fn an_unknown_key_names_its_place_and_the_nearest_key() {
        let message = failure("learning_rate: 0.1\nbacth: 3\n");
        assert!(message.starts_with("train.yaml:2:1: unknown key `bacth`: did you mean `batch`?"), "{message}");
        assert!(message.contains("remedy: known here: learning_rate, batch, schedule, data"), "{message}");
    }

    #[test]
    fn an_unknown_key_below_another_names_its_own_line() {
        let message = failure("learning_rate: 0.1\nschedule:\n  cosine:\n    warm_steps: 3\n");
        assert!(
            message.starts_with("train.yaml:4:5: unknown key `warm_steps`: did you mean `warmup_steps`?"),
            "{message}"
        );
    }

    #[test]
    fn an_unknown_choice_names_the_nearest_one() {
        let message = failure("learning_rate: 0.1\nschedule: constnat\n");
        assert!(
            message.starts_with("train.yaml:2:11: unknown value `constnat`: did you mean `constant`?"),
            "{message}"
        );
    }

    #[test]
    fn a_far_off_key_gets_no_guess() {
        let message = failure("learning_rate: 0.1\nzzz: 3\n");
        assert!(message.contains("unknown key `zzz`\n"), "{message}");
    }

    #[test]
    fn wrong_types_missing_and_repeated_keys_name_their_place() {
        let message = failure("learning_rate: fast\n");
        assert!(message.starts_with("train.yaml:1:16: "), "{message}");
        let message = failure("learning_rate: 0.1\nbatch: -1\n");
        assert!(message.starts_with("train.yaml:2:8: "), "{message}");
        let message = failure("learning_rate: 0.1\nbatch: [1, 2]\n");
        assert!(message.starts_with("train.yaml:2:8: "), "{message}");
        let message = failure("batch: 1\n");
        assert!(message.contains("the key `learning_rate` is missing"), "{message}");
        let message = failure("learning_rate: 0.1\nbatch: 1\nbatch: 2\n");
        assert!(message.starts_with("train.yaml:3:1: the key `batch` appears a second time"), "{message}");
    }

    #[test]
    fn floats_are_finite() {
        for value in [".nan", ".inf", "-.inf", "1e999"] {
            let message = failure(&format!("batch: 2\nlearning_rate: {value}\n"));
            assert!(message.starts_with("train.yaml:2:16: ") && message.contains("finite"), "{message}");
        }
    }

    #[test]
    fn malformed_yaml_names_its_place() {
        let message = failure("learning_rate: [0.1\nbatch: 2\n");
        assert!(message.starts_with("train.yaml:"), "{message}");
        failure("");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Training>(Path::new("no/such.yaml")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with("no/such.yaml: cannot be read"), "{error}");
    }

    #[test]
    fn a_file_is_bounded_and_a_found_one_regular() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.yaml");
        std::fs::write(&path, "learning_rate: 0.1\n").unwrap();
        assert_eq!(load::<Training>(&path).unwrap(), load_found::<Training>(&path).unwrap());
        for load in [load::<Training>, load_found::<Training>] {
            let error = load(Path::new("/dev/zero")).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("is not a YAML file"), "{error}");
        }
        let file = File::options().append(true).open(&path).unwrap();
        file.set_len(LARGEST + 1).unwrap();
        let error = load::<Training>(&path).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("more than"), "{error}");
        // No process writes to this pipe: `load` would wait for one, `load_found` must not.
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(load_found::<Training>(&pipe).unwrap_err().exit_code(), 2);
    }
}
