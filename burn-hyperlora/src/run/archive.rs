//! Checkpoints of a run from outside: which there are, and bringing one's parts together.

use std::path::Path;

use hyperlora_core::files::{Ownership, StagedFolder, apart, copy};
use hyperlora_core::{Error, Result};

use crate::checkpoint::{Checkpoint, CheckpointStore, Part};
use crate::hypernet::whole_files;
use crate::run::CHECKPOINTS;
use crate::run::claim::Claim;
use crate::run::moments::{self, MomentFiles, is_moments};
use crate::run::saved::{SavedState, WEIGHTS};

/// What is known of a checkpoint without reading its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Optimiser steps done in all.
    pub step: u64,
    /// Name of the stage that the last step belonged to; `None` where there was none, and for a state that cannot be read.
    pub stage: Option<String>,
    /// Of all files.
    pub bytes: u64,
    /// Ranks that wrote it.
    pub ranks: usize,
    /// Whether every file is there in its full length. Contents are for [`Checkpoint::verify`].
    pub whole: bool,
}

/// The checkpoints that a folder stands for: those of a run, oldest first, or the one it is.
///
/// # Errors
/// Input for a folder that holds none, Disk for a failing disk.
pub fn checkpoints(folder: &Path) -> Result<Vec<Checkpoint>> {
    if let Ok(checkpoint) = Checkpoint::at(folder) {
        return Ok(vec![checkpoint]);
    }
    let below = folder.join(CHECKPOINTS);
    let found = CheckpointStore::at(if below.is_dir() { &below } else { folder }).list()?;
    if found.is_empty() {
        let remedy = "give a run folder with checkpoints, or one of them (runs/NAME/checkpoints/step-00000300)";
        return Err(Error::file(folder, "holds no checkpoint", remedy));
    }
    Ok(found)
}

/// Looks at a checkpoint, however damaged.
pub fn summary(checkpoint: &Checkpoint) -> Summary {
    let files = checkpoint.files().unwrap_or_default();
    let length = |name: &str| checkpoint.path().join(name).symlink_metadata().map_or(0, |data| data.len());
    let state: Result<SavedState> = checkpoint.state();
    Summary {
        step: checkpoint.step,
        stage: state.ok().and_then(|state| state.train.records.last().map(|record| record.name.clone())),
        bytes: files.iter().map(|(name, _)| length(name)).sum(),
        ranks: files.iter().filter(|(name, _)| is_moments(name)).count(),
        whole: !files.is_empty() && files.iter().all(|(name, bytes)| length(name) == *bytes),
    }
}

/// Writes a checkpoint anew, in its place, as one process would have: the bases and the moments of all ranks in one file
/// each. Whatever fails, the checkpoint stays as it was.
///
/// # Errors
/// Input for a damaged checkpoint and for a run that is being trained; Input or Disk for a place or disk that cannot be
/// written to.
pub fn consolidate(checkpoint: &Checkpoint) -> Result<()> {
    let absolute = std::path::absolute(checkpoint.path()).map_err(|source| Error::read(checkpoint.path(), source))?;
    let Some(root) = absolute.parent() else { return Err(Error::file(&absolute, "has no parent", "move it")) };
    // A checkpoint that was copied elsewhere belongs to no run.
    let run = root.parent().filter(|_| root.ends_with(CHECKPOINTS));
    let _claim = run.map(Claim::take).transpose()?;
    checkpoint.verify()?;
    let whole = MomentFiles::open(checkpoint)?;
    let is_other = |name: &String| !is_moments(name) && Path::new(name).parent() != Some(Path::new(WEIGHTS));
    let others = checkpoint.files()?.into_iter().map(|(name, _)| name).filter(is_other);
    CheckpointStore::at(root).write(checkpoint.step, |part: &mut Part<'_>| {
        for name in others {
            part.file(&name, |path| copy(&checkpoint.path().join(&name), path))?;
        }
        for file in whole_files(&checkpoint.path().join(WEIGHTS)) {
            part.file(&format!("{WEIGHTS}/{}", file.name), |path| file.write(path))?;
        }
        part.file(&moments::file_name(0, 1), |path| whole.write_whole(path))
    })?;
    Ok(())
}

/// Copies the hypernetwork of a checkpoint to `target`, a folder of the released layout, whole or not at all.
///
/// # Errors
/// Input for a damaged checkpoint, a folder that this program did not write or that holds the checkpoint, and a place that
/// cannot be written to; Disk for a full or failing disk.
pub fn copy_weights(checkpoint: &Checkpoint, target: &Path) -> Result<()> {
    apart(target, [checkpoint.path()])?;
    let staged = StagedFolder::new(target, Ownership::Marked)?;
    checkpoint.verify()?;
    for file in whole_files(&checkpoint.path().join(WEIGHTS)) {
        file.write(&staged.path().join(&file.name))?;
    }
    staged.commit()
}
