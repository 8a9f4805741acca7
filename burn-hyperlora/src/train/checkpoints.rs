//! What a checkpoint of a run holds, and going on from one.
//!
//! `weights/` is a hypernetwork in the released folder layout, `optimizer.safetensors` the moments of AdamW, and
//! `state.json` the rest: [`SavedState`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{Checkpoint, CheckpointStore};
use crate::error::{Error, Result};
use crate::hypernet::{Stage, is_released};
use crate::train::CHECKPOINTS;
use crate::train::state::{TrainState, first_difference};
use crate::train::step::Learner;
use crate::weights::{self, TensorEntry, Weights};

/// Folder of the weights in a checkpoint.
pub const WEIGHTS: &str = "weights";

const OPTIMIZER: &str = "optimizer.safetensors";

/// `state.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Where the run stands.
    pub train: TrainState,
    /// What the last step taught.
    pub taught: Option<Stage>,
    /// How often each parameter was stepped in this stage.
    pub optimizer_steps: BTreeMap<String, usize>,
    /// The settings that a resume must match.
    pub settings: Value,
}

/// Saves the run; tells which folder. `moments` are those of all ranks.
///
/// # Errors
/// Disk for a full or failing disk, Input for a place that cannot be written to; older checkpoints are then intact.
pub fn save(
    store: &CheckpointStore,
    state: &SavedState,
    learner: &Learner,
    moments: &BTreeMap<String, Tensor<1>>,
    keep: usize,
) -> Result<PathBuf> {
    let checkpoint = store.write(state.train.global_step, state, |folder| {
        learner.hyper_lora.save(&folder.join(WEIGHTS), FloatDType::F32)?;
        save_optimizer(&folder.join(OPTIMIZER), moments)
    })?;
    store.prune(keep)?;
    Ok(checkpoint.path().into())
}

/// Writes the moments, the bytes of one in memory at a time.
fn save_optimizer(path: &Path, moments: &BTreeMap<String, Tensor<1>>) -> Result<()> {
    let entries = moments.iter().map(|(name, moment)| TensorEntry::new(name, moment.dtype(), moment.dims()));
    weights::save_lazily(path, BTreeMap::new(), entries.collect::<Result<_>>()?, |entry| {
        let name = &entry.name;
        let moment = moments.get(name).ok_or_else(|| Error::Fault(format!("no moment is named {name}")))?;
        weights::bytes_of(moment.clone(), name)
    })
}

/// The checkpoint that a run goes on from, verified; `None` for a run without one.
///
/// # Errors
/// Input for a damaged checkpoint, Disk for a failing disk.
pub fn latest(run: &Path) -> Result<Option<Checkpoint>> {
    let store = CheckpointStore::at(&run.join(CHECKPOINTS));
    let latest = store.latest()?;
    if let Some(checkpoint) = &latest {
        checkpoint.verify()?;
    }
    Ok(latest)
}

/// Where the hypernetwork lies that a folder given by the user stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In a checkpoint of a run.
    Run {
        /// The run folder.
        run: PathBuf,
        /// The checkpoint, verified.
        checkpoint: Checkpoint,
    },
    /// In a folder of the released layout, which tells nothing of a run.
    Released(PathBuf),
}

impl Source {
    /// Takes a run folder for its latest checkpoint, a checkpoint folder, or a folder of the released layout.
    ///
    /// # Errors
    /// Input for a folder that is none of these, a run without checkpoint, and a damaged checkpoint; Disk for a failing
    /// disk.
    pub fn find(folder: &Path) -> Result<Self> {
        if folder.join(CHECKPOINTS).is_dir() {
            let checkpoint = latest(folder)?.ok_or_else(|| {
                Error::file(folder, "holds no checkpoint yet", "let `hyperlora train` reach its first checkpoint")
            })?;
            return Ok(Self::Run { run: folder.into(), checkpoint });
        }
        if is_released(folder) {
            return Ok(Self::Released(folder.into()));
        }
        let remedy = "give a run folder, one of its checkpoints (runs/NAME/checkpoints/step-00000300), or a HyperLoRA \
                      folder with hyper_lora_modules.json";
        let checkpoint = Checkpoint::at(folder).map_err(|error| error.with_remedy(remedy))?;
        checkpoint.verify()?;
        let absolute = std::path::absolute(folder).map_err(|source| Error::read(folder, source))?;
        let run = absolute.ancestors().nth(2).unwrap_or(&absolute).to_path_buf();
        Ok(Self::Run { run, checkpoint })
    }

    /// The folder of the released layout.
    pub fn weights(&self) -> PathBuf {
        match self {
            Self::Run { checkpoint, .. } => checkpoint.path().join(WEIGHTS),
            Self::Released(folder) => folder.clone(),
        }
    }
}

/// Checks that the run was made with `settings`.
///
/// # Errors
/// Input, naming the first key that changed.
pub fn check_settings(place: &str, saved: &SavedState, settings: &Value) -> Result<()> {
    let Some((key, then, now)) = first_difference(&saved.settings, settings) else { return Ok(()) };
    Err(Error::input(
        format!("{place}: {key}"),
        format!("is {now}, the run's checkpoint was made with {then}"),
        "set it back to go on, or begin anew with --restart (the old run folder is kept aside)",
    ))
}

/// The tensors of the optimiser, by name.
///
/// # Errors
/// Input for a file that is missing or damaged.
pub fn optimizer_tensors(checkpoint: &Checkpoint) -> Result<(PathBuf, BTreeMap<String, TensorData>)> {
    let path = checkpoint.path().join(OPTIMIZER);
    let file = Weights::open(&path, &Device::flex())?;
    let lengths: Vec<(String, usize)> =
        file.shapes().into_iter().map(|(name, shape)| (name.to_owned(), shape.iter().product())).collect();
    let tensors = lengths.into_iter().map(|(name, length)| {
        let data = file.at("").tensor(&name, [length]).into_data();
        (name, data)
    });
    let tensors = tensors.collect();
    file.finish()?;
    Ok((path, tensors))
}
