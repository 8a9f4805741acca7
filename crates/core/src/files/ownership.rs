//! Which folders may be replaced: those that hold what this program wrote, and nothing else.

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

/// Longest marker, in bytes.
const LONGEST: u64 = 16 << 20;

const MADE_BY: &str = "hyperlora";

/// The files of a folder by their path in it, with `/` between folders, and their bytes where they are known.
pub type Listing = BTreeMap<String, Option<u64>>;

/// How a folder tells what this program wrote into it.
#[derive(Debug, Clone, Copy)]
pub enum Ownership {
    /// By [`MARKER`], which [`StagedFolder::commit`](super::StagedFolder::commit) writes.
    Marked,
    /// By a file of the format itself: the function reads it, and gives `None` where this program did not write it.
    Listed(fn(&Path) -> Option<Listing>),
    /// Not at all: such a folder is never replaced.
    Never,
}

/// [`MARKER`].
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    made_by: String,
    /// With their bytes.
    files: BTreeMap<String, u64>,
}

impl Ownership {
    /// Checks that `folder` is absent or empty, or holds what this program wrote and nothing else.
    ///
    /// # Errors
    /// Input that names what is foreign, Disk for a failing disk.
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

    /// Lists what is in `folder`, where that is the way of this kind of folder.
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

/// The first that is found in `folder` and that `listing` does not name as a file: by its path in the folder.
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
