//! Checkpoints: folders that are complete or absent, and that can verify their own content.
//!
//! `checkpoints/step-NNNNNNNN/` holds the caller's files (plain safetensors), `state.json` (the run's state other than
//! tensors) and `checksums.json` (size and SHA-256 of every other file), which is read before anything else.
//!
//! Several ranks fill one folder beside its final place, each with [its part](RankPart). The main rank moves it into place
//! once it has the checksums of all ranks ([`CheckpointWriter`]).

mod part;
mod task;
mod writer;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use hyperlora_core::files::{Hidden, Listing, Ownership, StagedFolder, unlisted};
use hyperlora_core::paths::{Root, below, read_limited};
use hyperlora_core::{Error, Result};
use part::{FileSums, STATE, names, sum, write_json};
use serde::de::DeserializeOwned;

pub use part::RankPart;
pub use writer::CheckpointWriter;

const CHECKSUMS: &str = "checksums.json";

/// Maximum size of `state.json` and `checksums.json`, in bytes.
const LONGEST: u64 = 64 << 20;

/// A folder is replaced only if it holds exactly the files that its checksums list.
const OWNERSHIP: Ownership = Ownership::Listed(listing);

/// Checkpoints of one run.
///
/// # Examples
/// ```
/// use burn_hyperlora::checkpoint::CheckpointStore;
/// use hyperlora_core::files::write_whole;
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let store = CheckpointStore::open(&folder.join("checkpoints"))?;
/// let checkpoint = store.write(100, |part| {
///     part.file("model/weights.bin", |path| write_whole(path, b"weights"))?;
///     part.state(&"the state of the run")
/// })?;
/// checkpoint.verify()?;
/// assert_eq!(store.latest()?.map(|latest| latest.step), Some(100));
/// assert_eq!(checkpoint.state::<String>()?, "the state of the run");
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    root: PathBuf,
}

/// One checkpoint folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Optimiser steps done when it was written.
    pub step: u64,
    path: PathBuf,
}

impl CheckpointStore {
    /// Opens `root` for writing, creates it if absent, and removes what a killed run left there.
    ///
    /// Only the one process that writes to the run may open its checkpoints this way: another process's unfinished
    /// checkpoint looks like a leftover.
    ///
    /// # Errors
    /// Input: `root` cannot be written to; Disk: a failing disk.
    pub fn open(root: &Path) -> Result<Self> {
        let store = Self { root: root.into() };
        fs::create_dir_all(root).map_err(|source| Error::write(root, source))?;
        store.tidy()?;
        Ok(store)
    }

