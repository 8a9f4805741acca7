//! The one error type of the library, and the exit code that each kind of failure maps to.

use std::path::{Path, PathBuf};

use crate::text::{name, shown};

/// Result of every fallible library call.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, sorted by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something the user gave does not hold: a YAML key, a model file, a shard, a path.
    #[error("{}: {}\n  remedy: {}", name(place), shown(problem), shown(remedy))]
    Input {
        /// File and position (key, line, column name).
        place: String,
        /// What is wrong there, with the offending value.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// The disk or another device of the machine failed.
    #[error("{}: {}: {source}\n  remedy: {}", name(&path.to_string_lossy()), shown(problem), shown(remedy))]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        problem: String,
        /// The system's own words.
        source: std::io::Error,
        /// What to do about it.
        remedy: String,
    },
    /// A fault of the program itself.
    #[error("{}", shown(.0))]
    Fault(String),
    /// Another process of the same run was lost or fell silent: named by rank and machine where they are known.
    #[error("{}", shown(.0))]
    Peer(String),
    /// Another process of the same run failed, and said why before it ended.
    #[error("{} failed: {}", name(rank), shown(problem))]
    PeerFailed {
        /// Its rank and machine.
        rank: String,
        /// Its error, on one line.
        problem: String,
        /// The code that it ends with.
        exit_code: u8,
    },
}

impl Error {
    /// An error in what the user gave.
    pub fn input(place: impl ToString, problem: impl ToString, remedy: impl ToString) -> Self {
        Self::Input { place: place.to_string(), problem: problem.to_string(), remedy: remedy.to_string() }
    }

    /// An error in a file or folder that the user named.
    pub fn file(path: &Path, problem: impl ToString, remedy: impl ToString) -> Self {
        Self::input(path.display(), problem, remedy)
    }

    /// Reading failed: a missing or unreadable file is the user's to mend, the rest is the disk's.
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
            // What the file holds, and no fault of the disk: text that is none, less than its header says.
            Kind::InvalidData | Kind::UnexpectedEof => unreadable("fetch the file again; text has to be UTF-8"),
            _ => Self::Disk {
                path: path.into(),
                problem: "reading failed".into(),
                source,
                remedy: "check the disk, then run the same command again".into(),
            },
        }
    }

    /// Writing failed: a forbidden place or an impossible name is the user's to mend, a full or failing disk is not.
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
                of_disk(source, "free some space, then run the same command again: what stood there before is intact")
            }
            _ => of_disk(source, "check the disk, then run the same command again: what stood there before is intact"),
        }
    }

    /// The same error in the user's input, with the remedy of someone who knows what the file was for.
    #[must_use]
    pub fn with_remedy(self, remedy: impl ToString) -> Self {
        match self {
            Self::Input { place, problem, .. } => Self::Input { place, problem, remedy: remedy.to_string() },
            other => other,
        }
    }

    /// The process exit code: 2 the user's input, 1 a fault of the machine or the program, 75 (`EX_TEMPFAIL`) the loss of
    /// another process of the run: start again. Where another process told its error, the code that belongs to that.
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
}
