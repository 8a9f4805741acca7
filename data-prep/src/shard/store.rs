//! Storage of a shard folder: the place of its files, and checked reads of their parts.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use hyperlora_core::Result;
use hyperlora_core::hash::sha256_of;
use hyperlora_core::paths::Root;

use crate::shard::access::{Damage, ReadError, RemoteConfig, unreadable};
use crate::shard::manifest::{Piece, read_manifest};
#[cfg(feature = "cloud")]
use crate::shard::remote::Remote;

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
        Err(hyperlora_core::Error::file(
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