    /// Opens the checkpoints below `root` read-only: nothing is created or removed.
    pub fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Lists every complete checkpoint, oldest first. A folder that does not exist holds none.
    ///
    /// # Errors
    /// Same as [`Error::read`].
    pub fn list(&self) -> Result<Vec<Checkpoint>> {
        let names = match names(&self.root) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names.map_err(|source| Error::read(&self.root, source))?,
        };
        let mut found: Vec<Checkpoint> = names
            .iter()
            .filter_map(|name| Some(Checkpoint { step: step_of(name)?, path: self.root.join(name) }))
            .collect();
        found.sort_by_key(|checkpoint| checkpoint.step);
        Ok(found)
    }

    /// Returns the checkpoint to resume from: the one with the most steps.
    ///
    /// # Errors
    /// Same as [`list`](Self::list).
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        Ok(self.list()?.pop())
    }

    /// Returns the checkpoint of `step` without checking that it exists; see [`Checkpoint::verify`].
    pub fn of_step(&self, step: u64) -> Checkpoint {
        Checkpoint { step, path: self.place_of(step) }
    }

    /// Writes the checkpoint of `step` immediately, as one part; `fill` adds its files. On any failure, no new folder
    /// appears and older checkpoints stay intact.
    ///
    /// # Errors
    /// Errors of `fill`; Disk: a full or failing disk; Input: a place that cannot be written to.
    pub fn write(&self, step: u64, fill: impl FnOnce(&mut RankPart<'_>) -> Result<()>) -> Result<Checkpoint> {
        let path = self.place_of(step);
        let staged = StagedFolder::new(&path, OWNERSHIP)?;
        let mut part = RankPart::new(staged.path());
        fill(&mut part)?;
        let sums = part.finish()?;
        commit(staged, &sums)?;
        Ok(Checkpoint { step, path })
    }

    /// Removes old checkpoints. Keeps the newest `keep` (at least one), the first one of each span of `keep_every` (M)
    /// steps (M to 2 M - 1, 2 M to 3 M - 1, and so on), and that of step `needed`.
    ///
    /// Warns about a folder that cannot be removed: NFS keeps a folder while a process has one of its files open. The
    /// next start tries again.
    ///
    /// # Errors
    /// Same as [`list`](Self::list).
    pub fn prune(&self, keep: usize, keep_every: Option<u64>, needed: Option<u64>) -> Result<()> {
        let mut old = self.list()?;
        old.truncate(old.len().saturating_sub(keep.max(1)));
        let mut last_span = Some(0);
        for checkpoint in old {
            let span = keep_every.and_then(|every| checkpoint.step.checked_div(every));
            if span > last_span {
                last_span = span;
                continue;
            }
            if needed == Some(checkpoint.step) {
                continue;
            }
            // The folder is hidden first, because a kill during the removal must not leave half a checkpoint.
            let doomed = Hidden::Partial.beside(&checkpoint.path);
            match fs::rename(&checkpoint.path, &doomed) {
                Ok(()) => remove(&doomed),
                Err(source) => tracing::warn!("{}: cannot be removed: {source}", checkpoint.path.display()),
            }
        }
        Ok(())
    }

    fn place_of(&self, step: u64) -> PathBuf {
        self.root.join(format!("step-{step:08}"))
    }

    /// Removes unfinished folders, and restores a complete one that was being replaced when the run was killed.
    fn tidy(&self) -> Result<()> {
        let names = names(&self.root).map_err(|source| Error::read(&self.root, source))?;
        let targets: BTreeSet<&str> = names.iter().filter_map(|name| leftover(name)).collect();
        targets.into_iter().try_for_each(|target| StagedFolder::clear(&self.root.join(target), OWNERSHIP))
    }
}

impl Checkpoint {
    /// Opens the checkpoint in a folder that the user named, such as `runs/a/checkpoints/step-00000300`.
    ///
    /// # Errors
    /// Input: the folder does not exist, or its name is not a checkpoint's.
    pub fn at(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match step_of(&name) {
            Some(step) if path.is_dir() => Ok(Self { step, path: path.into() }),
            _ => Err(Error::file(
                path,
                "is not a checkpoint folder",
                "give one such as runs/NAME/checkpoints/step-00000300",
            )),
        }
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lists every file by its path in the folder (`/` between folders), with its expected size in bytes.
    ///
    /// # Errors
    /// Input: missing or damaged checksums; Disk: a failing disk.
    pub fn files(&self) -> Result<Vec<(String, u64)>> {
        Ok(self.sums()?.into_iter().map(|(name, sum)| (name, sum.bytes)).collect())
    }

    /// Compares every file with its checksum.
    ///
    /// # Errors
    /// Input: names the first file that is missing, truncated, changed or has no checksum; Disk: a failing disk.
    pub fn verify(&self) -> Result<()> {
        let sums = self.sums()?;
        if !sums.contains_key(STATE) {
            return Err(self.damaged(CHECKSUMS, format!("does not list {STATE}")));
        }
        if let Some(name) = unlisted(&self.path, &listing_of(&sums))? {
            return Err(Error::file(
                &self.path.join(name),
                format!("is not a file that {CHECKSUMS} covers: it was not written with the checkpoint"),
                format!("move it out of the folder {}", self.path.display()),
            ));
        }
        for (name, expected) in &sums {
            let path = self.path.join(name);
            let mut file = self.open_file(name)?;
            let bytes = file.metadata().map_err(|source| Error::read(&path, source))?.len();
            if bytes != expected.bytes {
                return Err(self.damaged(name, format!("has {bytes} bytes instead of {}", expected.bytes)));
            }
            if sum(&mut file).map_err(|source| Error::read(&path, source))?.sha256 != expected.sha256 {
                return Err(self.damaged(name, "does not match its checksum"));
            }
        }
        Ok(())
    }

    /// Reads the state given to [`CheckpointStore::write`] without verifying it; see [`verify`](Self::verify).
    ///
    /// # Errors
    /// Input: the state is missing or was written by another version of the program; Disk: a failing disk.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        self.read_json(STATE)
    }

