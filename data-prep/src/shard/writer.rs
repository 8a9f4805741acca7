//! Writes rows as zstd Parquet shards; the same rows give the same bytes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::shard::FaceRecord;
use crate::shard::manifest::{ShardFile, sha256_of_file};
use crate::shard::schema::{EMBEDDING_DIM, SCHEMA_VERSION, schema, to_batch};

/// How rows are cut into files and row groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardConfig {
    /// Faces per row group, the unit that training reads at once.
    pub rows_per_group: usize,
    /// Faces per file; a multiple of `rows_per_group`.
    pub rows_per_shard: usize,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self { rows_per_group: 64, rows_per_shard: 4096 }
    }
}

impl ShardConfig {
    /// Checks that full files hold whole row groups.
    ///
    /// # Errors
    /// Input, at `place`: zero, or not a multiple.
    pub fn validate(&self, place: &str) -> Result<()> {
        if self.rows_per_group == 0
            || self.rows_per_shard == 0
            || !self.rows_per_shard.is_multiple_of(self.rows_per_group)
        {
            return Err(Error::input(
                place,
                format!("rows_per_shard is {}, rows_per_group is {}", self.rows_per_shard, self.rows_per_group),
                "make rows_per_shard a positive multiple of rows_per_group",
            ));
        }
        Ok(())
    }
}

/// Takes rows in order and writes `shard-00000.parquet`, `shard-00001.parquet`, ... into a folder.
pub struct ShardWriter {
    dir: PathBuf,
    config: ShardConfig,
    metadata: Vec<KeyValue>,
    pending: Vec<FaceRecord>,
    open: Option<OpenShard>,
    finished: Vec<ShardFile>,
}

struct OpenShard {
    file: String,
    writer: ArrowWriter<File>,
    rows: usize,
}

impl ShardWriter {
    /// A writer into the existing folder `dir`. `models` (role, name) go into each shard's key-value metadata.
    pub fn new<'a>(
        dir: &Path,
        config: &ShardConfig,
        models: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Self {
        let mut metadata = vec![KeyValue::new("hyperlora.schema_version".into(), SCHEMA_VERSION.to_string())];
        metadata.extend(
            models.into_iter().map(|(role, name)| KeyValue::new(format!("hyperlora.model.{role}"), name.clone())),
        );
        Self {
            dir: dir.into(),
            config: config.clone(),
            metadata,
            pending: Vec::with_capacity(config.rows_per_group),
            open: None,
            finished: Vec::new(),
        }
    }

    /// Adds one row.
    ///
    /// # Errors
    /// Fault for a row that breaks the schema, Input or Disk where the folder cannot be written.
    pub fn push(&mut self, record: FaceRecord) -> Result<()> {
        if record.id_embedding.len() != EMBEDDING_DIM {
            let length = record.id_embedding.len();
            return Err(Error::Fault(format!("{}: an ID embedding of {length}, not {EMBEDDING_DIM}", record.key)));
        }
        self.pending.push(record);
        if self.pending.len() == self.config.rows_per_group { self.write_group() } else { Ok(()) }
    }

    /// Writes what is left and closes the last file.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn finish(mut self) -> Result<Vec<ShardFile>> {
        if !self.pending.is_empty() {
            self.write_group()?;
        }
        self.close()?;
        Ok(self.finished)
    }

    fn write_group(&mut self) -> Result<()> {
        let mut shard = match self.open.take() {
            Some(shard) => shard,
            None => self.create()?,
        };
        let path = self.dir.join(&shard.file);
        let batch = to_batch(&self.pending).map_err(|error| Error::Fault(format!("{}: {error}", path.display())))?;
        shard.writer.write(&batch).and_then(|()| shard.writer.flush()).map_err(|error| write_error(&path, error))?;
        shard.rows += self.pending.len();
        self.pending.clear();
        let full = shard.rows >= self.config.rows_per_shard;
        self.open = Some(shard);
        if full { self.close() } else { Ok(()) }
    }

    fn create(&self) -> Result<OpenShard> {
        let file = format!("shard-{:05}.parquet", self.finished.len());
        let path = self.dir.join(&file);
        let output = File::create(&path).map_err(|source| Error::write(&path, source))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(self.config.rows_per_group))
            // The library's default names its own version: an upgrade would change every byte.
            .set_created_by("hyperlora data-prep".into())
            // Dictionaries where values repeat. Bounds of images and embeddings would only cost space.
            .set_dictionary_enabled(false)
            .set_column_dictionary_enabled("caption".into(), true)
            .set_column_dictionary_enabled("identity".into(), true)
            .set_column_dictionary_enabled("split".into(), true)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_key_value_metadata(Some(self.metadata.clone()))
            .build();
        let writer = ArrowWriter::try_new(output, Arc::new(schema()), Some(properties))
            .map_err(|error| write_error(&path, error))?;
        Ok(OpenShard { file, writer, rows: 0 })
    }

    fn close(&mut self) -> Result<()> {
        let Some(OpenShard { file, writer, rows }) = self.open.take() else { return Ok(()) };
        let path = self.dir.join(&file);
        writer.close().map_err(|error| write_error(&path, error))?;
        let bytes = std::fs::metadata(&path).map_err(|source| Error::read(&path, source))?.len();
        let sha256 = sha256_of_file(&path)?;
        self.finished.push(ShardFile { file, rows, bytes, sha256 });
        Ok(())
    }
}

/// What the disk refused is told as the disk's, the rest is a fault of the program.
fn write_error(path: &Path, error: ParquetError) -> Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => Error::write(path, *source),
            Err(other) => Error::Fault(format!("{}: {other}", path.display())),
        },
        other => Error::Fault(format!("{}: {other}", path.display())),
    }
}
