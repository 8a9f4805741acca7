//! Text from outside: decoding, and display in messages without control characters that act on a terminal and without
//! the secrets of URLs.

use std::fmt::{self, Debug, Display, Formatter, Write};

use tracing::field::Field;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::field::delimited::Delimited;
use tracing_subscriber::fmt::format::{FieldFn, Writer, debug_fn};

/// Longest text that is shown whole, in characters: a file may contain a name of a megabyte.
const LONGEST: usize = 6000;

/// Shows `text` on one line, with control characters escaped and secrets of URLs masked. Meant for names and other
/// single values.
///
/// # Examples
/// ```
/// use hyperlora_core::text::name;
///
/// assert_eq!(name("photo\n\u{1b}[2J.png").to_string(), "photo\\n\\u{1b}[2J.png");
/// assert_eq!(name("https://me:secret@host/x?key=1").to_string(), "https://***@host/x?***");
/// ```
pub fn name(text: &str) -> impl Display + '_ {
    Shown { text, newline: "\\n" }
}

/// Shows `text` as [`name`] does, but keeps line breaks and indents the following lines, so that a line in a file name
/// does not pass for a line of this program.
pub fn shown(text: &str) -> impl Display + '_ {
    Shown { text, newline: "\n    " }
}

/// Formats the fields of log entries as [`shown`] does. Every log of the program uses it.
pub fn log_fields() -> LogFields {
    let write: WriteField = |out, field, value| match field.name() {
        "message" => write!(out, "{}", shown(&format!("{value:?}"))),
        // Source location of a dependency's log entry.
        name if name.starts_with("log.") => Ok(()),
        name => write!(out, "{name}={}", shown(&format!("{value:?}"))),
    };
    debug_fn(write).delimited(" ")
}

/// Field formatter of [`log_fields`].
pub type LogFields = Delimited<&'static str, FieldFn<WriteField>>;

/// Function that writes one field.
pub type WriteField = fn(&mut Writer<'_>, &Field, &dyn Debug) -> fmt::Result;

/// Masks the user, the password, the query and the fragment of every URL in `text`: a signed URL carries its signature
/// there.
pub fn mask_urls(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        let end = after.find(|c: char| c.is_whitespace() || "\"'`<>".contains(c)).unwrap_or(after.len());
        let (url, behind) = after.split_at(end);
        let authority_end = url.find(['/', '?', '#']).unwrap_or(url.len());
        let host_start = url[..authority_end].rfind('@').map_or(0, |at| at + 1);
        masked.push_str(before);
        if host_start > 0 {
            masked.push_str("***@");
        }
        match url[host_start..].find(['?', '#']) {
            Some(end) => {
                masked.push_str(&url[host_start..=host_start + end]);
                masked.push_str("***");
            }
            None => masked.push_str(&url[host_start..]),
        }
        rest = behind;
    }
    masked.push_str(rest);
    masked
}

/// Decodes the `bytes` of a text file. Drops a byte-order mark, which some editors write at its start.
///
/// # Errors
/// A description of the bytes that are not UTF-8 text, in words that follow the file's name.
pub fn decode(mut bytes: Vec<u8>) -> Result<String, &'static str> {
    match bytes[..] {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => return Err("is UTF-16 text: save it as UTF-8"),
        [0xef, 0xbb, 0xbf, ..] => drop(bytes.drain(..3)),
        _ => {}
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8 text")
}

struct Shown<'a> {
    text: &'a str,
    newline: &'static str,
}

impl Display for Shown<'_> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let masked = mask_urls(self.text);
        for (place, letter) in masked.chars().enumerate() {
            match letter {
                _ if place == LONGEST => {
                    return write!(out, "... and {} characters more", masked.chars().count() - LONGEST);
                }
                '\n' => out.write_str(self.newline)?,
                '\t' => out.write_char(' ')?,
                _ if acts(letter) => write!(out, "{}", letter.escape_unicode())?,
                _ => out.write_char(letter)?,
            }
        }
        Ok(())
    }
}

/// Tells whether a terminal reacts to `letter` other than by showing it: control characters, and those that change the
/// direction of the surrounding text (Unicode technical report 36, section 2.5).
fn acts(letter: char) -> bool {
    letter.is_control() || matches!(letter, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(name("a\u{1b}[2Jb\r\nc\u{202e}d").to_string(), "a\\u{1b}[2Jb\\u{d}\\nc\\u{202e}d");
        assert_eq!(shown("one\ntwo\u{7}").to_string(), "one\n    two\\u{7}");
        assert_eq!(name("Zoë — 写真.png").to_string(), "Zoë — 写真.png");
    }

    #[test]
    fn a_long_text_is_cut() {
        assert_eq!(name(&"é".repeat(LONGEST)).to_string(), "é".repeat(LONGEST));
        let long = shown(&"é".repeat(LONGEST + 7)).to_string();
        assert!(long.starts_with("éé") && long.ends_with("é... and 7 characters more"));
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        assert_eq!(decode(b"\xef\xbb\xbfa woman".to_vec()), Ok("a woman".into()));
        assert_eq!(decode("a \u{feff}b".into()), Ok("a \u{feff}b".into()));
        assert!(decode(b"\xff\xfea\0".to_vec()).is_err_and(|problem| problem.contains("UTF-16")));
        assert!(decode(b"\xe9".to_vec()).is_err_and(|problem| problem.contains("not UTF-8")));
    }

    #[test]
    fn secrets_of_urls_are_masked() {
        for (text, expected) in [
            ("https://user:pass@host/a/b.parquet", "https://***@host/a/b.parquet"),
            ("see `s3://b/k?X-Amz-Signature=abc&x=1` there", "see `s3://b/k?***` there"),
            ("http://h/a http://t@h?k=v#f", "http://h/a http://***@h?***"),
            ("https://a:p/w@host", "https://a:p/w@host"),
            ("https://user:p@ss@host/x", "https://***@host/x"),
            ("no URL: // here", "no URL: // here"),
            ("https://h/a@b", "https://h/a@b"),
            ("https://h/a#token", "https://h/a#***"),
        ] {
            assert_eq!(mask_urls(text), expected);
        }
    }

    #[test]
    fn log_entries_show_names_and_urls_as_messages_do() {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Log {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let written = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(log_fields())
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || written.clone());
        tracing::subscriber::with_default(subscriber.finish(), || {
            let name = "a\u{1b}[2J\nERROR all is lost";
            tracing::warn!(url = "https://me:pass@h/x?sig=1", "{name}: https://h/y?sig=1");
            tracing::warn!(log.file = "/root/lib.rs", "done");
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let shown =
            " WARN a\\u{1b}[2J\n    ERROR all is lost: https://h/y?*** url=\"https://***@h/x?***\"\n WARN done \n";
        assert_eq!(log, shown);
    }
}
