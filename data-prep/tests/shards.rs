//! Shard folders: reading returns what was written, and damage is named.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod foreign;
mod shard_folder;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Float32Array, Int32Array, RecordBatch, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema};
use data_prep::shard::{
    FaceRecord, INDEX_FILE, MANIFEST_FILE, Manifest, RowGroupPiece, ShardConfig, ShardFolder, ShardWriter,
};
use hyperlora_core::hash::{sha256_of, sha256_of_file};
use parquet::basic::Encoding;
use parquet::file::properties::WriterVersion;

use crate::foreign::{Way, floats, sound, with};
use crate::shard_folder::{labels, record, write};
use hyperlora_testing::ALLOCATOR;

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
    let read: Vec<_> = folder.row_groups().iter().flat_map(|group| folder.read(group).unwrap()).collect();
    assert_eq!(read, records);
    assert_eq!(folder.read(&folder.row_groups()[3]).unwrap(), records[6..8]);
    let expected = |record: &FaceRecord| [record.identity.clone(), record.split.clone()];
    assert_eq!(labels(&folder), records.iter().map(expected).collect::<Vec<_>>());
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
    // The first page contains keys.
    bytes[20] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let folder = ShardFolder::open(dir.path()).unwrap();
    let error = folder.verify().unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("shard-00000.parquet: row group 0 is damaged: its SHA-256"), "{error}");
    let groups = folder.row_groups();
    assert!(folder.read(&groups[0]).unwrap_err().damage().unwrap().to_string().contains("SHA-256"));
    assert_eq!(folder.read(&groups[1]).unwrap(), records[2..4]);
    assert_eq!(folder.keys(0..2).unwrap(), [records[0].key.clone(), records[1].key.clone()]);
    // The file shrinks while it is open.
    fs::write(&shard, [0; 30]).unwrap();
    let damage = folder.read(&groups[1]).unwrap_err().damage().unwrap();
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
        // Parquet begins with four magic bytes that the reader ignores.
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
    let message = change("\"rows\": 2,", "\"rows\": 1099511627776,");
    assert!(message.contains("shard-00000.parquet counts 4 rows"), "{message}");
    let message = change("\"rows\": 2,", "\"rows\": 18446744073709551615,");
    assert!(message.contains("shard-00000.parquet counts 4 rows, its row groups too many"), "{message}");
    let message = change("\"rows\": 2,", "\"rows\": 18446744073709551616,");
    assert!(message.contains("manifest.json: is damaged"), "{message}");
    for name in ["/etc/passwd", "../shard-00000.parquet", "a/../b", ""] {
        let message = change("shard-00000.parquet", name);
        assert!(message.contains("manifest.json: names the file"), "{message}");
        let message = change("index.parquet", name);
        assert!(message.contains("manifest.json: names the file"), "{message}");
    }
    let message = change("shard-00000.parquet", "shard-00001.parquet");
    assert!(message.contains("it lists shard-00001.parquet twice"), "{message}");
    let message = change("\"sha256\": \"", "\"sha256\": \"/");
    assert!(message.contains("is not a SHA-256"), "{message}");
    // A cache would have a file of this name, or of another one.
    for checksum in ["", "0123456789abcdef", &"A".repeat(64), &"a".repeat(65)] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let mut manifest = Manifest::read(dir.path()).unwrap();
        manifest.index.sha256 = checksum.into();
        manifest.write(dir.path()).unwrap();
        let message = failure(dir.path());
        assert!(message.contains(&format!("index.parquet has the checksum `{checksum}`")), "{message}");
    }
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
    let sound = sound(dir.path());
    let schema = Arc::new(Schema::new(vec![Field::new("key", DataType::Int32, false)]));
    let batch = RecordBatch::try_new(schema, vec![Arc::new(Int32Array::from(vec![1, 2]))]).unwrap();
    let message = foreign::problem(dir.path(), &[batch]);
    assert!(message.contains("column 0 is `key` of type Int32, expected `key` of type Utf8"), "{message}");
    // Two names change places, the last column is missing, and one more is there.
    let columns: Vec<_> = sound.schema().fields().iter().cloned().zip(sound.columns().to_vec()).collect();
    let message = |columns: &[(Arc<Field>, ArrayRef)]| {
        let (fields, columns): (Vec<_>, Vec<_>) = columns.iter().cloned().unzip();
        foreign::problem(dir.path(), &[RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()])
    };
    let mut swapped = columns.clone();
    swapped.swap(2, 3);
    assert!(message(&swapped).contains("column 2 is `height` of type UInt32, expected `width`"));
    assert!(message(&columns[..12]).contains("column 12, `split`, is missing"));
    let more = (Arc::new(Field::new("more", DataType::UInt32, false)), Arc::clone(&columns[2].1));
    assert!(message(&[&columns[..], &[more]].concat()).contains("unknown column `more`"));
}

