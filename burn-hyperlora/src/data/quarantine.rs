//! Quarantine: the list of damaged row groups that a run leaves out, limited by a budget.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hyperlora_core::files::append;
use hyperlora_core::paths::{read_limited, read_regular};
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// File name of the quarantine in a run folder.
pub const QUARANTINE_FILE: &str = "quarantine.jsonl";

/// Size limit of the file in bytes; each line lists the photos of a row group.
const LARGEST: u64 = 256 << 20;

/// One damaged row group: a line of [`QUARANTINE_FILE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRowGroup {
    /// Checksum of the shard folder's manifest.
    pub shards: String,
    /// Number of the row group in the folder, from 0.
    pub group: u32,
    /// Shard that holds the row group.
    pub file: String,
    /// Number of the row group in that shard, from 0.
    pub row_group: usize,
    /// Number of its first photo in the folder, from 0.
    pub first_row: usize,
    /// Number of its photos.
    pub rows: usize,
    /// Keys of its photos.
    pub ids: Vec<String>,
    /// Kind of damage.
    pub reason: String,
}

/// Row groups that a run leaves out. All ranks of a run share one file.
#[derive(Debug)]
pub struct Quarantine {
    file: PathBuf,
    budget: usize,
    known: Mutex<BTreeMap<u32, BadRowGroup>>,
}

impl Quarantine {
    /// Opens the quarantine of `run` for the shards with this checksum. It may hold up to `budget` row groups.
    ///
    /// # Errors
    /// Input: the quarantine exceeds the budget; Input or Disk: the file cannot be read.
    pub fn open(run: &Path, budget: usize, shards: &str) -> Result<Self> {
        let file = run.join(QUARANTINE_FILE);
        let text = read(&file)?;
        let known: BTreeMap<u32, BadRowGroup> = entries(&text, shards).map(|bad| (bad.group, bad)).collect();
        let last = known.values().next_back().map_or("", |bad| bad.reason.as_str());
        within_budget(&file, budget, &known, last)?;
        Ok(Self { file, budget, known: Mutex::new(known) })
    }

    /// Returns true if a row group is left out.
    pub fn holds(&self, group: u32) -> bool {
        self.known().contains_key(&group)
    }

    /// Number of row groups that are left out.
    pub fn len(&self) -> usize {
        self.known().len()
    }

    /// Returns true if no row group is left out.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Leaves a row group out from now on and records it, unless another rank already has.
    ///
    /// # Errors
    /// Input: the quarantine exceeds the budget; Input or Disk: the file cannot be written.
    pub fn add(&self, bad: BadRowGroup) -> Result<()> {
        let mut known = self.known();
        if known.contains_key(&bad.group) {
            return Ok(());
        }
        let of_all = self.write_down(&bad).map_err(|source| Error::write(&self.file, source))?;
        tracing::warn!("{}: row group {} is left out: {}", bad.file, bad.row_group, bad.reason);
        let last = bad.reason;
        known.extend(of_all.into_iter().map(|bad| (bad.group, bad)));
        within_budget(&self.file, self.budget, &known, &last)
    }

