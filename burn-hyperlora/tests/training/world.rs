//! A small world to train in: synthetic people in real shards, and an experiment on the fixture pipeline.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_hyperlora::Result;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::metrics::Display;
use burn_hyperlora::signals::StopFlag;
use burn_hyperlora::train::{Outcome, TrainOptions};
use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardWriter};
use image::{ImageFormat, Rgb, RgbImage};

/// Photos 0..5 of people 0..4 are for training, photo 5 is held out; person 4 and 5 are unseen.
pub(crate) const PHOTOS: usize = 6;

/// The folder with shards, YAML and run.
pub(crate) struct World {
    root: tempfile::TempDir,
}

/// One synthetic face: a disc in the person's colour, placed by the photo's number.
fn record(person: usize, photo: usize) -> FaceRecord {
    let (width, height) = (44, 48);
    let centre = [20.0 + photo as f32, 22.0 + (photo % 3) as f32];
    let colour = [40 * person as u8 + 20, 230 - 35 * person as u8, (photo * 30) as u8];
    let image = RgbImage::from_fn(width, height, |x, y| {
        let inside = (x as f32 - centre[0]).hypot(y as f32 - centre[1]) < 11.0;
        Rgb(if inside { colour } else { [(x * 5) as u8, (y * 5) as u8, 90] })
    });
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).unwrap();
    let around = |part: usize, of: usize, radius: f32| {
        let angle = std::f32::consts::TAU * part as f32 / of as f32;
        [centre[0] + radius * angle.cos(), centre[1] + radius * angle.sin()]
    };
    let embedding: Vec<f32> =
        (0..EMBEDDING_DIM).map(|i| ((i * (person + 3)) as f32).sin() + 0.1 * ((i + photo) as f32).cos()).collect();
    let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
    let split = match (person, photo) {
        (4.., _) => "unseen",
        (_, 5) => "held_out",
        _ => "train",
    };
    FaceRecord {
        key: format!("p{person}/{photo}.png"),
        image: png.into_inner(),
        width,
        height,
        face_box: [centre[0] - 11.0, centre[1] - 11.0, centre[0] + 11.0, centre[1] + 11.0],
        points: std::array::from_fn(|i| around(i, 5, 5.0)),
        landmarks: (0..68).map(|i| around(i, 68, 10.0)).collect(),
        score: 0.9,
        id_embedding: embedding.iter().map(|x| x / length).collect(),
        caption: "a photo of a person".into(),
        sha256: format!("{:064x}", person * PHOTOS + photo),
        identity: Some(format!("p{person}")),
        split: Some(split.into()),
    }
}

impl World {
    /// Shards of six people, and the YAML of [`YAML`].
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let shards = root.path().join("shards");
        fs::create_dir(&shards).unwrap();
        let config = ShardConfig { rows_per_group: 5, rows_per_shard: 20 };
        let mut writer = ShardWriter::new(&shards, &config, []);
        for (person, photo) in (0..6).flat_map(|person| (0..PHOTOS).map(move |photo| (person, photo))) {
            writer.push(record(person, photo)).unwrap();
        }
        let written = writer.finish().unwrap();
        Manifest {
            schema_version: SCHEMA_VERSION,
            photos: 36,
            kept: 36,
            splits: Default::default(),
            rejected: Default::default(),
            models: Default::default(),
            shards: written.shards,
            index: written.index,
            config: serde_json::json!({}),
        }
        .write(&shards)
        .unwrap();
        Self { root }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The experiment of [`YAML`] with some of its text replaced.
    pub(crate) fn experiment(&self, changes: &[(&str, &str)]) -> Result<Experiment> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders");
        let mut yaml = YAML.replace("BASE", &base.display().to_string());
        for (from, to) in changes {
            assert!(yaml.contains(from), "nothing to replace: {from}");
            yaml = yaml.replace(from, to);
        }
        let path = self.root.path().join("train.yaml");
        fs::write(&path, yaml).unwrap();
        Experiment::load(&path)
    }

    /// Trains into `run`, up to `max_steps`.
    pub(crate) fn train(&self, experiment: &Experiment, run: &str, max_steps: Option<u64>) -> Result<Outcome> {
        let options = TrainOptions { max_steps, stop: StopFlag::default(), display: Display::Hidden, work: Vec::new() };
        experiment.train(&self.run(run), &Device::flex(), &options)
    }
}

/// Two steps of the Base stage, four and three of the ID stages.
pub(crate) const YAML: &str = "
name: small
seed: 5
base: {path: BASE}
data:
  shards: shards
  image_size: 32
  crop: {smallest: 1.2, largest: 1.8}
  flip: true
  mask: {size: 64}
  shuffle_window: 2
hyper_lora:
  id_rank: 2
  base_rank: 1
  basis: 8
  id_tokens: 2
  clip_dim: 24
  resampler: {dim: 16, depth: 1, heads: 2, head_dim: 8, ff_mult: 2}
train:
  micro_batch: 2
  global_batch: 4
  recompute: false
  checkpoints: {every: 2, keep: 9}
  log_every: 2
  fixed_set: {triples: 6}
  stages:
    - base: {steps: 2, optim: {learning_rate: 0.01}}
    - id_clip: {steps: 4, reference: same_identity, optim: {learning_rate: 0.01, schedule: {warmup_steps: 2}}}
    - id_embedding: {steps: 3, reference: same_identity, optim: {learning_rate: 0.01, schedule: {decay: {cosine: {}}}}}
eval:
  identity_gap: {draws: 3, batch: 8}
";