#[test]
fn pages_are_read_whoever_wrote_them_or_it_is_told_why_not() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let sound = sound(dir.path());
    let read = || {
        let folder = ShardFolder::open(dir.path()).unwrap();
        folder.read(&folder.row_groups()[4]).map_err(|error| error.damage().unwrap().to_string())
    };
    let second: Way = |properties| {
        let plain = properties.set_writer_version(WriterVersion::PARQUET_2_0);
        plain.set_column_encoding("image".into(), Encoding::PLAIN)
    };
    foreign::replace_with(dir.path(), std::slice::from_ref(&sound), second);
    assert_eq!(read().unwrap(), [record(8), record(9)]);
    foreign::replace_with(dir.path(), std::slice::from_ref(&sound), |properties| {
        let differences = properties.set_column_dictionary_enabled("caption".into(), false);
        differences.set_column_encoding("caption".into(), Encoding::DELTA_BYTE_ARRAY)
    });
    assert!(read().unwrap_err().contains("its texts are written as differences"));
    // A stranger changes one byte: where a column begins, its compression, the kind of its first page.
    foreign::replace(dir.path(), &[sound]);
    let (whole, end) = foreign::bytes(dir.path());
    let told = |places: std::ops::Range<usize>, change: fn(u8) -> u8, problem: &str| {
        places.into_iter().any(|at| {
            let mut bytes = whole.clone();
            bytes[at] = change(bytes[at]);
            bytes[at] != whole[at] && {
                foreign::seal(dir.path(), &bytes, end, 2);
                read().is_err_and(|damage| damage.contains(problem))
            }
        })
    };
    assert!(told(end..whole.len() - 8, |byte| byte ^ 1, "a column begins or ends before the file"));
    let snappy = |byte| if byte == 6 << 1 { 1 << 1 } else { byte };
    assert!(told(end..whole.len() - 8, snappy, "only zstd is read"));
    let no_dictionary = |byte| if byte == 2 << 1 { 1 << 1 } else { byte };
    assert!(told(4..end, no_dictionary, "refer to a dictionary that is not there"));
    // The manifest tells of more rows, and of more row groups.
    foreign::seal(dir.path(), &whole, end, 3);
    assert!(read().unwrap_err().contains("the footer counts 2 rows, manifest.json 3"));
    foreign::seal(dir.path(), &whole, end, 2);
    let mut manifest = Manifest::read(dir.path()).unwrap();
    let none = RowGroupPiece { rows: 0, offset: end as u64, bytes: 0, sha256: sha256_of(b"") };
    manifest.shards[2].row_groups.push(none);
    manifest.write(dir.path()).unwrap();
    let folder = ShardFolder::open(dir.path()).unwrap();
    let damage = folder.read(&folder.row_groups()[5]).unwrap_err().damage().unwrap().to_string();
    assert!(damage.contains("the file has fewer row groups"), "{damage}");
}

