//! One optimiser step in nine numbered phases: [`gradients`] (1 to 8), then [`apply`] (9). Phases 1 to 5 are in `pass`,
//! 6 in `window`.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Ranks};
use hyperlora_sdxl::lora::LoraWeights;

use crate::conditioning::FrozenModels;
use crate::data::batch::Batch;
use crate::data::scenario::Scenario;
use crate::hypernet::{CoefficientStatistics, HyperLora, Stage};
use crate::objective::{self, Objective};
use crate::optim::{GradientMap, Optimizer, ReducedGradients};
use crate::train::forward::make_lora;

/// Weights and optimiser, which change from step to step.
pub struct Learner {
    /// Hypernetwork, on the autodiff device.
    pub hyper_lora: HyperLora,
    /// Optimiser of the hypernetwork.
    pub optimizer: Optimizer,
}

/// Step settings of a stage.
pub struct StepConfig<'a> {
    /// Stage that is trained.
    pub kind: Stage,
    /// Passes of this rank per step.
    pub accumulation: usize,
    /// Passes that run in parallel, each on its own thread; more than one only on a CPU.
    pub lanes: usize,
    /// True if the UNet recomputes its blocks.
    pub recompute: bool,
    /// Prefix of captions whenever the ID-LoRA is active.
    pub trigger: &'a str,
}

/// Results of a step.
#[derive(Debug, Default)]
pub struct StepReport {
    /// Losses, one entry per sample of all ranks.
    pub losses: Vec<SampleLoss>,
    /// Draw and photo key of each of this rank's samples. A replaced damaged photo has the key of its replacement.
    pub photos: Vec<(u64, String)>,
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Reason for skipping the update, if it was skipped.
    pub skipped: Option<String>,
    /// Statistics of the last pass.
    pub coefficients: Option<CoefficientStatistics>,
    /// Next draw.
    pub next_draw: u64,
    /// Time per phase.
    pub phases: Phases,
}

/// Loss of one sample, with its scenario and timestep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleLoss {
    /// Mean squared error.
    pub loss: f32,
    /// Parts that were active.
    pub scenario: Scenario,
    /// Timestep of the sample.
    pub timestep: u32,
}

/// Time per phase of a step, without data waits. Parallel passes share their common elapsed time.
#[derive(Debug, Default, Clone, Copy)]
pub struct Phases {
    /// Frozen encoders.
    pub encode: Duration,
    /// Hypernetwork forward.
    pub hypernet: Duration,
    /// UNet forward and backward.
    pub unet: Duration,
    /// Hypernetwork backward.
    pub backward: Duration,
    /// Clipping and optimiser.
    pub update: Duration,
}

impl Phases {
    /// Adds the time `elapsed` of parallel passes, split in proportion to their own clocks.
    fn add_share(&mut self, passes: &[Pass], elapsed: Duration) {
        let own = |pass: &Pass| [pass.phases.encode, pass.phases.hypernet, pass.phases.unet, pass.phases.backward];
        let total: Duration = passes.iter().flat_map(own).sum();
        let factor = elapsed.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE);
        for pass in passes {
            let phases = [&mut self.encode, &mut self.hypernet, &mut self.unet, &mut self.backward];
            for (phase, time) in phases.into_iter().zip(own(pass)) {
                *phase += time.mul_f64(factor);
            }
        }
    }

    /// Iterates over the phases, with their names in the curves.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        [
            ("encode", self.encode),
            ("hypernet", self.hypernet),
            ("unet", self.unet),
            ("backward", self.backward),
            ("update", self.update),
        ]
        .into_iter()
    }
}

/// Gradients of one optimiser step, averaged over its batches and over the ranks.
pub struct StepGradients {
    /// Report of the step up to the weight update.
    pub report: StepReport,
    reduced: ReducedGradients,
}

