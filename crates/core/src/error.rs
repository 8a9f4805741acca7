//! The error type of the library, and the exit code of each kind of failure.

use std::path::{Path, PathBuf};

use crate::text::{name, shown};

/// Result of every fallible library call.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors, sorted by who can fix them.
///
/// # Examples
/// ```
/// use hyperlora_core::{Error, ErrorKind};
///
/// let error = Error::input("train.yaml:3:1", "unknown key `bacth`", "rename it to `batch`");
/// assert_eq!(error.kind(), ErrorKind::Input);
/// assert_eq!(error.exit_code(), 2);
/// assert_eq!(error.remedy(), Some("rename it to `batch`"));
/// assert_eq!(error.to_string(), "train.yaml:3:1: unknown key `bacth`\n  remedy: rename it to `batch`");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Invalid user input: a YAML key, a model file, a shard, a path.
    #[error("{}: {}\n  remedy: {}", name(place), shown(problem), shown(remedy))]
    Input {
        /// File and position (key, line, column name).
        place: String,
        /// The problem there, with the offending value.
        problem: String,
        /// The remedy.
        remedy: String,
    },
    /// Failure of the disk or another device of the machine.
    #[error("{}: {}: {source}\n  remedy: {}", name(&path.to_string_lossy()), shown(problem), shown(remedy))]
    Disk {
        /// File or folder.
        path: PathBuf,
        /// The failed operation.
        problem: String,
        /// The system's error.
        source: std::io::Error,
        /// The remedy.
        remedy: String,
    },
    /// Fault of the program itself.
    #[error("{}", shown(.0))]
    Fault(String),
    /// Another process of the same run was lost or fell silent. Names its rank and machine if known.
    #[error("{}", shown(.0))]
    Peer(String),
    /// Another process of the same run failed and said why before it ended.
    #[error("{} failed: {}", name(rank), shown(problem))]
    PeerFailed {
        /// Its rank and machine.
        rank: String,
        /// Its error, on one line.
        problem: String,
        /// Its exit code.
        exit_code: u8,
    },
}

/// Party that can fix an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The user, by changing the input.
    Input,
    /// The machine's owner: a disk is full or fails.
    Disk,
    /// The developers of the program.
    Fault,
    /// A restart: another rank was lost.
    Peer,
}

impl Error {
    /// Makes an error about user input.
    pub fn input(place: impl ToString, problem: impl ToString, remedy: impl ToString) -> Self {
        Self::Input { place: place.to_string(), problem: problem.to_string(), remedy: remedy.to_string() }
    }

    /// Makes an error about a file or folder that the user named.
    pub fn file(path: &Path, problem: impl ToString, remedy: impl ToString) -> Self {
        Self::input(path.display(), problem, remedy)
    }

    /// Maps a read error: a missing or unreadable file is the user's to fix, everything else is the disk's.
    pub fn read(path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let unreadable = |remedy: &str| Self::file(path, format!("cannot be read: {source}"), remedy);
        match source.kind() {
            Kind::NotFound
            | Kind::PermissionDenied
            | Kind::IsADirectory
            | Kind::NotADirectory
            | Kind::InvalidFilename => unreadable("check the path and its permissions"),
            Kind::InvalidInput => unreadable("give a regular file below the folder that it belongs to"),
            Kind::FileTooLarge => unreadable("give a smaller file, if this is the right one at all"),
            // The content is at fault, not the disk: invalid text, or fewer bytes than the header announces.
            Kind::InvalidData | Kind::UnexpectedEof => unreadable("fetch the file again; text has to be UTF-8"),
            _ => Self::Disk {
                path: path.into(),
                problem: "reading failed".into(),
                source,
                remedy: "check the disk, then run the same command again".into(),
            },
        }
    }

    /// Maps a write error: a forbidden place or an impossible name is the user's to fix, a full or failing disk is not.
    pub fn write(path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let of_disk = |source, remedy: &str| Self::Disk {
            path: path.into(),
            problem: "writing failed".into(),
            source,
            remedy: remedy.into(),
        };
        match source.kind() {
            Kind::InvalidFilename => Self::file(path, format!("cannot be written: {source}"), "choose a shorter name"),
            Kind::InvalidInput => Self::file(path, format!("cannot be written: {source}"), "choose another name"),
            Kind::PermissionDenied
            | Kind::NotFound
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::AlreadyExists
            | Kind::ReadOnlyFilesystem => {
                Self::file(path, format!("cannot be written: {source}"), "choose a folder that you may write to")
            }
            Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => {
                of_disk(source, "free some space, then run the same command again: the previous content is intact")
            }
            _ => of_disk(source, "check the disk, then run the same command again: the previous content is intact"),
        }
    }