#[test]
fn an_embedding_of_another_length_and_uneven_sizes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(dir.path(), &ShardConfig::default(), &BTreeMap::new());
    let wrong = FaceRecord { id_embedding: vec![0.0; 128], ..record(1) };
    assert!(writer.push(wrong).unwrap_err().to_string().contains("people/001.png: an ID embedding of 128"));
    for (rows_per_group, rows_per_shard) in [(0, 4), (3, 4), (4, 0), (1 << 17, 1 << 17)] {
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

/// Refuses a manifest whose numbers are consistent, but exceed any machine.
#[test]
fn a_manifest_that_asks_for_too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let sound = Manifest::read(dir.path()).unwrap();
    let refused = |change: fn(&mut Manifest)| {
        let mut manifest = sound.clone();
        change(&mut manifest);
        manifest.write(dir.path()).unwrap();
        assert!(Manifest::read(dir.path()).is_err());
        failure(dir.path())
    };
    fn rows(manifest: &mut Manifest, rows: usize) {
        let shard = &mut manifest.shards[2];
        (shard.row_groups[0].rows, shard.rows, manifest.kept) = (rows, rows, 8 + rows);
    }
    let message = refused(|manifest| rows(manifest, 1 << 40));
    assert!(message.contains("shard-00002.parquet has 1099511627776 rows in the "), "{message}");
    // Fewer rows, but more than there are bytes.
    let message = refused(|manifest| rows(manifest, 1 << 16));
    assert!(message.contains("shard-00002.parquet has 65536 rows in the "), "{message}");
    let message = refused(|manifest| {
        rows(manifest, (1 << 16) + 1);
        let shard = &mut manifest.shards[2];
        (shard.bytes, shard.row_groups[0].bytes) = (1 << 20, 1 << 19);
    });
    assert!(message.contains("shard-00002.parquet has 65537 rows in the 524288 bytes"), "{message}");
    let message = refused(|manifest| manifest.shards[2].row_groups[0].bytes += 1 << 20);
    assert!(message.contains("shard-00002.parquet has row group 0 outside of its place"), "{message}");
    let message = refused(|manifest| manifest.shards[0].row_groups[1].offset -= 1);
    assert!(message.contains("shard-00000.parquet has row group 1 outside of its place"), "{message}");
    let message = refused(|manifest| manifest.shards[2].row_groups[0].offset = u64::MAX);
    assert!(message.contains("shard-00002.parquet has row group 0 outside of its place"), "{message}");
    let message = refused(|manifest| {
        let shard = &mut manifest.shards[2];
        (shard.bytes, shard.row_groups[0].bytes) = (1 << 60, 1 << 59);
    });
    assert!(message.contains("shard-00002.parquet has 2 rows in the 576460752303423488 bytes"), "{message}");
    let message = refused(|manifest| manifest.shards[2].bytes = 1 << 60);
    assert!(message.contains("shard-00002.parquet has a footer of "), "{message}");
    let message = refused(|manifest| manifest.index.bytes = 1 << 60);
    assert!(message.contains("index.parquet has 10 rows in 1152921504606846976 bytes"), "{message}");
    let message = refused(|manifest| manifest.index.bytes = 0);
    assert!(message.contains("index.parquet has 10 rows in 0 bytes"), "{message}");
    // Each row group is one that is read, and all of them are more than a row's number counts.
    let message = refused(|manifest| {
        let (shard, side) = (&mut manifest.shards[2], 1 << 16);
        let group = |number: u64| RowGroupPiece {
            rows: side,
            offset: 4 + number * side as u64,
            bytes: side as u64,
            ..shard.row_groups[0].clone()
        };
        shard.row_groups = (0..side as u64).map(group).collect();
        (shard.rows, shard.bytes, manifest.kept) = (side * side, (side * side) as u64 + 100, side * side + 8);
    });
    assert!(message.contains("its shards hold more than 4294967295 faces"), "{message}");
    let message = refused(|manifest| {
        for shard in &mut manifest.shards {
            shard.rows = usize::MAX / 2;
            shard.row_groups = vec![RowGroupPiece { rows: usize::MAX / 2, ..shard.row_groups[0].clone() }];
        }
    });
    assert!(message.contains("is damaged"), "{message}");
}

#[test]
fn links_that_lead_out_pipes_and_huge_manifests_are_refused() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("faces");
    for name in [MANIFEST_FILE, "shard-00001.parquet", INDEX_FILE] {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let records = write(&dir);
        let (file, moved) = (dir.join(name), outer.path().join(name));
        let open = || {
            let folder = ShardFolder::open(&dir)?;
            folder.verify().map(|()| folder)
        };
        let refused = |expected: &str| {
            let error = open().unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(name), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        fs::rename(&file, &moved).unwrap();
        symlink(&moved, &file).unwrap();
        refused("no links that lead out of it");
        fs::remove_file(&file).unwrap();
        assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
        refused("not a regular file");
        assert_eq!(sha256_of_file(&file).unwrap_err().exit_code(), 2);
        fs::remove_file(&file).unwrap();
        // A link within the folder is as good as the file.
        fs::create_dir(dir.join("pool")).unwrap();
        fs::rename(&moved, dir.join("pool/1")).unwrap();
        symlink("pool/1", &file).unwrap();
        let folder = open().unwrap();
        assert_eq!(folder.read(&folder.row_groups()[2]).unwrap(), records[4..6]);
    }
    // A sparse file takes no disk space.
    fs::File::create(dir.join("pool/1")).unwrap().set_len(1 << 40).unwrap();
    fs::remove_file(dir.join(MANIFEST_FILE)).unwrap();
    symlink("pool/1", dir.join(MANIFEST_FILE)).unwrap();
    assert!(failure(&dir).contains("it holds more than"));
}

