//! Saving a run, and rolling it back.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use hyperlora_core::{Error, Result};

use crate::checkpoint::RankPart;
use crate::hypernet::Stage;
use crate::metrics::RunSummary;
use crate::run::SKIPPED;
use crate::run::saved::{SavedState, Snapshot};
use crate::train::config::StageEntry;
use crate::train::session::Session;
use crate::train::start::begin_or_resume;
use crate::train::step::Learner;

impl Session {
    /// Begins to save the whole run. Training waits for the copy to host memory and for the previous checkpoint.
    pub(super) fn save(&mut self) -> Result<()> {
        let saved = SavedState {
            train: self.state.clone(),
            taught: self.taught(),
            optimizer_steps: self.learner.optimizer.steps(),
            settings: self.settings.clone(),
        };
        let (clock, ranks) = (Instant::now(), &self.setup.ranks);
        let Learner { hyper_lora, optimizer } = &self.learner;
        let copy = || {
            let snapshot = Snapshot::take(&saved, hyper_lora, optimizer, &**ranks)?;
            Ok(move |part: &mut RankPart<'_>| snapshot.write(part))
        };
        self.writer.begin(&**ranks, self.state.global_step, copy, self.tidying())?;
        self.log(&[("speed/checkpoint_stall_s".into(), clock.elapsed().as_secs_f64())]);
        Ok(())
    }

    /// Returns the stage of the last step; `None` before the first.
    fn taught(&self) -> Option<Stage> {
        let stage = self.state.stage;
        let index = if self.state.stage_step > 0 { Some(stage) } else { stage.checked_sub(1) };
        index.and_then(|index| self.setup.train.stages.get(index)).map(StageEntry::kind)
    }

    /// Returns the work that follows a checkpoint: pruning older ones and updating the summary.
    pub(super) fn tidying(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (run, store, policy) = (self.setup.run.clone(), self.checkpoints.clone(), self.setup.train.checkpoints);
        let (records, last_due) = (self.state.records.clone(), self.state.last_due);
        move || {
            store.prune(policy.keep, policy.keep_every, last_due)?;
            RunSummary::update(&run, |summary| summary.stages = records)
        }
    }

    /// Waits until the pending checkpoint is saved, and returns the latest one.
    pub(super) fn finish_checkpoint(&mut self) -> Result<PathBuf> {
        self.writer.finish(&*self.setup.ranks)?;
        Ok(self.checkpoints.latest()?.map(|last| last.path().to_owned()).unwrap_or_default())
    }

    /// Rolls back to the weights and moments of the last checkpoint that was due, or fails if there is none. Step and
    /// data position advance.
    pub(super) fn go_back(&mut self, reason: &str) -> Result<()> {
        let Some(step) = self.state.last_due else { return Err(diverged(reason)) };
        self.finish_checkpoint()?;
        let setup = Rc::clone(&self.setup);
        let checkpoint = self.checkpoints.of_step(step);
        tracing::warn!("{reason}: rolled back to the weights of {}", checkpoint.path().display());
        setup.ranks.on_main("rank 0 to verify a checkpoint", || {
            checkpoint.verify().map_err(|error| error.with_remedy("restore it, or start a new run with --restart"))
        })?;
        (self.learner, _) = setup.ranks.try_on_all("all ranks to go back to a checkpoint", || {
            begin_or_resume(&setup, &self.base, Some(&checkpoint), &self.settings)
        })?;
        Ok(())
    }
}

/// Returns the error of a run whose weights cannot be trusted.
pub(super) fn diverged(reason: &str) -> Error {
    Error::Fault(format!(
        "the training diverged: {reason}; the photos of the skipped steps are in {SKIPPED}\n  remedy: lower optim.learning_rate of the stage or lengthen its warm-up, then start a new run with --restart"
    ))
}
