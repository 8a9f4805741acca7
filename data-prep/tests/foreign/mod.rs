//! Shards that `ShardWriter` would not write, in a folder whose checksums are right.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Float32Type, Schema};
use data_prep::shard::{INDEX_FILE, MANIFEST_FILE, Manifest, ShardFolder};
use hyperlora_core::hash::sha256_of;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};

/// How a file is written, if not as usual.
pub(crate) type Way = fn(WriterPropertiesBuilder) -> WriterPropertiesBuilder;

/// Shard that is replaced.
const SHARD: &str = "shard-00002.parquet";

/// Reads the two rows of that shard, as they were written.
pub(crate) fn sound(dir: &Path) -> RecordBatch {
    read(&dir.join(SHARD))
}

/// Reads the rows of the index.
pub(crate) fn index(dir: &Path) -> RecordBatch {
    read(&dir.join(INDEX_FILE))
}

fn read(file: &Path) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(file).unwrap()).unwrap();
    reader.build().unwrap().next().unwrap().unwrap()
}

/// Replaces the column `name` of the rows.
pub(crate) fn with(batch: &RecordBatch, name: &str, column: ArrayRef) -> RecordBatch {
    let place = batch.schema().index_of(name).unwrap();
    let mut fields: Vec<_> = batch.schema().fields().iter().cloned().collect();
    let nullable = fields[place].is_nullable() || column.null_count() > 0;
    fields[place] = Arc::new(Field::new(name, column.data_type().clone(), nullable));
    let mut columns = batch.columns().to_vec();
    columns[place] = column;
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

/// Returns all numbers of a column of lists.
pub(crate) fn floats(batch: &RecordBatch, name: &str) -> Vec<f32> {
    let lists = batch.column_by_name(name).unwrap().as_fixed_size_list();
    lists.values().as_primitive::<Float32Type>().values().to_vec()
}

pub(crate) fn fixed_lists(length: i32, values: Vec<f32>) -> ArrayRef {
    Arc::new(FixedSizeListArray::new(element(), length, Arc::new(Float32Array::from(values)), None))
}

pub(crate) fn lists(rows: &[&[f32]]) -> ArrayRef {
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.len()));
    Arc::new(ListArray::new(element(), offsets, Arc::new(Float32Array::from(rows.concat())), None))
}

fn element() -> Arc<Field> {
    Arc::new(Field::new("element", DataType::Float32, false))
}

/// Writes the rows as one row group of the shard, and updates the manifest.
pub(crate) fn replace(dir: &Path, batches: &[RecordBatch]) {
    replace_with(dir, batches, |properties| properties);
}

/// As [`replace`], written in another way.
pub(crate) fn replace_with(dir: &Path, batches: &[RecordBatch], way: Way) {
    let bytes = parquet(batches, way);
    let footer = u32::from_le_bytes(bytes[bytes.len() - 8..][..4].try_into().unwrap()) as usize + 8;
    seal(dir, &bytes, bytes.len() - footer, batches.iter().map(RecordBatch::num_rows).sum());
}

/// Returns the shard's bytes, and the position of its footer.
pub(crate) fn bytes(dir: &Path) -> (Vec<u8>, usize) {
    let shard = &Manifest::read(dir).unwrap().shards[2];
    let last = &shard.row_groups[0];
    (fs::read(dir.join(SHARD)).unwrap(), (last.offset + last.bytes) as usize)
}

/// Makes `bytes` the shard, with one row group up to `end`, and updates the manifest.
pub(crate) fn seal(dir: &Path, bytes: &[u8], end: usize, rows: usize) {
    fs::write(dir.join(SHARD), bytes).unwrap();
    let mut manifest = Manifest::read(dir).unwrap();
    let shard = &mut manifest.shards[2];
    let piece = &mut shard.row_groups[0];
    (piece.rows, piece.offset, piece.bytes, piece.sha256) = (rows, 4, end as u64 - 4, sha256_of(&bytes[4..end]));
    (shard.rows, shard.bytes, shard.footer_sha256) = (rows, bytes.len() as u64, sha256_of(&bytes[end..]));
    manifest.kept = 8 + rows;
    write_manifest(dir, &manifest);
}

/// Writes the rows as the index, and its checksum into the manifest.
pub(crate) fn replace_index(dir: &Path, batches: &[RecordBatch]) {
    seal_index(dir, &parquet(batches, |properties| properties));
}

/// The index as it is without compression: a change of a byte reaches the values.
pub(crate) fn plain_index(dir: &Path) -> Vec<u8> {
    parquet(&[index(dir)], |properties| properties.set_compression(Compression::UNCOMPRESSED))
}

/// Makes `bytes` the index, and writes the manifest for it.
pub(crate) fn seal_index(dir: &Path, bytes: &[u8]) {
    fs::write(dir.join(INDEX_FILE), bytes).unwrap();
    let mut manifest = Manifest::read(dir).unwrap();
    (manifest.index.bytes, manifest.index.sha256) = (bytes.len() as u64, sha256_of(bytes));
    write_manifest(dir, &manifest);
}

/// Not synced: that would take most of a test's time.
fn write_manifest(dir: &Path, manifest: &Manifest) {
    fs::write(dir.join(MANIFEST_FILE), serde_json::to_vec(manifest).unwrap()).unwrap();
}

/// Puts the rows into the shard, and returns the reader's error.
pub(crate) fn problem(dir: &Path, batches: &[RecordBatch]) -> String {
    replace(dir, batches);
    let folder = ShardFolder::open(dir).unwrap();
    folder.read(&folder.row_groups()[4]).unwrap_err().damage().unwrap().to_string()
}

/// Writes one row group that stores each distinct text once, however long it is.
fn parquet(batches: &[RecordBatch], way: Way) -> Vec<u8> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(Default::default()))
        .set_dictionary_page_size_limit(1 << 30)
        .set_column_dictionary_enabled("image".into(), false)
        .set_max_row_group_row_count(Some(1 << 20))
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None)
        .set_offset_index_disabled(true);
    let properties = way(properties).build();
    let fields: Vec<Field> = (0..batches[0].num_columns())
        .map(|place| {
            let nullable = batches.iter().any(|batch| batch.schema().field(place).is_nullable());
            batches[0].schema().field(place).clone().with_nullable(nullable)
        })
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, Arc::clone(&schema), Some(properties)).unwrap();
    for batch in batches {
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), batch.columns().to_vec()).unwrap()).unwrap();
    }
    writer.close().unwrap();
    bytes
}