    /// Reads the checksums of every file, and checks that every name leads to a file below the folder.
    fn sums(&self) -> Result<FileSums> {
        let sums: FileSums = self.read_json(CHECKSUMS)?;
        let list = self.path.join(CHECKSUMS);
        sums.keys().try_for_each(|name| below(&self.path, name, &list).map(drop))?;
        Ok(sums)
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = read_limited(self.open_file(name)?, LONGEST);
        let text = text.map_err(|source| Error::read(&self.path.join(name), source))?;
        serde_json::from_slice(&text).map_err(|source| self.damaged(name, format!("cannot be read: {source}")))
    }

    fn open_file(&self, name: &str) -> Result<File> {
        if !self.path.is_dir() {
            return Err(self.damaged(name, "is missing"));
        }
        Root::open(&self.path)?.open_file(Path::new(name)).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => self.damaged(name, "is missing"),
            _ => Error::read(&self.path.join(name), source),
        })
    }

    fn damaged(&self, name: &str, problem: impl ToString) -> Error {
        Error::file(
            &self.path.join(name),
            problem,
            format!("delete the folder {} to resume from the previous checkpoint", self.path.display()),
        )
    }
}

/// Name of the target of a [`Hidden`] name: `.step-00000300.hyperlora.old` -> `step-00000300`.
fn leftover(name: &str) -> Option<&str> {
    let (target, role) = name.strip_prefix('.')?.split_once(".hyperlora.")?;
    (step_of(target).is_some() && matches!(role, "old" | "partial" | "lock")).then_some(target)
}

/// Lists the files that a checkpoint's own checksums name.
fn listing(folder: &Path) -> Option<Listing> {
    Some(listing_of(&Checkpoint { step: 0, path: folder.into() }.sums().ok()?))
}

fn listing_of(sums: &FileSums) -> Listing {
    let listed = sums.iter().map(|(name, sum)| (name.clone(), Some(sum.bytes)));
    listed.chain([(CHECKSUMS.to_owned(), None)]).collect()
}

/// `step-00000300` -> 300.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok()
}

/// Removes a hidden folder that is no longer needed. If it cannot be removed, it does no harm.
fn remove(hidden: &Path) {
    if let Err(source) = fs::remove_dir_all(hidden) {
        tracing::warn!("{}: cannot be removed, the next start tries again: {source}", hidden.display());
    }
}

/// Moves a folder into place once it holds every file that the ranks wrote; a rank may have written elsewhere.
fn commit(staged: StagedFolder, sums: &FileSums) -> Result<()> {
    for (name, sum) in sums {
        let path = below(staged.path(), name, Path::new("a rank's part"))?;
        // The file is opened rather than only stat'ed, because NFS then asks the server for the current length.
        let problem = match File::open(&path).and_then(|file| file.metadata()) {
            Ok(found) if found.len() == sum.bytes => continue,
            Ok(found) => format!("has {} bytes, its rank wrote {}", found.len(), sum.bytes),
            Err(source) if source.kind() == io::ErrorKind::NotFound => "is not here, though its rank wrote it".into(),
            Err(source) => return Err(Error::read(&path, source)),
        };
        return Err(Error::file(&path, problem, "give all ranks one run folder that they share, with --out"));
    }
    write_json(&staged.path().join(CHECKSUMS), sums)?;
    staged.commit()
}
