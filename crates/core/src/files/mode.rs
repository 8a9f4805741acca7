//! Permissions of new files.

use rustix::fs::Mode;
use rustix::process::umask;

use crate::{Error, Result};

/// Environment variable with a different umask, in octal.
pub const UMASK: &str = "HYPERLORA_UMASK";

/// Default umask: denies group and others everything.
const PRIVATE: u32 = 0o077;

/// Makes new files readable by the user alone (files 0600, folders 0700), because they hold faces, names and weights
/// trained on them. `HYPERLORA_UMASK` overrides the mask.
///
/// # Errors
/// Input: the variable is not a umask.
pub fn restrict_modes() -> Result<()> {
    let Some(text) = std::env::var_os(UMASK) else {
        let before = umask(Mode::from_raw_mode(PRIVATE));
        umask(before | Mode::from_raw_mode(PRIVATE));
        return Ok(());
    };
    let text = text.to_string_lossy();
    umask(Mode::from_raw_mode(parse(&text).ok_or_else(|| {
        Error::input(
            UMASK,
            format!("`{text}` is not a umask that keeps the files usable by their owner"),
            "give an octal number from 000 to 077, such as 022",
        )
    })?));
    Ok(())
}

fn parse(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|digit| digit.is_ascii_digit());
    u32::from_str_radix(text, 8).ok().filter(|mask| digits && *mask <= PRIVATE)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_umask_is_octal_and_never_the_owners_loss() {
        assert_eq!(["022", "0027", "000", "77"].map(parse), [Some(0o22), Some(0o27), Some(0), Some(0o77)]);
        assert_eq!(["", "8", "+22", "0o22", "22 ", "rwx", "100", "777", "-1"].map(parse), [None; 9]);
    }
}
