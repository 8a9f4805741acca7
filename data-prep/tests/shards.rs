//! Shard folders: what is written is what is read, and damage is named.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod shard_folder;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Int32Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use data_prep::shard::manifest::sha256_of;
use data_prep::shard::{FaceRecord, INDEX_FILE, MANIFEST_FILE, Manifest, ShardConfig, ShardFolder, ShardWriter};

use crate::shard_folder::{record, write};

fn failure(dir: &Path) -> String {
    let error = ShardFolder::open(dir).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn rows_come_back_in_order_group_by_group() {
    let dir = tempfile::tempdir().unwrap();
    let records = write(dir.path());
    let folder = ShardFolder::open(dir.path()).unwrap();
    folder.verify().unwrap();
    let places: Vec<_> = folder
        .row_groups()
        .iter()
        .map(|group| (folder.file(group), group.index, group.first_row, group.rows))
        .collect();
    let [a, b, c] = ["shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet"];
    assert_eq!(places, [(a, 0, 0, 2), (a, 1, 2, 2), (b, 0, 4, 2), (b, 1, 6, 2), (c, 0, 8, 2)]);
    let read: Vec<_> = folder.row_groups().iter().flat_map(|group| folder.read(group).unwrap().unwrap()).collect();
    assert_eq!(read, records);
    assert_eq!(folder.read(&folder.row_groups()[3]).unwrap().unwrap(), records[6..8]);
    let labels = folder.labels().unwrap();
    let expected = |record: &FaceRecord| (record.identity.clone(), record.split.clone());
    assert_eq!(
        labels.into_iter().map(|label| (label.identity, label.split)).collect::<Vec<_>>(),
        records.iter().map(expected).collect::<Vec<_>>()
    );
    assert_eq!(folder.keys(3..5).unwrap(), [&records[3].key, &records[4].key].map(String::clone));
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(one.path());
    write(two.path());
    for file in ["shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet", INDEX_FILE, MANIFEST_FILE] {
        assert_eq!(fs::read(one.path().join(file)).unwrap(), fs::read(two.path().join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_truncated_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let shard = dir.path().join("shard-00001.parquet");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let message = failure(dir.path());
    assert!(
        message.contains("shard-00001.parquet: holds") && message.contains("remedy: restore the file"),
        "{message}"
    );
    fs::remove_file(&shard).unwrap();
    assert!(failure(dir.path()).contains("shard-00001.parquet: cannot be read"));
}

#[test]
fn a_damaged_row_group_is_told_and_the_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let records = write(dir.path());
    let shard = dir.path().join("shard-00000.parquet");
    let mut bytes = fs::read(&shard).unwrap();
    // The first page: keys.
    bytes[20] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let folder = ShardFolder::open(dir.path()).unwrap();
    let error = folder.verify().unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("shard-00000.parquet: row group 0 is damaged: its SHA-256"), "{error}");
    let groups = folder.row_groups();
    assert!(folder.read(&groups[0]).unwrap().unwrap_err().to_string().contains("SHA-256"));
    assert_eq!(folder.read(&groups[1]).unwrap().unwrap(), records[2..4]);
    assert_eq!(folder.keys(0..2).unwrap(), [records[0].key.clone(), records[1].key.clone()]);
    // It shrinks while it is read.
    fs::write(&shard, [0; 30]).unwrap();
    let damage = folder.read(&groups[1]).unwrap().unwrap_err();
    assert!(damage.to_string().contains("the footer of the file: the file ends within it"), "{damage}");
    fs::remove_file(&shard).unwrap();
    assert!(folder.read(&groups[1]).unwrap_err().to_string().contains("shard-00000.parquet: cannot be read"));
}

#[test]
fn every_byte_that_is_read_is_covered_by_a_checksum() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    for file in ["shard-00002.parquet", INDEX_FILE] {
        let path = dir.path().join(file);
        let whole = fs::read(&path).unwrap();
        // Parquet begins with four letters that nobody reads.
        for at in (4..whole.len()).step_by(97).chain([4, whole.len() - 1]) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            let error = ShardFolder::open(dir.path()).unwrap().verify().unwrap_err();
            assert!(error.to_string().contains(file), "byte {at}: {error}");
        }
        fs::write(&path, whole).unwrap();
        ShardFolder::open(dir.path()).unwrap().verify().unwrap();
    }
}