    /// Replaces the remedy of an [`Input`](Self::Input) error, for a caller that knows the purpose of the file.
    ///
    /// # Examples
    /// ```
    /// use std::path::Path;
    /// use hyperlora_core::Error;
    ///
    /// let error = Error::file(Path::new("base/unet"), "is missing", "check the path");
    /// let error = error.with_remedy("fetch the base model again");
    /// assert!(error.to_string().ends_with("remedy: fetch the base model again"));
    /// ```
    #[must_use]
    pub fn with_remedy(self, remedy: impl ToString) -> Self {
        match self {
            Self::Input { place, problem, .. } => Self::Input { place, problem, remedy: remedy.to_string() },
            other => other,
        }
    }

    /// Returns the kind of the error. A rank that hears of another rank's error reports that error's kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Input { .. } | Self::PeerFailed { exit_code: 2, .. } => ErrorKind::Input,
            Self::Disk { .. } => ErrorKind::Disk,
            Self::Peer(_) | Self::PeerFailed { exit_code: 75, .. } => ErrorKind::Peer,
            Self::Fault(_) | Self::PeerFailed { .. } => ErrorKind::Fault,
        }
    }

    /// Returns the remedy, if one is known.
    pub fn remedy(&self) -> Option<&str> {
        match self {
            Self::Input { remedy, .. } | Self::Disk { remedy, .. } => Some(remedy),
            Self::Fault(_) | Self::Peer(_) | Self::PeerFailed { .. } => None,
        }
    }

    /// Returns the process exit code: 2 for user input, 1 for a fault of the machine or the program, 75 (`EX_TEMPFAIL`)
    /// for the loss of another process of the run, after which a new start may succeed. If another process reported its
    /// error, returns that process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input { .. } => 2,
            Self::Disk { .. } | Self::Fault(_) => 1,
            Self::Peer(_) => 75,
            Self::PeerFailed { exit_code, .. } => *exit_code,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_keeps_a_file_from_being_written_is_told_apart() {
        for (code, exit_code, words) in [
            (libc::ENAMETOOLONG, 2, "choose a shorter name"),
            (libc::EINVAL, 2, "choose another name"),
            (libc::EACCES, 2, "choose a folder that you may write to"),
            (libc::ENOSPC, 1, "free some space"),
            (libc::EDQUOT, 1, "free some space"),
            (libc::EFBIG, 1, "free some space"),
            (libc::EIO, 1, "check the disk"),
        ] {
            let error = Error::write(Path::new("out"), io::Error::from_raw_os_error(code));
            assert!(error.exit_code() == exit_code && error.to_string().contains(words), "{code}: {error}");
        }
        let nul = std::fs::write("a\0b", "").map_err(|source| Error::write(Path::new("a"), source));
        assert_eq!(nul.map_err(|error| error.exit_code()), Err(2));
        assert_eq!(Error::read(Path::new("a"), io::ErrorKind::InvalidInput.into()).exit_code(), 2);
    }

    #[test]
    fn what_a_file_holds_is_no_fault_of_the_disk() {
        use std::io::ErrorKind as Kind;
        let code = |kind: Kind| Error::read(Path::new("a.json"), kind.into()).exit_code();
        for kind in [Kind::NotFound, Kind::PermissionDenied, Kind::InvalidData, Kind::UnexpectedEof, Kind::FileTooLarge]
        {
            assert_eq!(code(kind), 2, "{kind}");
        }
        assert_eq!(code(Kind::Other), 1);
    }

    #[test]
    fn kind_remedy_and_source_agree_with_the_exit_code() {
        let peer = |exit_code| Error::PeerFailed { rank: "rank 1".into(), problem: "x".into(), exit_code };
        let disk = Error::write(Path::new("a"), io::ErrorKind::StorageFull.into());
        assert!(std::error::Error::source(&disk).is_some() && disk.remedy().is_some_and(|text| text.contains("space")));
        for (error, kind, code) in [
            (Error::input("a", "b", "c"), ErrorKind::Input, 2),
            (disk, ErrorKind::Disk, 1),
            (Error::Fault("a".into()), ErrorKind::Fault, 1),
            (Error::Peer("a".into()), ErrorKind::Peer, 75),
            (peer(2), ErrorKind::Input, 2),
            (peer(75), ErrorKind::Peer, 75),
            (peer(1), ErrorKind::Fault, 1),
        ] {
            assert_eq!((error.kind(), error.exit_code()), (kind, code), "{error}");
        }
        assert_eq!(Error::input("a", "b", "c").remedy(), Some("c"));
    }
}
