//! Setup of a run, and how it ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use hyperlora_core::Result;
use hyperlora_core::signals::StopFlag;
use hyperlora_ranks::Ranks;

use crate::conditioning::BaseConfig;
use crate::data::DataConfig;
use crate::data::dataset::Dataset;
use crate::data::quarantine::Quarantine;
use crate::hypernet::HyperLoraConfig;
use crate::metrics::Display;
use crate::run::Resolved;
use crate::train::config::TrainConfig;

/// Parts of an experiment that training reads.
pub struct TrainSetup {
    /// Path of the YAML file, for messages.
    pub place: String,
    /// Folder that the YAML's relative paths start from.
    pub folder: PathBuf,
    /// Run folder.
    pub run: PathBuf,
    /// Name of the experiment.
    pub name: String,
    /// Seed of all randomness.
    pub seed: u64,
    /// Frozen base models.
    pub base: BaseConfig,
    /// Source of the samples.
    pub data: DataConfig,
    /// Sizes of the hypernetwork.
    pub hyper_lora: HyperLoraConfig,
    /// Training settings.
    pub train: TrainConfig,
    /// Whole configuration as the run folder keeps it.
    pub resolved: Resolved,
    /// Plain device to train on.
    pub device: Device,
    /// Ranks of the run, including this process.
    pub ranks: Ranks,
}

/// Options from the command line.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Stops, with a checkpoint, once this many optimiser steps are done in total.
    pub max_steps: Option<u64>,
    /// Flag raised by SIGTERM, SIGINT and SIGHUP.
    pub stop: StopFlag,
    /// Display mode of progress.
    pub display: Display,
    /// Compute cost of each stage, in stage order; empty if unknown.
    pub work: Vec<StageWork>,
}

impl Default for TrainOptions {
    /// Runs all stages to the end, without a progress bar and without listening for signals.
    fn default() -> Self {
        Self { max_steps: None, stop: StopFlag::default(), display: Display::Hidden, work: Vec::new() }
    }
}

/// Compute cost of a stage per image, from which the curves derive utilisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageWork {
    /// Floating-point operations of the model, without those repeated to save memory.
    pub flops_per_image: f64,
    /// Seconds that these operations take at the device's peak, if known.
    pub ideal_seconds_per_image: Option<f64>,
}

/// Orderly end of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All stages are done.
    Finished {
        /// Total steps.
        step: u64,
        /// Last checkpoint.
        checkpoint: PathBuf,
    },
    /// `max_steps` was reached; the same command without it resumes.
    Paused {
        /// Total steps.
        step: u64,
        /// Checkpoint that was written.
        checkpoint: PathBuf,
    },
    /// A signal asked for a stop and everything is saved; the same command resumes.
    Stopped {
        /// Name of the signal.
        signal: &'static str,
        /// Total steps.
        step: u64,
        /// Checkpoint that was written.
        checkpoint: PathBuf,
    },
}

/// Opens the shards that an experiment names. Skips damaged row groups, as listed in the quarantine file of `run`.
///
/// # Errors
/// Input: a missing, foreign or corrupt shard folder.
pub fn open_dataset(config: &DataConfig, yaml_folder: &Path, run: &Path) -> Result<Arc<Dataset>> {
    let shards = config.open_shards(yaml_folder)?;
    let quarantine = Quarantine::open(run, config.bad_row_groups, shards.checksum())?;
    Ok(Arc::new(Dataset::open(shards, config.cache_mib)?.with_quarantine(quarantine)))
}
