//! Who is in which row and which split it belongs to, without reading a single photo.

use std::path::Path;

use arrow::array::{AsArray, RecordBatch, StringArray};
use arrow::error::ArrowError;
use parquet::arrow::ProjectionMask;

use crate::error::{Error, Result};
use crate::shard::reader::{REMEDY, RowGroup, ShardFolder, reader};

/// The labels of one row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowLabel {
    /// Who it is, where the source says so.
    pub identity: Option<String>,
    /// Which part of an experiment the photo belongs to, where the source says so.
    pub split: Option<String>,
}

impl ShardFolder {
    /// The labels of all rows, in order; every shard is opened once.
    ///
    /// # Errors
    /// Input, with the file: damaged data.
    pub fn labels(&self) -> Result<Vec<RowLabel>> {
        let mut labels = Vec::with_capacity(self.manifest().kept);
        for groups in self.row_groups().chunk_by(|a, b| a.file == b.file) {
            labels.extend(labels_of_shard(groups)?);
        }
        Ok(labels)
    }
}

/// The labels of the row groups of one shard, at least one and in order.
fn labels_of_shard(groups: &[RowGroup]) -> Result<Vec<RowLabel>> {
    let [first, ..] = groups else { return Ok(Vec::new()) };
    let rows: usize = groups.iter().map(|group| group.rows).sum();
    let unreadable = |error: &dyn std::fmt::Display| damaged_labels(&first.file, error);
    let builder = reader(&first.file)?;
    let columns = ProjectionMask::columns(builder.parquet_schema(), ["identity", "split"]);
    let batches = builder.with_projection(columns).build().map_err(|error| unreadable(&error))?;
    let mut labels = Vec::with_capacity(rows);
    for batch in batches {
        labels.extend(batch.and_then(|batch| labels_of(&batch)).map_err(|error| unreadable(&error))?);
    }
    if labels.len() != rows {
        return Err(unreadable(&format_args!("{} rows instead of {rows}", labels.len())));
    }
    Ok(labels)
}

fn damaged_labels(file: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::file(file, format!("its columns `identity` and `split` are damaged: {error}"), REMEDY)
}

fn labels_of(batch: &RecordBatch) -> std::result::Result<Vec<RowLabel>, ArrowError> {
    let column = |name: &str| {
        let strings = batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
        strings.ok_or_else(|| ArrowError::SchemaError(format!("column `{name}` is missing or no string")))
    };
    let owned = |text: Option<&str>| text.map(str::to_owned);
    let (identities, splits): (&StringArray, &StringArray) = (column("identity")?, column("split")?);
    let rows = identities.iter().zip(splits);
    Ok(rows.map(|(identity, split)| RowLabel { identity: owned(identity), split: owned(split) }).collect())
}
