//! The rows of a shard folder: who is in which photo, and the photos themselves through a bounded cache.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use data_prep::shard::manifest::sha256_of_file;
use data_prep::shard::{FaceRecord, MANIFEST_FILE, ShardFolder};
use rand_core::RngCore;

use crate::data::Reference;
use crate::error::{Error, Result};
use crate::random::below;

/// The split name that takes every row.
pub const ALL_SPLITS: &str = "all";

/// An opened shard folder.
pub struct Dataset {
    path: PathBuf,
    shards: ShardFolder,
    rows: Vec<Row>,
    identities: Names,
    splits: Names,
    /// Rows of every labelled person, by the number of the name.
    photos: Vec<Vec<u32>>,
    cache: Mutex<Cache>,
}

struct Row {
    group: u32,
    place: u32,
    /// Number of the person's name.
    identity: Option<u32>,
    /// Number of the split's name.
    split: Option<u32>,
}

/// Names and their numbers: a large set repeats few of them.
#[derive(Default)]
struct Names {
    names: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Names {
    fn number(&mut self, name: String) -> u32 {
        let next = self.names.len() as u32;
        *self.numbers.entry(name).or_insert_with_key(|name| {
            self.names.push(name.clone());
            next
        })
    }
}

/// One record, held together with the row group that it came with.
pub struct RecordHandle {
    group: Arc<Vec<FaceRecord>>,
    place: usize,
}

impl Deref for RecordHandle {
    type Target = FaceRecord;

    fn deref(&self) -> &FaceRecord {
        &self.group[self.place]
    }
}

impl Dataset {
    /// Opens the folder that `data-prep build` wrote; up to `cache_mib` MiB of its photos are kept in memory.
    ///
    /// # Errors
    /// Input for a missing, foreign or corrupt folder.
    pub fn open(path: &Path, cache_mib: usize) -> Result<Self> {
        let shards = ShardFolder::open(path)?;
        let mut rows: Vec<Row> = Vec::new();
        let (mut identities, mut splits) = (Names::default(), Names::default());
        let mut photos: Vec<Vec<u32>> = Vec::new();
        let places =
            (0..).zip(shards.row_groups()).flat_map(|(group, of)| (0..of.rows as u32).map(move |row| (group, row)));
        for ((group, place), label) in places.zip(shards.labels()?) {
            let identity = label.identity.map(|name| identities.number(name));
            let split = label.split.map(|name| splits.number(name));
            photos.resize_with(identities.names.len(), Vec::new);
            if let Some(person) = identity {
                photos[person as usize].push(rows.len() as u32);
            }
            rows.push(Row { group, place, identity, split });
        }
        let cache = Mutex::new(Cache { limit: cache_mib << 20, ..Cache::default() });
        Ok(Self { path: path.into(), shards, rows, identities, splits, photos, cache })
    }

