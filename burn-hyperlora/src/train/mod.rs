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
pub mod skipped;
pub mod spikes;
mod start;
pub mod state;
pub mod step;
mod together;
pub mod trainer;

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use data_prep::files::write_whole;

use crate::collective::Collective;
use crate::conditioning::BaseConfig;
use crate::data::DataConfig;
use crate::data::dataset::Dataset;
use crate::data::quarantine::Quarantine;
use crate::error::{Error, Result};
use crate::hypernet::HyperLoraConfig;
use crate::metrics::Display;
use crate::signals::StopFlag;
use crate::train::config::TrainConfig;
use crate::train::together::lead_alone;
use crate::train::trainer::Trainer;

pub(crate) use crate::train::together::all_or_none;

/// Name of the resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.yaml";
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
    /// The whole configuration with its defaults written out.
    pub resolved_yaml: String,
    /// The plain device to train on.
    pub device: Device,
    /// The ranks of the run, this process among them.
    pub world: &'a dyn Collective,
}

/// What the command line adds.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Stops, with a checkpoint, once this many optimiser steps are done in all.
    pub max_steps: Option<u64>,
    /// Raised by SIGTERM and SIGINT.
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
/// that diverged; Input too where another process trains into the run folder.
pub fn run(setup: &TrainSetup<'_>, options: &TrainOptions) -> Result<Outcome> {
    let (world, patience) = (setup.world, setup.train.long_timeout());
    // One rank writes; the others only read.
    let _lock = all_or_none(world, "rank 0 to claim the run folder", patience, || {
        let claim = || {
            fs::create_dir_all(setup.run).map_err(|source| Error::write(setup.run, source))?;
            lock(setup.run)
        };
        world.leads().then(claim).transpose()
    })?;
    let mut trainer = Trainer::prepare(setup, options)?;
    lead_alone(world, "rank 0 to write the configuration", patience, || {
        write_whole(&setup.run.join(CONFIG_FILE), setup.resolved_yaml.as_bytes()).map(drop)
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

/// Moves a run folder aside, to `<run>.1`, `<run>.2` and so on, and tells where; `None` where there is none.
///
/// # Errors
/// Input for a folder that another process trains into; Input or Disk when the folder cannot be renamed.
pub fn move_aside(run: &Path) -> Result<Option<PathBuf>> {
    if !run.exists() {
        return Ok(None);
    }
    let _lock = lock(run)?;
    let name = run.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let free = (1_u32..).map(|number| run.with_file_name(format!("{name}.{number}"))).find(|path| !path.exists());
    let Some(aside) = free else { return Err(Error::Fault(format!("no free name beside {}", run.display()))) };
    fs::rename(run, &aside).map_err(|source| Error::write(run, source))?;
    Ok(Some(aside))
}

/// Claims a run folder until the returned handle is dropped or the process ends, however it ends: two writers would take
/// each other's half-written checkpoints for leftovers.
fn lock(run: &Path) -> Result<File> {
    // `hyperlora status` looks at the lock by holding it for a moment.
    lock_after(run, || thread::sleep(Duration::from_millis(200)))
}

/// [`lock`], which lets some time pass with `wait` where the folder is not free at once.
fn lock_after(run: &Path, wait: impl FnOnce()) -> Result<File> {
    let folder = File::open(run).map_err(|source| Error::write(run, source))?;
    let mut locked = folder.try_lock();
    if let Err(TryLockError::WouldBlock) = locked {
        wait();
        locked = folder.try_lock();
    }
    match locked {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => Err(Error::file(
            run,
            "another process trains into this folder",
            "wait until it has ended, or give another folder with --out",
        )),
        Err(TryLockError::Error(source)) if source.kind() == ErrorKind::Unsupported => {
            tracing::warn!("{}: this file system has no locks: see that no other process trains here", run.display());
            Ok(folder)
        }
        Err(TryLockError::Error(source)) => Err(Error::write(run, source)),
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_look_at_the_lock_keeps_nobody_from_training_and_another_training_does() {
        let run = tempfile::tempdir().unwrap();
        let look = File::open(run.path()).unwrap();
        look.try_lock_shared().unwrap();
        let lock = lock_after(run.path(), || drop(look)).unwrap();
        let refused = lock_after(run.path(), || ()).unwrap_err();
        assert!(refused.exit_code() == 2 && refused.to_string().contains("another process trains"), "{refused}");
        drop(lock);
        lock_after(run.path(), || ()).unwrap();
    }

    #[test]
    fn an_old_run_is_kept_under_the_next_free_name() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("quickstart");
        assert_eq!(move_aside(&run).unwrap(), None);
        for number in 1..=2 {
            fs::create_dir(&run).unwrap();
            fs::write(run.join("summary.json"), number.to_string()).unwrap();
            assert_eq!(move_aside(&run).unwrap(), Some(root.path().join(format!("quickstart.{number}"))));
        }
        assert!(!run.exists());
        assert_eq!(fs::read_to_string(root.path().join("quickstart.1/summary.json")).unwrap(), "1");
    }
}
