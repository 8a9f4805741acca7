//! Paths in a YAML file. Variables are expanded only in files that the user named, and secrets never become part of a
//! URL.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result};

/// Path as spelled in the YAML. [`resolve`](Self::resolve) turns it into one that can be opened.
///
/// Serialising it hides the layout of this machine: of an absolute path or a URL, only the last part is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigPath {
    spelled: PathBuf,
    origin: Origin,
}

/// Author of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// The user (on the command line, or in a YAML that the command line names) or this program.
    Started,
    /// The author of the folder that contains this file.
    Found(Arc<Path>),
}

thread_local! {
    /// Author of the paths being read. `None` counts as a stranger.
    static READING: RefCell<Option<Origin>> = const { RefCell::new(None) };
}

/// Runs `read` with `origin` as the author of every path that it parses.
pub(super) fn reading<T>(origin: Origin, read: impl FnOnce() -> T) -> T {
    struct Restored(Option<Origin>);
    impl Drop for Restored {
        fn drop(&mut self) {
            READING.set(self.0.take());
        }
    }
    let _before = Restored(READING.replace(Some(origin)));
    read()
}

impl<'de> Deserialize<'de> for ConfigPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let spelled = PathBuf::deserialize(deserializer)?;
        let unknown = || Origin::Found(Path::new("the file that was read").into());
        let origin = READING.with_borrow(|origin| origin.clone().unwrap_or_else(unknown));
        Ok(Self { spelled, origin })
    }
}

impl Serialize for ConfigPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.shareable())
    }
}

impl JsonSchema for ConfigPath {
    fn schema_name() -> Cow<'static, str> {
        "ConfigPath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "format": "path",
            "description": "Path. A relative one starts at the YAML file's folder; `~`, `${VAR}` and `${VAR:-default}` \
                are expanded.",
        })
    }
}

impl ConfigPath {
    /// Makes a path that the user or this program spelled as `text`.
    pub fn new(text: impl Into<PathBuf>) -> Self {
        Self { spelled: text.into(), origin: Origin::Started }
    }

    /// Expands `${VAR}`, `${VAR:-default}` and a leading `~`. A relative path starts at `base_dir`, the folder of the
    /// YAML file. A URL stays a URL.
    ///
    /// # Errors
    /// Input: a variable that is not set and has no default, or `${` without `}`; a URL with a user, a password, a
    /// query or the value of a variable whose name suggests a secret. For a path from a file in a run folder also: a
    /// variable or `~`, which are expanded only for the user, and a relative path to nothing.
    ///
    /// # Examples
    /// ```
    /// use std::path::Path;
    /// use hyperlora_core::config::ConfigPath;
    ///
    /// let yaml_folder = Path::new("/work/experiment");
    /// let faces = ConfigPath::new("${EXAMPLE_FACES:-data}/faces");
    /// assert_eq!(faces.resolve(yaml_folder)?, Path::new("/work/experiment/data/faces"));
    /// let shards = ConfigPath::new("s3://bucket/shards");
    /// assert_eq!(shards.resolve(yaml_folder)?, Path::new("s3://bucket/shards"));
    /// # Ok::<(), hyperlora_core::Error>(())
    /// ```
    pub fn resolve(&self, base_dir: &Path) -> Result<PathBuf> {
        self.resolve_with(base_dir, &|name| std::env::var(name).ok())
    }

