//! Reads JSON written by other tools, and the small text files of models.

use std::borrow::Cow;
use std::path::Path;

use hyperlora_core::paths::read_regular;
use hyperlora_core::{Error, Result};
use serde::de::DeserializeOwned;

/// Size limit in bytes for configs, indices, vocabularies and merge lists; the largest have a few MB.
const LARGEST: u64 = 1 << 26;

/// Float literals that Python's `json` writes although JSON lacks them.
const BARE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Reads a text file of a model.
///
/// # Errors
/// Same as [`Error::read`]; Input: the file is not a regular file, exceeds 64 MiB, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let remedy = "fetch the file again from the model's source";
    let bytes = read_regular(path, LARGEST).map_err(|source| Error::read(path, source))?;
    String::from_utf8(bytes).map_err(|problem| Error::file(path, format!("is not UTF-8 text: {problem}"), remedy))
}

/// Parses JSON that another tool may have written: skips a byte-order mark and turns `NaN`, `Infinity` and `-Infinity`
/// into strings of that name. A key that must be a number then rejects them by name, and an unused key may hold them.
///
/// # Errors
/// Errors of `serde_json`, with line and column.
pub fn parse_json<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    serde_json::from_str(&quoted(text.strip_prefix('\u{feff}').unwrap_or(text)))
}

/// Quotes the bare literals of `text`.
fn quoted(text: &str) -> Cow<'_, str> {
    let mut made = String::new();
    let (mut copied, mut at, mut in_string) = (0, 0, false);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' | b'-' if !in_string => {
                if let Some(word) = BARE.into_iter().find(|word| bytes[at..].starts_with(word.as_bytes())) {
                    made.push_str(&text[copied..at]);
                    made.extend(["\"", word, "\""]);
                    copied = at + word.len();
                    at = copied - 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return text.into();
    }
    made.push_str(&text[copied..]);
    made.into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn json_of_python_is_read() {
        let text =
            "\u{feff}{\"a\": Infinity, \"b\": [-Infinity, NaN, -1.5],\n\"c \\\" NaN\": \"Infinity \\\\\", \"d\": NaN}";
        let read: Value = parse_json(text).unwrap();
        let expected = json!({"a": "Infinity", "b": ["-Infinity", "NaN", -1.5], "c \" NaN": "Infinity \\", "d": "NaN"});
        assert_eq!(read, expected);
        assert_eq!(parse_json::<Value>("NaN").unwrap(), json!("NaN"));
        assert!(matches!(quoted("{\"NaN\": -1}"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_number_that_must_be_one_is_refused_by_name() {
        for text in ["{\"a\": Infinity}", "{\"a\": 1, \"b\": }", "{\"a\": Infinit}", "{\"a\": \"", "{\"a\\"] {
            assert!(parse_json::<std::collections::BTreeMap<String, f64>>(text).is_err(), "{text}");
        }
        let problem = parse_json::<std::collections::BTreeMap<String, f64>>("{\n\"a\": -Infinity}").unwrap_err();
        assert!(problem.to_string().contains("\"-Infinity\"") && problem.line() == 2, "{problem}");
    }
}
