//! Writer of zstd Parquet shards. The same rows give the same bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyperlora_core::hash::{hex, sha256_of};
use hyperlora_core::{Error, Result};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::{ColumnChunkMetaData, KeyValue, ParquetMetaData};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::shard::index::IndexWriter;
use crate::shard::limits::ROWS_PER_GROUP;
use crate::shard::manifest::{IndexFile, RowGroupPiece, ShardFile};
use crate::shard::output::{reproducible, write_error};
use crate::shard::schema::{SCHEMA_VERSION, schema, to_batch};
use crate::shard::{EMBEDDING_DIM, FaceRecord};

/// Sizes of row groups and files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShardConfig {
    /// Faces per row group, which training reads at once; 1 to 65536.
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
    /// Checks that full files contain whole row groups, of a size that the reader accepts.
    ///
    /// # Errors
    /// Input, at `place`: zero, not a multiple, or row groups of more than [`ROWS_PER_GROUP`].
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
        if self.rows_per_group > ROWS_PER_GROUP {
            let problem = format!("rows_per_group is {}", self.rows_per_group);
            return Err(Error::input(place, problem, format!("give at most {ROWS_PER_GROUP}; 64 reads well")));
        }
        Ok(())
    }
}

/// Takes rows in order and writes `shard-00000.parquet`, `shard-00001.parquet`, ... into a folder.
///
/// # Examples
/// ```
/// use std::collections::BTreeMap;
/// use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardFolder, ShardWriter};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// # let mut id_embedding = vec![0.0; EMBEDDING_DIM];
/// # id_embedding[0] = 1.0;
/// # let face = FaceRecord {
/// #     key: "anna/1.jpg".into(),
/// #     image: vec![0; 100],
/// #     width: 64,
/// #     height: 64,
/// #     face_box: [10.0, 10.0, 50.0, 50.0],
/// #     points: [[20.0, 25.0], [40.0, 25.0], [30.0, 35.0], [22.0, 45.0], [38.0, 45.0]],
/// #     landmarks: (15..50_u8).map(|x| [x.into(), 40.0 - f32::from(x) / 4.0]).collect(),
/// #     score: 0.9,
/// #     id_embedding,
/// #     caption: "a photo of a person".into(),
/// #     sha256: "0".repeat(64),
/// #     identity: None,
/// #     split: None,
/// # };
/// let models = BTreeMap::from([("embedder".to_string(), "fr_feature.onnx".to_string())]);
/// let mut writer = ShardWriter::new(folder, &ShardConfig::default(), &models);
/// writer.push(face)?;
/// let written = writer.finish()?;
/// # let (splits, rejected, notes) = Default::default();
/// # let config = Default::default();
/// # let (photos, kept, schema_version) = (1, 1, SCHEMA_VERSION);
/// let (shards, index) = (written.shards, written.index);
/// Manifest { schema_version, photos, kept, splits, rejected, notes, models, shards, index, config }.write(folder)?;
///
/// let shards = ShardFolder::open(folder)?;
/// assert!(shards.read(&shards.row_groups()[0]).is_ok_and(|faces| faces[0].key == "anna/1.jpg"));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub struct ShardWriter {
    dir: PathBuf,
    config: ShardConfig,
    metadata: Vec<KeyValue>,
    pending: Vec<FaceRecord>,
    open: Option<OpenShard>,
    index: Option<IndexWriter>,
    finished: Vec<ShardFile>,
}

/// Files that a [`ShardWriter`] wrote, for the manifest.
#[derive(Debug)]
pub struct Written {
    /// Shards, in the order of their rows.
    pub shards: Vec<ShardFile>,
    /// Index with key, identity and split of all rows.
    pub index: IndexFile,
}

struct OpenShard {
    file: String,
    writer: ArrowWriter<File>,
    rows: usize,
}

impl ShardWriter {
    /// Makes a writer into the existing folder `dir`. `models` (role, name) go into each shard's key-value metadata.
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
            index: None,
            finished: Vec::new(),
        }
    }

    /// Adds one row.
    ///
    /// # Errors
    /// Fault: the row breaks the schema. Input or Disk: the folder cannot be written.
    pub fn push(&mut self, record: FaceRecord) -> Result<()> {
        if record.id_embedding.len() != EMBEDDING_DIM {
            let length = record.id_embedding.len();
            return Err(Error::Fault(format!("{}: an ID embedding of {length}, not {EMBEDDING_DIM}", record.key)));
        }
        self.pending.push(record);
        if self.pending.len() == self.config.rows_per_group { self.write_group() } else { Ok(()) }
    }

    /// Writes the remaining rows and closes the last file.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn finish(mut self) -> Result<Written> {
        if !self.pending.is_empty() {
            self.write_group()?;
        }
        self.close()?;
        let index = match self.index {
            Some(index) => index,
            None => IndexWriter::create(&self.dir)?,
        };
        Ok(Written { shards: self.finished, index: index.close()? })
    }

    fn write_group(&mut self) -> Result<()> {
        let mut shard = match self.open.take() {
            Some(shard) => shard,
            None => self.create()?,
        };
        let path = self.dir.join(&shard.file);
        let batch = to_batch(&self.pending).map_err(|error| Error::Fault(format!("{}: {error}", path.display())))?;
        shard.writer.write(&batch).and_then(|()| shard.writer.flush()).map_err(|error| write_error(&path, error))?;
        let index = match &mut self.index {
            Some(index) => index,
            none => none.insert(IndexWriter::create(&self.dir)?),
        };
        index.push(&self.pending)?;
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
        let properties = reproducible(WriterProperties::builder())
            .set_max_row_group_row_count(Some(self.config.rows_per_group))
            // Dictionaries only for columns whose values repeat. Statistics of images and embeddings would only waste
            // space.
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
        let metadata = writer.close().map_err(|error| write_error(&path, error))?;
        self.finished.push(describe(&path, file, rows, &metadata).map_err(|source| Error::read(&path, source))?);
        Ok(())
    }
}

/// Describes a shard for the manifest. Reads the file back for its checksums.
fn describe(path: &Path, file: String, rows: usize, metadata: &ParquetMetaData) -> std::io::Result<ShardFile> {
    let shard = File::open(path)?;
    let bytes = shard.metadata()?.len();
    let mut whole = Sha256::new();
    let mut read = |from: u64, to: u64| {
        let mut piece = vec![0; (to - from) as usize];
        shard.read_exact_at(&mut piece, from)?;
        whole.update(&piece);
        std::io::Result::Ok(sha256_of(&piece))
    };
    let mut row_groups = Vec::with_capacity(metadata.num_row_groups());
    let mut end = 0;
    for group in metadata.row_groups() {
        let ranges = || group.columns().iter().map(ColumnChunkMetaData::byte_range);
        let offset = ranges().map(|(start, _)| start).min().unwrap_or(end);
        read(end, offset)?;
        end = ranges().map(|(start, length)| start + length).max().unwrap_or(offset);
        let sha256 = read(offset, end)?;
        row_groups.push(RowGroupPiece { rows: group.num_rows() as usize, offset, bytes: end - offset, sha256 });
    }
    let footer_sha256 = read(end, bytes)?;
    let sha256 = hex(&whole.finalize());
    Ok(ShardFile { file, rows, bytes, sha256, row_groups, footer_sha256 })
}