    fn resolve_with(&self, base_dir: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Result<PathBuf> {
        let Some(spelled) = self.spelled.to_str() else { return Ok(base_dir.join(&self.spelled)) };
        let mut expansion = Expansion { spelled, variable, names: Vec::new() };
        let expanded = match &self.origin {
            Origin::Started => expansion.path()?,
            Origin::Found(file) if spelled.contains("${") || spelled == "~" || spelled.starts_with("~/") => {
                return Err(Error::file(
                    file,
                    format!("names `{spelled}`, which is not expanded in a run folder"),
                    ELSEWHERE,
                ));
            }
            Origin::Found(_) => spelled.to_owned(),
        };
        if is_url(&expanded) {
            check_url(spelled, &expanded, &expansion.names)?;
            return Ok(expanded.into());
        }
        let path = base_dir.join(&expanded);
        match &self.origin {
            Origin::Found(file) if Path::new(&expanded).is_relative() && !path.exists() => {
                Err(Error::file(file, format!("names `{spelled}`, which does not lie beside it"), ELSEWHERE))
            }
            _ => Ok(path),
        }
    }

    /// Returns the spelling without anything that describes this machine.
    fn shareable(&self) -> Cow<'_, str> {
        let text = self.spelled.to_string_lossy();
        if let Some((_, url)) = text.split_once("://").filter(|_| is_url(&text)) {
            let path = url.split(['?', '#']).next().unwrap_or_default().trim_end_matches('/');
            let last = path.split_once('/').and_then(|(_, path)| path.rsplit('/').next());
            return Cow::Owned(last.unwrap_or("URL").to_owned());
        }
        if self.spelled.is_absolute() {
            return Cow::Owned(self.spelled.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        text
    }
}

/// Remedy for a run folder that comes from another machine.
const ELSEWHERE: &str = "write its path on this machine into paths.yaml beside config.yaml (`base.path: /models/sdxl`, \
     likewise data.shards, faces.models, base.image_encoder), or give the command's option for it (--base, \
     --image-encoder, --faces)";

/// Longest spelling of a path in bytes, the limit of Linux.
const LONGEST: usize = 4096;

/// Name parts of environment variables that hold secrets.
const SECRETS: [&str; 6] = ["SECRET", "TOKEN", "PASSW", "KEY", "CREDENTIAL", "SIGNATURE"];

/// Tells whether a resolved path is a URL, which only some keys accept.
pub fn is_url(path: &str) -> bool {
    path.split_once("://").is_some_and(|(scheme, _)| scheme.chars().all(|letter| letter.is_ascii_alphanumeric()))
}

/// Refuses secrets in a URL, because it appears in messages and is sent to the host that it names.
fn check_url(spelled: &str, url: &str, names: &[String]) -> Result<()> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let secret = names.iter().find(|name| SECRETS.iter().any(|part| name.to_uppercase().contains(part)));
    let problem = match secret {
        Some(name) => format!("puts {name}, by its name a secret, into a URL"),
        None if authority.contains('@') => "is a URL with a user or a password".into(),
        None if rest.contains(['?', '#']) => "is a URL with a `?` or a `#` part, which is not understood".into(),
        None => return Ok(()),
    };
    let remedy = "take it out: credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, \
        GOOGLE_SERVICE_ACCOUNT)";
    Err(Error::input(spelled, problem, remedy))
}

/// Expansion of one spelling.
struct Expansion<'a> {
    spelled: &'a str,
    variable: &'a dyn Fn(&str) -> Option<String>,
    /// Names of all variables in it.
    names: Vec<String>,
}

impl Expansion<'_> {
    fn path(&mut self) -> Result<String> {
        if self.spelled.len() > LONGEST {
            return Err(self.refuse(format!("is not a path: it has more than {LONGEST} bytes"), "give a shorter one"));
        }
        let expanded = self.expand(self.spelled)?;
        match expanded.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                let home = (self.variable)("HOME").ok_or_else(|| self.unset("HOME"))?;
                Ok(format!("{home}{rest}"))
            }
            _ => Ok(expanded),
        }
    }

    fn expand(&mut self, text: &str) -> Result<String> {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let Some(end) = closing(after) else {
                return Err(self.refuse("`${` is never closed", "close it with `}`, as in ${HOME}/photos"));
            };
            expanded.push_str(before);
            expanded.push_str(&self.value(&after[..end])?);
            rest = &after[end + 1..];
        }
        expanded.push_str(rest);
        Ok(expanded)
    }

    /// Returns the value of the text between `${` and its `}`.
    fn value(&mut self, inside: &str) -> Result<String> {
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        let begins = name.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_');
        if !begins || !name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_') {
            let problem = format!("`{name}` is not a variable name");
            return Err(self.refuse(problem, "write ${VAR} or ${VAR:-default}"));
        }
        self.names.push(name.to_owned());
        // As in the shell, `:-` also replaces a variable that is set but empty.
        match ((self.variable)(name), default) {
            (Some(value), None) => Ok(value),
            (Some(value), Some(_)) if !value.is_empty() => Ok(value),
            (_, Some(default)) => self.expand(default),
            (None, None) => Err(self.unset(name)),
        }
    }

    fn unset(&self, name: &str) -> Error {
        let remedy = format!("set {name}, or write a default: ${{{name}:-/some/folder}}");
        self.refuse(format!("the environment variable {name} is not set"), remedy)
    }

    fn refuse(&self, problem: impl ToString, remedy: impl ToString) -> Error {
        Error::input(self.spelled, problem, remedy)
    }
}

