//! Rows of a shard folder: the person in each photo, and the photos through a bounded cache.

use std::collections::HashMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use data_prep::shard::{Damage, FaceRecord, RowGroup, ShardFolder};
use hyperlora_core::{Error, Result};

use crate::data::Reference;
use crate::data::cache::{Cache, Records};
use crate::data::pairs::{Pair, Pairs};
use crate::data::quarantine::{BadRowGroup, Quarantine};

/// Split name that selects every row.
pub const ALL_SPLITS: &str = "all";

/// An opened shard folder.
pub struct Dataset {
    path: PathBuf,
    shards: ShardFolder,
    rows: Vec<Row>,
    identities: Names,
    splits: Names,
    /// Rows of every labelled person, indexed by the number of the name.
    photos: Vec<Vec<u32>>,
    cache: Cache,
    quarantine: Option<Quarantine>,
    groups_read: AtomicU64,
}

struct Row {
    group: u32,
    place: u32,
    /// Number of the person's name.
    identity: Option<u32>,
    /// Number of the split's name.
    split: Option<u32>,
}

/// Interned names: a large set repeats few of them.
#[derive(Default)]
struct Names {
    names: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Names {
    fn number(&mut self, name: &str) -> u32 {
        if let Some(&known) = self.numbers.get(name) {
            return known;
        }
        let next = self.names.len() as u32;
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), next);
        next
    }
}

/// One record, which keeps its row group alive.
pub struct RecordHandle {
    group: Records,
    place: usize,
}

impl Deref for RecordHandle {
    type Target = FaceRecord;

    fn deref(&self) -> &FaceRecord {
        &self.group[self.place]
    }
}

impl Dataset {
    /// Opens the rows of `shards`, with a cache of `cache_mib` MiB.
    ///
    /// # Errors
    /// Input: the index is missing or damaged.
    pub fn open(shards: ShardFolder, cache_mib: usize) -> Result<Self> {
        let mut rows: Vec<Row> = Vec::new();
        let (mut identities, mut splits) = (Names::default(), Names::default());
        let mut photos: Vec<Vec<u32>> = Vec::new();
        let mut places =
            (0..).zip(shards.row_groups()).flat_map(|(group, of)| (0..of.rows as u32).map(move |row| (group, row)));
        shards.labels(|identity, split| {
            let Some((group, place)) = places.next() else { return };
            let identity = identity.map(|name| identities.number(name));
            let split = split.map(|name| splits.number(name));
            photos.resize_with(identities.names.len(), Vec::new);
            if let Some(person) = identity {
                photos[person as usize].push(rows.len() as u32);
            }
            rows.push(Row { group, place, identity, split });
        })?;
        drop(places);
        let (path, cache) = (shards.origin(), Cache::new(cache_mib << 20));
        let groups_read = AtomicU64::new(0);
        Ok(Self { path, shards, rows, identities, splits, photos, cache, quarantine: None, groups_read })
    }

    /// Returns the same dataset with a quarantine: damaged row groups are left out within its budget instead of being
    /// an error.
    #[must_use]
    pub fn with_quarantine(self, quarantine: Quarantine) -> Self {
        Self { quarantine: Some(quarantine), ..self }
    }

    /// Reads a row's record from the cache or from its row group, whose checksum is verified.
    ///
    /// # Errors
    /// Input: the row group is damaged; Disk: the disk fails.
    pub fn record(&self, row: usize) -> Result<RecordHandle> {
        let Row { group, place, .. } = &self.rows[row];
        match self.records(*group)? {
            Some(group) if group.len() > *place as usize => Ok(RecordHandle { group, place: *place as usize }),
            _ => Err(self.damaged(*group, "it is left out of this run")),
        }
    }

    /// Returns true if a row's record is readable, and false if its row group is in the quarantine.
    ///
    /// # Errors
    /// Same as [`record`](Self::record) without a quarantine; Input: the quarantine exceeds its budget.
    pub fn is_readable(&self, row: usize) -> Result<bool> {
        Ok(self.records(self.rows[row].group)?.is_some())
    }

    /// Returns true if the records of all these rows are readable.
    ///
    /// # Errors
    /// Same as [`is_readable`](Self::is_readable).
    pub fn are_readable(&self, rows: &[usize]) -> Result<bool> {
        rows.iter().try_fold(true, |all, &row| Ok(all && self.is_readable(row)?))
    }

    /// Reads the faces of a row group; `None` if it is left out.
    fn records(&self, group: u32) -> Result<Option<Records>> {
        if self.quarantine.as_ref().is_some_and(|quarantine| quarantine.holds(group)) {
            return Ok(None);
        }
        self.cache.get_or_read(group, || {
            self.groups_read.fetch_add(1, Ordering::Relaxed);
            let place = &self.shards.row_groups()[group as usize];
            let damage = match self.shards.read(place) {
                Ok(records) => match self.mislabelled(place, &records) {
                    None => return Ok(Some(Arc::new(records))),
                    Some(damage) => damage,
                },
                Err(error) => error.damage()?,
            };
            self.leave_out(group, &damage).map(|()| None)
        })
    }

