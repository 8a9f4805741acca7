//! Files and folders that are whole or absent: written next to their place, synced, renamed. Replaces and removes only
//! what this program wrote, and never lets two processes write to one name.

mod lock;
mod mode;
mod ownership;
mod staged_folder;
mod target;
mod whole_file;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use mode::{UMASK, restrict_modes};
pub use ownership::{Listing, MARKER, Ownership, unlisted};
pub use staged_folder::StagedFolder;
pub use target::{OutputFile, apart, follow};
pub use whole_file::{write_whole, write_whole_with};

/// Temporary files and folders next to a target, which stay behind if the process is killed. Their names contain the
/// whole target name, so that no two targets share one, and the program's name, so that no other program's file is
/// mistaken for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// The new file or folder, half-written.
    Partial,
    /// The folder that is about to be replaced.
    Old,
    /// The file whose lock shows that a process writes to the target.
    Lock,
}

impl Hidden {
    /// Returns the hidden path of a target: `folder/name` -> `folder/.name.hyperlora.partial`. It is on the same file
    /// system, so that a rename is atomic.
    pub fn beside(self, path: &Path) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(match self {
            Self::Partial => ".hyperlora.partial",
            Self::Old => ".hyperlora.old",
            Self::Lock => ".hyperlora.lock",
        });
        path.with_file_name(name)
    }
}

/// Opens one of the program's own files for reading and appending, and creates it if absent. Does not follow a link,
/// because in a folder from somebody else it may lead anywhere.
///
/// # Errors
/// The system's; `InvalidInput` for a link, a pipe, a device or a folder.
pub fn append(path: &Path) -> io::Result<File> {
    open_own(OpenOptions::new().read(true).append(true).create(true), path)
}

/// Copies the file `from` to the new file `to`, with the default mode of new files.
///
/// # Errors
/// Reading: as [`Error::read`](crate::Error::read). Writing: as [`Error::write`](crate::Error::write).
pub fn copy(from: &Path, to: &Path) -> crate::Result<()> {
    let source = crate::paths::open_regular(from).map_err(|source| crate::Error::read(from, source))?;
    whole_file::write_whole_with(to, |file| io::copy(&mut &source, file).map(drop))
}

/// Opens one of the program's own files with `options`, and refuses anything but a regular file.
fn open_own(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let opened = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let other = |kind| io::Error::new(ErrorKind::InvalidInput, format!("it is {kind}, not a regular file"));
    match opened {
        Err(source) if source.raw_os_error() == Some(libc::ELOOP) => Err(other("a link")),
        Ok(file) if !file.metadata()?.is_file() => Err(other("a pipe or a device")),
        opened => opened,
    }
}

/// Tells whether something exists at `path`, even a dangling link.
fn stands(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Tells whether `path` still leads to the open file.
fn leads_to(path: &Path, file: &File) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.dev(), open.ino())),
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(source),
    }
}

/// Syncs the folder of `path`: only then is a rename on the disk.
fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent_of(path))?.sync_all()
}

/// Returns the folder that contains `path`.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
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