    /// Appends a line under a lock, and returns the entries of all ranks.
    fn write_down(&self, bad: &BadRowGroup) -> std::io::Result<Vec<BadRowGroup>> {
        let mut file = append(&self.file)?;
        // Without file locks, a row group may be recorded twice, but it is counted once.
        let _ = File::lock(&file);
        let text = lossy(read_limited(file.try_clone()?, LARGEST)?);
        let mut of_all: Vec<BadRowGroup> = entries(&text, &bad.shards).collect();
        if of_all.iter().all(|other| other.group != bad.group) {
            let broken = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            let line = format!("{broken}{}\n", serde_json::to_string(bad)?);
            file.seek(SeekFrom::End(0))?;
            file.write_all(line.as_bytes())?;
            file.sync_all()?;
            of_all.push(bad.clone());
        }
        Ok(of_all)
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, BadRowGroup>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the row groups that `run` has left out of the shards with this checksum, or of any shards if it is `None`.
///
/// # Errors
/// Input or Disk: the file cannot be read.
pub fn count(run: &Path, shards: Option<&str>) -> Result<usize> {
    let text = read(&run.join(QUARANTINE_FILE))?;
    let counted = lines(&text).filter(|bad| shards.is_none_or(|shards| bad.shards == shards));
    Ok(counted.map(|bad| (bad.shards, bad.group)).collect::<BTreeSet<_>>().len())
}

/// Reads the file; a missing one is empty.
fn read(file: &Path) -> Result<String> {
    match read_regular(file, LARGEST) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        text => text.map(lossy).map_err(|source| Error::read(file, source)),
    }
}

/// A dying process may have cut a UTF-8 character in two. Only that line is skipped, not the file.
fn lossy(text: Vec<u8>) -> String {
    String::from_utf8_lossy(&text).into_owned()
}

/// Checks the number of left-out row groups against the budget, both on resume and during a run. `last` is the damage
/// of one of them.
fn within_budget(file: &Path, budget: usize, known: &BTreeMap<u32, BadRowGroup>, last: &str) -> Result<()> {
    if known.len() <= budget {
        return Ok(());
    }
    let files: Vec<String> = known.values().map(|bad| format!("{} ({})", bad.file, bad.row_group)).collect();
    let (count, files) = (files.len(), files.join(", "));
    Err(Error::file(
        file,
        format!("{count} row groups are damaged: {files}; data.bad_row_groups allows {budget}; for example: {last}"),
        "restore these files, or prepare the data again, and remove the lines from quarantine.jsonl; or allow more",
    ))
}

/// Parses the entries. Half-written lines of a dying process are skipped: the row group will be found again.
fn lines(text: &str) -> impl Iterator<Item = BadRowGroup> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}

/// Parses the entries of these shards.
fn entries(text: &str, shards: &str) -> impl Iterator<Item = BadRowGroup> {
    lines(text).filter(move |bad| bad.shards == shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(group: u32) -> BadRowGroup {
        let (file, reason) = ("shard-00000.parquet".into(), "its SHA-256".into());
        BadRowGroup { shards: "abc".into(), group, file, row_group: 1, first_row: 5, rows: 1, ids: Vec::new(), reason }
    }

    #[test]
    fn ranks_share_the_list_and_the_budget() {
        let run = tempfile::tempdir().unwrap();
        let open = || Quarantine::open(run.path(), 2, "abc").unwrap();
        let (one, two) = (open(), open());
        one.add(bad(7)).unwrap();
        two.add(bad(7)).unwrap();
        two.add(bad(8)).unwrap();
        assert_eq!((one.len(), two.len(), open().len()), (1, 2, 2));
        assert!(open().holds(8) && !open().holds(9));
        assert!(Quarantine::open(run.path(), 2, "other shards").unwrap().is_empty());
        let too_many = one.add(bad(9)).unwrap_err();
        // A restart reads the same lines.
        for error in [too_many, Quarantine::open(run.path(), 2, "abc").unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("3 row groups are damaged") && error.contains("allows 2"), "{error}");
        }
        assert_eq!(Quarantine::open(run.path(), 3, "abc").unwrap().len(), 3);
        assert_eq!([Some("abc"), Some("other shards"), None].map(|of| count(run.path(), of).unwrap()), [3, 0, 3]);
    }

    #[test]
    fn a_half_written_line_is_passed_over() {
        let run = tempfile::tempdir().unwrap();
        let quarantine = Quarantine::open(run.path(), 9, "abc").unwrap();
        quarantine.add(bad(7)).unwrap();
        let path = run.path().join(QUARANTINE_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, [text.as_bytes(), &text.as_bytes()[..30], &"é".as_bytes()[..1]].concat()).unwrap();
        quarantine.add(bad(8)).unwrap();
        let again = Quarantine::open(run.path(), 9, "abc").unwrap();
        assert!(again.holds(7) && again.holds(8) && again.len() == 2);
    }

    #[test]
    fn a_pipe_in_its_place_is_refused() {
        let run = tempfile::tempdir().unwrap();
        let quarantine = Quarantine::open(run.path(), 9, "abc").unwrap();
        let path = run.path().join(QUARANTINE_FILE);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(Quarantine::open(run.path(), 9, "abc").is_err());
        assert!(quarantine.add(bad(7)).is_err());
    }
}
