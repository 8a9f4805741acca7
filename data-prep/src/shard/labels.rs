//! Who is in a row group and which split its rows belong to, without reading a single photo.

use arrow::array::{AsArray, RecordBatch, StringArray};
use arrow::error::ArrowError;
use parquet::arrow::ProjectionMask;

use crate::error::Result;
use crate::shard::reader::{RowGroup, ShardFolder, damaged, reader};

/// The labels of one row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowLabel {
    /// Who it is, where the source says so.
    pub identity: Option<String>,
    /// Which part of an experiment the photo belongs to, where the source says so.
    pub split: Option<String>,
}

impl ShardFolder {
    /// The labels of one row group, in the order of its rows.
    ///
    /// # Errors
    /// Input, with the file: damaged data.
    pub fn labels(&self, group: &RowGroup) -> Result<Vec<RowLabel>> {
        let builder = reader(&group.file)?;
        let columns = ProjectionMask::columns(builder.parquet_schema(), ["identity", "split"]);
        let batches = builder
            .with_projection(columns)
            .with_row_groups(vec![group.index])
            .with_batch_size(group.rows.max(1))
            .build()
            .map_err(|error| damaged(group, &error))?;
        let mut labels = Vec::with_capacity(group.rows);
        for batch in batches {
            let of_batch = batch.and_then(|batch| labels_of(&batch)).map_err(|error| damaged(group, &error))?;
            labels.extend(of_batch);
        }
        if labels.len() != group.rows {
            return Err(damaged(group, &format_args!("{} rows instead of {}", labels.len(), group.rows)));
        }
        Ok(labels)
    }
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
