//! `index.parquet`: key, person and split of every row of a shard folder, so that an epoch can be planned, and what is
//! damaged be named, without touching a shard.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;

use crate::error::{Error, Result};
use crate::shard::FaceRecord;
use crate::shard::manifest::{IndexFile, Piece, sha256_of_file};
use crate::shard::reader::{REMEDY, ShardFolder};
use crate::shard::writer::{reproducible, write_error};

/// Name of the index in its folder.
pub const INDEX_FILE: &str = "index.parquet";

/// The labels of one row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowLabel {
    /// Who it is, where the source says so.
    pub identity: Option<String>,
    /// Which part of an experiment the photo belongs to, where the source says so.
    pub split: Option<String>,
}

impl ShardFolder {
    /// The labels of all rows, in order.
    ///
    /// # Errors
    /// Input for a missing or damaged index, Disk for a failing disk.
    pub fn labels(&self) -> Result<Vec<RowLabel>> {
        let mut labels = Vec::with_capacity(self.manifest().kept);
        self.scan_index(["identity", "split"], |[identities, splits]| {
            let owned = |text: Option<&str>| text.map(str::to_owned);
            let rows = identities.iter().zip(splits);
            labels.extend(rows.map(|(identity, split)| RowLabel { identity: owned(identity), split: owned(split) }));
        })?;
        if labels.len() != self.manifest().kept {
            return Err(self.bad_index(format!("holds {} rows instead of {}", labels.len(), self.manifest().kept)));
        }
        Ok(labels)
    }

    /// The keys of some rows, by their number in the folder.
    ///
    /// # Errors
    /// As [`labels`](Self::labels).
    pub fn keys(&self, rows: Range<usize>) -> Result<Vec<String>> {
        let mut keys = Vec::with_capacity(rows.len());
        let mut first = 0;
        self.scan_index(["key"], |[column]| {
            let of_batch = column.iter().enumerate().filter(|(row, _)| rows.contains(&(first + row)));
            keys.extend(of_batch.filter_map(|(_, key)| key.map(str::to_owned)));
            first += column.len();
        })?;
        Ok(keys)
    }

    /// Shows the named columns to `visit`, batch by batch.
    fn scan_index<const N: usize>(&self, names: [&str; N], mut visit: impl FnMut([&StringArray; N])) -> Result<()> {
        let IndexFile { file, bytes, sha256 } = self.manifest().index.clone();
        let read = self.store().read_piece(&file, &Piece { offset: 0, bytes, sha256 })?;
        let bytes = read.map_err(|damage| self.bad_index(format!("is damaged: {damage}")))?;
        let unreadable = |error: &dyn std::fmt::Display| self.bad_index(format!("is damaged: {error}"));
        let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|error| unreadable(&error))?;
        let columns = ProjectionMask::columns(builder.parquet_schema(), names);
        let batches = builder.with_projection(columns).build().map_err(|error| unreadable(&error))?;
        for batch in batches {
            let batch = batch.map_err(|error| unreadable(&error))?;
            let strings = |name: &str| batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
            let found: Vec<&StringArray> = names.iter().filter_map(|name| strings(name)).collect();
            visit(found.try_into().map_err(|_| unreadable(&format_args!("not every one of {names:?} is a string")))?);
        }
        Ok(())
    }

    fn bad_index(&self, problem: String) -> Error {
        Error::file(&self.store().place(&self.manifest().index.file), problem, REMEDY)
    }
}

/// Writes the index while the shards are written.
pub(super) struct IndexWriter {
    path: PathBuf,
    writer: ArrowWriter<File>,
}

impl IndexWriter {
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX_FILE);
        let output = File::create(&path).map_err(|source| Error::write(&path, source))?;
        let properties = reproducible(WriterProperties::builder()).build();
        let writer = ArrowWriter::try_new(output, Arc::new(schema()), Some(properties))
            .map_err(|error| write_error(&path, error))?;
        Ok(Self { path, writer })
    }

    pub(super) fn push(&mut self, records: &[FaceRecord]) -> Result<()> {
        let fault = |error: ArrowError| Error::Fault(format!("{}: {error}", self.path.display()));
        let batch = to_batch(records).map_err(fault)?;
        self.writer.write(&batch).map_err(|error| write_error(&self.path, error))
    }

    pub(super) fn close(self) -> Result<IndexFile> {
        let Self { path, writer } = self;
        writer.close().map_err(|error| write_error(&path, error))?;
        let bytes = std::fs::metadata(&path).map_err(|source| Error::read(&path, source))?.len();
        Ok(IndexFile { file: INDEX_FILE.into(), bytes, sha256: sha256_of_file(&path)? })
    }
}

fn schema() -> Schema {
    Schema::new(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("identity", DataType::Utf8, true),
        Field::new("split", DataType::Utf8, true),
    ])
}

fn to_batch(records: &[FaceRecord]) -> std::result::Result<RecordBatch, ArrowError> {
    let keys: ArrayRef = Arc::new(StringArray::from_iter_values(records.iter().map(|record| &record.key)));
    let identities: ArrayRef = Arc::new(records.iter().map(|r| r.identity.as_deref()).collect::<StringArray>());
    let splits: ArrayRef = Arc::new(records.iter().map(|r| r.split.as_deref()).collect::<StringArray>());
    RecordBatch::try_new(Arc::new(schema()), vec![keys, identities, splits])
}
