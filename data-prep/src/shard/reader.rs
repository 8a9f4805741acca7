//! Reads a shard folder, one row group at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::error::{Error, Result};
use crate::shard::FaceRecord;
use crate::shard::manifest::{Manifest, ShardFile, sha256_of_file};
use crate::shard::schema::{difference, from_batch};

pub(super) const REMEDY: &str = "restore the file, or prepare the data again with `data-prep build`";

/// A folder that `data-prep build` wrote.
#[derive(Debug, Clone)]
pub struct ShardFolder {
    dir: PathBuf,
    manifest: Manifest,
    row_groups: Vec<RowGroup>,
}

/// The unit that is read at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowGroup {
    /// The shard it lies in.
    pub file: PathBuf,
    /// Its number in that shard, from 0.
    pub index: usize,
    /// Number of faces in it.
    pub rows: usize,
}

impl ShardFolder {
    /// Opens the shard folder `dir`: reads the manifest and each shard's footer, no faces.
    ///
    /// # Errors
    /// Input, with the file: no manifest or one of another schema version; a shard that is missing, truncated, not
    /// Parquet, has other columns, or whose size or row count is not the manifest's.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let mut row_groups = Vec::new();
        for shard in &manifest.shards {
            row_groups.extend(row_groups_of(&dir.join(&shard.file), shard)?);
        }
        let rows: usize = row_groups.iter().map(|group| group.rows).sum();
        if rows != manifest.kept {
            let problem = format!("the manifest counts {} faces, its shards hold {rows}", manifest.kept);
            return Err(Error::file(dir, problem, REMEDY));
        }
        Ok(Self { dir: dir.into(), manifest, row_groups })
    }

    /// What the manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// All row groups, in the order of their rows.
    pub fn row_groups(&self) -> &[RowGroup] {
        &self.row_groups
    }

    /// The faces of one row group, in order.
    ///
    /// # Errors
    /// Input, with the file: damaged data.
    pub fn read(&self, group: &RowGroup) -> Result<Vec<FaceRecord>> {
        let batches = reader(&group.file)?
            .with_row_groups(vec![group.index])
            .with_batch_size(group.rows.max(1))
            .build()
            .map_err(|error| damaged(group, &error))?;
        let mut records = Vec::with_capacity(group.rows);
        for batch in batches {
            let batch = batch.map_err(|error| damaged(group, &error))?;
            records.extend(from_batch(&batch).map_err(|error| damaged(group, &error))?);
        }
        if records.len() != group.rows {
            return Err(damaged(group, &format_args!("{} rows instead of {}", records.len(), group.rows)));
        }
        Ok(records)
    }

    /// Compares every shard's checksum with the manifest's.
    ///
    /// # Errors
    /// Input, with the file: the content is not what was written.
    pub fn verify(&self) -> Result<()> {
        self.manifest.shards.iter().try_for_each(|shard| self.verify_shard(&self.dir.join(&shard.file)))
    }

    /// Compares the checksum of one shard, as [`RowGroup::file`] names it, with the manifest's.
    ///
    /// # Errors
    /// Input, with the file: the content is not what was written, or the manifest knows no such shard.
    pub fn verify_shard(&self, file: &Path) -> Result<()> {
        let expected = self.manifest.shards.iter().find(|shard| self.dir.join(&shard.file) == file);
        match expected {
            Some(shard) if shard.sha256 == sha256_of_file(file)? => Ok(()),
            _ => Err(Error::file(file, "its SHA-256 is not the one in manifest.json", REMEDY)),
        }
    }
}

fn row_groups_of(path: &Path, expected: &ShardFile) -> Result<Vec<RowGroup>> {
    let bytes = std::fs::metadata(path).map_err(|source| Error::read(path, source))?.len();
    if bytes != expected.bytes {
        let problem = format!("holds {bytes} bytes, manifest.json says {}", expected.bytes);
        return Err(Error::file(path, problem, REMEDY));
    }
    let builder = reader(path)?;
    if let Some(difference) = difference(builder.schema().fields()) {
        return Err(Error::file(path, difference, REMEDY));
    }
    let groups = builder.metadata().row_groups().iter().enumerate().map(|(index, group)| {
        let rows = usize::try_from(group.num_rows())
            .map_err(|_| Error::file(path, format!("row group {index} counts {} rows", group.num_rows()), REMEDY))?;
        Ok(RowGroup { file: path.into(), index, rows })
    });
    let groups = groups.collect::<Result<Vec<_>>>()?;
    let rows: usize = groups.iter().map(|group| group.rows).sum();
    if rows != expected.rows {
        let problem = format!("holds {rows} rows, manifest.json says {}", expected.rows);
        return Err(Error::file(path, problem, REMEDY));
    }
    Ok(groups)
}

fn damaged(group: &RowGroup, error: &dyn std::fmt::Display) -> Error {
    Error::file(&group.file, format!("row group {} is damaged: {error}", group.index), REMEDY)
}

pub(super) fn reader(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path).map_err(|source| Error::read(path, source))?;
    ParquetRecordBatchReaderBuilder::try_new(file)
        .map_err(|error| Error::file(path, format!("is truncated or not a Parquet file: {error}"), REMEDY))
}
