//! Shard folders: the manifest, and Parquet files that a stranger wrote, whose checksums are therefore right.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use data_prep::shard::{
    FaceRecord, INDEX_FILE, IndexFile, MANIFEST_FILE, Manifest, RowGroupPiece, SCHEMA_VERSION, ShardFile, ShardFolder,
};
use hyperlora_core::hash::sha256_of;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::properties::WriterProperties;

use crate::shard_folder::record;
use hyperlora_testing::fuzz::{Answer, Refusal, fuzz, scratch};

const SHARD: &str = "shard-00000.parquet";

/// Budget of the reader for a small row group and for a page of the index, 64 MiB, and room for the rest.
const MEMORY: usize = 80 << 20;

/// Parquet file with the ranges of its row groups.
#[derive(Clone)]
struct Table {
    bytes: Vec<u8>,
    groups: Vec<(usize, std::ops::Range<usize>)>,
}

/// Reads everything that training reads.
fn read(dir: &Path) -> Answer {
    let folder = ShardFolder::open(dir)?;
    let mut rows = 0;
    folder.labels(|_, _| rows += 1)?;
    assert_eq!(folder.keys(0..rows)?.len(), rows);
    for group in folder.row_groups() {
        match folder.read(group) {
            Ok(records) => assert_eq!(records.len(), group.rows),
            Err(error) => return Err(Refusal::Reason(error.damage()?.to_string())),
        }
    }
    folder.verify()?;
    Ok(())
}

/// Writes four faces as `data-prep` does.
fn small_folder(dir: &Path) -> Manifest {
    let models = BTreeMap::from([("detector".to_owned(), "yunet sha256:00".to_owned())]);
    let config = data_prep::shard::ShardConfig { rows_per_group: 2, rows_per_shard: 4 };
    let mut writer = data_prep::shard::ShardWriter::new(dir, &config, &models);
    for number in 0..4 {
        let record = record(number);
        writer.push(FaceRecord { landmarks: record.landmarks[..4].to_vec(), ..record }).unwrap();
    }
    let written = writer.finish().unwrap();
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        photos: 5,
        kept: 4,
        splits: BTreeMap::from([("train".into(), 2)]),
        rejected: BTreeMap::from([("no_face".into(), 1)]),
        notes: Default::default(),
        models,
        shards: written.shards,
        index: written.index,
        config: serde_json::json!({"margin": 1.5}),
    };
    manifest.write(dir).unwrap();
    manifest
}

/// Returns the file unchanged, and without compression, so that a mutation reaches the values.
fn tables(path: &Path) -> Vec<Table> {
    let plain = tempfile::NamedTempFile::new().unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let properties = WriterProperties::builder().set_compression(Compression::UNCOMPRESSED).build();
    let mut writer =
        ArrowWriter::try_new(plain.reopen().unwrap(), Arc::clone(reader.schema()), Some(properties)).unwrap();
    for batch in reader.with_batch_size(2).build().unwrap() {
        writer.write(&batch.unwrap()).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    [path, plain.path()].map(table).to_vec()
}

fn table(path: &Path) -> Table {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let groups = reader.metadata().row_groups().iter().map(|group| {
        let ranges = || group.columns().iter().map(ColumnChunkMetaData::byte_range);
        let start = ranges().map(|(start, _)| start).min().unwrap();
        let end = ranges().map(|(start, length)| start + length).max().unwrap();
        (group.num_rows() as usize, start as usize..end as usize)
    });
    Table { groups: groups.collect(), bytes: fs::read(path).unwrap() }
}

impl Table {
    /// Describes the file for a manifest.
    fn shard(&self) -> ShardFile {
        let length = self.bytes.len();
        let piece = |from: usize, to: usize| sha256_of(&self.bytes[from.min(length)..to.min(length)]);
        let group = |(rows, range): &(usize, std::ops::Range<usize>)| {
            let (start, end) = (range.start.min(length), range.end.min(length));
            RowGroupPiece { rows: *rows, offset: start as u64, bytes: (end - start) as u64, sha256: piece(start, end) }
        };
        let end = self.groups.last().map_or(0, |(_, range)| range.end);
        ShardFile {
            file: SHARD.into(),
            rows: self.groups.iter().map(|(rows, _)| rows).sum(),
            bytes: length as u64,
            sha256: sha256_of(&self.bytes),
            row_groups: self.groups.iter().map(group).collect(),
            footer_sha256: piece(end, length),
        }
    }
}

#[test]
fn manifest() {
    const WORDS: [&str; 14] = [
        "\"schema_version\"",
        "\"kept\"",
        "\"rows\"",
        "\"bytes\"",
        "\"offset\"",
        "\"sha256\"",
        "\"row_groups\"",
        "\"file\"",
        "\"shards\"",
        "\"index\"",
        "\"/dev/zero\"",
        "\"manifest.json\"",
        "\"shard-00000.parquet\"",
        "\"index.parquet\"",
    ];
    let folder = scratch();
    small_folder(folder.path());
    let path = folder.path().join(MANIFEST_FILE);
    let seed = fs::read(&path).unwrap();
    let named = folder.path().display().to_string();
    fuzz("manifest", 2000, 8 << 20, &named, |case| {
        case.choose(1);
        fs::write(&path, case.text(&seed, &WORDS)).unwrap();
        read(folder.path())
    });
}

#[test]
fn shard() {
    let folder = scratch();
    let mut manifest = small_folder(folder.path());
    let path = folder.path().join(SHARD);
    let tables = tables(&path);
    let named = folder.path().display().to_string();
    fuzz("shard", 1000, MEMORY, &named, |case| {
        let mut table = tables[case.choose(tables.len())].clone();
        table.bytes = case.binary(&table.bytes);
        manifest.shards = vec![table.shard()];
        fs::write(&path, &table.bytes).unwrap();
        fs::write(folder.path().join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        read(folder.path())
    });
}

#[test]
fn index() {
    let folder = scratch();
    let mut manifest = small_folder(folder.path());
    let path = folder.path().join(INDEX_FILE);
    let seeds: Vec<Vec<u8>> = tables(&path).into_iter().map(|table| table.bytes).collect();
    let named = folder.path().display().to_string();
    fuzz("index", 1000, MEMORY, &named, |case| {
        let bytes = case.one_binary(&seeds);
        manifest.index = IndexFile { file: INDEX_FILE.into(), bytes: bytes.len() as u64, sha256: sha256_of(&bytes) };
        fs::write(&path, &bytes).unwrap();
        fs::write(folder.path().join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let folder = ShardFolder::open(folder.path())?;
        let mut rows = 0;
        folder.labels(|_, _| rows += 1)?;
        assert_eq!(folder.keys(0..rows)?.len(), rows);
        Ok(())
    });
}
