//! A small world for the binary: synthetic people in real shards, the quickstart's base model, and a short experiment.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardWriter};
use image::{ImageFormat, Rgb, RgbImage};

const PEOPLE: usize = 4;
const PHOTOS: usize = 4;

/// Two steps of each stage.
const YAML: &str = "
name: small
seed: 5
base: {path: BASE}
faces: {models: \"${HYPERLORA_CACHE:-~/.cache/hyperlora}/models\"}
data:
  shards: shards
  image_size: 32
  crop: {smallest: 1.2, largest: 1.8}
  mask: {size: 64}
hyper_lora:
  id_rank: 2
  base_rank: 1
  basis: 8
  id_tokens: 2
  clip_dim: 64
  resampler: {dim: 16, depth: 1, heads: 2, head_dim: 8, ff_mult: 2}
train:
  micro_batch: 1
  global_batch: 2
  recompute: false
  checkpoints: {every: 1, keep: 3}
  log_every: 1
  stages:
    - base: {steps: 2, optim: {learning_rate: 0.01}}
    - id_clip: {steps: 2, reference: same_identity, optim: {learning_rate: 0.01}}
    - id_embedding: {steps: 2, reference: same_identity, optim: {learning_rate: 0.01}}
";

/// Optimiser steps of [`YAML`].
pub(crate) const STEPS: u64 = 6;

pub(crate) use crate::stability::quickstart_base;

/// `hyperlora` with arguments, on one thread: tests run beside each other.
pub(crate) fn hyperlora(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hyperlora"));
    command.args(arguments).stdin(Stdio::null()).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
    command
}

/// What a test does to a file or folder.
pub(crate) type Damage = fn(&Path);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// What a finished child left.
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Ended with `code`, without a panic.
    #[track_caller]
    pub(crate) fn with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Ended with `code` and one message that holds a remedy and all of `parts`.
    #[track_caller]
    pub(crate) fn refused(self, code: i32, parts: &[&str]) {
        let ended = self.with(code);
        let stderr = &ended.stderr;
        assert_eq!(stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{stderr}");
        assert_eq!(stderr.lines().filter(|line| line.starts_with("  remedy: ")).count(), 1, "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
        }
    }
}

/// Runs a command to its end.
pub(crate) fn run(mut command: Command) -> Ended {
    Ended::of(command.output().unwrap())
}

/// A folder with shards and the YAML of [`YAML`].
pub(crate) struct World {
    root: tempfile::TempDir,
}

impl World {
    /// Shards and YAML, no run yet.
    pub(crate) fn new() -> Self {
        let world = Self { root: tempfile::tempdir().unwrap() };
        world.write_shards();
        world.write_yaml(&[]);
        world
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes the YAML with some of its text replaced.
    pub(crate) fn write_yaml(&self, changes: &[(&str, &str)]) {
        let mut yaml = YAML.replace("BASE", &quickstart_base().display().to_string());
        for (from, to) in changes {
            assert!(yaml.contains(from), "nothing to replace: {from}");
            yaml = yaml.replace(from, to);
        }
        fs::write(self.path("train.yaml"), yaml).unwrap();
    }

    /// `hyperlora train` of the YAML into the folder `name`.
    pub(crate) fn train(&self, name: &str, more: &[&str]) -> Command {
        let mut command = hyperlora(["train"]);
        command.arg(self.path("train.yaml")).arg("--out").arg(self.path(name)).args(more);
        command
    }

    /// A copy of the base model that a test may damage.
    pub(crate) fn copy_base(&self, name: &str) -> PathBuf {
        let copy = self.path(name);
        copy_folder(&quickstart_base(), &copy);
        copy
    }

    fn write_shards(&self) {
        let shards = self.path("shards");
        fs::create_dir(&shards).unwrap();
        let mut writer = ShardWriter::new(&shards, &ShardConfig { rows_per_group: 8, rows_per_shard: 16 }, []);
        for (person, photo) in (0..PEOPLE).flat_map(|person| (0..PHOTOS).map(move |photo| (person, photo))) {
            writer.push(record(person, photo)).unwrap();
        }
        let written = writer.finish().unwrap();
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            photos: PEOPLE * PHOTOS,
            kept: PEOPLE * PHOTOS,
            splits: BTreeMap::new(),
            rejected: BTreeMap::new(),
            models: BTreeMap::new(),
            shards: written.shards,
            index: written.index,
            config: serde_json::json!({}),
        };
        manifest.write(&shards).unwrap();
    }
}

/// Copies a folder with all that is in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Every file below a folder with its bytes, by its path there.
pub(crate) fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = PathBuf::from(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            found.extend(contents(&entry.path()).into_iter().map(|(below, bytes)| (name.join(below), bytes)));
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// The first file below `folder` whose name ends with `ending`.
pub(crate) fn first_file(folder: &Path, ending: &str) -> PathBuf {
    let name = contents(folder).into_keys().find(|path| path.to_string_lossy().ends_with(ending)).unwrap();
    folder.join(name)
}

/// Flips one bit in the middle of a file.
pub(crate) fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(path, bytes).unwrap();
}

/// Cuts a file off after a part of its bytes.
pub(crate) fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() * 2 / 3]).unwrap();
}

/// One synthetic face: a disc in the person's colour, placed by the photo's number. The last photo is held out.
fn record(person: usize, photo: usize) -> FaceRecord {
    let (width, height) = (44, 48);
    let centre = [20.0 + photo as f32, 22.0 + (photo % 3) as f32];
    let colour = [50 * person as u8 + 20, 230 - 40 * person as u8, (photo * 40) as u8];
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
        split: Some(if photo + 1 == PHOTOS { "held_out" } else { "train" }.into()),
    }
}
