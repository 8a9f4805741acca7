//! Files and folders that are whole or absent: written next to their place, synced, renamed. Replaces and removes only
//! what this program wrote, and never lets two processes write to one name.

mod lock;
mod mode;
mod ownership;
mod place;
mod staged_folder;
mod target;
mod whole_file;

use std::io;
use std::path::Path;

pub use mode::{UMASK, restrict_modes};
pub use ownership::{Listing, MARKER, Ownership, unlisted};
pub use place::{Hidden, append};
pub use staged_folder::StagedFolder;
pub use target::{OutputFile, apart, follow};
pub use whole_file::{write_whole, write_whole_with};

/// Copies the file `from` to the new file `to`, with the default mode of new files.
///
/// # Errors
/// Reading: as [`Error::read`](crate::Error::read). Writing: as [`Error::write`](crate::Error::write).
pub fn copy(from: &Path, to: &Path) -> crate::Result<()> {
    let source = crate::paths::open_regular(from).map_err(|source| crate::Error::read(from, source))?;
    write_whole_with(to, |file| io::copy(&mut &source, file).map(drop))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{ErrorKind, Write};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    use super::*;

    #[test]
    fn nothing_is_appended_to_what_is_no_file_of_ours() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        for text in ["one", " two"] {
            append(&place("log")).unwrap().write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(fs::read(place("log")).unwrap(), b"one two");
        symlink("log", place("link")).unwrap();
        symlink("new", place("dangling")).unwrap();
        assert!(Command::new("mkfifo").arg(place("pipe")).status().unwrap().success());
        for name in ["link", "dangling", "pipe"] {
            assert_eq!(append(&place(name)).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
        }
        assert!(!place("new").exists());
    }

    #[test]
    fn a_copy_has_the_mode_of_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, "content").unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o777)).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"content");
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o111, 0);
    }
}
