//! `index.parquet`: key, identity and split of every row of a shard folder, to plan an epoch and to name damaged rows
//! without reading a shard.

use std::fmt::Display;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use hyperlora_core::hash::sha256_of_file;
use hyperlora_core::{Error, Result};
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::file::properties::WriterProperties;

use crate::shard::FaceRecord;
use crate::shard::limits::{Budget, LABEL_BYTES};
use crate::shard::manifest::{IndexFile, Piece};
use crate::shard::output::{reproducible, write_error};
use crate::shard::pages::{self, batches};
use crate::shard::reader::{REMEDY, ShardFolder};

/// Name of the index in its folder.
pub const INDEX_FILE: &str = "index.parquet";

/// Rows that are decoded at once.
const BATCH: usize = 1024;

/// Key, identity and split of a row.
type Row<'a> = (&'a str, Option<&'a str>, Option<&'a str>);

impl ShardFolder {
    /// Passes the identity and the split of each row to `visit`, in the order of the rows.
    ///
    /// # Errors
    /// Input: the index is missing or damaged, its keys are not in order and unique, or it has more or fewer rows than
    /// the shards. Disk: a failing disk.
    pub fn labels(&self, mut visit: impl FnMut(Option<&str>, Option<&str>)) -> Result<()> {
        let (mut rows, mut last) = (0, String::new());
        self.scan_index(|(key, identity, split)| {
            let (row, labels) = (rows, [Some(key), identity, split]);
            rows += 1;
            if labels.into_iter().flatten().any(|label| label.len() > LABEL_BYTES) {
                return Err(format!("has a name of more than {LABEL_BYTES} bytes in row {row}"));
            }
            if row > 0 && *key <= *last {
                return Err(format!("has the key `{key}` in row {row}, behind `{last}`: not in order, or twice"));
            }
            last.replace_range(.., key);
            visit(identity, split);
            Ok(())
        })?;
        let expected = self.manifest().kept;
        if rows == expected { Ok(()) } else { Err(self.bad_index(format!("holds {rows} rows instead of {expected}"))) }
    }

    /// Returns the keys of some rows, by their number in the folder.
    ///
    /// # Errors
    /// Input: a missing or damaged index. Disk: a failing disk.
    pub fn keys(&self, rows: Range<usize>) -> Result<Vec<String>> {
        let (mut row, mut keys) = (0, Vec::new());
        self.scan_index(|(key, ..)| {
            if rows.contains(&row) {
                keys.push(key.to_owned());
            }
            row += 1;
            Ok(())
        })?;
        Ok(keys)
    }

    /// Passes the rows to `visit` until it reports a problem.
    fn scan_index(&self, mut visit: impl FnMut(Row<'_>) -> std::result::Result<(), String>) -> Result<()> {
        let IndexFile { file, bytes, sha256 } = self.manifest().index.clone();
        let bytes = match self.store().read_piece(&file, &Piece { offset: 0, bytes, sha256 }) {
            Ok(bytes) => Arc::new(bytes),
            Err(error) => return Err(self.bad_index(format!("is damaged: {}", error.damage()?))),
        };
        let damaged = |error: &dyn Display| self.bad_index(format!("is damaged: {error}"));
        let metadata = pages::footer(bytes.as_ref()).map_err(|error| damaged(&error))?;
        let expected = schema();
        if metadata.schema().fields() != expected.fields() {
            return Err(damaged(&"it has other columns than key, identity and split"));
        }
        let mut left = self.manifest().kept;
        for group in 0..metadata.metadata().num_row_groups() {
            let (what, budget) = ((expected.fields(), ProjectionMask::all()), Arc::new(Budget::of_index()));
            let batches = batches(&bytes, metadata.metadata(), group, what, (BATCH, &budget));
            for batch in batches.map_err(|error| damaged(&error))? {
                let batch = batch.map_err(|error| damaged(&error))?;
                left =
                    left.checked_sub(batch.num_rows()).ok_or_else(|| damaged(&"it has more rows than the shards"))?;
                let column = |number: usize| {
                    let column = batch.columns().get(number).and_then(|column| column.as_string_view_opt());
                    column.ok_or_else(|| damaged(&"it has other columns than key, identity and split"))
                };
                for ((key, identity), split) in column(0)?.iter().zip(column(1)?).zip(column(2)?) {
                    let key = key.ok_or_else(|| damaged(&"a key is null"))?;
                    visit((key, identity, split)).map_err(|problem| self.bad_index(problem))?;
                }
            }
        }
        Ok(())
    }

    fn bad_index(&self, problem: String) -> Error {
        Error::file(&self.store().locate(&self.manifest().index.file), problem, REMEDY)
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
