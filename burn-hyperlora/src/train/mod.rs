//! Training: three stages, one step function, and a state from which a run goes on bit for bit.

pub mod archive;
pub mod checkpoints;
pub mod config;
pub mod curves;
mod fingerprint;
pub mod fixed_set;
pub mod forward;
pub mod moments;
pub mod pictures;
mod ranks;
mod run_folder;
pub mod skipped;
pub mod spikes;
mod start;
pub mod state;
pub mod step;
mod together;
pub mod trainer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use data_prep::files::write_whole;

use crate::collective::Collective;
use crate::conditioning::BaseConfig;
use crate::data::DataConfig;
use crate::data::dataset::Dataset;
use crate::data::quarantine::Quarantine;
use crate::error::Result;
use crate::hypernet::HyperLoraConfig;
use crate::metrics::Display;
use crate::signals::StopFlag;
use crate::train::config::TrainConfig;
use crate::train::run_folder::{claim_together, write_config};
use crate::train::together::lead_alone;
use crate::train::trainer::Trainer;

pub(crate) use crate::train::together::all_or_none;
pub use run_folder::{is_claimed, move_aside, verify_config};

/// Name of the resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.yaml";
/// Name of the file in a run folder that tells where on this machine lies what the configuration names.
pub const PATHS_FILE: &str = "paths.yaml";
/// Folder of the checkpoints in a run folder.
pub const CHECKPOINTS: &str = "checkpoints";
/// Folder of the event files in a run folder.
pub const TENSORBOARD: &str = "tensorboard";
/// The skipped steps in a run folder, one JSON object a line.
pub const SKIPPED: &str = "skipped.jsonl";
/// Folder of the pictures in a run folder.
pub const SAMPLES: &str = "samples";

/// What a run is made of: the parts of an experiment that training reads.
pub struct TrainSetup<'a> {
    /// The YAML file, for messages.
    pub place: String,
    /// The folder that paths of the YAML start at.
    pub folder: &'a Path,
    /// The run folder.
    pub run: &'a Path,
    /// The experiment's name.
    pub name: &'a str,
    /// All randomness hangs on it.
    pub seed: u64,
    /// The frozen models.
    pub base: &'a BaseConfig,
    /// Where the samples come from.
    pub data: &'a DataConfig,
    /// Sizes of the hypernetwork.
    pub hyper_lora: &'a HyperLoraConfig,
    /// How it is trained.
    pub train: &'a TrainConfig,
    /// The whole configuration as the run folder keeps it.
    pub resolved: Resolved,
    /// The plain device to train on.
    pub device: Device,
    /// The ranks of the run, this process among them.
    pub world: &'a dyn Collective,
}

/// A configuration as files of a run folder, in YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// [`CONFIG_FILE`]: everything, with defaults written out. It tells nothing of the machine, and goes along when a run
    /// is shared.
    pub config: String,
    /// [`PATHS_FILE`]: where on this machine lies what it names.
    pub paths: String,
}

/// What the command line adds.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Stops, with a checkpoint, once this many optimiser steps are done in all.
    pub max_steps: Option<u64>,
    /// Raised by SIGTERM, SIGINT and SIGHUP.
    pub stop: StopFlag,
    /// How progress is shown.
    pub display: Display,
    /// The work of each stage, in their order; empty where it is not known.
    pub work: Vec<StageWork>,
}

/// What a stage has to compute per image: what the curves measure the speed by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageWork {
    /// Floating-point operations of the model, those that are repeated to save memory not counted.
    pub flops_per_image: f64,
    /// Seconds of them at the peak of the device, where it is known.
    pub ideal_seconds_per_image: Option<f64>,
}

/// How a run ended in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All stages are done.
    Finished {
        /// Steps in all.
        step: u64,
        /// The last checkpoint.
        checkpoint: PathBuf,
    },
    /// `max_steps` was reached; the same command without it goes on.
    Paused {
        /// Steps in all.
        step: u64,
        /// The checkpoint that was written.
        checkpoint: PathBuf,
    },
    /// A signal asked for a stop and everything is saved; the same command goes on.
    Stopped {
        /// The signal's name.
        signal: &'static str,
        /// Steps in all.
        step: u64,
        /// The checkpoint that was written.
        checkpoint: PathBuf,
    },
}

/// Trains, or goes on from the latest checkpoint of the run folder.
///
/// # Errors
/// Input for what the YAML names and for a checkpoint of other settings, Disk for a failing disk, Fault for a training
/// that diverged; Input too where another process trains into the run folder, and where the ranks have not one and the same.
pub fn run(setup: &TrainSetup<'_>, options: &TrainOptions) -> Result<Outcome> {
    let (world, patience) = (setup.world, setup.train.long_timeout());
    // A quarter: the ranks must not give each other up while one looks for the folder.
    let _claim = claim_together(world, setup.run, patience, setup.train.collective_timeout() / 4)?;
    let mut trainer = Trainer::prepare(setup, options)?;
    lead_alone(world, "rank 0 to write the configuration", patience, || {
        write_whole(&setup.run.join(PATHS_FILE), setup.resolved.paths.as_bytes())?;
        write_config(setup.run, &setup.resolved.config)
    })?;
    loop {
        match trainer.run_stage() {
            Ok(None) => {}
            Ok(Some(outcome)) => return Ok(outcome),
            Err(error) => {
                trainer.fail();
                return Err(error);
            }
        }
    }
}

/// Opens the shards that an experiment names; damaged row groups are left out of `run` as its quarantine file says.
///
/// # Errors
/// Input for a missing, foreign or corrupt shard folder.
pub fn open_dataset(config: &DataConfig, yaml_folder: &Path, run: &Path) -> Result<Arc<Dataset>> {
    let shards = config.open_shards(yaml_folder)?;
    let quarantine = Quarantine::open(run, config.bad_row_groups, shards.checksum())?;
    Ok(Arc::new(Dataset::open(shards, config.cache_mib)?.with_quarantine(quarantine)))
}
