//! The run: stages one after the other, each a loop of steps with its checkpoints, curves and pictures.

mod saving;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use serde_json::Value;

use crate::checkpoint::{CheckpointStore, CheckpointWriter};
use crate::collective::Timed;
use crate::conditioning::Base;
use crate::data::batch::{DrawConfig, Draws};
use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderConfig};
use crate::data::quarantine;
use crate::data::rank::Rank;
use crate::data::sample::SampleMaker;
use crate::error::{Error, Result};
use crate::hypernet::Stage;
use crate::metrics::{Display, MetricsWriter, Progress, StageSummary, WaitClock};
use crate::sdxl::tokenizer::TEXT_TOKENS;
use crate::train::checkpoints;
use crate::train::config::{SamplesConfig, StageEntry};
use crate::train::curves::{CUT_CAPTIONS, Curves, StepTime};
use crate::train::fixed_set::FixedSet;
use crate::train::spikes::Remedy;
use crate::train::start::{
    begin_learning, begin_or_resume, check_same_files, check_same_settings, check_same_start, check_wire, load_base,
    open, origin,
};
use crate::train::state::{TrainState, common_settings};
use crate::train::step::{Learner, StepConfig, StepTerms, step};
use crate::train::together::{all_or_none, asked_to_stop, lead_alone};
use crate::train::{CHECKPOINTS, Outcome, SKIPPED, TENSORBOARD, TrainOptions, TrainSetup, pictures, skipped};

use saving::diverged;

/// A run in progress.
pub struct Trainer<'a> {
    setup: &'a TrainSetup<'a>,
    options: &'a TrainOptions,
    base: Base,
    dataset: Arc<Dataset>,
    /// What a resume must match.
    settings: Value,
    state: TrainState,
    learner: Learner,
    checkpoints: CheckpointStore,
    writer: CheckpointWriter,
    /// On rank 0 alone.
    metrics: Option<MetricsWriter>,
    rank: Rank,
}

/// Why a stage's loop ended.
enum End {
    Done,
    Paused,
    Stopped(&'static str),
}

impl<'a> Trainer<'a> {
    /// Loads models and data, and takes up the latest checkpoint where there is one.
    ///
    /// # Errors
    /// See [`crate::train::run`].
    pub fn prepare(setup: &'a TrainSetup<'a>, options: &'a TrainOptions) -> Result<Self> {
        let (world, patience) = (setup.world, setup.train.long_timeout());
        // Compared in this order, and before anything can fail for it, what differs is named.
        let common = common_settings(setup.seed, setup.data, setup.hyper_lora, setup.train)?;
        check_same_settings(setup, options, &common)?;
        let rank = Rank::new(world.rank(), world.world_size())?;
        rank.check(&setup.place, setup.data.streams, setup.train.micro_batch, setup.train.global_batch)?;
        check_wire(setup)?;
        let (dataset, settings) =
            all_or_none(world, "all ranks to open base and data", patience, || open(setup, common))?;
        check_same_files(setup, &settings)?;
        let root = setup.run.join(CHECKPOINTS);
        lead_alone(world, "rank 0 to open the run folder", patience, || {
            CheckpointStore::open(&root)?;
            checkpoints::latest(setup.run).map(drop)
        })?;
        let checkpoints = CheckpointStore::at(&root);
        let writer = CheckpointWriter::new(checkpoints.clone(), patience);
        let (base, (learner, state), origin) = all_or_none(world, "all ranks to load their models", patience, || {
            let (base, checkpoint) = (load_base(setup)?, checkpoints.latest()?);
            let start = begin_or_resume(setup, &base, checkpoint.as_ref(), &settings)?;
            Ok((base, start, origin(setup, checkpoint.as_ref())?))
        })?;
        check_same_start(setup, &learner.hyper_lora, &state, &origin)?;
        let metrics = all_or_none(world, "rank 0 to begin its curves", patience, || {
            let create = || MetricsWriter::create(&setup.run.join(TENSORBOARD), state.global_step + 1);
            world.leads().then(create).transpose()
        })?;
        let mut trainer =
            Self { setup, options, base, dataset, settings, state, learner, checkpoints, writer, metrics, rank };
        trainer.record(|metrics, step| metrics.text(step, "config", &format!("```yaml\n{}```", setup.resolved.config)));
        Ok(trainer)
    }

