//! Run in progress, one optimiser step at a time.
//!
//! [`Session::next_window`] opens a step; it also begins and ends stages, handles signals and advances checkpoints.
//! [`Session::gradients`] computes the gradients. [`Session::apply`] updates the weights, counts the step, and writes
//! the curves, pictures and checkpoints that are due.

mod open_stage;
mod reporting;
mod saving;
mod stages;

use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use hyperlora_core::files::write_whole;
use hyperlora_core::{Error, Result};
use serde_json::Value;

use crate::checkpoint::{CheckpointStore, CheckpointWriter};
use crate::conditioning::FrozenModels;
use crate::data::dataset::Dataset;
use crate::data::rank::Rank;
use crate::hypernet::{HyperLora, Stage};
use crate::metrics::{Display, LiveCurves, MetricsWriter};
use crate::objective::Objective;
use crate::run::claim::{Claim, claim_together, write_config};
use crate::run::state::TrainState;
use crate::run::{CHECKPOINTS, PATHS_FILE, TENSORBOARD, saved};
use crate::train::curves::StepTime;
use crate::train::session::open_stage::{OpenStage, StageEnd};
use crate::train::settings::common_settings;
use crate::train::setup::{Outcome, TrainOptions, TrainSetup};
use crate::train::start::{
    begin_or_resume, check_same_files, check_same_settings, check_same_start, check_wire, load_base, open, origin,
};
use crate::train::step::{self, Learner, StepConfig, StepGradients, StepReport};

/// Run in progress.
///
/// # Examples
/// ```no_run
/// use burn::tensor::Device;
/// use burn_hyperlora::objective::Denoising;
/// use burn_hyperlora::train::Session;
///
/// let mut session = Session::open("experiments/quickstart/train.yaml", &Device::flex())?;
/// while let Some(window) = session.next_window()? {
///     let gradients = session.gradients(&window, &Denoising)?;
///     println!("step {}: loss {:.5}", window.global_step, gradients.mean_loss());
///     session.apply(gradients, window.learning_rate)?;
/// }
/// println!("{:?}", session.outcome()?);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub struct Session {
    setup: Rc<TrainSetup>,
    options: TrainOptions,
    base: FrozenModels,
    dataset: Arc<Dataset>,
    /// Settings that a resume must match.
    settings: Value,
    state: TrainState,
    learner: Learner,
    checkpoints: CheckpointStore,
    writer: CheckpointWriter,
    /// On the main rank only.
    metrics: Option<MetricsWriter>,
    rank: Rank,
    stage: Option<OpenStage>,
    live: Option<LiveCurves>,
    outcome: Option<Outcome>,
    /// Keeps other processes out of the run folder.
    _claim: Option<Claim>,
}

/// Optimiser step that is about to be taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// Stage of the step.
    pub stage: Stage,
    /// Steps done in the stage before this one.
    pub stage_step: u64,
    /// Steps done in total before this one.
    pub global_step: u64,
    /// Learning rate of the stage's schedule at this step.
    pub learning_rate: f64,
    loss_limit: f64,
}

/// Gradients of a window, averaged over its batches and over the ranks; or the signal that arrived before its data.
pub struct Gradients {
    found: ControlFlow<&'static str, StepGradients>,
    begun: Instant,
}

impl Gradients {
    /// Returns the squared error of the UNet's prediction, averaged over the samples of the window and over the ranks,
    /// whatever the objective. NaN if a signal arrived before the data.
    pub fn mean_loss(&self) -> f64 {
        self.report().map_or(f64::NAN, StepReport::mean_loss)
    }

    /// Returns the global L2 norm before clipping. NaN if a signal arrived before the data.
    pub fn norm(&self) -> f64 {
        self.report().map_or(f64::NAN, |report| report.gradient_norm)
    }

    fn report(&self) -> Option<&StepReport> {
        match &self.found {
            ControlFlow::Continue(gradients) => Some(&gradients.report),
            ControlFlow::Break(_) => None,
        }
    }
}

