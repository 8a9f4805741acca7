//! YAML configuration: strict parsing with errors that name line, column and the nearest key, and paths in it.
//!
//! Every part of the program keeps its own config struct with `#[serde(deny_unknown_fields)]` and its defaults
//! resolved while parsing; this module only turns text into such structs, the same way everywhere.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_saphyr::options::NonFiniteFloatPolicy;
use serde_saphyr::{Error as YamlError, Options};

use crate::error::{Error, Result};

/// Reads the YAML file at `path` into `T`.
///
/// # Errors
/// Input: the file cannot be read, or as [`parse`].
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidData => Error::file(path, "is not UTF-8 text", "give a YAML file"),
        _ => Error::read(path, source),
    })?;
    parse(&text, path)
}

/// Reads YAML `text` into `T`; `origin` is the file that errors name.
///
/// # Errors
/// Input, with `origin:line:column`: malformed YAML, an unknown, missing or repeated key, a value of the wrong type,
/// a float that is not finite.
pub fn parse<T: DeserializeOwned>(text: &str, origin: &Path) -> Result<T> {
    reject_non_finite(text).and_then(|()| serde_saphyr::from_str_with_options(text, options())).map_err(|error| {
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
/// Fault: `value` holds something that YAML cannot express.
pub fn to_yaml<T: Serialize>(value: &T) -> Result<String> {
    serde_saphyr::to_string(value)
        .map_err(|error| Error::Fault(format!("the config cannot be written as YAML: {error}")))
}

/// A path as the YAML spells it; [`resolve`](Self::resolve) turns it into one that can be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigPath(PathBuf);

impl ConfigPath {
    /// A path spelled as `text`.
    pub fn new(text: impl Into<PathBuf>) -> Self {
        Self(text.into())
    }

    /// The path with `${VAR}`, `${VAR:-default}` and a leading `~` expanded; a relative one starts at `base_dir`, the
    /// folder of the YAML file. A URL stays one.
    ///
    /// # Errors
    /// Input: a variable that is not set and has no default, or `${` without `}`.
    pub fn resolve(&self, base_dir: &Path) -> Result<PathBuf> {
        self.resolve_with(base_dir, &|name| std::env::var(name).ok())
    }

    fn resolve_with(&self, base_dir: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Result<PathBuf> {
        let spelled = self.0.to_string_lossy();
        let expanded = expand_variables(&spelled, variable)?;
        let expanded = match expanded.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                let home = variable("HOME").ok_or_else(|| unset(&spelled, "HOME"))?;
                format!("{home}{rest}")
            }
            _ => expanded,
        };
        Ok(if is_url(&expanded) { expanded.into() } else { base_dir.join(expanded) })
    }
}

/// Whether a resolved path is a URL, which only some keys take.
pub fn is_url(path: &str) -> bool {
    path.split_once("://").is_some_and(|(scheme, _)| scheme.chars().all(|letter| letter.is_ascii_alphanumeric()))
}

fn options() -> Options {
    serde_saphyr::options! { with_snippet: false, non_finite_float_policy: NonFiniteFloatPolicy::Reject }
}

/// The float policy holds only where the reader does not know the type it wants, so read once without types.
/// What else is wrong in the text is left to the typed reading, which explains it better.
fn reject_non_finite(text: &str) -> std::result::Result<(), YamlError> {
    match serde_saphyr::from_str_with_options::<serde_json::Value>(text, options()) {
        Err(error @ YamlError::NonFiniteFloat { .. }) => Err(error),
        _ => Ok(()),
    }
}

/// The problem and the remedy of a YAML error.
fn explain(error: &YamlError) -> (String, String) {
    match error {
        YamlError::SerdeUnknownField { field, expected, .. } => suggest("key", field, expected),
        YamlError::SerdeUnknownVariant { variant, expected, .. } => suggest("value", variant, expected),
        YamlError::SerdeMissingField { field, .. } => {
            (format!("the key `{field}` is missing"), format!("add `{field}:` here"))
        }
        YamlError::DuplicateMappingKey { key, .. } => {
            let key = key.as_deref().unwrap_or("?");
            (format!("the key `{key}` stands here a second time"), "keep one of the two".into())
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
    // A name less alike than this is a guess that misleads.
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

fn expand_variables(spelled: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let mut expanded = String::with_capacity(spelled.len());
    let mut rest = spelled;
    while let Some((before, after)) = rest.split_once("${") {
        let (inside, after) = after
            .split_once('}')
            .ok_or_else(|| Error::input(spelled, "`${` is never closed", "close it with `}`, as in ${HOME}/photos"))?;
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        // As in the shell, `:-` also replaces a variable that is set but empty.
        let value = match (variable(name), default) {
            (Some(value), None) => value,
            (Some(value), Some(_)) if !value.is_empty() => value,
            (_, Some(default)) => default.into(),
            (None, None) => return Err(unset(spelled, name)),
        };
        expanded.push_str(before);
        expanded.push_str(&value);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn unset(spelled: &str, name: &str) -> Error {
    Error::input(
        spelled,
        format!("the environment variable {name} is not set"),
        format!("set {name}, or write a default: ${{{name}:-/some/folder}}"),
    )
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

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
        assert!(message.starts_with("train.yaml:3:1: the key `batch` stands here a second time"), "{message}");
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
    fn paths_expand_variables_and_home_and_start_at_the_yaml() {
        let variable = |name: &str| match name {
            "HOME" => Some("/home/ada".to_owned()),
            "CACHE" => Some("/cache".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let resolve = |text: &str| ConfigPath::new(text).resolve_with(Path::new("/run"), &variable);
        for (text, expected) in [
            ("faces", "/run/faces"),
            ("/faces", "/faces"),
            ("~", "/home/ada"),
            ("~/faces", "/home/ada/faces"),
            ("a~b", "/run/a~b"),
            ("${CACHE}/x/${CACHE}", "/cache/x//cache"),
            ("${UNSET:-~/.cache/hyperlora}/photos", "/home/ada/.cache/hyperlora/photos"),
            ("${EMPTY:-/d}/photos", "/d/photos"),
            ("${CACHE:-/d}/photos", "/cache/photos"),
        ] {
            assert_eq!(resolve(text).unwrap(), Path::new(expected), "{text}");
        }
        assert!(resolve("${UNSET}/x").unwrap_err().to_string().contains("UNSET is not set"));
        assert!(resolve("${CACHE/x").unwrap_err().to_string().contains("never closed"));
    }
}
