//! Folders that may be replaced: those that contain only what this program wrote.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

use super::write_whole;
use crate::paths::{Root, is_plain};
use crate::{Error, Result};

/// Name of the file in a folder that lists what this program wrote into it.
pub const MARKER: &str = ".hyperlora.json";

/// Size limit of a marker in bytes.
const LONGEST: u64 = 16 << 20;

const MADE_BY: &str = "hyperlora";

/// Files of a folder by their path in it, with `/` between folders, and their sizes in bytes where known.
pub type Listing = BTreeMap<String, Option<u64>>;

/// Proof that this program wrote a folder.
#[derive(Debug, Clone, Copy)]
pub enum Ownership {
    /// [`MARKER`], which [`StagedFolder::commit`](super::StagedFolder::commit) writes.
    Marked,
    /// A file of the format itself. The function reads it, and returns `None` if this program did not write it.
    Listed(fn(&Path) -> Option<Listing>),
    /// None: such a folder is never replaced.
    Never,
}

/// Content of [`MARKER`].
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    made_by: String,
    /// File sizes in bytes by path.
    files: BTreeMap<String, u64>,
}

impl Ownership {
    /// Checks that `folder` is absent or empty, or contains only what this program wrote.
    ///
    /// # Errors
    /// Input: names the foreign file. Disk: a failing disk.
    pub(super) fn check(self, folder: &Path) -> Result<()> {
        let refused = |problem: String| Error::file(folder, problem, "name another folder, or remove this one by hand");
        let mut entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(source) if source.kind() == ErrorKind::NotFound => return Ok(()),
            Err(source) if source.kind() == ErrorKind::NotADirectory => return Err(refused("is a file".into())),
            Err(source) => return Err(Error::read(folder, source)),
        };
        if entries.next().is_none() {
            return Ok(());
        }
        let listing = match self {
            Self::Marked => marked(folder),
            Self::Listed(read) => read(folder),
            Self::Never => return Err(refused("is a folder that exists already".into())),
        };
        let Some(listing) = listing else {
            return Err(refused("is not empty, and nothing in it tells that this program made it".into()));
        };
        if let Some(name) = unlisted(folder, &listing)? {
            return Err(refused(format!("holds `{name}`, which this program did not write")));
        }
        let changed = |(name, bytes): &(&String, &Option<u64>)| {
            let found = fs::symlink_metadata(folder.join(name)).map(|found| found.len());
            is_plain(name) && found.is_ok_and(|found| bytes.is_some_and(|bytes| found != bytes))
        };
        match listing.iter().find(changed) {
            Some((name, _)) => Err(refused(format!("holds `{name}`, which was changed since this program wrote it"))),
            None => Ok(()),
        }
    }

    /// Writes the list of files in `folder`, if this kind of folder has a marker.
    pub(super) fn mark(self, folder: &Path) -> Result<()> {
        let Self::Marked = self else { return Ok(()) };
        let failed = |error: walkdir::Error| Error::read(folder, error.into());
        let mut files = BTreeMap::new();
        for entry in WalkDir::new(folder).min_depth(1) {
            let entry = entry.map_err(failed)?;
            if !entry.file_type().is_dir() {
                files.insert(name_in(folder, entry.path()), entry.metadata().map_err(failed)?.len());
            }
        }
        let marker = serde_json::to_vec_pretty(&Marker { made_by: MADE_BY.into(), files })
            .map_err(|error| Error::Fault(format!("{MARKER} cannot be written as JSON: {error}")))?;
        write_whole(&folder.join(MARKER), &marker)
    }
}

/// Returns the first path in `folder` that `listing` does not name as a file.
///
/// # Errors
/// As [`Error::read`].
pub fn unlisted(folder: &Path, listing: &Listing) -> Result<Option<String>> {
    for entry in WalkDir::new(folder).min_depth(1) {
        let entry = entry.map_err(|error| Error::read(folder, error.into()))?;
        let name = name_in(folder, entry.path());
        let listed = if entry.file_type().is_dir() {
            let below = format!("{name}/");
            listing.range(below.clone()..).next().is_some_and(|(file, _)| file.starts_with(&below))
        } else {
            entry.file_type().is_file() && listing.contains_key(&name)
        };
        if !listed {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn marked(folder: &Path) -> Option<Listing> {
    let text = Root::open(folder).ok()?.read(Path::new(MARKER), LONGEST).ok()?;
    let marker: Marker = serde_json::from_slice(&text).ok()?;
    let files = marker.files.into_iter().map(|(name, bytes)| (name, Some(bytes)));
    (marker.made_by == MADE_BY).then(|| files.chain([(MARKER.to_owned(), None)]).collect())
}

fn name_in(folder: &Path, path: &Path) -> String {
    path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned()
}