#[test]
fn rows_that_are_no_faces_are_told_with_row_and_column() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let sound = sound(dir.path());
    let problem = |name: &str, column: ArrayRef| foreign::problem(dir.path(), &[with(&sound, name, column)]);
    let numbers = |values: [f32; 2]| -> ArrayRef { Arc::new(Float32Array::from(values.to_vec())) };
    let sides = |values: [u32; 2]| -> ArrayRef { Arc::new(UInt32Array::from(values.to_vec())) };
    let row = |row: usize, problem: &str| format!("row {row}, `people/{:03}.png`: {problem}", 8 + row);
    let of_second = |values: &[f32], length: i32| {
        let sound = floats(&sound, if length == 4 { "face_box" } else { "id_embedding" });
        let values: Vec<f32> = sound[..length as usize].iter().chain(values).copied().collect();
        foreign::fixed_lists(length, values)
    };
    for (name, column, expected) in [
        ("score", numbers([0.5, f32::NAN]), row(1, "`score` is NaN, not between 0 and 1")),
        ("score", numbers([1.5, 0.5]), row(0, "`score` is 1.5, not between 0 and 1")),
        ("score", Arc::new(Float32Array::from(vec![Some(0.5), None])), "column `score` is null in row 1".into()),
        ("caption", Arc::new(StringArray::from(vec![None, Some("x")])), "column `caption` is null in row 0".into()),
        ("width", sides([92, 0]), row(1, "`width` is 0, not 1 to 8192 pixels")),
        ("height", sides([13_000, 112]), row(0, "`height` is 13000, not 1 to 8192 pixels")),
        ("face_box", of_second(&[1.0, f32::NAN, 2.0, 3.0], 4), row(1, "`face_box` has a coordinate of NaN")),
        ("face_box", of_second(&[9.0, 1.0, 2.0, 3.0], 4), row(1, "`face_box` is [9.0, 1.0, 2.0, 3.0]: no box")),
        ("face_box", of_second(&[1.0, 2.0, 3.0, 1e9], 4), row(1, "`face_box` has a coordinate of 1000000000")),
        ("face_box", of_second(&[-30.0, 2.0, -3.0, 9.0], 4), row(1, "`face_box` is outside the picture")),
        ("face_box", of_second(&[93.0, 2.0, 150.0, 9.0], 4), row(1, "`face_box` is outside the picture")),
        ("face_box", of_second(&[1.0, 9.0, 2.0, 3.0], 4), row(1, "`face_box` is [1.0, 9.0, 2.0, 3.0]: no box")),
        ("points", foreign::fixed_lists(10, vec![f32::INFINITY; 20]), row(0, "`points` has a coordinate of inf")),
        ("points", foreign::lists(&[&[1.0; 10], &[1.0; 9]]), row(1, "`points` has an odd number of coordinates")),
        ("landmarks", foreign::lists(&[&[1.0; 136], &[1.0; 136]]), row(0, "`landmarks` are all on one line")),
        (
            "landmarks",
            foreign::lists(&[&[1.0, 2.0, 1.0, 3.0, 1.0, 4.0], &[]]),
            row(0, "`landmarks` are all on one line"),
        ),
        (
            "landmarks",
            foreign::lists(&[&[1.0, 2.0, 2.0, 2.0, 3.0, 2.0], &[]]),
            row(0, "`landmarks` are all on one line"),
        ),
        ("landmarks", foreign::lists(&[&[1.0, 2.0], &[]]), row(0, "`landmarks` has 1 points")),
        ("landmarks", foreign::lists(&[&[1.0; 2050], &[]]), row(0, "`landmarks` has 1025 points, not 3 to 1024")),
        ("id_embedding", of_second(&[0.0; 512], 512), row(1, "`id_embedding` is 0 long, not 1")),
        ("id_embedding", of_second(&[f32::NAN; 512], 512), row(1, "`id_embedding` is NaN long, not 1")),
        ("id_embedding", of_second(&[1.0; 512], 512), row(1, "`id_embedding` is 22.627417 long, not 1")),
        ("id_embedding", foreign::fixed_lists(128, vec![0.1; 256]), row(0, "`id_embedding` has 128 values, not 512")),
        ("identity", Arc::new(StringArray::from(vec!["x".repeat(5000), "y".into()])), row(0, "`identity` has 5000")),
        ("split", Arc::new(StringArray::from(vec!["x".repeat(5000), "y".into()])), row(0, "`split` has 5000")),
        ("key", Arc::new(StringArray::from(vec!["x".repeat(5000), "y".into()])), "`key` has 5000 bytes".into()),
    ] {
        let message = problem(name, column);
        assert!(message.contains(&expected), "{name}: `{message}` instead of `{expected}`");
    }
    foreign::replace(dir.path(), &[sound]);
    let folder = ShardFolder::open(dir.path()).unwrap();
    assert_eq!(folder.read(&folder.row_groups()[4]).unwrap(), [record(8), record(9)]);
}

