//! Captions and their source.

use std::path::Path;

use hyperlora_core::{Error, Result, text};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::filter::{Reason, Rejection};
use crate::source::SourceFiles;

/// Size limit of a caption in bytes: a larger file is not a caption.
const MAX_BYTES: u64 = 64 * 1024;

/// Source of the captions, tagged in the YAML by the kind, as in `caption: {template: {text: a photo of a person}}`.
///
/// # Examples
/// ```
/// use data_prep::caption::Captioner;
///
/// let captioner = Captioner::Template { text: "a photo of a person".into() };
/// captioner.validate("data.yaml: caption")?;
/// // A placeholder could tell the text encoder who the person is.
/// let named = Captioner::Template { text: "a photo of {name}".into() };
/// assert!(named.validate("data.yaml: caption").is_err());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Captioner {
    /// The `.txt` file next to the photo (`photo.txt` for `photo.jpg`), joined to one line.
    Sidecar {
        /// Caption of a photo whose file is missing or empty.
        fallback: String,
    },
    /// The same words for every photo.
    Template {
        /// The words.
        text: String,
    },
}

/// Caption of one photo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caption {
    /// Words, on one line.
    pub text: String,
    /// True if they are the fallback.
    pub fallback: bool,
}

impl Captioner {
    /// Tells whether captions come from text files next to the photos.
    pub fn reads_files(&self) -> bool {
        matches!(self, Self::Sidecar { .. })
    }

    /// Checks that the fixed words contain no placeholder: a name in the caption would tell the text encoder who the
    /// person is, and the hypernetwork would not have to learn it.
    ///
    /// # Errors
    /// Input, at `place`: empty text, or one with `{` or `}`.
    pub fn validate(&self, place: &str) -> Result<()> {
        let (Self::Sidecar { fallback: text } | Self::Template { text }) = self;
        if text.trim().is_empty() {
            return Err(Error::input(place, "the caption is empty", "write words such as `a photo of a person`"));
        }
        if text.contains(['{', '}']) {
            let remedy = "captions have no placeholders, so that none can name the person: write plain words";
            return Err(Error::input(place, format!("the caption `{text}` holds a brace"), remedy));
        }
        Ok(())
    }

    /// Returns the caption of the photo at `path` in `files`.
    ///
    /// # Errors
    /// Reason to reject the photo: its sidecar file cannot be read, is not UTF-8, or is too large for a caption.
    pub fn caption(&self, files: &SourceFiles, path: &Path) -> std::result::Result<Caption, Rejection> {
        let (text, found) = match self {
            Self::Template { text } => (text, None),
            Self::Sidecar { fallback } => (fallback, read_sidecar(files, &path.with_extension("txt"))?),
        };
        let fallback = found.is_none() && self.reads_files();
        Ok(Caption { text: found.unwrap_or_else(|| text.clone()), fallback })
    }
}

fn read_sidecar(files: &SourceFiles, path: &Path) -> std::result::Result<Option<String>, Rejection> {
    let bad = |problem: String| Rejection::new(Reason::BadCaption, format!("the caption {problem}"));
    let bytes = match files.read(path, MAX_BYTES) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| bad(format!("cannot be read: {error}")))?,
    };
    let text = text::decode(bytes).map_err(|problem| bad(problem.into()))?;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok((!line.is_empty()).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_wins_over_the_fallback() {
        let dir = tempfile::tempdir().unwrap();
        let write = |content: &[u8]| std::fs::write(dir.path().join("x.txt"), content).unwrap();
        std::fs::write(dir.path().join("x.jpg"), "").unwrap();
        let source = format!("folder: {{root: '{}'}}", dir.path().display());
        let source: crate::source::SourceConfig =
            hyperlora_core::config::parse(&source, Path::new("data.yaml")).unwrap();
        let files = source.open(dir.path(), true).unwrap().files;
        let captioner = Captioner::Sidecar { fallback: "a photo of a person".into() };
        let caption = || captioner.caption(&files, Path::new("x.jpg"));
        let fallback = Caption { text: "a photo of a person".into(), fallback: true };
        assert_eq!(caption().unwrap(), fallback);
        let template = Captioner::Template { text: fallback.text.clone() };
        let words = Caption { fallback: false, ..fallback.clone() };
        assert_eq!(template.caption(&files, Path::new("x.jpg")).unwrap(), words);
        write(b" a woman\n in a hat \n");
        assert_eq!(caption().unwrap(), Caption { text: "a woman in a hat".into(), fallback: false });
        write(b"\xef\xbb\xbfa woman in orange");
        assert_eq!(caption().unwrap().text, "a woman in orange");
        write(b" \n");
        assert_eq!(caption().unwrap(), fallback);
        write(&[0xff, 0xfe]);
        assert_eq!(caption().unwrap_err().reason, Reason::BadCaption);
        write(&[b'a'; 70_000]);
        assert_eq!(caption().unwrap_err().detail, "the caption cannot be read: it holds more than 65536 bytes");

        std::fs::remove_file(dir.path().join("x.txt")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("x.txt")).unwrap();
        assert_eq!(caption().unwrap_err().reason, Reason::BadCaption);
        std::fs::remove_file(dir.path().join("x.txt")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(dir.path().join("x.txt")).status().unwrap().success());
        assert_eq!(caption().unwrap_err().reason, Reason::BadCaption);
    }

    #[test]
    fn a_template_is_plain_words() {
        let template = |text: &str| Captioner::Template { text: text.into() }.validate("data.yaml: caption");
        template("a photo of a person").unwrap();
        for wrong in ["", "  ", "a photo of {identity}"] {
            assert_eq!(template(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