    /// Runs what is left of the current stage; tells the outcome once there is nothing more to do.
    ///
    /// # Errors
    /// See [`crate::train::run`].
    pub fn run_stage(&mut self) -> Result<Option<Outcome>> {
        let setup = self.setup;
        let step = self.state.global_step;
        let Some(entry) = setup.train.stages.get(self.state.stage) else {
            let checkpoint = self.finish_checkpoint()?;
            // A run that was killed right after its last checkpoint was not tidied.
            let tidy = self.tidying();
            lead_alone(setup.world, "rank 0 to tidy the run folder", setup.train.long_timeout(), tidy)?;
            return Ok(Some(Outcome::Finished { step, checkpoint }));
        };
        let maker = self.maker(entry.kind())?;
        let fixed_set = self.fixed_set(maker.clone(), entry)?;
        if let Some(signal) = self.begin_stage(entry, fixed_set.as_ref())? {
            // Later than at the first step, this is the moment of the checkpoint at the end of the stage before.
            if step == 0 {
                self.save()?;
            }
            return Ok(Some(Outcome::Stopped { signal, step, checkpoint: self.finish_checkpoint()? }));
        }
        let mut end = self.steps(entry, maker, fixed_set.as_ref())?;
        if let End::Done = end {
            end = self.end_stage(entry, fixed_set.as_ref())?;
        }
        self.save()?;
        // Between stages, too: measuring for the next one may take longer than who asks for a stop waits for it.
        let checkpoint = self.finish_checkpoint()?;
        if self.state.stage < setup.train.stages.len()
            && let End::Done = end
            && let Some(signal) = asked_to_stop(setup.world, self.options.stop.raised_by())?
        {
            end = End::Stopped(signal);
        }
        let step = self.state.global_step;
        Ok(match end {
            End::Done => None,
            End::Paused => Some(Outcome::Paused { step, checkpoint }),
            End::Stopped(signal) => Some(Outcome::Stopped { signal, step, checkpoint }),
        })
    }

    /// After a failure: the checkpoint that was being written is still worth having. Several ranks cannot end it, as none
    /// knows where the others stand.
    pub fn fail(&mut self) {
        if self.setup.world.world_size() == 1
            && let Err(error) = self.writer.finish(self.setup.world)
        {
            tracing::error!("{error}");
        }
    }

