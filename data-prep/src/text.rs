//! Text from outside in messages: no control characters that act on a terminal, no secrets of a URL.

use std::fmt::{self, Display, Formatter, Write};

/// The longest text that is shown whole, in characters: a file may hold a name of a megabyte.
const LONGEST: usize = 6000;

/// Shows `text` on one line: control characters escaped, secrets of URLs masked. For names and other single values.
pub fn name(text: &str) -> impl Display + '_ {
    Shown { text, newline: "\\n" }
}

/// Shows `text` as [`name`] does, but keeps its line breaks and indents what follows them: a line that somebody put into
/// a file's name does not pass for a line of ours.
pub fn shown(text: &str) -> impl Display + '_ {
    Shown { text, newline: "\n    " }
}

/// Masks in `text` the user, the password and the query of every URL: a signed URL carries its signature there.
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
        match url[host_start..].find('?') {
            Some(query) => {
                masked.push_str(&url[host_start..=host_start + query]);
                masked.push_str("***");
            }
            None => masked.push_str(&url[host_start..]),
        }
        rest = behind;
    }
    masked.push_str(rest);
    masked
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

/// Whether a terminal does something at `letter` beside showing it: control characters, and those that turn the direction
/// of what stands beside them (Unicode technical report 36, section 2.5).
fn acts(letter: char) -> bool {
    letter.is_control() || matches!(letter, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
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
    fn secrets_of_urls_are_masked() {
        for (text, expected) in [
            ("https://user:pass@host/a/b.parquet", "https://***@host/a/b.parquet"),
            ("see `s3://b/k?X-Amz-Signature=abc&x=1` there", "see `s3://b/k?***` there"),
            ("http://h/a http://t@h?k=v#f", "http://h/a http://***@h?***"),
            ("https://a:p/w@host", "https://a:p/w@host"),
            ("https://user:p@ss@host/x", "https://***@host/x"),
            ("no URL: // here", "no URL: // here"),
            ("https://h/a@b", "https://h/a@b"),
        ] {
            assert_eq!(mask_urls(text), expected);
        }
    }
}
