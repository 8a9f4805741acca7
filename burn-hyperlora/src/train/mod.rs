//! Training: three stages, one step function, and a state from which a run goes on bit for bit.
//!
//! [`Session`] is a run in progress. [`run`] is the loop of `hyperlora train` over it; a loop of your own starts with
//! [`Session::open`].

pub mod config;
pub mod curves;
mod fingerprint;
pub mod fixed_set;
pub mod forward;
pub mod pictures;
mod rank_figures;
pub mod session;
mod settings;
mod start;
pub mod step;

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
use crate::objective::Denoising;
use crate::run::Resolved;
use crate::train::config::TrainConfig;

pub use session::{Gradients, Session, Window};

/// What a run is made of: the parts of an experiment that training reads.
pub struct TrainSetup {
    /// The YAML file, for messages.
    pub place: String,
    /// The folder that paths of the YAML start at.
    pub folder: PathBuf,
    /// The run folder.
    pub run: PathBuf,
    /// The experiment's name.
    pub name: String,
    /// All randomness hangs on it.
    pub seed: u64,
    /// The frozen models.
    pub base: BaseConfig,
    /// Where the samples come from.
    pub data: DataConfig,
    /// Sizes of the hypernetwork.
    pub hyper_lora: HyperLoraConfig,
    /// How it is trained.
    pub train: TrainConfig,
    /// The whole configuration as the run folder keeps it.
    pub resolved: Resolved,
    /// The plain device to train on.
    pub device: Device,
    /// The ranks of the run, this process among them.
    pub ranks: Ranks,
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

impl Default for TrainOptions {
    /// All stages to their end, without a progress bar; no signal is listened for.
    fn default() -> Self {
        Self { max_steps: None, stop: StopFlag::default(), display: Display::Hidden, work: Vec::new() }
    }
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
pub fn run(setup: TrainSetup, options: TrainOptions) -> Result<Outcome> {
    let mut session = Session::begin(setup, options)?;
    let mut train = || {
        while let Some(window) = session.next_window()? {
            let gradients = session.gradients(&window, &Denoising)?;
            session.apply(gradients, window.learning_rate)?;
        }
        session.outcome()
    };
    train().inspect_err(|_| session.fail())
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
