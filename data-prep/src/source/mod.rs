//! Sources of photos.

mod decode;
mod folder;
mod jpeg;
mod labels;
mod webp;

use std::io;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use decode::{DecodeConfig, Decoded};
pub use folder::FolderConfig;

use hyperlora_core::Result;
use hyperlora_core::paths::{Root, read_regular};

use crate::notes::Notes;

/// Source of the photos, tagged in the YAML by the kind, as in `source: {folder: {root: photos}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum SourceConfig {
    /// Image files below a folder.
    Folder(FolderConfig),
}

/// Content of a source.
#[derive(Debug)]
pub struct Source {
    /// All photos, in the order of their keys.
    pub photos: Vec<Photo>,
    /// Reader of their files.
    pub files: SourceFiles,
    /// Notes on skipped files.
    pub notes: Notes,
}

/// One photo that has not been read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Photo {
    /// Name in the source: unique, and the same on every machine.
    pub key: String,
    /// Path of its file, relative to the source's root.
    pub path: PathBuf,
    /// Identity of the person, if the source names it.
    pub identity: Option<String>,
    /// Split of the photo, if the source names it.
    pub split: Option<String>,
}

/// Files of a source. The author of the folder may be a stranger: only regular files are read, and no link is followed
/// out of it unless the user wants that.
#[derive(Debug)]
pub struct SourceFiles {
    root: Root,
    follow_links: bool,
}

impl SourceFiles {
    /// Reads the file at `path` from the root, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Root::read`].
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        if self.follow_links { read_regular(&self.root.path().join(path), limit) } else { self.root.read(path, limit) }
    }

    /// Returns the size in bytes of the file at `path` from the root, 0 if unknown.
    pub fn size(&self, path: &Path) -> u64 {
        std::fs::metadata(self.root.path().join(path)).map_or(0, |file| file.len())
    }
}

impl SourceConfig {
    /// Returns the input files and folders of the source. Relative paths start at `base_dir`.
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

    /// Opens the source. Relative paths start at `base_dir`. `captions_beside` tells whether the text files next to
    /// photos are their captions.
    ///
    /// # Errors
    /// Input: a source that is missing, empty or wrongly labelled.
    pub fn open(&self, base_dir: &Path, captions_beside: bool) -> Result<Source> {
        match self {
            Self::Folder(folder) => folder.open(base_dir, captions_beside),
        }
    }
}
