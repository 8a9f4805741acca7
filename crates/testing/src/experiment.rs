//! Experiment that trains on the fixture pipeline, shared by the tests of training and of several ranks.

use burn::tensor::Device;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::train::{Outcome, TrainOptions};
use data_prep::shard::ShardConfig;
use hyperlora_core::Result;

use crate::fixture;
use crate::world::{Recipe, World};

/// Optimiser steps of [`YAML`].
pub const STEPS: u64 = 9;

/// Small experiment: two steps of the Base stage, four and three of the ID stages.
pub const YAML: &str = "
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

impl World {
    /// Makes six people with six photos each: photos 0 to 4 of people 0 to 3 are for training, photo 5 is held out, and
    /// people 4 and 5 are unseen.
    pub fn small() -> Self {
        Self::of(Recipe {
            yaml: YAML,
            base: fixture("encoders"),
            people: 6,
            photos: 6,
            split: |person, photo| match (person, photo) {
                (4.., _) => "unseen",
                (_, 5) => "held_out",
                _ => "train",
            },
            shards: ShardConfig { rows_per_group: 5, rows_per_shard: 20 },
        })
    }

    /// Loads the experiment of [`YAML`] with some of its text replaced.
    ///
    /// # Errors
    /// Same as [`Experiment::load`].
    pub fn experiment(&self, changes: &[(&str, &str)]) -> Result<Experiment> {
        self.write_yaml(changes);
        Experiment::load(&self.path("train.yaml"))
    }

    /// Trains into `run`, up to `max_steps`.
    ///
    /// # Errors
    /// Same as [`Experiment::train`].
    pub fn train(&self, experiment: &Experiment, run: &str, max_steps: Option<u64>) -> Result<Outcome> {
        let options = TrainOptions { max_steps, ..TrainOptions::default() };
        experiment.train(&self.path(run), &Device::flex(), options)
    }
}
