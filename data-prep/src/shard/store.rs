//! Storage of a shard folder: the place of its files, and checked reads of their parts.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use hyperlora_core::hash::sha256_of;
use hyperlora_core::paths::Root;
use hyperlora_core::{Error, Result};

use crate::shard::limits::MANIFEST_BYTES;
use crate::shard::manifest::{MANIFEST_FILE, Piece};
#[cfg(feature = "cloud")]
use crate::shard::remote::Remote;

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

/// Place of a shard folder.
#[derive(Debug)]
pub(super) enum Store {
    /// Folder of this machine. No name in it leads out.
    Folder(Root),
    /// Folder behind a URL.
    #[cfg(feature = "cloud")]
    Remote(Box<Remote>),
}

impl Store {
    /// Opens the folder behind a URL.
    ///
    /// # Errors
    /// Input: a URL that is not understood or not supported by this build.
    #[cfg(feature = "cloud")]
    pub(super) fn remote(url: &str, config: &RemoteConfig) -> Result<Self> {
        Ok(Self::Remote(Box::new(Remote::open(url, config)?)))
    }

    /// Refuses a URL, because this build has no client.
    #[cfg(not(feature = "cloud"))]
    pub(super) fn remote(url: &str, _config: &RemoteConfig) -> Result<Self> {
        Err(Error::file(
            Path::new(url),
            "this program was built without reading from S3, Google Cloud Storage and HTTP",
            "build it with `--features burn-hyperlora/cloud`, or copy the folder to a disk",
        ))
    }

    /// Returns the place of one file, for messages.
    pub(super) fn locate(&self, file: &str) -> PathBuf {
        match self {
            Self::Folder(root) => root.path().join(file),
            #[cfg(feature = "cloud")]
            Self::Remote(remote) => remote.locate(file),
        }
    }

    /// Reads the whole manifest.
    pub(super) fn read_manifest(&self) -> Result<Bytes> {
        match self {
            Self::Folder(root) => read_manifest(root).map(Bytes::from),
            #[cfg(feature = "cloud")]
            Self::Remote(remote) => remote.read_manifest(),
        }
    }

    /// Reads a part of a file and checks its checksum.
    ///
    /// # Errors
    /// Damaged: content that differs from what was written. Failed with Input or Disk: the part cannot be read.
    pub(super) fn read_piece(&self, file: &str, piece: &Piece) -> std::result::Result<Bytes, ReadError> {
        match self {
            Self::Folder(root) => read_local(root, file, piece),
            #[cfg(feature = "cloud")]
            Self::Remote(remote) => remote.read_piece(file, piece),
        }
    }
}

/// Reads the manifest of a folder.
pub(super) fn read_manifest(root: &Root) -> Result<Vec<u8>> {
    root.read(Path::new(MANIFEST_FILE), MANIFEST_BYTES)
        .map_err(|source| unreadable(&root.path().join(MANIFEST_FILE), source))
}

fn read_local(root: &Root, file: &str, piece: &Piece) -> std::result::Result<Bytes, ReadError> {
    let read = |file: File| {
        // Check the length first, to allocate nothing for a file that ends early.
        if file.metadata()?.len().checked_sub(piece.bytes).is_none_or(|last| last < piece.offset) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; piece.bytes as usize];
        file.read_exact_at(&mut bytes, piece.offset).map(|()| bytes)
    };
    match root.open_file(Path::new(file)).and_then(read) {
        Ok(bytes) if sha256_of(&bytes) == piece.sha256 => Ok(bytes.into()),
        Ok(_) => Err(Damage::of_checksum().into()),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Damage::of_end().into()),
        Err(source) => Err(unreadable(&root.path().join(file), source).into()),
    }
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
