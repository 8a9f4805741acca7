//! Stages of a run: opening and closing.

use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;

use burn::tensor::Device;
use hyperlora_core::Result;
use hyperlora_ranks::Timed;
use hyperlora_sdxl::tokenizer::TEXT_TOKENS;

use crate::data::batch::{DrawConfig, Draws};
use crate::data::loader::{Loader, LoaderConfig};
use crate::data::sample::SampleMaker;
use crate::hypernet::Stage;
use crate::metrics::{Display, Progress, StageSummary, WaitClock};
use crate::train::config::StageEntry;
use crate::train::curves::StepCurves;
use crate::train::fixed_set::FixedSet;
use crate::train::session::Session;
use crate::train::session::open_stage::{OpenStage, StageEnd};
use crate::train::setup::Outcome;
use crate::train::start::begin_learning;

impl Session {
    /// Opens a stage, or the rest of it. Returns `false` if a signal arrived meanwhile and set the outcome of the run.
    pub(super) fn open_stage(&mut self, entry: &StageEntry) -> Result<bool> {
        let step = self.state.global_step;
        let maker = self.maker(entry.kind())?;
        let fixed_set = self.fixed_set(maker.clone(), entry)?;
        if let Some(signal) = self.begin_stage(entry, fixed_set.as_ref())? {
            // After the first stage, the checkpoint at the end of the previous one already holds this state.
            if step == 0 {
                self.save()?;
            }
            self.outcome = Some(Outcome::Stopped { signal, step, checkpoint: self.finish_checkpoint()? });
            return Ok(false);
        }
        let (setup, config) = (&self.setup, entry.config());
        if let Some(live) = &mut self.live {
            live.begin_stage(self.state.stage, entry.name(), self.state.stage_step, config.steps);
        }
        let loader = Loader::start(
            maker,
            self.draws(entry)?,
            self.state.next_draw..config.steps * setup.train.global_batch as u64,
            LoaderConfig {
                batch_size: setup.train.micro_batch,
                workers: setup.data.workers,
                prefetch_bytes: setup.data.prefetch_mib << 20,
                rank: self.rank,
            },
        )?;
        let timed = Rc::new(Timed::new(setup.ranks.collective()));
        let display = if setup.ranks.is_main() { self.options.display } else { Display::Hidden };
        let timesteps = self.base.schedule.config().num_train_timesteps as u32;
        self.stage = Some(OpenStage {
            loader,
            fixed_set: fixed_set.map(Rc::new),
            curves: StepCurves::new(entry.name(), timesteps, config.optim.clip_norm),
            progress: Progress::new(entry.name(), self.state.stage_step, config.steps, display),
            waits: WaitClock::default(),
            ranks: setup.ranks.through(timed.clone()),
            timed,
            lanes: lanes(&setup.device),
            cut_before: self.base.cut_captions(),
            images: 0,
        });
        Ok(true)
    }

    /// Closes the open stage and saves. Then either the outcome of the run is set or the next stage follows.
    pub(super) fn close_stage(&mut self, end: StageEnd) -> Result<()> {
        let (setup, mut end) = (Rc::clone(&self.setup), end);
        let open = self.stage.take();
        if let (StageEnd::Done, Some(stage), Some(entry)) = (&end, open, setup.train.stages.get(self.state.stage)) {
            stage.progress.finish();
            let (cut, images) = (self.base.cut_captions() - stage.cut_before, stage.images);
            if cut > 0 {
                let name = entry.name();
                tracing::warn!("stage {name}: {cut} of {images} captions were truncated to {TEXT_TOKENS} tokens");
            }
            let fixed_set = stage.fixed_set.clone();
            // The loader's threads end before the fixed set is measured.
            drop(stage.loader);
            end = self.end_stage(entry, fixed_set.as_deref())?;
        }
        self.save()?;
        // Stop requests are also checked between stages, because measuring the fixed set for the next stage may take
        // longer than the sender of the signal waits.
        let checkpoint = self.finish_checkpoint()?;
        if self.state.stage < setup.train.stages.len()
            && let StageEnd::Done = end
            && let Some(signal) = setup.ranks.asked_to_stop(self.options.stop.raised_by())?
        {
            end = StageEnd::Stopped(signal);
        }
        let step = self.state.global_step;
        self.outcome = match end {
            StageEnd::Done => None,
            StageEnd::Paused => Some(Outcome::Paused { step, checkpoint }),
            StageEnd::Stopped(signal) => Some(Outcome::Stopped { signal, step, checkpoint }),
        };
        Ok(())
    }

