//! Small world for the binary: synthetic people in real shards, the quickstart's base model, and a short experiment.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use data_prep::shard::ShardConfig;

use hyperlora_testing::world::Recipe;

/// Experiment with two steps per stage.
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

pub(crate) use hyperlora_testing::stability::quickstart_base;

/// Small world of these tests.
pub(crate) struct World(hyperlora_testing::world::World);

impl Deref for World {
    type Target = hyperlora_testing::world::World;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// Builds a `hyperlora` command on one thread, because tests run in parallel.
pub(crate) fn hyperlora(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hyperlora"));
    command.args(arguments).stdin(Stdio::null()).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
    command
}

/// Damage that a test does to a file or folder.
pub(crate) type Damage = fn(&Path);

/// Result of a command.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Collects the output of a finished child.
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Asserts that the command ended with `code`, without a panic.
    #[track_caller]
    pub(crate) fn with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Asserts that the command ended with `code` and one message that holds a remedy and all of `parts`.
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

impl World {
    /// Creates shards of four people with four photos each, the last of them held out, and [`YAML`]; no run yet.
    pub(crate) fn new() -> Self {
        Self(hyperlora_testing::world::World::of(Recipe {
            yaml: YAML,
            base: quickstart_base(),
            people: 4,
            photos: 4,
            split: |_, photo| if photo == 3 { "held_out" } else { "train" },
            shards: ShardConfig { rows_per_group: 8, rows_per_shard: 16 },
        }))
    }

    /// Builds a `hyperlora train` command for the YAML, into the folder `name`.
    pub(crate) fn train(&self, name: &str, more: &[&str]) -> Command {
        let mut command = hyperlora(["train"]);
        command.arg(self.path("train.yaml")).arg("--out").arg(self.path(name)).args(more);
        command
    }

    /// Copies the base model, so that a test may damage it.
    pub(crate) fn copy_base(&self, name: &str) -> PathBuf {
        let copy = self.path(name);
        copy_folder(&quickstart_base(), &copy);
        copy
    }
}

/// Copies a folder recursively.
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

/// Reads every file below a folder, by its relative path.
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

/// Returns the first file below `folder` whose name ends with `ending`.
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

/// Truncates a file to two thirds.
pub(crate) fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() * 2 / 3]).unwrap();
}