    /// Finds a row whose person or split differs from the index, from which the pairs were made.
    fn mislabelled(&self, group: &RowGroup, records: &[FaceRecord]) -> Option<Damage> {
        let mut rows = records.iter().enumerate();
        let (row, record) = rows.find(|(row, record)| {
            let split = self.rows[group.first_row + row].split.map(|split| self.splits.names[split as usize].as_str());
            let labels = [self.identity(group.first_row + row), split];
            labels != [record.identity.as_deref(), record.split.as_deref()]
        })?;
        Some(Damage(format!("row {row}, `{}`: `identity` or `split` is not what index.parquet says", record.key)))
    }

    fn leave_out(&self, group: u32, damage: &Damage) -> Result<()> {
        let Some(quarantine) = &self.quarantine else { return Err(self.damaged(group, damage)) };
        let place = self.shards.row_groups()[group as usize];
        quarantine.add(BadRowGroup {
            shards: self.shards.checksum().into(),
            group,
            file: self.shards.file(&place).into(),
            row_group: place.index,
            first_row: place.first_row,
            rows: place.rows,
            ids: self.shards.keys(place.first_row..place.first_row + place.rows)?,
            reason: damage.to_string(),
        })
    }

    fn damaged(&self, group: u32, problem: impl std::fmt::Display) -> Error {
        let place = self.shards.row_groups()[group as usize];
        Error::file(
            &self.path.join(self.shards.file(&place)),
            format!("row group {} is damaged: {problem}", place.index),
            "restore the file, or prepare the data again with `data-prep build`",
        )
    }

    /// Number of row groups read so far, counting repeated reads.
    pub fn groups_read(&self) -> u64 {
        self.groups_read.load(Ordering::Relaxed)
    }

    /// Number of row groups that are left out.
    pub fn quarantined(&self) -> usize {
        self.quarantine.as_ref().map_or(0, Quarantine::len)
    }

    /// Path of the shard folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checksum of the manifest, which contains the checksums of all data.
    pub fn checksum(&self) -> &str {
        self.shards.checksum()
    }

    /// Row group of a row.
    pub fn group(&self, row: usize) -> u32 {
        self.rows[row].group
    }

    /// Name of the person in a row's photo, if labelled.
    pub fn identity(&self, row: usize) -> Option<&str> {
        self.rows[row].identity.map(|person| self.identities.names[person as usize].as_str())
    }

    /// Rows of a split, in disk order.
    pub fn split(&self, split: &str) -> Vec<usize> {
        (0..self.rows.len()).filter(|&row| self.is_in(row, split)).collect()
    }

    /// Pairs the targets of `split` with their possible reference photos from the split `references`.
    ///
    /// # Errors
    /// Input: no target is left.
    pub fn pairs(&self, split: &str, references: &str, reference: Reference) -> Result<Pairs> {
        let targets = self.split(split);
        let of_split = targets.len();
        if of_split == 0 {
            let splits = &self.splits.names;
            return Err(Error::file(
                &self.path,
                format!("no face in split `{split}`; the set holds {} faces, splits {splits:?}", self.rows.len()),
                format!("name one of these splits, or `{ALL_SPLITS}`, or prepare more photos"),
            ));
        }
        let people: Vec<Arc<[u32]>> = match reference {
            Reference::Target => Vec::new(),
            Reference::SameIdentity => self.photos.iter().map(|photos| self.of_split(photos, references)).collect(),
        };
        let pairs: Vec<Pair> = targets
            .into_iter()
            .map(|target| {
                let photos = self.rows[target].identity.and_then(|person| people.get(person as usize)).cloned();
                let photos = photos.unwrap_or_default();
                Pair::new(target, photos)
            })
            .filter(|pair| reference == Reference::Target || pair.references() > 0)
            .collect();
        if pairs.is_empty() {
            return Err(Error::file(
                &self.path,
                format!("no face in split `{split}` has another photo of its person in split `{references}`"),
                "use `reference: self`, or prepare a set with identity labels",
            ));
        }
        Ok(Pairs { left_out: of_split - pairs.len(), pairs })
    }

    /// Checks that no photo is both in `judged`, the split that `place` names, and in `learnt`, the training split.
    ///
    /// # Errors
    /// Input: a photo is in both, for example when training on `all` of a set that has the other split too.
    pub fn check_apart(&self, learnt: &str, judged: &str, place: &str) -> Result<()> {
        let shared = (0..self.rows.len()).filter(|&row| self.is_in(row, learnt) && self.is_in(row, judged)).count();
        if shared == 0 {
            return Ok(());
        }
        Err(Error::input(
            place,
            format!(
                "{shared} photos of split `{judged}` are also in split `{learnt}`, the training split (data.split)"
            ),
            "name splits without common photos",
        ))
    }

    fn of_split(&self, rows: &[u32], split: &str) -> Arc<[u32]> {
        rows.iter().copied().filter(|&row| self.is_in(row as usize, split)).collect()
    }

    fn is_in(&self, row: usize, split: &str) -> bool {
        split == ALL_SPLITS || self.rows[row].split.is_some_and(|number| self.splits.names[number as usize] == split)
    }
}
