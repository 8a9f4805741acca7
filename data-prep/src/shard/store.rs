//! Where the files of a shard folder lie, and how parts of them are read and checked.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::shard::manifest::{Piece, sha256_of};

/// What is wrong with the content of a part of a shard, in words: the medium could be read, but gave something else than
/// what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub String);

/// The folder that the files lie in.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// The place of one file, for messages.
    pub(super) fn place(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// A whole file.
    pub(super) fn read(&self, file: &str) -> Result<Bytes> {
        let path = self.place(file);
        std::fs::read(&path).map(Bytes::from).map_err(|source| Error::read(&path, source))
    }

    /// A part of a file, its checksum compared.
    ///
    /// # Errors
    /// Input or Disk where it cannot be read; what could be read but is not what was written is the inner error.
    pub(super) fn read_piece(&self, file: &str, piece: &Piece) -> Result<std::result::Result<Bytes, Damage>> {
        let path = self.place(file);
        let mut bytes = vec![0; piece.bytes as usize];
        match File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, piece.offset)) {
            Ok(()) if sha256_of(&bytes) == piece.sha256 => Ok(Ok(bytes.into())),
            Ok(()) => Ok(Err(Damage("its SHA-256 is not the one in manifest.json".into()))),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(Err(Damage("the file ends within it".into()))),
            Err(source) => Err(Error::read(&path, source)),
        }
    }
}