    /// Ends the run after its last stage.
    pub(super) fn finish(&mut self) -> Result<()> {
        let checkpoint = self.finish_checkpoint()?;
        // A run that was killed right after its last checkpoint has not been tidied yet.
        let tidy = self.tidying();
        self.setup.ranks.on_main("rank 0 to tidy the run folder", tidy)?;
        self.outcome = Some(Outcome::Finished { step: self.state.global_step, checkpoint });
        Ok(())
    }

    /// Creates the stage's record and optimiser; a resume within the stage finds both. Returns the signal that
    /// interrupted it.
    fn begin_stage(&mut self, entry: &StageEntry, fixed_set: Option<&FixedSet>) -> Result<Option<&'static str>> {
        if self.state.records.len() == self.state.stage {
            let before = match self.measure(entry, fixed_set)? {
                ControlFlow::Continue(before) => before,
                ControlFlow::Break(signal) => return Ok(Some(signal)),
            };
            let name = entry.name().into();
            self.state.records.push(StageSummary { name, fixed_set_loss_before: before, ..StageSummary::default() });
        }
        if self.state.stage_step == 0 {
            self.learner = begin_learning(&self.setup, self.learner.hyper_lora.clone(), entry);
        }
        Ok(None)
    }

    /// Measures the fixed set again and moves on to the next stage. If interrupted, a resume repeats the measurement.
    fn end_stage(&mut self, entry: &StageEntry, fixed_set: Option<&FixedSet>) -> Result<StageEnd> {
        if self.state.spikes.end() {
            self.go_back(&format!("the last step of stage {} was skipped", entry.name()))?;
        }
        let after = match self.measure(entry, fixed_set)? {
            ControlFlow::Continue(after) => after,
            ControlFlow::Break(signal) => return Ok(StageEnd::Stopped(signal)),
        };
        if let Some(record) = self.state.records.last_mut() {
            record.fixed_set_loss_after = after;
        }
        self.state.finish_stage();
        Ok(StageEnd::Done)
    }

    /// Computes the loss on the fixed set, if there is one; or returns the signal that interrupted it.
    fn measure(
        &mut self,
        entry: &StageEntry,
        set: Option<&FixedSet>,
    ) -> Result<ControlFlow<&'static str, Option<f64>>> {
        let Some(set) = set else { return Ok(ControlFlow::Continue(None)) };
        // A pending checkpoint is put in its place before the measurement, not after it.
        self.finish_checkpoint()?;
        let (setup, stop) = (&self.setup, &self.options.stop);
        let measured = set.loss(&self.base, &self.learner.hyper_lora, &setup.train.trigger, &setup.ranks, stop)?;
        if let ControlFlow::Continue(loss) = measured {
            let step = self.state.global_step;
            tracing::info!("stage {}, step {step}: loss on the fixed set {loss:.5}", entry.name());
            self.log(&[(format!("fixed_set/{}", entry.name()), loss)]);
        }
        Ok(measured.map_continue(Some))
    }

    fn maker(&self, kind: Stage) -> Result<SampleMaker> {
        let shape = self.base.sample_shape(self.setup.data.image_size, kind != Stage::Base)?;
        Ok(SampleMaker::new(Arc::clone(&self.dataset), &self.setup.data, self.setup.seed, shape))
    }

    fn draws(&self, entry: &StageEntry) -> Result<Draws> {
        let config = DrawConfig {
            seed: self.setup.seed,
            stage: self.state.stage as u64,
            split: &self.setup.data.split,
            reference: entry.config().reference,
            scenarios: entry.scenarios(),
            streams: self.setup.data.streams,
            shuffle_window: self.setup.data.shuffle_window,
        };
        let draws = Draws::new(&self.dataset, &config)?;
        if draws.left_out() > 0 {
            let (left_out, used) = (draws.left_out(), draws.epoch_len());
            tracing::warn!("{left_out} photos are left out: no second photo of their person; {used} are used");
        }
        Ok(draws)
    }

    fn fixed_set(&self, maker: SampleMaker, entry: &StageEntry) -> Result<Option<FixedSet>> {
        let Some(config) = &self.setup.train.fixed_set else { return Ok(None) };
        let timesteps = self.base.schedule.config().num_train_timesteps as u32;
        let reference = entry.config().reference;
        let set = FixedSet::new(maker, config, entry.kind(), reference, timesteps, self.setup.train.micro_batch)?;
        Ok(Some(set))
    }
}

/// Returns the number of parallel passes. A CPU's operations are too small to keep all cores busy; a GPU takes one pass
/// after the other.
fn lanes(device: &Device) -> usize {
    if *device == Device::flex() { rayon::current_num_threads() } else { 1 }
}
