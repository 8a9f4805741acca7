//! Part of a checkpoint that one process writes, with the checksums of its files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use hyperlora_core::files::write_whole;
use hyperlora_core::hash::hex;
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub(super) const STATE: &str = "state.json";

/// Size and SHA-256 of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileSum {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// Checksums by path relative to the checkpoint, with `/` between folders.
pub(super) type FileSums = BTreeMap<String, FileSum>;

/// Files that this process adds to a checkpoint. Other ranks may add theirs to the same folder at the same time.
#[derive(Debug)]
pub struct RankPart<'a> {
    folder: &'a Path,
    sums: FileSums,
}

impl<'a> RankPart<'a> {
    pub(super) fn new(folder: &'a Path) -> Self {
        Self { folder, sums: FileSums::new() }
    }

    /// Adds the file `name`, relative to the checkpoint with `/` between folders. `write` creates it at the given path.
    ///
    /// # Errors
    /// Errors of `write`; Disk: a full or failing disk.
    pub fn file(&mut self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.folder.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))?;
        }
        write(&path)?;
        let written = File::open(&path).and_then(|mut file| file.sync_all().and_then(|()| sum(&mut file)));
        self.sums.insert(name.into(), written.map_err(|source| Error::write(&path, source))?);
        Ok(())
    }

    /// Adds `state.json`, the run's state other than tensors. Every checkpoint has one.
    ///
    /// # Errors
    /// Same as [`file`](Self::file).
    pub fn state(&mut self, state: &impl Serialize) -> Result<()> {
        self.file(STATE, |path| write_json(path, state))
    }

    /// Syncs the folders and returns the checksums of all added files.
    pub(super) fn finish(self) -> Result<FileSums> {
        sync_folders(self.folder).map_err(|source| Error::write(self.folder, source))?;
        Ok(self.sums)
    }
}

/// Syncs `folder` after the folders in it.
fn sync_folders(folder: &Path) -> io::Result<()> {
    for name in names(folder)? {
        let path = folder.join(name);
        if path.is_dir() {
            sync_folders(&path)?;
        }
    }
    File::open(folder)?.sync_all()
}

/// Lists the names in a folder, sorted. Names that are not UTF-8 are skipped: this program writes none.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|source| Error::Fault(format!("{}: cannot be written as JSON: {source}", path.display())))?;
    write_whole(path, text.as_bytes())
}

pub(super) fn sum(file: &mut File) -> io::Result<FileSum> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(FileSum { bytes, sha256: hex(&hasher.finalize()) });
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
}
