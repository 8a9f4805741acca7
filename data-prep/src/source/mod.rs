//! Where photos come from.

mod decode;
mod folder;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use decode::DecodeConfig;
pub use folder::FolderConfig;

use crate::error::Result;

/// The source of the photos; tagged in the YAML by the kind, as in `source: {folder: {root: photos}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum SourceConfig {
    /// Image files below a folder.
    Folder(FolderConfig),
}

/// One photo that has not been read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Photo {
    /// Its name in the source: unique, the same on every machine.
    pub key: String,
    /// The file.
    pub path: PathBuf,
    /// Who it shows, where the source says so.
    pub identity: Option<String>,
    /// The split it belongs to, where the source says so.
    pub split: Option<String>,
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

    /// All photos of the source in the order of their keys; relative paths start at `base_dir`.
    ///
    /// # Errors
    /// Input: a source that is missing, empty or wrongly labelled.
    pub fn photos(&self, base_dir: &Path) -> Result<Vec<Photo>> {
        match self {
            Self::Folder(folder) => folder.photos(base_dir),
        }
    }
}
