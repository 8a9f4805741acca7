//! Curves, pictures and skip records of a run.

use std::ops::ControlFlow;
use std::rc::Rc;

use hyperlora_core::Result;

use crate::data::quarantine;
use crate::metrics::MetricsWriter;
use crate::optim::spikes::SpikeAction;
use crate::run::{SKIPPED, skipped};
use crate::train::config::{SamplesConfig, StageEntry};
use crate::train::curves::{CUT_CAPTIONS, StepTime};
use crate::train::fixed_set::FixedSet;
use crate::train::pictures;
use crate::train::session::Session;
use crate::train::session::saving::diverged;
use crate::train::step::StepReport;

impl Session {
    /// Adds a counted step to the curves, or records that it was skipped.
    pub(super) fn take_note(
        &mut self,
        entry: &StageEntry,
        report: StepReport,
        learning_rate: f64,
        time: StepTime,
    ) -> Result<()> {
        match &report.skipped {
            Some(reason) => self.skip(entry, reason, &report.photos)?,
            None => {
                self.state.spikes.good(&self.setup.train.spikes, report.mean_loss());
                if let Some(stage) = &mut self.stage {
                    stage.curves.add(&report, learning_rate, time);
                }
            }
        }
        if let Some(stage) = &mut self.stage {
            stage.images += report.losses.len() / self.setup.ranks.world_size();
            stage.progress.step(self.state.stage_step, report.mean_loss(), report.losses.len());
        }
        if let Some(live) = &mut self.live {
            live.step(self.state.stage_step);
        }
        Ok(())
    }

    /// Writes the curves, pictures and checkpoints that are due after the last step.
    pub(super) fn write_what_is_due(&mut self, entry: &StageEntry) -> Result<()> {
        let setup = Rc::clone(&self.setup);
        let train = &setup.train;
        let done = self.state.stage_step;
        let last = done == entry.config().steps;
        if last || done.is_multiple_of(train.log_every) {
            self.log_curves()?;
        }
        if let Some(samples) = &train.samples
            && (last || done.is_multiple_of(samples.every))
            && let Some(set) = self.stage.as_ref().and_then(|stage| stage.fixed_set.clone())
        {
            self.draw_pictures(entry, samples, &set)?;
        }
        // The end of a stage has its own checkpoint, whose state is already at the next stage. During a row of bad
        // steps no checkpoint is written for a rollback, because the weights may be bad themselves.
        let good = self.state.spikes.in_a_row == 0;
        if !last && good && done.is_multiple_of(train.checkpoints.every) {
            self.state.last_due = Some(self.state.global_step);
            self.save()?;
        }
        Ok(())
    }

    fn log_curves(&mut self) -> Result<()> {
        let Some(stage) = &mut self.stage else { return Ok(()) };
        let work = self.options.work.get(self.state.stage);
        let moment_bytes = self.learner.optimizer.state_bytes();
        let ranks = &self.setup.ranks;
        let mut values = stage.curves.take(&**ranks, stage.waits.take_share(), moment_bytes, work)?;
        let cut = self.base.cut_captions() - stage.cut_before;
        let images = stage.images.max(1);
        if ranks.is_main() {
            values.push(("data/left_out_row_groups".into(), self.left_out() as f64));
        }
        values.push((CUT_CAPTIONS.into(), cut as f64 / images as f64));
        values.push(("optim/skipped_steps".into(), self.state.spikes.skipped as f64));
        self.log(&values);
        Ok(())
    }

    /// Records a skipped step with the photos of its batch. After too many in a row, rolls back to the last checkpoint
    /// that was due, or stops the run.
    fn skip(&mut self, entry: &StageEntry, reason: &str, photos: &[(u64, String)]) -> Result<()> {
        let setup = Rc::clone(&self.setup);
        let step = self.state.global_step;
        tracing::warn!("step {step} is skipped: {reason}; its photos are in {SKIPPED}");
        skipped::note(&setup.ranks, &setup.run, step, entry.name(), reason, photos)?;
        match self.state.spikes.bad(&setup.train.spikes) {
            SpikeAction::Skip => Ok(()),
            SpikeAction::RollBack => self.go_back(&format!("too many in a row, the last one for {reason}")),
            SpikeAction::Stop => Err(diverged(reason)),
        }
    }

    /// Writes to the curves if this rank has them. A failing disk ends the curves, never the run.
    pub(super) fn record(&mut self, write: impl FnOnce(&mut MetricsWriter, u64)) {
        let Some(metrics) = &mut self.metrics else { return };
        write(metrics, self.state.global_step);
        if let Some(error) = metrics.take_error() {
            tracing::warn!("no more curves are written, the run continues: {error}");
        }
    }

    /// Counts the row groups that all ranks have left out so far. Those found by other ranks are listed only in the
    /// shared quarantine file.
    fn left_out(&self) -> usize {
        let of_all = quarantine::count(&self.setup.run, self.settings["data"]["shards"].as_str());
        of_all.unwrap_or_else(|_| self.dataset.quarantined())
    }

    /// Draws the pictures on the main rank while the others wait. Draws nothing if the run was asked to stop.
    fn draw_pictures(&mut self, entry: &StageEntry, config: &SamplesConfig, set: &FixedSet) -> Result<()> {
        let setup = Rc::clone(&self.setup);
        if setup.ranks.asked_to_stop(self.options.stop.raised_by())?.is_some() {
            tracing::warn!("the pictures of step {} are not drawn: the run is stopping", self.state.global_step);
            return Ok(());
        }
        setup.ranks.on_main("rank 0 to draw the pictures", || {
            let people = match set.first_people(config.count, &|| self.options.stop.raised_by())? {
                ControlFlow::Continue(people) => people,
                ControlFlow::Break(_) => {
                    tracing::warn!(
                        "the pictures of step {} are not drawn: the run is stopping",
                        self.state.global_step
                    );
                    return Ok(());
                }
            };
            let hyper_lora = &self.learner.hyper_lora;
            let grid = pictures::grid(&self.base, hyper_lora, entry.kind(), &people, config, &setup.train.trigger)?;
            self.record(|metrics, step| metrics.image(step, &format!("samples/{}", entry.name()), &grid));
            let step = self.state.global_step;
            if let Err(error) = pictures::write(&setup.run, step, &grid) {
                tracing::warn!("the pictures of step {step} are not written: {error}");
            }
            Ok(())
        })
    }
}