#[test]
fn a_manifest_that_does_not_fit_is_refused() {
    let change = |from: &str, to: &str| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let path = dir.path().join(MANIFEST_FILE);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        failure(dir.path())
    };
    let message = change("\"schema_version\": 2", "\"schema_version\": 1");
    assert!(message.contains("has schema version 1, this program reads version 2"), "{message}");
    let message = change("\"kept\": 10", "\"kept\": 11");
    assert!(message.contains("counts 11 faces, its shards hold 10"), "{message}");
    let message = change("\"rows\": 4", "\"rows\": 5");
    assert!(message.contains("shard-00000.parquet counts 5 rows, its row groups 4"), "{message}");
    let message = change("\"offset\": 4,", "\"offset\": 18446744073709551615,");
    assert!(message.contains("shard-00000.parquet has row group 0 outside of its place"), "{message}");
    let message = change("\"photos\"", "\"pictures\"");
    assert!(message.contains("manifest.json: is damaged: missing field `photos`"), "{message}");
    let message = change("{", "[");
    assert!(message.contains("manifest.json: is damaged"), "{message}");
}

#[test]
fn a_folder_without_a_manifest_is_no_shard_folder() {
    let dir = tempfile::tempdir().unwrap();
    let message = failure(dir.path());
    assert!(message.contains("holds no manifest.json") && message.contains("data-prep build"), "{message}");
}

#[test]
fn a_parquet_file_with_other_columns_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let schema = Arc::new(Schema::new(vec![Field::new("key", DataType::Int32, false)]));
    let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(Int32Array::from(vec![1, 2]))]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    fs::write(dir.path().join("shard-00002.parquet"), &bytes).unwrap();
    let mut manifest = Manifest::read(dir.path()).unwrap();
    let shard = &mut manifest.shards[2];
    let piece = &mut shard.row_groups[0];
    (piece.offset, piece.bytes, piece.sha256) = (4, 20, sha256_of(&bytes[4..24]));
    (shard.bytes, shard.footer_sha256) = (bytes.len() as u64, sha256_of(&bytes[24..]));
    manifest.write(dir.path()).unwrap();
    let folder = ShardFolder::open(dir.path()).unwrap();
    let message = folder.read(&folder.row_groups()[4]).unwrap().unwrap_err().to_string();
    assert!(message.contains("column 0 is `key` of type Int32, expected `key` of type Utf8"), "{message}");
}

#[test]
fn an_embedding_of_another_length_and_uneven_sizes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(dir.path(), &ShardConfig::default(), &BTreeMap::new());
    let wrong = FaceRecord { id_embedding: vec![0.0; 128], ..record(1) };
    assert!(writer.push(wrong).unwrap_err().to_string().contains("people/001.png: an ID embedding of 128"));
    for (rows_per_group, rows_per_shard) in [(0, 4), (3, 4), (4, 0)] {
        let config = ShardConfig { rows_per_group, rows_per_shard };
        assert_eq!(config.validate("data.yaml: shards").unwrap_err().exit_code(), 2);
    }
}

#[test]
fn another_embedder_is_refused_and_another_detector_told() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let manifest = Manifest::read(dir.path()).unwrap();
    let models = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|&(role, model)| (role.to_owned(), model.to_owned())).collect()
    };
    let made = models(&[("detector", "a.onnx sha256:1"), ("embedder", "b.onnx sha256:2")]);
    let manifest = Manifest { models: made, ..manifest };
    let compare = |pairs| manifest.compare_models(dir.path(), &models(pairs));
    let renamed = compare(&[("detector", "x.onnx sha256:1"), ("embedder", "y.onnx sha256:2")]).unwrap();
    assert_eq!(renamed, Vec::<String>::new());
    let told = compare(&[("detector", "a.onnx sha256:7"), ("embedder", "b.onnx sha256:2")]).unwrap();
    assert_eq!(told, ["detector: a.onnx sha256:1 made the shards, and `faces` finds a.onnx sha256:7"]);
    let error = compare(&[("detector", "a.onnx sha256:1"), ("embedder", "b.onnx sha256:7")]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("made with b.onnx sha256:2, and `faces` finds b.onnx sha256:7"), "{error}");
}
