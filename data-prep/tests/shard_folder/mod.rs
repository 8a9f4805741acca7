//! Small shard folder, written by the real writer.

use std::collections::BTreeMap;
use std::path::Path;

use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardFolder, ShardWriter};

pub(crate) fn record(number: usize) -> FaceRecord {
    let value = number as f32;
    let embedding: Vec<f32> = (0..EMBEDDING_DIM).map(|i| ((i + number) as f32).sin()).collect();
    let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
    FaceRecord {
        key: format!("people/{number:03}.png"),
        image: vec![number as u8; 100 + number],
        width: 92,
        height: 112,
        face_box: [1.0, 2.0, 60.5, 80.25].map(|x| x + value),
        points: [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, value]],
        landmarks: (0..68).map(|i| [i as f32, value - i as f32]).collect(),
        score: 0.5 + value / 100.0,
        id_embedding: embedding.iter().map(|x| x / length).collect(),
        caption: "a photo of a person".into(),
        sha256: format!("{number:064x}"),
        identity: (!number.is_multiple_of(3)).then(|| format!("s{number:02}")),
        split: number.is_multiple_of(2).then(|| "train".into()),
    }
}

/// Writes a folder of 10 faces in shards of 4 with row groups of 2.
pub(crate) fn write(dir: &Path) -> Vec<FaceRecord> {
    let records: Vec<_> = (0..10).map(record).collect();
    let models = BTreeMap::from([("detector".to_owned(), "yunet".to_owned())]);
    let config = ShardConfig { rows_per_group: 2, rows_per_shard: 4 };
    let mut writer = ShardWriter::new(dir, &config, &models);
    for record in &records {
        writer.push(record.clone()).unwrap();
    }
    let written = writer.finish().unwrap();
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        photos: 12,
        kept: 10,
        splits: BTreeMap::from([("train".into(), 5)]),
        rejected: BTreeMap::from([("no_face".into(), 2)]),
        notes: Default::default(),
        models,
        shards: written.shards,
        index: written.index,
        config: serde_json::json!({"margin": 1.5}),
    };
    manifest.write(dir).unwrap();
    records
}

/// Returns identity and split of all rows from the index.
pub(crate) fn labels(folder: &ShardFolder) -> Vec<[Option<String>; 2]> {
    let mut labels = Vec::new();
    folder.labels(|identity, split| labels.push([identity, split].map(|name| name.map(str::to_owned)))).unwrap();
    labels
}