    /// The loop over the stage's steps.
    fn steps(&mut self, entry: &StageEntry, maker: SampleMaker, fixed_set: Option<&FixedSet>) -> Result<End> {
        let (setup, train, config) = (self.setup, self.setup.train, entry.config());
        let global_batch = train.global_batch as u64;
        let mut loader = Loader::start(
            maker,
            self.draws(entry)?,
            self.state.next_draw..config.steps * global_batch,
            LoaderConfig {
                batch_size: train.micro_batch,
                workers: setup.data.workers,
                prefetch_bytes: setup.data.prefetch_mib << 20,
                rank: self.rank,
            },
        )?;
        let step_config = StepConfig {
            kind: entry.kind(),
            accumulation: train.accumulation() / setup.world.world_size(),
            lanes: lanes(&setup.device),
            recompute: train.recompute,
            trigger: &train.trigger,
            optim: &config.optim,
        };
        let scaling = train.lr_scaling.factor(setup.world.world_size());
        let display = if setup.world.leads() { self.options.display } else { Display::Hidden };
        let timesteps = self.base.schedule.config().num_train_timesteps as u32;
        let mut curves = Curves::new(entry.name(), timesteps, config.optim.clip_norm);
        let world = Timed::new(setup.world);
        let mut progress = Progress::new(entry.name(), self.state.stage_step, config.steps, display);
        let mut waits = WaitClock::default();
        let (cut_before, mut images) = (self.base.cut_captions(), 0_usize);
        while self.state.stage_step < config.steps {
            self.writer.advance(setup.world)?;
            if let Some(signal) = asked_to_stop(setup.world, self.options.stop.raised_by())? {
                return Ok(End::Stopped(signal));
            }
            if self.options.max_steps.is_some_and(|max| self.state.global_step >= max) {
                return Ok(End::Paused);
            }
            let start = Instant::now();
            let terms = StepTerms {
                learning_rate: scaling * config.optim.learning_rate_at(self.state.stage_step, config.steps),
                loss_limit: self.state.spikes.loss_limit(&train.spikes),
            };
            let report = step(&self.base, &mut self.learner, &step_config, &world, terms, || {
                let batch = waits.waiting(|| loader.next_batch_unless(&|| self.options.stop.raised_by()))?;
                match batch {
                    ControlFlow::Continue(None) => Err(Error::Fault("the data ended before the stage".into())),
                    ControlFlow::Continue(Some(batch)) => Ok(ControlFlow::Continue(batch)),
                    ControlFlow::Break(signal) => Ok(ControlFlow::Break(signal)),
                }
            })?;
            let report = match report {
                ControlFlow::Continue(report) => report,
                ControlFlow::Break(signal) => return Ok(End::Stopped(signal)),
            };
            let time = StepTime { elapsed: start.elapsed(), communication: world.take() };

            self.state.count(&report, time.elapsed);
            match &report.skipped {
                Some(reason) => self.skip(entry, reason, &report.photos)?,
                None => {
                    self.state.spikes.good(&train.spikes, report.mean_loss());
                    curves.add(&report, &terms, time);
                }
            }
            images += report.losses.len() / setup.world.world_size();
            progress.step(self.state.stage_step, report.mean_loss(), report.losses.len());
            let done = self.state.stage_step;
            let last = done == config.steps;
            if last || done.is_multiple_of(train.log_every) {
                let work = self.options.work.get(self.state.stage);
                let moment_bytes = self.learner.optimizer.state_bytes();
                let mut values = curves.take(setup.world, waits.take_share(), moment_bytes, work)?;
                if setup.world.leads() {
                    values.push(("data/left_out_row_groups".into(), self.left_out() as f64));
                }
                let cut = self.base.cut_captions() - cut_before;
                values.push((CUT_CAPTIONS.into(), cut as f64 / images.max(1) as f64));
                values.push(("optim/skipped_steps".into(), self.state.spikes.skipped as f64));
                self.log(&values);
            }
            if let (Some(samples), Some(set)) = (&train.samples, fixed_set)
                && (last || done.is_multiple_of(samples.every))
            {
                self.draw_pictures(entry, samples, set)?;
            }
            // The end of a stage has a checkpoint of its own, with the state already at the next stage.
            // Among bad steps the weights may be bad themselves: no checkpoint to go back to.
            let good = self.state.spikes.in_a_row == 0;
            if !last && good && done.is_multiple_of(train.checkpoints.every) {
                self.state.last_due = Some(self.state.global_step);
                self.save()?;
            }
        }
        progress.finish();
        let cut = self.base.cut_captions() - cut_before;
        if cut > 0 {
            let name = entry.name();
            tracing::warn!(
                "stage {name}: the ends of {cut} of {images} captions were left out, beyond {TEXT_TOKENS} tokens"
            );
        }
        Ok(End::Done)
    }

    /// Notes a step that was not taken, with the photos of its batch; takes the last checkpoint's weights, or stops, where
    /// there were too many.
    fn skip(&mut self, entry: &StageEntry, reason: &str, photos: &[(u64, String)]) -> Result<()> {
        let setup = self.setup;
        let step = self.state.global_step;
        tracing::warn!("step {step} is skipped: {reason}; its photos are in {SKIPPED}");
        skipped::note(setup, step, entry.name(), reason, photos)?;
        match self.state.spikes.bad(&setup.train.spikes) {
            Remedy::Skip => Ok(()),
            Remedy::RollBack => self.go_back(&format!("too many in a row, the last one for {reason}")),
            Remedy::Stop => Err(diverged(reason)),
        }
    }

