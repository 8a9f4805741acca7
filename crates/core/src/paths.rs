//! File names that were read from a file, and the files behind them. The author of a name may be a stranger: it must be
//! a plain relative path, only a regular file is opened, and no link may lead out of the root.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};

use crate::{Error, Result};

/// Longest plain name in bytes, the path limit of Linux.
const LONGEST: usize = 4096;

/// Joins `name`, which was read from a file, to `root`. Checks only the spelling: [`Root`] opens the file.
///
/// # Errors
/// Input, naming `listed_in`, the file that contains the name: an absolute path, `..`, `.`, an empty part, a backslash,
/// a control character, or more than 4096 bytes.
pub fn below(root: &Path, name: &str, listed_in: &Path) -> Result<PathBuf> {
    match problem(name) {
        None => Ok(root.join(name)),
        Some(problem) => Err(Error::file(
            listed_in,
            format!("names the file `{name}`, which {problem}"),
            "do not use this folder: names in it may only lead to files below it",
        )),
    }
}

/// Tells whether `name` is a plain relative path: ordinary parts separated by `/`.
///
/// # Examples
/// ```
/// use hyperlora_core::paths::is_plain;
///
/// assert!(is_plain("shards/shard-00000.parquet"));
/// assert!(!is_plain("../secret"));
/// assert!(!is_plain("/etc/passwd"));
/// ```
pub fn is_plain(name: &str) -> bool {
    problem(name).is_none()
}

fn problem(name: &str) -> Option<&'static str> {
    let parts = || name.split('/');
    match () {
        () if name.is_empty() => Some("is empty"),
        () if name.len() > LONGEST => Some("is too long"),
        () if name.contains(|c: char| c.is_control()) => Some("holds a control character"),
        // Other systems read a backslash as a separator or as part of a drive.
        () if name.contains('\\') => Some("holds a backslash"),
        () if Path::new(name).components().any(|part| !matches!(part, Component::Normal(_))) => {
            Some("leads out of the folder")
        }
        () if parts().any(|part| part.is_empty() || part == ".") => Some("has an empty part"),
        () => None,
    }
}

/// Folder whose files are opened by name. A link that leads to a place below the folder is followed; one that leads out
/// of it is refused.
///
/// # Examples
/// ```
/// use std::path::Path;
/// use hyperlora_core::paths::Root;
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// # std::fs::write(folder.join("manifest.json"), "{}").expect("a file");
/// let root = Root::open(folder)?;
/// let limit = 1 << 20;
/// assert!(root.read(Path::new("manifest.json"), limit).is_ok_and(|bytes| bytes == b"{}"));
/// assert!(root.read(Path::new("../manifest.json"), limit).is_err());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Root {
    dir: Dir,
    path: PathBuf,
}

impl Root {
    /// Opens the folder at `path`, which the user named: links in `path` itself are followed.
    ///
    /// # Errors
    /// As [`Error::read`].
    pub fn open(path: &Path) -> Result<Self> {
        let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(|source| Error::read(path, source))?;
        Ok(Self { dir, path: path.into() })
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the regular file `name` for reading. Does not wait for a pipe's writer.
    ///
    /// # Errors
    /// The system's; `PermissionDenied` for a link that leads out; `InvalidInput` for a name that is not a plain
    /// relative path, and for a pipe, a device, a socket or a folder.
    pub fn open_file(&self, name: &Path) -> io::Result<File> {
        if name.components().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the name leads out of the folder"));
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(NONBLOCK);
        let file = self.dir.open_with(name, &options)?.into_std();
        regular(file)
    }

    /// Reads the regular file `name` of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file); `FileTooLarge` beyond the limit.
    pub fn read(&self, name: &Path, limit: u64) -> io::Result<Vec<u8>> {
        read_limited(self.open_file(name)?, limit)
    }
}

/// Opens the regular file at `path`, which the user named or a link leads to. Does not wait for a pipe's writer.
///
/// # Errors
/// The system's; `InvalidInput` for a pipe, a device, a socket or a folder.
pub fn open_regular(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    regular(std::fs::OpenOptions::new().read(true).custom_flags(NONBLOCK).open(path)?)
}

/// Reads the regular file at `path` of at most `limit` bytes.
///
/// # Errors
/// As [`open_regular`]; `FileTooLarge` beyond the limit.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_limited(open_regular(path)?, limit)
}

/// Reads `file` to its end, whatever size its metadata reports. Refuses more than `limit` bytes.
///
/// # Errors
/// The system's; `FileTooLarge` beyond the limit.
pub fn read_limited(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let size = file.metadata()?.len();
    let too_large = || io::Error::new(ErrorKind::FileTooLarge, format!("it holds more than {limit} bytes"));
    if size > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes) }
}

/// Keeps the opening of a pipe from waiting. Has no effect on regular files.
const NONBLOCK: i32 = libc::O_NONBLOCK;

fn regular(file: File) -> io::Result<File> {
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let found = if kind.is_dir() { "a folder" } else { "a pipe, a socket or a device" };
    Err(io::Error::new(ErrorKind::InvalidInput, format!("it is {found}, not a regular file")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn names_are_plain_relative_paths() {
        let list = Path::new("run/checksums.json");
        for name in ["a", "a/b.safetensors", "..a/b..", "Zoë 1.png"] {
            assert_eq!(below(Path::new("run"), name, list).unwrap(), Path::new("run").join(name));
        }
        for name in
            ["", "/etc/passwd", "..", "a/../../x", "./a", "a/./b", "a//b", "a/", "a\\b", "C:\\x", "a\0b", "a\nb"]
        {
            let error = below(Path::new("run"), name, list).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().starts_with("run/checksums.json: names the file `"), "{error}");
        }
        assert!(below(Path::new("run"), &"a".repeat(5000), list).is_err());
    }

    #[test]
    fn a_root_opens_regular_files_below_it_alone() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(outer.path().join("secret"), b"secret").unwrap();
        std::fs::write(root.join("sub/a"), b"hello").unwrap();
        symlink("sub/a", root.join("inside")).unwrap();
        symlink("../secret", root.join("outside")).unwrap();
        symlink(outer.path(), root.join("up")).unwrap();
        symlink("/dev/zero", root.join("zero")).unwrap();
        assert!(Command::new("mkfifo").arg(root.join("pipe")).status().unwrap().success());
        let root = Root::open(&root).unwrap();
        for name in ["sub/a", "inside"] {
            assert_eq!(root.read(Path::new(name), 5).unwrap(), b"hello", "{name}");
            assert_eq!(root.read(Path::new(name), 4).unwrap_err().kind(), ErrorKind::FileTooLarge, "{name}");
        }
        for name in
            ["outside", "up/secret", "zero", "pipe", "sub", "../secret", "/etc/hostname", "nothing", "sub/../sub/a"]
        {
            assert!(root.read(Path::new(name), 100).is_err(), "{name}");
        }
        let pipe = root.path().join("pipe");
        assert_eq!(read_regular(&pipe, 9).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(read_regular(Path::new("/dev/zero"), 9).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
