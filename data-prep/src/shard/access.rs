//! Reads of a shard folder: settings, and the ways in which a read fails.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyperlora_core::{Error, Result};

/// Description of damaged content in a part of a shard: the medium could be read, but returned something other than
/// what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub String);

impl Damage {
    pub(super) fn of_checksum() -> Self {
        Self("its SHA-256 is not the one in manifest.json".into())
    }

    pub(super) fn of_end() -> Self {
        Self("the file ends within it".into())
    }
}

/// Failure to read a part of a shard: damaged content, which a training may leave out, or a medium that fails.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The medium could be read, but returned something other than what was written.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The medium could not be read.
    #[error(transparent)]
    Failed(#[from] Error),
}

impl ReadError {
    /// Returns the damage.
    ///
    /// # Errors
    /// The failure, if the medium could not be read.
    pub fn damage(self) -> Result<Damage> {
        match self {
            Self::Damaged(damage) => Ok(damage),
            Self::Failed(error) => Err(error),
        }
    }
}

/// Settings for reading a shard folder behind a URL.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// Cache folder, shared by the processes of a machine.
    pub cache: PathBuf,
    /// Size of the cache in bytes, which it may exceed a little during a write.
    pub cache_bytes: u64,
    /// Time after which a failing read is given up, including retries.
    pub deadline: Duration,
}

/// Maps a read error of a file in a folder: the folder's fault, or the disk's.
pub(super) fn unreadable(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        ErrorKind::InvalidInput | ErrorKind::PermissionDenied | ErrorKind::FileTooLarge => {
            let remedy = "a shard folder holds plain files that this user may read, and no links that lead out of it";
            Error::file(path, format!("cannot be read: {source}"), remedy)
        }
        _ => Error::read(path, source),
    }
}
