//! Places of the program's own files: hidden names next to a target, and access that follows no link.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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

/// Opens one of the program's own files with `options`, and refuses anything but a regular file.
pub(super) fn open_own(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let opened = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let other = |kind| io::Error::new(ErrorKind::InvalidInput, format!("it is {kind}, not a regular file"));
    match opened {
        Err(source) if source.raw_os_error() == Some(libc::ELOOP) => Err(other("a link")),
        Ok(file) if !file.metadata()?.is_file() => Err(other("a pipe or a device")),
        opened => opened,
    }
}

/// Tells whether something exists at `path`, even a dangling link.
pub(super) fn stands(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Tells whether `path` still leads to the open file.
pub(super) fn leads_to(path: &Path, file: &File) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.dev(), open.ino())),
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(source),
    }
}

/// Syncs the folder of `path`: only then is a rename on the disk.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent_of(path))?.sync_all()
}

/// Returns the folder that contains `path`.
pub(super) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