    /// Opens the stage's record and optimiser; a resume within the stage finds both already there. Gives the signal that broke
    /// it off.
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
            self.learner = begin_learning(self.setup, self.learner.hyper_lora.clone(), entry);
        }
        Ok(None)
    }

    /// Measures the fixed set again and goes over to the next stage. Where that is broken off, a resume begins with it.
    fn end_stage(&mut self, entry: &StageEntry, fixed_set: Option<&FixedSet>) -> Result<End> {
        if self.state.spikes.end() {
            self.go_back(&format!("the last step of stage {} was skipped", entry.name()))?;
        }
        let after = match self.measure(entry, fixed_set)? {
            ControlFlow::Continue(after) => after,
            ControlFlow::Break(signal) => return Ok(End::Stopped(signal)),
        };
        if let Some(record) = self.state.records.last_mut() {
            record.fixed_set_loss_after = after;
        }
        self.state.finish_stage();
        Ok(End::Done)
    }

    /// The loss on the fixed set, where there is one; the signal that broke it off.
    fn measure(
        &mut self,
        entry: &StageEntry,
        set: Option<&FixedSet>,
    ) -> Result<ControlFlow<&'static str, Option<f64>>> {
        let Some(set) = set else { return Ok(ControlFlow::Continue(None)) };
        // One that is on its way comes into its place before, not after.
        self.finish_checkpoint()?;
        let TrainSetup { train, world, .. } = *self.setup;
        let (stop, patience) = (&self.options.stop, train.long_timeout());
        let measured = set.loss(&self.base, &self.learner.hyper_lora, &train.trigger, world, stop, patience)?;
        if let ControlFlow::Continue(loss) = measured {
            let step = self.state.global_step;
            tracing::info!("stage {}, step {step}: loss on the fixed set {loss:.5}", entry.name());
            self.log(&[(format!("fixed_set/{}", entry.name()), loss)]);
        }
        Ok(measured.map_continue(Some))
    }

    /// Writes figures of the current step.
    fn log(&mut self, values: &[(String, f64)]) {
        self.record(|metrics, step| metrics.scalars(step, values));
    }

    /// Writes to the curves where this rank has them. A failing disk ends the curves, never the run.
    fn record(&mut self, write: impl FnOnce(&mut MetricsWriter, u64)) {
        let Some(metrics) = &mut self.metrics else { return };
        write(metrics, self.state.global_step);
        if let Some(error) = metrics.take_error() {
            tracing::warn!("no more curves, the run goes on: {error}");
        }
    }

    /// Row groups that the ranks have left out so far: of what the others met, only their common file tells.
    fn left_out(&self) -> usize {
        let of_all = quarantine::count(self.setup.run, self.settings["data"]["shards"].as_str());
        of_all.unwrap_or_else(|_| self.dataset.quarantined())
    }

    /// Rank 0 draws, the others wait; nobody draws who was asked to stop.
    fn draw_pictures(&mut self, entry: &StageEntry, config: &SamplesConfig, set: &FixedSet) -> Result<()> {
        let setup = self.setup;
        if asked_to_stop(setup.world, self.options.stop.raised_by())?.is_some() {
            tracing::warn!("the pictures of step {} are not drawn: the run is to stop", self.state.global_step);
            return Ok(());
        }
        lead_alone(setup.world, "rank 0 to draw the pictures", setup.train.long_timeout(), || {
            let people = match set.first_people(config.count, &|| self.options.stop.raised_by())? {
                ControlFlow::Continue(people) => people,
                ControlFlow::Break(_) => {
                    tracing::warn!("the pictures of step {} are not drawn: the run is to stop", self.state.global_step);
                    return Ok(());
                }
            };
            let hyper_lora = &self.learner.hyper_lora;
            let grid = pictures::grid(&self.base, hyper_lora, entry.kind(), &people, config, &setup.train.trigger)?;
            self.record(|metrics, step| metrics.image(step, &format!("samples/{}", entry.name()), &grid));
            let step = self.state.global_step;
            if let Err(error) = pictures::write(setup.run, step, &grid) {
                tracing::warn!("the pictures of step {step} are not written: {error}");
            }
            Ok(())
        })
    }

    fn maker(&self, kind: Stage) -> Result<SampleMaker> {
        let shape = self.base.sample_shape(self.setup.data.image_size, kind != Stage::Base)?;
        Ok(SampleMaker::new(Arc::clone(&self.dataset), self.setup.data, self.setup.seed, shape))
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

/// Passes side by side: a CPU's operations are too small to keep all its cores busy, a GPU takes one pass after the other.
fn lanes(device: &Device) -> usize {
    if *device == Device::flex() { rayon::current_num_threads() } else { 1 }
}