/// Returns the position of the `}` that closes the `${` before `text`, which may contain nested ones.
fn closing(text: &str) -> Option<usize> {
    let mut open = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '}' if open == 0 => return Some(at),
            '}' => open -= 1,
            '{' if text[..at].ends_with('$') => open += 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str) -> Option<String> {
        let value = match name {
            "HOME" => "/home/ada",
            "CACHE" => "/cache",
            "EMPTY" => "",
            "AWS_SECRET_ACCESS_KEY" | "SIGNED" | "my_token" => "hush",
            "DATA" => "https://ada:hush@host/faces",
            _ => return None,
        };
        Some(value.to_owned())
    }

    fn resolve(text: &str) -> Result<PathBuf> {
        ConfigPath::new(text).resolve_with(Path::new("/run"), &variable)
    }

    fn refusal(text: &str) -> String {
        let error = resolve(text).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn variables_and_home_are_expanded_and_paths_start_at_the_yaml() {
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
            ("${UNSET:-${CACHE}}/photos", "/cache/photos"),
            ("${UNSET:-${EMPTY:-${HOME}/x}}/photos", "/home/ada/x/photos"),
            ("${CACHE:-${UNSET}}/photos", "/cache/photos"),
            ("s3://bucket/${UNSET:-faces}", "s3://bucket/faces"),
        ] {
            assert_eq!(resolve(text).unwrap(), Path::new(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_expanded_is_refused() {
        for (text, problem) in [
            ("${UNSET}/x", "UNSET is not set"),
            ("${UNSET:-${GONE}}/x", "GONE is not set"),
            ("${CACHE/x", "never closed"),
            ("${UNSET:-${CACHE}/x", "never closed"),
            ("${UNSET:-${CACHE/x}", "never closed"),
            ("${}/x", "`` is not a variable name"),
            ("${CACHE:=/x}", "`CACHE:=/x` is not a variable name"),
            ("${${CACHE}}", "`${CACHE}` is not a variable name"),
            (&"${A:-".repeat(100_000), "more than 4096 bytes"),
        ] {
            let message = refusal(text);
            assert!(message.contains(problem) && message.contains("remedy: "), "{message}");
        }
    }

    #[test]
    fn a_url_holds_no_secret_and_no_message_shows_one() {
        for (text, problem) in [
            ("https://host/${AWS_SECRET_ACCESS_KEY}", "AWS_SECRET_ACCESS_KEY, by its name a secret"),
            ("https://host/${X:-${AWS_SECRET_ACCESS_KEY}}", "AWS_SECRET_ACCESS_KEY, by its name a secret"),
            ("https://host/${my_token}", "my_token, by its name a secret"),
            ("https://ada:hush@host/faces", "a user or a password"),
            ("${DATA}", "a user or a password"),
            ("https://host/faces?sig=${SIGNED}", "a `?` or a `#` part"),
            ("https://host/faces#hush", "a `?` or a `#` part"),
        ] {
            let message = refusal(text);
            assert!(message.contains(problem) && !message.contains("hush"), "{message}");
        }
    }

    #[test]
    fn a_found_path_is_taken_as_it_stands() {
        let run = tempfile::tempdir().unwrap();
        std::fs::create_dir(run.path().join("base")).unwrap();
        let found = |text: &str| {
            let file = run.path().join("config.yaml");
            let path: ConfigPath = reading(Origin::Found(file.into()), || serde_json::from_value(text.into())).unwrap();
            path.resolve_with(run.path(), &variable)
        };
        assert_eq!(found("base").unwrap(), run.path().join("base"));
        assert_eq!(found("/models/none").unwrap(), Path::new("/models/none"));
        for text in ["${HOME}", "/x/${HOME}", "https://host/${AWS_SECRET_ACCESS_KEY}", "~", "~/x", "nothing"] {
            let message = found(text).unwrap_err().to_string();
            let named = message.contains("config.yaml: names `") && message.contains("paths.yaml");
            assert!(named && !message.contains("hush") && !message.contains("ada"), "{message}");
            assert_eq!(message.contains("not expanded in a run folder"), text != "nothing", "{message}");
        }
        assert!(found("https://ada:hush@host/x").unwrap_err().to_string().contains("a password"));
        // The author is unknown, so it counts as a stranger: a file that was read before does not matter.
        reading(Origin::Started, || ());
        let path: ConfigPath = serde_json::from_value("${HOME}/x".into()).unwrap();
        assert!(path.resolve_with(run.path(), &variable).is_err());
    }

    #[test]
    fn what_is_written_tells_nothing_of_the_machine() {
        for (text, expected) in [
            ("/home/ada/sdxl", "sdxl"),
            ("../faces", "../faces"),
            ("${HYPERLORA_CACHE:-~/.cache/hyperlora}/models", "${HYPERLORA_CACHE:-~/.cache/hyperlora}/models"),
            ("https://ada:hush@host/a/faces/?sig=x", "faces"),
            ("s3://bucket", "URL"),
            ("/", ""),
        ] {
            assert_eq!(serde_json::to_value(ConfigPath::new(text)).unwrap(), expected, "{text}");
        }
    }
}
