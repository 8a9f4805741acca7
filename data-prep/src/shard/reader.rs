//! Reader of shard folders, one row group at a time.

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use hyperlora_core::hash::sha256_of;
use hyperlora_core::paths::Root;
use hyperlora_core::{Error, Result};
use parquet::arrow::ProjectionMask;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use crate::shard::FaceRecord;
use crate::shard::access::{Damage, ReadError, RemoteConfig, unreadable};
use crate::shard::limits::Budget;
use crate::shard::manifest::{MANIFEST_FILE, Manifest, ShardFile, no_manifest};
use crate::shard::pages::{self, batches};
use crate::shard::schema::{columns, difference, from_batch};
use crate::shard::store::Store;

pub(super) const REMEDY: &str = "restore the file, or prepare the data again with `data-prep build`";

/// Folder that `data-prep build` wrote.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use data_prep::shard::ShardFolder;
///
/// let shards = ShardFolder::open(Path::new("runs/quickstart-data"))?;
/// println!("{} faces of {} photos", shards.manifest().kept, shards.manifest().photos);
/// for group in shards.row_groups() {
///     match shards.read(group) {
///         Ok(faces) => faces.iter().for_each(|face| println!("{}: {}", face.key, face.caption)),
///         Err(error) => println!("{}: {}", shards.file(group), error.damage()?),
///     }
/// }
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct ShardFolder {
    store: Store,
    manifest: Manifest,
    checksum: String,
    row_groups: Vec<RowGroup>,
}

/// Row group, which is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowGroup {
    /// Number of its shard, from 0.
    pub shard: usize,
    /// Its number in that shard, from 0.
    pub index: usize,
    /// Number of its first face in the folder, from 0.
    pub first_row: usize,
    /// Number of faces in it.
    pub rows: usize,
}

impl ShardFolder {
    /// Opens the shard folder `dir`. Reads the manifest and checks that the shards exist, without reading them.
    ///
    /// # Errors
    /// Input, with the file: no manifest, a damaged one or one of another schema version; a shard that is missing or
    /// differs in size from the manifest.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.join(MANIFEST_FILE).exists() {
            return Err(no_manifest(dir));
        }
        let root = Root::open(dir)?;
        let folder = Self::of_store(Store::Folder(Root::open(dir)?))?;
        for shard in &folder.manifest.shards {
            let path = dir.join(&shard.file);
            let found = root.open_file(Path::new(&shard.file)).and_then(|file| file.metadata());
            let bytes = found.map_err(|source| unreadable(&path, source))?.len();
            if bytes != shard.bytes {
                let problem = format!("holds {bytes} bytes, manifest.json says {}", shard.bytes);
                return Err(Error::file(&path, problem, REMEDY));
            }
        }
        Ok(folder)
    }

    /// Opens the shard folder behind `url`: `s3://`, `gs://`, `http://` or `https://`.
    ///
    /// # Errors
    /// Input: as [`open`](Self::open), an unsupported URL, missing credentials, or a build without the feature `cloud`.
    /// Disk: the provider cannot be reached.
    pub fn open_remote(url: &str, config: &RemoteConfig) -> Result<Self> {
        Self::of_store(Store::remote(url, config)?)
    }

    fn of_store(store: Store) -> Result<Self> {
        let text = store.read_manifest()?;
        let manifest = Manifest::parse(&text, &store.locate(MANIFEST_FILE))?;
        let mut row_groups = Vec::new();
        let mut first_row = 0;
        for (shard, file) in manifest.shards.iter().enumerate() {
            for (index, group) in file.row_groups.iter().enumerate() {
                row_groups.push(RowGroup { shard, index, first_row, rows: group.rows });
                first_row += group.rows;
            }
        }
        Ok(Self { store, manifest, checksum: sha256_of(&text), row_groups })
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the SHA-256 of the manifest, which contains the checksums of everything that is read.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// Returns the folder, for messages.
    pub fn origin(&self) -> PathBuf {
        self.store.locate("")
    }

    /// Returns all row groups, in the order of their rows.
    pub fn row_groups(&self) -> &[RowGroup] {
        &self.row_groups
    }

    /// Returns the file of a row group, for messages.
    pub fn file(&self, group: &RowGroup) -> &str {
        self.manifest.shards.get(group.shard).map_or("", |shard| shard.file.as_str())
    }

    /// Reads the faces of one row group, in order. Checks its checksum, and that each row can be a face.
    ///
    /// # Errors
    /// Damaged: content that differs from what was written, or is not a face. Failed with Input or Disk: the file cannot
    /// be read.
    pub fn read(&self, group: &RowGroup) -> std::result::Result<Vec<FaceRecord>, ReadError> {
        let shard = self.manifest.shards.get(group.shard);
        let Some((shard, piece)) = shard.and_then(|shard| Some((shard, shard.row_group(group.index)?))) else {
            return Err(Error::Fault(format!("no row group {} in shard {}", group.index, group.shard)).into());
        };
        let footer = self.store.read_piece(&shard.file, &shard.footer()).map_err(|error| match error {
            ReadError::Damaged(damage) => Damage(format!("the footer of the file: {damage}")).into(),
            failed @ ReadError::Failed(_) => failed,
        })?;
        let footer = Window { file: shard.bytes, offset: shard.footer().offset, bytes: footer };
        let rows = self.store.read_piece(&shard.file, &piece)?;
        let rows = Window { file: shard.bytes, offset: piece.offset, bytes: rows };
        Ok(decode(footer, rows, group)?)
    }

    /// Compares all checksums with the manifest's.
    ///
    /// # Errors
    /// Input, with the file: the content differs from what was written.
    pub fn verify(&self) -> Result<()> {
        self.labels(|_, _| ())?;
        for shard in &self.manifest.shards {
            let groups = (0..shard.row_groups.len()).filter_map(|index| Some((Some(index), shard.row_group(index)?)));
            for (index, piece) in groups.chain([(None, shard.footer())]) {
                if let Err(error) = self.store.read_piece(&shard.file, &piece) {
                    return Err(self.damaged(shard, index, &error.damage()?));
                }
            }
        }
        Ok(())
    }

    fn damaged(&self, shard: &ShardFile, group: Option<usize>, damage: &Damage) -> Error {
        let what = group.map_or("the footer".into(), |index| format!("row group {index}"));
        Error::file(&self.store.locate(&shard.file), format!("{what} is damaged: {damage}"), REMEDY)
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }
}