impl Session {
    /// Claims the run folder, loads models and data, and resumes from the latest checkpoint if there is one.
    ///
    /// # Errors
    /// Same as [`crate::train::run`].
    pub fn begin(setup: TrainSetup, options: TrainOptions) -> Result<Self> {
        let ranks = setup.ranks.clone();
        // A quarter of the timeout, so that the ranks do not give each other up while one looks for the folder.
        let claim = claim_together(&ranks, &setup.run, setup.train.collective_timeout() / 4)?;
        // Settings are compared in this order and before anything can fail, so that the first difference is named.
        let common = common_settings(setup.seed, &setup.data, &setup.hyper_lora, &setup.train)?;
        check_same_settings(&setup, &options, &common)?;
        let rank = Rank::new(ranks.rank(), ranks.world_size())?;
        rank.check(&setup.place, setup.data.streams, setup.train.micro_batch, setup.train.global_batch)?;
        check_wire(&setup)?;
        let (dataset, settings) = ranks.try_on_all("all ranks to open base and data", || open(&setup, common))?;
        check_same_files(&setup, &settings)?;
        let root = setup.run.join(CHECKPOINTS);
        ranks.on_main("rank 0 to open the run folder", || {
            CheckpointStore::open(&root)?;
            saved::latest(&setup.run).map(drop)
        })?;
        let checkpoints = CheckpointStore::at(&root);
        let writer = CheckpointWriter::new(checkpoints.clone(), ranks.deadline());
        let (base, (learner, state), origin) = ranks.try_on_all("all ranks to load their models", || {
            let (base, checkpoint) = (load_base(&setup)?, checkpoints.latest()?);
            let start = begin_or_resume(&setup, &base, checkpoint.as_ref(), &settings)?;
            Ok((base, start, origin(&setup, checkpoint.as_ref())?))
        })?;
        check_same_start(&setup, &learner.hyper_lora, &state, &origin)?;
        let metrics = ranks.try_on_all("rank 0 to begin its curves", || {
            let create = || MetricsWriter::create(&setup.run.join(TENSORBOARD), state.global_step + 1);
            ranks.is_main().then(create).transpose()
        })?;
        let live = (ranks.is_main() && options.display == Display::Curves)
            .then(|| LiveCurves::open(setup.train.stages.len()))
            .flatten();
        let setup = Rc::new(setup);
        let mut session = Self {
            setup: Rc::clone(&setup),
            options,
            base,
            dataset,
            settings,
            state,
            learner,
            checkpoints,
            writer,
            metrics,
            rank,
            stage: None,
            live,
            outcome: None,
            _claim: claim,
        };
        let config = format!("```yaml\n{}```", setup.resolved.config);
        session.record(|metrics, step| metrics.text(step, "config", &config));
        ranks.on_main("rank 0 to write the configuration", || {
            write_whole(&setup.run.join(PATHS_FILE), setup.resolved.paths.as_bytes())?;
            write_config(&setup.run, &setup.resolved.config)
        })?;
        Ok(session)
    }

    /// Opens the next optimiser step, in the next stage if one ended. Returns `None` once the run has ended and
    /// everything is saved; see [`outcome`](Self::outcome).
    ///
    /// # Errors
    /// Same as [`crate::train::run`].
    pub fn next_window(&mut self) -> Result<Option<Window>> {
        while self.outcome.is_none() {
            let Some(entry) = self.setup.train.stages.get(self.state.stage).cloned() else {
                self.finish()?;
                break;
            };
            if self.stage.is_none() && !self.open_stage(&entry)? {
                break;
            }
            let config = entry.config();
            if self.state.stage_step >= config.steps {
                self.close_stage(StageEnd::Done)?;
                continue;
            }
            self.writer.advance(&*self.setup.ranks)?;
            if self.live.as_ref().is_some_and(LiveCurves::asked_to_stop) {
                self.options.stop.raise();
            }
            if let Some(signal) = self.setup.ranks.asked_to_stop(self.options.stop.raised_by())? {
                self.close_stage(StageEnd::Stopped(signal))?;
                break;
            }
            if self.options.max_steps.is_some_and(|max| self.state.global_step >= max) {
                self.close_stage(StageEnd::Paused)?;
                break;
            }
            let scaling = self.setup.train.lr_scaling.factor(self.setup.ranks.world_size());
            return Ok(Some(Window {
                stage: entry.kind(),
                stage_step: self.state.stage_step,
                global_step: self.state.global_step,
                learning_rate: scaling * config.optim.learning_rate_at(self.state.stage_step, config.steps),
                loss_limit: self.state.spikes.loss_limit(&self.setup.train.spikes),
            }));
        }
        Ok(None)
    }

