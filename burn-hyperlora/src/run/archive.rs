//! Checkpoints of a run, for tools outside training: listing, consolidating and copying.

use std::path::Path;

use hyperlora_core::files::{Ownership, StagedFolder, apart, copy};
use hyperlora_core::{Error, Result};

use crate::checkpoint::{Checkpoint, CheckpointStore, RankPart};
use crate::hypernet::whole_files;
use crate::run::CHECKPOINTS;
use crate::run::claim::Claim;
use crate::run::moments::{self, MomentFiles, is_moments};
use crate::run::saved::{SavedState, WEIGHTS};

/// CheckpointInfo of a checkpoint, made without reading its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Optimiser steps done in total.
    pub step: u64,
    /// Name of the stage of the last step; `None` if there was none or the state cannot be read.
    pub stage: Option<String>,
    /// Size of all files in bytes.
    pub bytes: u64,
    /// Number of ranks that wrote it.
    pub ranks: usize,
    /// True if every file exists at its full length. [`Checkpoint::verify`] checks the content.
    pub whole: bool,
}

/// Lists the checkpoints of a folder: those of a run, oldest first, or the folder itself if it is a checkpoint.
///
/// # Errors
/// Input: a folder without checkpoints; Disk: a failing disk.
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

/// Summarises a checkpoint, however damaged.
pub fn summary(checkpoint: &Checkpoint) -> CheckpointInfo {
    let files = checkpoint.files().unwrap_or_default();
    let length = |name: &str| checkpoint.path().join(name).symlink_metadata().map_or(0, |data| data.len());
    let state: Result<SavedState> = checkpoint.state();
    CheckpointInfo {
        step: checkpoint.step,
        stage: state.ok().and_then(|state| state.train.records.last().map(|record| record.name.clone())),
        bytes: files.iter().map(|(name, _)| length(name)).sum(),
        ranks: files.iter().filter(|(name, _)| is_moments(name)).count(),
        whole: !files.is_empty() && files.iter().all(|(name, bytes)| length(name) == *bytes),
    }
}

/// Rewrites a checkpoint in place as one process would have written it, with the bases and the moments of all ranks in
/// one file each. On any failure, the checkpoint stays as it was.
///
/// # Errors
/// Input: a damaged checkpoint, or a run that is being trained; Input or Disk: an unwritable place or disk.
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
    CheckpointStore::at(root).write(checkpoint.step, |part: &mut RankPart<'_>| {
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

/// Copies the hypernetwork of a checkpoint to `target`, a folder of the released layout, completely or not at all.
///
/// # Errors
/// Input: a damaged checkpoint, a folder that this program did not write or that holds the checkpoint, or a place that
/// cannot be written to; Disk: a full or failing disk.
pub fn copy_weights(checkpoint: &Checkpoint, target: &Path) -> Result<()> {
    apart(target, [checkpoint.path()])?;
    let staged = StagedFolder::new(target, Ownership::Marked)?;
    checkpoint.verify()?;
    for file in whole_files(&checkpoint.path().join(WEIGHTS)) {
        file.write(&staged.path().join(&file.name))?;
    }
    staged.commit()
}
