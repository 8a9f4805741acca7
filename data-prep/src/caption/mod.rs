//! What a caption says, and where it comes from.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::filter::{Reason, Rejection};

/// A caption longer than this is no caption but a wrong file.
const MAX_BYTES: u64 = 64 * 1024;

/// The source of the captions; tagged in the YAML by the kind, as in `caption: {template: {text: a photo of a person}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Captioner {
    /// The `.txt` file beside the photo (`x.jpg` -> `x.txt`), on one line.
    Sidecar {
        /// The caption of a photo without such a file, or with an empty one.
        fallback: String,
    },
    /// The same words for every photo.
    Template {
        /// The words.
        text: String,
    },
}

impl Captioner {
    /// Checks that the fixed words are words only. They hold no placeholder on purpose: a name in the caption would
    /// tell the text encoder who it is, and the hypernetwork would not have to learn it.
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

    /// The caption of the photo at `path`.
    ///
    /// # Errors
    /// Why the photo is left out: a sidecar file that cannot be read, is not UTF-8, or is no caption by its size.
    pub fn caption(&self, path: &Path) -> std::result::Result<String, Rejection> {
        match self {
            Self::Template { text } => Ok(text.clone()),
            Self::Sidecar { fallback } => {
                Ok(read_sidecar(&path.with_extension("txt"))?.unwrap_or_else(|| fallback.clone()))
            }
        }
    }
}

fn read_sidecar(path: &Path) -> std::result::Result<Option<String>, Rejection> {
    let bad = |problem: String| Rejection::new(Reason::BadCaption, problem);
    let unreadable = |error: std::io::Error| bad(format!("the caption cannot be read: {error}"));
    let size = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(unreadable)?.len(),
    };
    if size > MAX_BYTES {
        return Err(bad(format!("the caption holds {size} bytes")));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|_| bad("the caption is not UTF-8 text".into()))?;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok((!line.is_empty()).then_some(line))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_sidecar_wins_over_the_fallback() {
        let dir = tempfile::tempdir().unwrap();
        let captioner = Captioner::Sidecar { fallback: "a photo of a person".into() };
        let photo = dir.path().join("x.jpg");
        assert_eq!(captioner.caption(&photo).unwrap(), "a photo of a person");
        std::fs::write(dir.path().join("x.txt"), " a woman\n in a hat \n").unwrap();
        assert_eq!(captioner.caption(&photo).unwrap(), "a woman in a hat");
        std::fs::write(dir.path().join("x.txt"), " \n").unwrap();
        assert_eq!(captioner.caption(&photo).unwrap(), "a photo of a person");
        std::fs::write(dir.path().join("x.txt"), [0xff, 0xfe]).unwrap();
        assert_eq!(captioner.caption(&photo).unwrap_err().reason, Reason::BadCaption);
        std::fs::write(dir.path().join("x.txt"), vec![b'a'; 70_000]).unwrap();
        assert_eq!(captioner.caption(&photo).unwrap_err().detail, "the caption holds 70000 bytes");
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