    /// The row's record, from memory or from its row group; a shard's checksum is compared before its first row is read.
    ///
    /// # Errors
    /// Input for a corrupt row group, Disk for a failing disk.
    pub fn record(&self, row: usize) -> Result<RecordHandle> {
        let Row { group, place, .. } = &self.rows[row];
        let cached = self.cache().get(*group);
        let records = match cached {
            Some(records) => records,
            None => {
                // Without the lock: the other threads go on with what they have. Two may read the same group at once.
                let row_group = &self.shards.row_groups()[*group as usize];
                if !self.cache().verified.contains(&row_group.file) {
                    self.shards.verify_shard(&row_group.file)?;
                    self.cache().verified.insert(row_group.file.clone());
                }
                let read = Arc::new(self.shards.read(row_group)?);
                self.cache().put(*group, Arc::clone(&read));
                read
            }
        };
        if records.len() <= *place as usize {
            return Err(Error::file(&self.path, format!("row group {group} lost rows"), "build the shards again"));
        }
        Ok(RecordHandle { group: records, place: *place as usize })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checksum of the manifest, which holds those of all shards.
    ///
    /// # Errors
    /// Input for a manifest that cannot be read.
    pub fn checksum(&self) -> Result<String> {
        sha256_of_file(&self.path.join(MANIFEST_FILE))
    }

    /// The row group of a row.
    pub fn group(&self, row: usize) -> u32 {
        self.rows[row].group
    }

    /// The name of the person in a row's photo, where the set knows it.
    pub fn identity(&self, row: usize) -> Option<&str> {
        self.rows[row].identity.map(|person| self.identities.names[person as usize].as_str())
    }

    /// Rows of a split in their order on the disk.
    pub fn split(&self, split: &str) -> Vec<usize> {
        (0..self.rows.len()).filter(|&row| self.is_in(row, split)).collect()
    }

    /// The targets of `split`, each with the photos of `references` that may stand for its person.
    ///
    /// # Errors
    /// Input when not one target is left.
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
                let own_place = photos.binary_search(&(target as u32)).ok();
                Pair { target, photos, own_place }
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

    /// Checks that no photo of `judged`, the split that `place` names, is also in `learnt`, the split to learn from.
    ///
    /// # Errors
    /// Input when one is, as with `all` to learn from a set that has the other split too.
    pub fn check_apart(&self, learnt: &str, judged: &str, place: &str) -> Result<()> {
        let shared = (0..self.rows.len()).filter(|&row| self.is_in(row, learnt) && self.is_in(row, judged)).count();
        if shared == 0 {
            return Ok(());
        }
        Err(Error::input(
            place,
            format!(
                "{shared} photos of split `{judged}` are also in split `{learnt}`, which is learnt from (data.split)"
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

    /// A panic elsewhere cannot leave the cache half changed in a way that matters: whatever it holds was read whole.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Targets and the photos that may stand for their people.
#[derive(Debug)]
pub struct Pairs {
    pairs: Vec<Pair>,
    /// Targets without any reference photo.
    pub left_out: usize,
}

/// One target.
#[derive(Debug)]
pub struct Pair {
    /// Its row.
    pub target: usize,
    /// Rows of the person that may be a reference, in order: one list for all the targets of a person.
    photos: Arc<[u32]>,
    /// Where the target itself stands in that list.
    own_place: Option<usize>,
}

impl Pairs {
    /// All targets in their order on the disk, at least one.
    pub fn as_slice(&self) -> &[Pair] {
        &self.pairs
    }
}

impl Pair {
    /// Photos that may be its reference.
    pub fn references(&self) -> usize {
        self.photos.len() - usize::from(self.own_place.is_some())
    }

    /// Draws the reference photo; the target where there is no other.
    pub fn reference(&self, generator: &mut impl RngCore) -> usize {
        let drawn = below(generator, self.references() as u64) as usize;
        let skipped = usize::from(self.own_place.is_some_and(|own| own <= drawn));
        self.photos.get(drawn + skipped).map_or(self.target, |&row| row as usize)
    }
}

/// The most recently used row groups, up to a limit of bytes; the one in use always stays.
#[derive(Default)]
struct Cache {
    limit: usize,
    bytes: usize,
    clock: u64,
    groups: HashMap<u32, Cached>,
    /// Shards whose checksum held when they were first read.
    verified: HashSet<PathBuf>,
}

struct Cached {
    records: Arc<Vec<FaceRecord>>,
    bytes: usize,
    used: u64,
}

impl Cache {
    fn get(&mut self, group: u32) -> Option<Arc<Vec<FaceRecord>>> {
        self.clock += 1;
        let clock = self.clock;
        self.groups.get_mut(&group).map(|cached| {
            cached.used = clock;
            Arc::clone(&cached.records)
        })
    }

    fn put(&mut self, group: u32, records: Arc<Vec<FaceRecord>>) {
        let bytes = records.iter().map(|record| record.image.len() + size_of::<FaceRecord>()).sum();
        if let Some(replaced) = self.groups.remove(&group) {
            self.bytes -= replaced.bytes;
        }
        while self.bytes + bytes > self.limit
            && let Some(oldest) = self.groups.iter().min_by_key(|(_, cached)| cached.used).map(|(group, _)| *group)
            && let Some(dropped) = self.groups.remove(&oldest)
        {
            self.bytes -= dropped.bytes;
        }
        self.bytes += bytes;
        self.groups.insert(group, Cached { records, bytes, used: self.clock });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_two_threads_read_counts_once() {
        let mut cache = Cache { limit: 1 << 20, ..Cache::default() };
        let record = FaceRecord {
            key: String::new(),
            image: vec![0; 1000],
            width: 1,
            height: 1,
            face_box: [0.0; 4],
            points: [[0.0; 2]; 5],
            landmarks: Vec::new(),
            score: 1.0,
            id_embedding: Vec::new(),
            caption: String::new(),
            sha256: String::new(),
            identity: None,
            split: None,
        };
        let group = Arc::new(vec![record]);
        cache.put(3, Arc::clone(&group));
        let once = cache.bytes;
        cache.put(3, group);
        assert!(once >= 1000 && cache.bytes == once && cache.groups.len() == 1, "{} bytes", cache.bytes);
    }
}