/// Computes the gradients of `config.accumulation` batches and averages them over the ranks. Records a non-finite
/// gradient, or a loss above `loss_limit`, in [`StepReport::skipped`]. Breaks with the signal if `next_batch` returns
/// one instead of a batch, on any rank.
///
/// # Errors
/// Errors of the data; PeerFailed: another rank fails. The weights are unchanged.
pub fn gradients(
    base: &FrozenModels,
    learner: &mut Learner,
    config: &StepConfig<'_>,
    objective: &dyn Objective,
    ranks: &Ranks,
    loss_limit: f64,
    next_batch: impl FnMut() -> Result<ControlFlow<&'static str, Batch>>,
) -> Result<ControlFlow<&'static str, StepGradients>> {
    // 1 to 6. Compute this rank's part of the batch.
    let report = window(base, learner, config, objective, next_batch);
    // 7. Exchange the losses and failures of all ranks.
    let own = match &report {
        Ok(ControlFlow::Continue(report)) => Ok(ControlFlow::Continue(&report.losses[..])),
        Ok(ControlFlow::Break(signal)) => Ok(ControlFlow::Break(*signal)),
        Err(error) => Err(error),
    };
    let heard = share_losses(ranks, own);
    let (mut report, losses) = match (report?, heard?) {
        (ControlFlow::Continue(report), ControlFlow::Continue(losses)) => (report, losses),
        (ControlFlow::Break(signal), _) | (_, ControlFlow::Break(signal)) => return Ok(ControlFlow::Break(signal)),
    };
    report.losses = losses;
    // 8. Reduce the gradients over the ranks and compute their global norm.
    let clock = Instant::now();
    let reduced = learner.optimizer.reduce(&**ranks)?;
    report.gradient_norm = reduced.norm;
    report.skipped = harm(&report, loss_limit);
    report.phases.update = clock.elapsed();
    Ok(ControlFlow::Continue(StepGradients { report, reduced }))
}

/// Clips the gradients by their global norm and updates the weights; a step that would do harm updates nothing.
///
/// # Errors
/// Errors of the collective. The weights are then partly updated, and the run must be resumed from a checkpoint.
pub fn apply(
    learner: &mut Learner,
    gradients: StepGradients,
    clip_norm: Option<f64>,
    learning_rate: f64,
    collective: &dyn Collective,
) -> Result<StepReport> {
    let StepGradients { mut report, reduced } = gradients;
    if report.skipped.is_none() {
        // 9. Step.
        let clock = Instant::now();
        learner.optimizer.step(&mut learner.hyper_lora, reduced.clip(clip_norm), learning_rate, collective)?;
        report.phases.update += clock.elapsed();
    }
    Ok(report)
}

/// Shares the losses of all ranks, in rank order. Breaks with the signal if one of them was asked to stop before it had
/// its data.
///
/// # Errors
/// Same as [`Ranks::share`].
fn share_losses(
    ranks: &Ranks,
    own: std::result::Result<ControlFlow<&'static str, &[SampleLoss]>, &Error>,
) -> Result<ControlFlow<&'static str, Vec<SampleLoss>>> {
    // A loss travels as its bits, because JSON has no NaN.
    let bits = |losses: &[SampleLoss]| -> Vec<(u32, Scenario, u32)> {
        losses.iter().map(|sample| (sample.loss.to_bits(), sample.scenario, sample.timestep)).collect()
    };
    let own = own.map(|losses| losses.map_continue(bits));
    let own = match &own {
        Ok(ControlFlow::Continue(losses)) => Ok(ControlFlow::Continue(losses)),
        Ok(ControlFlow::Break(signal)) => Ok(ControlFlow::Break(*signal)),
        Err(error) => Err(*error),
    };
    let all = ranks.share_unless_stopped("all ranks to end their passes", own)?;
    let sample = |(bits, scenario, timestep)| SampleLoss { loss: f32::from_bits(bits), scenario, timestep };
    Ok(all.map_continue(|all| all.into_iter().flatten().map(sample).collect()))
}

/// Accumulates the gradients of this rank's batches. Returns the report so far, or the signal instead of a batch.
fn window(
    base: &FrozenModels,
    learner: &mut Learner,
    config: &StepConfig<'_>,
    objective: &dyn Objective,
    mut next_batch: impl FnMut() -> Result<ControlFlow<&'static str, Batch>>,
) -> Result<ControlFlow<&'static str, StepReport>> {
    let mut report = StepReport::default();
    let Learner { hyper_lora, optimizer } = learner;
    let mut left = config.accumulation;
    while left > 0 {
        let lanes = config.lanes.clamp(1, left);
        let mut batches = Vec::with_capacity(lanes);
        for _ in 0..lanes {
            match next_batch()? {
                ControlFlow::Continue(batch) => batches.push(batch),
                ControlFlow::Break(signal) => return Ok(ControlFlow::Break(signal)),
            }
        }
        // 1 to 5. The passes run independently, but are summed in batch order, however they ran.
        let clock = Instant::now();
        let passes = side_by_side(&batches, |index, batch| {
            // Statistics are needed only for the last pass.
            pass(base, hyper_lora, config, objective, batch, index + 1 == left)
        })?;
        report.phases.add_share(&passes, clock.elapsed());
        // 6. Accumulate over the window.
        for (batch, pass) in batches.iter().zip(passes) {
            report.note(batch, &pass.losses, pass.coefficients);
            optimizer.accumulate(pass.gradients)?;
        }
        left -= lanes;
    }
    Ok(ControlFlow::Continue(report))
}

