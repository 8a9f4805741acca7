//! Where photos come from.

mod decode;
mod folder;
mod jpeg;
mod labels;
mod webp;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use decode::{DecodeConfig, Decoded};
pub use folder::FolderConfig;

use hyperlora_core::Result;
use hyperlora_core::paths::{Root, read_regular};

use crate::notes::Notes;

/// The source of the photos; tagged in the YAML by the kind, as in `source: {folder: {root: photos}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum SourceConfig {
    /// Image files below a folder.
    Folder(FolderConfig),
}

/// What a source holds.
#[derive(Debug)]
pub struct Source {
    /// All photos, in the order of their keys.
    pub photos: Vec<Photo>,
    /// Where their files are read.
    pub files: SourceFiles,
    /// What was passed over.
    pub notes: Notes,
}

/// One photo that has not been read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Photo {
    /// Its name in the source: unique, the same on every machine.
    pub key: String,
    /// Its file, from the source's root.
    pub path: PathBuf,
    /// Who it shows, where the source says so.
    pub identity: Option<String>,
    /// The split it belongs to, where the source says so.
    pub split: Option<String>,
}

/// The files of a source. Whoever filled the folder may be a stranger: nothing but regular files is read, and no link is
/// followed out of it unless the user wants that.
#[derive(Debug)]
pub struct SourceFiles {
    root: Root,
    follow_links: bool,
}

impl SourceFiles {
    /// Reads the file at `path` from the root, which may hold `limit` bytes.
    ///
    /// # Errors
    /// As [`Root::read`].
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        if self.follow_links { read_regular(&self.root.path().join(path), limit) } else { self.root.read(path, limit) }
    }

    /// Number of bytes of the file at `path` from the root, 0 where it cannot be told.
    pub fn size(&self, path: &Path) -> u64 {
        std::fs::metadata(self.root.path().join(path)).map_or(0, |file| file.len())
    }
}

impl SourceConfig {
    /// The files and folders that photos and what belongs to them are read from; relative paths start at `base_dir`.
    ///
    /// # Errors
    /// Input: a path with an unset variable.
    pub fn places(&self, base_dir: &Path) -> Result<Vec<PathBuf>> {
        match self {
            Self::Folder(folder) => [Some(&folder.root), folder.labels.as_ref()]
                .into_iter()
                .flatten()
                .map(|path| path.resolve(base_dir))
                .collect(),
        }
    }

    /// Opens the source; relative paths start at `base_dir`. `captions_beside` tells whether the text files beside photos
    /// are their captions.
    ///
    /// # Errors
    /// Input: a source that is missing, empty or wrongly labelled.
    pub fn open(&self, base_dir: &Path, captions_beside: bool) -> Result<Source> {
        match self {
            Self::Folder(folder) => folder.open(base_dir, captions_beside),
        }
    }
}