/// Small files whose content would take gigabytes.
#[test]
fn bombs_are_refused_before_they_take_memory() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let sound = sound(dir.path());
    let one = sound.slice(0, 1);
    let text = |bytes: usize| -> ArrayRef { Arc::new(StringArray::from(vec!["x".repeat(bytes)])) };
    let huge = 150 << 20;
    // One text stored once and repeated 1000 times; an image and a text that compress to almost nothing; a face with
    // millions of landmarks.
    let repeated = vec![with(&one, "caption", text(1 << 20)); 1000];
    let image: ArrayRef = Arc::new(BinaryArray::from_vec(vec![&vec![0; huge]]));
    for (name, batches) in [
        ("repeated", repeated),
        ("image", vec![with(&one, "image", image)]),
        ("caption", vec![with(&one, "caption", text(huge))]),
        ("landmarks", vec![with(&one, "landmarks", foreign::lists(&[&vec![1.0; 10_000_000]]))]),
    ] {
        foreign::replace(dir.path(), &batches);
        drop(batches);
        let file = fs::metadata(dir.path().join("shard-00002.parquet")).unwrap().len();
        let folder = ShardFolder::open(dir.path()).unwrap();
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let damage = folder.read(&folder.row_groups()[4]).unwrap_err().damage().unwrap().to_string();
        let taken = ALLOCATOR.peak_usage().saturating_sub(before);
        assert!(damage.contains("more bytes would be decoded"), "{name}: {damage}");
        assert!(file < 300_000 && taken < 80 << 20, "{name}: {taken} bytes for a file of {file}");
    }
}

#[test]
fn a_changed_shard_with_right_checksums_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let (whole, end) = foreign::bytes(dir.path());
    for at in (4..end).step_by(97).chain((end..whole.len()).step_by(11)) {
        for value in [whole[at] ^ 1, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            foreign::seal(dir.path(), &bytes, end, 2);
            let folder = ShardFolder::open(dir.path()).unwrap();
            // Rows or damage, but no failure.
            folder.read(&folder.row_groups()[4]).map_or_else(|error| drop(error.damage().unwrap()), drop);
        }
    }
}

/// The library panics at some of them, such as a run of levels that ends behind its page.
#[test]
fn a_changed_index_with_a_right_checksum_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let whole = foreign::plain_index(dir.path());
    for at in 4..whole.len() - 8 {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        foreign::seal_index(dir.path(), &bytes);
        let folder = ShardFolder::open(dir.path()).unwrap();
        if let Err(error) = folder.labels(|_, _| ()) {
            assert!(error.exit_code() == 2 && error.to_string().contains(INDEX_FILE), "byte {at}: {error}");
        }
    }
}

#[test]
fn an_index_whose_keys_repeat_or_are_not_in_order_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let problem = |batches: &[RecordBatch]| {
        foreign::replace_index(dir.path(), batches);
        let folder = ShardFolder::open(dir.path()).unwrap();
        let error = folder.labels(|_, _| ()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let index = foreign::index(dir.path());
    let (one, rest) = (index.slice(0, 1), index.slice(1, 9));
    let message = problem(&[one.clone(), one.clone(), rest.slice(0, 8)]);
    let expected =
        "index.parquet: has the key `people/000.png` in row 1, behind `people/000.png`: not in order, or twice";
    assert!(message.contains(expected), "{message}");
    let message = problem(&[rest, one.clone()]);
    assert!(message.contains("has the key `people/000.png` in row 9, behind `people/009.png`"), "{message}");
    let message = problem(&[index.slice(0, 9)]);
    assert!(message.contains("index.parquet: holds 9 rows instead of 10"), "{message}");
    let message = problem(&[index.clone(), with(&one, "key", Arc::new(StringArray::from(vec!["z"])))]);
    assert!(message.contains("it has more rows than the shards"), "{message}");
    // A name stored once and repeated a million times takes no memory, but a long one is invalid.
    let named = with(&one, "identity", Arc::new(StringArray::from(vec!["x".repeat(5000)])));
    let message = problem(&[named, index.slice(1, 9)]);
    assert!(message.contains("has a name of more than 4096 bytes in row 0"), "{message}");
    let null = with(&one, "key", Arc::new(StringArray::from(vec![None::<&str>])));
    let message = problem(&[null]);
    assert!(message.contains("other columns than key, identity and split"), "{message}");
    let message = problem(&[with(&one, "identity", Arc::new(Int32Array::from(vec![1])))]);
    assert!(message.contains("other columns than key, identity and split"), "{message}");
}
