//! Sources of photos.

mod decode;
mod folder;
mod jpeg;
mod labels;
mod photo;
mod webp;

use std::path::{Path, PathBuf};

use hyperlora_core::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use decode::{DecodeConfig, Decoded};
pub use folder::FolderConfig;
pub use photo::{Photo, Source, SourceFiles};

/// Source of the photos, tagged in the YAML by the kind, as in `source: {folder: {root: photos}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum SourceConfig {
    /// Image files below a folder.
    Folder(FolderConfig),
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
