//! What a run saves, and goes back to.

use std::path::PathBuf;
use std::time::Instant;

use super::Trainer;
use crate::checkpoint::Part;
use crate::error::{Error, Result};
use crate::metrics::Summary;
use crate::train::SKIPPED;
use crate::train::checkpoints::{SavedState, Snapshot};
use crate::train::start::begin_or_resume;
use crate::train::together::{all_or_none, lead_alone};

impl Trainer<'_> {
    /// Begins to save everything. The training waits for the copy to host memory, and for the checkpoint before this one.
    pub(super) fn save(&mut self) -> Result<()> {
        let saved = SavedState {
            train: self.state.clone(),
            taught: self.state.taught(&self.setup.train.stages),
            optimizer_steps: self.learner.optimizer.steps(),
            settings: self.settings.clone(),
        };
        let world = self.setup.world;
        let clock = Instant::now();
        let learner = &self.learner;
        let copy = || {
            let snapshot = Snapshot::take(&saved, learner, world)?;
            Ok(move |part: &mut Part<'_>| snapshot.write(part))
        };
        self.writer.begin(world, self.state.global_step, copy, self.tidying())?;
        self.log(&[("speed/checkpoint_stall_s".into(), clock.elapsed().as_secs_f64())]);
        Ok(())
    }

    /// What follows a checkpoint: older ones give way, and the summary tells what the run has reached.
    pub(super) fn tidying(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (run, store, policy) = (self.setup.run.to_owned(), self.checkpoints.clone(), self.setup.train.checkpoints);
        let (records, last_due) = (self.state.records.clone(), self.state.last_due);
        move || {
            store.prune(policy.keep, policy.keep_every, last_due)?;
            Summary::update(&run, |summary| summary.stages = records)
        }
    }

    /// Waits until all that was begun is saved; the latest checkpoint.
    pub(super) fn finish_checkpoint(&mut self) -> Result<PathBuf> {
        self.writer.finish(self.setup.world)?;
        Ok(self.checkpoints.latest()?.map(|last| last.path().to_owned()).unwrap_or_default())
    }

    /// Takes the weights and moments of the last checkpoint that was due, or stops where there is none; step and data go on.
    pub(super) fn go_back(&mut self, reason: &str) -> Result<()> {
        let Some(step) = self.state.last_due else { return Err(diverged(reason)) };
        self.finish_checkpoint()?;
        let (setup, patience) = (self.setup, self.setup.train.long_timeout());
        let checkpoint = self.checkpoints.of_step(step);
        tracing::warn!("{reason}: back to the weights of {}", checkpoint.path().display());
        lead_alone(setup.world, "rank 0 to verify a checkpoint", patience, || {
            checkpoint.verify().map_err(|error| error.with_remedy("restore it, or begin anew with --restart"))
        })?;
        (self.learner, _) = all_or_none(setup.world, "all ranks to go back to a checkpoint", patience, || {
            begin_or_resume(setup, &self.base, Some(&checkpoint), &self.settings)
        })?;
        Ok(())
    }
}

/// The end of a run whose weights cannot be trusted.
pub(super) fn diverged(reason: &str) -> Error {
    Error::Fault(format!(
        "the training diverged: {reason}; the photos of the skipped steps are in {SKIPPED}\n  remedy: lower optim.learning_rate of the stage or lengthen its warm-up, then begin anew with --restart"
    ))
}