    /// Computes the gradients of a window over `global_batch` samples of all ranks.
    ///
    /// # Errors
    /// Input: data that cannot be read; PeerFailed: another rank fails; Peer: another rank is lost; Fault: `window` is
    /// not the last one that was opened.
    pub fn gradients(&mut self, window: &Window, objective: &dyn Objective) -> Result<Gradients> {
        let begun = Instant::now();
        let Some(stage) = self.stage.as_mut().filter(|_| window.global_step == self.state.global_step) else {
            return Err(Error::Fault(format!("the window of step {} is not open", window.global_step)));
        };
        let config = StepConfig {
            kind: window.stage,
            accumulation: self.setup.train.accumulation() / self.setup.ranks.world_size(),
            lanes: stage.lanes,
            recompute: self.setup.train.recompute,
            trigger: &self.setup.train.trigger,
        };
        let OpenStage { loader, waits, ranks, .. } = stage;
        let stop = &self.options.stop;
        let found =
            step::gradients(&self.base, &mut self.learner, &config, objective, ranks, window.loss_limit, || {
                Ok(match waits.waiting(|| loader.next_batch_unless(&|| stop.raised_by()))? {
                    ControlFlow::Continue(None) => {
                        return Err(Error::Fault("the data ended before the stage".into()));
                    }
                    ControlFlow::Continue(Some(batch)) => ControlFlow::Continue(batch),
                    ControlFlow::Break(signal) => ControlFlow::Break(signal),
                })
            })?;
        Ok(Gradients { found, begun })
    }

    /// Clips the gradients, updates the weights, counts the step, and writes what is due. A step that would do harm
    /// (see `train.spikes`) is counted and recorded, but does not change the weights.
    ///
    /// # Errors
    /// Peer: another rank is lost; Disk: a failing disk; Fault: a training that diverged.
    pub fn apply(&mut self, gradients: Gradients, learning_rate: f64) -> Result<()> {
        let found = match gradients.found {
            ControlFlow::Continue(found) => found,
            ControlFlow::Break(signal) => return self.close_stage(StageEnd::Stopped(signal)),
        };
        let setup = Rc::clone(&self.setup);
        let (Some(stage), Some(entry)) = (&self.stage, setup.train.stages.get(self.state.stage)) else {
            return Err(Error::Fault("gradients are applied outside of their stage".into()));
        };
        let clip_norm = entry.config().optim.clip_norm;
        let report = step::apply(&mut self.learner, found, clip_norm, learning_rate, &*stage.ranks)?;
        let time = StepTime { elapsed: gradients.begun.elapsed(), communication: stage.timed.take() };
        self.state.count(report.next_draw, report.losses.len(), time.elapsed);
        self.take_note(entry, report, learning_rate, time)?;
        self.write_what_is_due(entry)
    }

    /// Returns how the run ended.
    ///
    /// # Errors
    /// Fault: [`next_window`](Self::next_window) has not returned `None` yet.
    pub fn outcome(&self) -> Result<Outcome> {
        self.outcome.clone().ok_or_else(|| Error::Fault("the run has not come to its end".into()))
    }

    /// Returns the hypernetwork in its current state, on the autodiff device.
    pub fn hyper_lora(&self) -> &HyperLora {
        &self.learner.hyper_lora
    }

    /// Returns the frozen models.
    pub fn base(&self) -> &FrozenModels {
        &self.base
    }

    /// Returns the position of the run.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Writes values of the current step as curves, on the main rank.
    pub fn log(&mut self, values: &[(String, f64)]) {
        self.record(|metrics, step| metrics.scalars(step, values));
        if let Some(live) = &mut self.live {
            live.add(values);
        }
    }

    /// Finishes the pending checkpoint after a failure, because it is still useful. Several ranks cannot do so, because
    /// none knows the state of the others.
    pub fn fail(&mut self) {
        if self.setup.ranks.world_size() == 1
            && let Err(error) = self.writer.finish(&*self.setup.ranks)
        {
            tracing::error!("{error}");
        }
    }
}