fn decode(footer: Window, rows: Window, group: &RowGroup) -> std::result::Result<Vec<FaceRecord>, Damage> {
    let damage = |error: &dyn Display| Damage(error.to_string());
    let metadata = pages::footer(&footer).map_err(|error| damage(&error))?;
    if let Some(difference) = difference(metadata.schema().fields()) {
        return Err(Damage(difference));
    }
    let metadata = metadata.metadata();
    if group.index >= metadata.num_row_groups() {
        return Err(Damage("the file has fewer row groups".into()));
    }
    let found = metadata.row_group(group.index).num_rows();
    if usize::try_from(found) != Ok(group.rows) {
        return Err(Damage(format!("the footer counts {found} rows, manifest.json {}", group.rows)));
    }
    let budget = Arc::new(Budget::of_group(rows.bytes.len() as u64));
    let what = (&columns(), ProjectionMask::all());
    let batches = batches(&Arc::new(rows), metadata, group.index, what, (group.rows.max(1), &budget));
    let mut records = Vec::with_capacity(group.rows);
    for batch in batches.map_err(|error| damage(&error))? {
        let batch = batch.map_err(|error| damage(&error))?;
        if records.len() + batch.num_rows() > group.rows {
            return Err(Damage(format!("it holds more than {} rows", group.rows)));
        }
        records.extend(from_batch(&batch, &budget)?);
    }
    if records.len() != group.rows {
        return Err(Damage(format!("{} rows instead of {}", records.len(), group.rows)));
    }
    Ok(records)
}

/// Part of a Parquet file that stands in for the whole. The rest is never requested.
struct Window {
    /// Size of the whole file.
    file: u64,
    /// Offset of the part.
    offset: u64,
    bytes: Bytes,
}

impl Length for Window {
    fn len(&self) -> u64 {
        self.file
    }
}

impl ChunkReader for Window {
    type T = Box<dyn Read + Send + Sync>;

    fn get_read(&self, start: u64) -> std::result::Result<Self::T, ParquetError> {
        let length = self.offset.saturating_add(self.bytes.len() as u64).saturating_sub(start);
        Ok(Box::new(self.get_bytes(start, usize::try_from(length)?)?.reader()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> std::result::Result<Bytes, ParquetError> {
        let from = start.checked_sub(self.offset).and_then(|from| usize::try_from(from).ok());
        let range = from.and_then(|from| Some(from..from.checked_add(length)?));
        match range {
            Some(range) if range.end <= self.bytes.len() => Ok(self.bytes.slice(range)),
            _ => Err(ParquetError::EOF(format!("{length} bytes at {start} lie outside of the part"))),
        }
    }
}