/// Result of one batch.
struct Pass {
    gradients: GradientMap,
    losses: Vec<f32>,
    /// Present if requested.
    coefficients: Option<CoefficientStatistics>,
    phases: Phases,
}

fn pass(
    base: &FrozenModels,
    hyper_lora: &HyperLora,
    config: &StepConfig<'_>,
    objective: &dyn Objective,
    batch: &Batch,
    statistics: bool,
) -> Result<Pass> {
    // Each pass has its own leaves. Passes with shared leaves would share a graph and wait for each other.
    let hyper_lora = hyper_lora.clone().fork(&base.device().clone().autodiff());
    let mut phases = Phases::default();
    let mut clock = Instant::now();
    // 1. Encode with the frozen models, without a graph.
    let conditions = base.encode(&batch.samples, config.trigger)?;
    lap(&mut clock, &mut phases.encode);
    // 2. Make a LoRA for every sample with the hypernetwork, with a graph.
    let made = make_lora(&hyper_lora, config.kind, conditions.portraits.clone().autodiff())?;
    // 3. Cut the graph at the LoRA.
    let plain = made.lora.clone().map(Tensor::inner);
    lap(&mut clock, &mut phases.hypernet);
    // 4. Run the frozen UNet: the loss, and its gradients with respect to the LoRA only.
    let with_graph = conditions.autodiff();
    let (_, gradients, prediction) =
        base.unet.loss_and_lora_gradients(&conditions.input, plain, config.recompute, |prediction| {
            objective.loss(prediction, &with_graph)
        });
    let losses = objective::per_sample(prediction, conditions.target)?;
    lap(&mut clock, &mut phases.unet);
    // 5. Seed the backward pass of the hypernetwork with those gradients.
    let mut backward = seeded(made.lora, gradients).backward();
    let gradients = GradientMap::take(&hyper_lora, &mut backward);
    lap(&mut clock, &mut phases.backward);
    let coefficients = statistics.then(|| CoefficientStatistics::of(&made.coefficients)).transpose()?;
    Ok(Pass { gradients, losses, coefficients, phases })
}

/// Runs `work` on every item and its index, each on its own thread, and returns the results in item order.
///
/// Uses threads outside rayon's pool: a pool thread that waits for a piece of one item could begin another.
fn side_by_side<T: Sync, R: Send>(items: &[T], work: impl Fn(usize, &T) -> Result<R> + Sync) -> Result<Vec<R>> {
    if let [only] = items {
        return Ok(vec![work(0, only)?]);
    }
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            items.iter().enumerate().map(|(index, item)| scope.spawn(move || work(index, item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// Returns a scalar whose gradients with respect to the LoRA are `gradients`.
fn seeded(lora: LoraWeights, gradients: LoraWeights) -> Tensor<1> {
    let products = lora
        .tensors()
        .zip(gradients.tensors())
        .filter(|(tensor, _)| tensor.is_tracked())
        .map(|(tensor, gradient)| (tensor.clone() * Tensor::from_inner(gradient.clone())).sum());
    Tensor::cat(products.collect(), 0).sum()
}

/// Adds the time since the last lap to `phase`.
fn lap(clock: &mut Instant, phase: &mut Duration) {
    *phase += clock.elapsed();
    *clock = Instant::now();
}

/// Returns why the step would do harm, from figures that are the same on all ranks.
fn harm(report: &StepReport, loss_limit: f64) -> Option<String> {
    let (norm, loss) = (report.gradient_norm, report.mean_loss());
    if !norm.is_finite() || !loss.is_finite() {
        return Some(format!("the gradient norm is {norm}, the loss {loss}"));
    }
    (loss > loss_limit).then(|| format!("the loss is {loss:.5}, above the limit of {loss_limit:.5}"))
}

impl StepReport {
    /// Returns the mean loss over the samples of the step.
    pub fn mean_loss(&self) -> f64 {
        let sum: f64 = self.losses.iter().map(|sample| f64::from(sample.loss)).sum();
        sum / self.losses.len().max(1) as f64
    }

    fn note(&mut self, batch: &Batch, losses: &[f32], coefficients: Option<CoefficientStatistics>) {
        self.losses.extend(batch.samples.iter().zip(losses).map(|(sample, &loss)| SampleLoss {
            loss,
            scenario: sample.request.scenario,
            timestep: sample.timestep,
        }));
        self.photos.extend(batch.samples.iter().map(|sample| (sample.request.draw, sample.key.clone())));
        self.coefficients = coefficients;
        self.next_draw = batch.next_draw;
    }
}
