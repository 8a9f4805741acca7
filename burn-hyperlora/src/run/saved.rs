//! Content of a run's checkpoint, and the source that a run resumes from.
//!
//! A checkpoint holds `weights/`, a hypernetwork in the released folder layout with one shard of its bases per rank;
//! `optimizer*.safetensors`, the [moments] of AdamW; and `state.json`, the rest: [`SavedState`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{FloatDType, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::Collective;
use hyperlora_sdxl::weights;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{Checkpoint, CheckpointStore, RankPart};
use crate::hypernet::{FolderFile, HyperLora, Stage, is_released};
use crate::optim::Optimizer;
use crate::run::state::TrainState;
use crate::run::{CHECKPOINTS, CONFIG_FILE, moments};

/// Folder of the weights in a checkpoint.
pub const WEIGHTS: &str = "weights";

/// `state.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Position of the run.
    pub train: TrainState,
    /// Stage that the last step trained.
    pub taught: Option<Stage>,
    /// Step count of each parameter in this stage.
    pub optimizer_steps: BTreeMap<String, usize>,
    /// Settings that a resume must match.
    pub settings: Value,
}

/// RankPart of a checkpoint that one rank writes, copied to host memory.
pub struct Snapshot {
    /// On the main rank only.
    state: Option<SavedState>,
    weights: Vec<FolderFile>,
    /// File name of the moments.
    moments_file: String,
    moments: Vec<(String, TensorData)>,
}

impl Snapshot {
    /// Copies this rank's part: its moments and its share of the weights.
    ///
    /// # Errors
    /// Fault: the device fails.
    pub fn take(
        state: &SavedState,
        hyper_lora: &HyperLora,
        optimizer: &Optimizer,
        world: &dyn Collective,
    ) -> Result<Self> {
        let (rank, ranks) = (world.rank(), world.world_size());
        let moments = optimizer.pieces(world).into_iter().map(|(name, piece)| {
            let data = weights::data_of(piece, &name)?;
            Ok((name, data))
        });
        Ok(Self {
            state: world.is_main().then(|| state.clone()),
            weights: hyper_lora.copy_part(FloatDType::F32, rank, ranks)?,
            moments_file: moments::file_name(rank, ranks),
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// Writes the part and frees its memory file by file.
    ///
    /// # Errors
    /// Disk: a full or failing disk; Input: a place that cannot be written to.
    pub fn write(self, part: &mut RankPart<'_>) -> Result<()> {
        for file in self.weights {
            part.file(&format!("{WEIGHTS}/{}", file.name), |path| file.write(path))?;
        }
        part.file(&self.moments_file, |path| weights::save(path, self.moments))?;
        self.state.map_or(Ok(()), |state| part.state(&state))
    }
}

/// Returns the checkpoint to resume from, verified; `None` for a run without one.
///
/// # Errors
/// Input: a damaged checkpoint; Disk: a failing disk.
pub fn latest(run: &Path) -> Result<Option<Checkpoint>> {
    let store = CheckpointStore::at(&run.join(CHECKPOINTS));
    let latest = store.latest()?;
    if let Some(checkpoint) = &latest {
        checkpoint.verify()?;
    }
    Ok(latest)
}

/// Hypernetwork location for a folder given by the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In a checkpoint of a run.
    Run {
        /// Run folder.
        run: PathBuf,
        /// Checkpoint, verified.
        checkpoint: Checkpoint,
    },
    /// In a folder of the released layout, which holds no data of a run.
    Released(PathBuf),
}

impl Source {
    /// Finds the hypernetwork of a folder: a run folder (its latest checkpoint), a checkpoint folder, or a folder of
    /// the released layout.
    ///
    /// # Errors
    /// Input: another kind of folder, a run without a checkpoint, or a damaged checkpoint; Disk: a failing disk.
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

    /// Returns the paths that are read from a folder accepted by [`find`](Self::find); outputs must not be written
    /// there. In a run folder, outputs may lie beside the checkpoints.
    pub fn inputs(folder: &Path) -> Vec<PathBuf> {
        let below = folder.join(CHECKPOINTS);
        if below.is_dir() { vec![below, folder.join(CONFIG_FILE)] } else { vec![folder.into()] }
    }

    /// Path of the folder of the released layout.
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
/// Input: names the first key that changed.
pub fn check_settings(place: &str, saved: &SavedState, settings: &Value) -> Result<()> {
    let Some((key, then, now)) = first_difference(&saved.settings, settings) else { return Ok(()) };
    Err(Error::input(
        format!("{place}: {key}"),
        format!("is {now}, the run's checkpoint was made with {then}"),
        "set it back to resume, or start a new run with --restart (the old run folder is moved aside)",
    ))
}

/// Finds the first key whose value differs: its path, the value in `then` and the value in `now`.
fn first_difference(then: &Value, now: &Value) -> Option<(String, String, String)> {
    match (then, now) {
        (Value::Object(a), Value::Object(b)) => a
            .keys()
            .chain(b.keys().filter(|key| !a.contains_key(*key)))
            .find_map(|key| within(key, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))),
        (Value::Array(a), Value::Array(b)) => (0..a.len().max(b.len())).find_map(|index| {
            let at = |array: &[Value]| array.get(index).cloned().unwrap_or(Value::Null);
            within(&index.to_string(), &at(a), &at(b))
        }),
        (a, b) => (a != b).then(|| (String::new(), plain(a), plain(b))),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn within(key: &str, then: &Value, now: &Value) -> Option<(String, String, String)> {
    first_difference(then, now).map(|(path, then, now)| {
        let path = if path.is_empty() { key.to_owned() } else { format!("{key}.{path}") };
        (path, then, now)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_differing_key_is_named_by_its_path() {
        let then = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 5}}]}});
        assert_eq!(first_difference(&then, &then.clone()), None);
        let now = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 6}}]}});
        let (path, before, after) = first_difference(&then, &now).unwrap_or_default();
        assert_eq!((path.as_str(), before.as_str(), after.as_str()), ("train.stages.0.base.steps", "5", "6"));
        let now = json!({"seed": 1, "train": {"stages": [{"base": {"steps": 5}}, {"id_clip": 1}]}});
        assert_eq!(first_difference(&then, &now).map(|found| found.0), Some("train.stages.1".into()));
    }
}
