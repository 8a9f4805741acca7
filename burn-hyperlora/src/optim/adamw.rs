//! AdamW (arXiv 1711.05101) over a module's flat parameters, sharded over the ranks (ZeRO-1, arXiv 1910.02054).
//!
//! The trainable parameters lie in [buckets](super::buckets). Each rank owns one part of each bucket: it receives the
//! mean gradient of that part, steps the part, and sends the result to the others. A single rank owns everything and
//! runs the same code.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use burn::module::{Module, Param};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer as _};
use burn::tensor::{FloatDType, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Pending};

use super::buckets::{Bucket, bucket_numbers, cut};
use super::window::Window;
use crate::optim::{GradientMap, OptimConfig, Wire};
use crate::parameters::{self, ParameterMapper, ParameterVisitor};

const FIRST_MOMENT: &str = "exp_avg";
const SECOND_MOMENT: &str = "exp_avg_sq";

/// Optimiser of one training stage.
///
/// # Examples
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding};
/// use hyperlora_ranks::WorldOfOne;
///
/// let (world, device) = (WorldOfOne::new(), Device::flex().autodiff());
/// let mut linear = LinearConfig::new(3, 2).init(&device);
/// let config = OptimConfig::default();
/// let mut optimizer = Optimizer::new(&config, &linear, Sharding::WHOLE);
/// // A step may have several micro-batches.
/// for _ in 0..2 {
///     let loss = linear.forward(Tensor::<2>::ones([4, 3], &device)).square().mean();
///     optimizer.accumulate(GradientMap::take(&linear, &mut loss.backward()))?;
/// }
/// let gradients = optimizer.reduce(&world)?.clip(config.clip_norm);
/// optimizer.step(&mut linear, gradients, config.learning_rate_at(0, 100), &world)?;
/// assert_eq!(optimizer.steps()["weight"], 1);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub struct Optimizer {
    adamw: AdamW,
    buckets: Vec<Bucket>,
    share: Sharding,
    /// State of this rank's part of each bucket, on the plain device; `None` before the first step.
    states: Vec<Option<AdamWState<1>>>,
    window: Window,
}

/// Part of the optimiser state that lies on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharding {
    part: usize,
    parts: usize,
    wire: Wire,
    /// True in a world of one rank.
    alone: bool,
}

impl Sharding {
    /// The whole state, in a world of one rank.
    pub const WHOLE: Self = Self { part: 0, parts: 1, wire: Wire::F32, alone: true };

    /// Returns this rank's part if the state is `sharded`, else the whole state. Gradients travel between ranks as
    /// `wire`; a world of one sends none.
    pub fn of(world: &dyn Collective, sharded: bool, wire: Wire) -> Self {
        let (part, parts) = if sharded { (world.rank(), world.world_size()) } else { (0, 1) };
        let alone = world.world_size() == 1;
        Self { part, parts, wire: if alone { Wire::F32 } else { wire }, alone }
    }

    /// Minimum number of elements in a bucket. In a world of one, every parameter is its own bucket, because packing
    /// would only copy.
    fn bucket_numbers(self) -> usize {
        if self.alone { 1 } else { bucket_numbers(self.parts) }
    }
}

/// Mean gradients over all ranks; this rank holds its own part.
pub struct ReducedGradients {
    /// Whole buckets. Outside this rank's part, a bucket still holds this rank's own unreduced gradients.
    buckets: Vec<Tensor<1>>,
    /// Global L2 norm, the same on all ranks. NaN or infinite if any gradient is; such gradients must not be applied.
    pub norm: f64,
    /// Factor applied to the gradients before the step, at most 1.
    factor: f64,
}

impl ReducedGradients {
    /// Scales the gradients so that their global norm is at most `max_norm`, like `torch.nn.utils.clip_grad_norm_`.
    #[must_use]
    pub fn clip(self, max_norm: Option<f64>) -> Self {
        let factor = max_norm.map_or(1.0, |max| max / (self.norm + 1e-6));
        Self { factor: factor.min(1.0), ..self }
    }
}

impl Optimizer {
    /// Creates an optimiser of the module's trainable parameters, before its first step.
    pub fn new<M: Module>(config: &OptimConfig, module: &M, share: Sharding) -> Self {
        let [beta_1, beta_2] = config.betas;
        let adamw = AdamWConfig::new()
            .with_beta_1(beta_1)
            .with_beta_2(beta_2)
            .with_epsilon(config.epsilon)
            .with_weight_decay(config.weight_decay)
            .build();
        let parameters = trainable(module).into_iter().map(|(path, value)| (path, value.dims()[0]));
        let buckets = cut(parameters, share.bucket_numbers(), share.parts);
        let states = vec![None; buckets.len()];
        let window = Window::new(buckets.len(), !share.alone);
        Self { adamw, buckets, share, states, window }
    }

    /// Adds the gradients of one micro-batch to those of the step.
    ///
    /// # Errors
    /// Fault: a trainable parameter has no gradient.
    pub fn accumulate(&mut self, gradients: GradientMap) -> Result<()> {
        self.window.add(&self.buckets, gradients)
    }

    /// Returns the mean of all gradients [accumulated](Self::accumulate) on all ranks since the last call; each rank
    /// gets the part that it owns. Reduces in place: one bucket travels while the next is prepared.
    ///
    /// # Errors
    /// Errors of the collective.
    pub fn reduce(&mut self, world: &dyn Collective) -> Result<ReducedGradients> {
        let what = "the gradients of all ranks";
        let share = self.share;
        let mut buckets = Vec::with_capacity(self.buckets.len());
        let mut on_the_wire: Option<Pending<'_>> = None;
        for mean in self.window.take_mean() {
            let sent = if share.wire == Wire::Bf16 { mean.cast(FloatDType::BF16) } else { mean };
            let begun = if share.parts > 1 {
                world.reduce_scatter_mean(what, sent)?
            } else {
                world.all_reduce_mean(what, sent)?
            };
            if let Some(before) = on_the_wire.replace(begun) {
                buckets.push(before()?.cast(FloatDType::F32));
            }
        }
        if let Some(last) = on_the_wire {
            buckets.push(last()?.cast(FloatDType::F32));
        }
        let norm = self.norm(&buckets, world)?;
        Ok(ReducedGradients { buckets, norm, factor: 1.0 })
    }

    /// Computes the L2 norm over the parts of all ranks.
    fn norm(&self, reduced: &[Tensor<1>], world: &dyn Collective) -> Result<f64> {
        if reduced.is_empty() {
            return Ok(0.0);
        }
        let own = self.buckets.iter().zip(reduced).map(|(bucket, whole)| self.share.part_of(bucket, whole.clone()));
        let squares = own.map(|part| part.square().sum()).collect();
        // Reads once from the device. The sum over buckets and ranks is in f64, in the same order on every rank.
        let own = Tensor::cat(squares, 0).into_data().iter::<f64>().sum::<f64>();
        let all = world.exchange("the gradient norms of all ranks", &own.to_le_bytes())?;
        let numbers = all.iter().map(|note| note.as_slice().try_into().map_or(f64::NAN, f64::from_le_bytes));
        // If every rank holds all gradients, only the main rank's norm counts: a GPU does not add in the same order
        // twice, and ranks that clip by different norms drift apart.
        let counted = if self.share.parts == 1 { 1 } else { all.len() };
        Ok(numbers.take(counted).sum::<f64>().sqrt())
    }

    /// Updates every trainable parameter of `module`; frozen ones stay bit for bit. Each rank steps its own part, then
    /// all ranks receive all parts. New weights replace the old ones bucket by bucket: unless the caller still holds
    /// the old weights, at most a few buckets are in memory twice.
    ///
    /// # Errors
    /// Errors of the collective. Some parameters and their state are then updated and others are not.
    pub fn step<M: Module>(
        &mut self,
        module: &mut M,
        gradients: ReducedGradients,
        learning_rate: f64,
        world: &dyn Collective,
    ) -> Result<()> {
        let mut swap = Swap::default();
        *module = parameters::map(module.clone(), &mut swap);
        let stepped = self.step_values(&mut swap.0, gradients, learning_rate, world);
        *module = parameters::map(module.clone(), &mut swap);
        stepped
    }

    /// Runs [`step`](Self::step) on the flat trainable parameters.
    fn step_values(
        &mut self,
        values: &mut BTreeMap<String, Tensor<1>>,
        gradients: ReducedGradients,
        learning_rate: f64,
        world: &dyn Collective,
    ) -> Result<()> {
        let mut on_the_wire: Option<(&Bucket, Pending<'_>)> = None;
        let Self { adamw, buckets, share, states, window } = self;
        for (index, (bucket, reduced)) in buckets.iter().zip(gradients.buckets).enumerate() {
            let part = bucket.pack(share.own(bucket), values);
            window.give_back(index, reduced.clone());
            let gradient = share.part_of(bucket, reduced);
            let gradient = if gradients.factor < 1.0 { gradient.mul_scalar(gradients.factor) } else { gradient };
            let (part, moved) = adamw.step(learning_rate, part, gradient, states[index].take());
            states[index] = moved;
            if let Some((before, gathered)) = on_the_wire.replace((bucket, share.gather(part, world)?)) {
                values.extend(before.unpack(0..before.len(), &gathered()?));
            }
        }
        if let Some((last, gathered)) = on_the_wire {
            values.extend(last.unpack(0..last.len(), &gathered()?));
        }
        Ok(())
    }

    /// Returns the step count of each parameter. Together with the [`pieces`](Self::pieces) of all ranks, this is the
    /// whole state that the next step depends on.
    pub fn steps(&self) -> BTreeMap<String, usize> {
        let stepped =
            self.buckets.iter().zip(&self.states).filter_map(|(bucket, state)| Some((bucket, state.as_ref()?)));
        stepped.flat_map(|(bucket, state)| bucket.paths().map(|path| (path.into(), state.momentum.time))).collect()
    }

    /// Returns the size in bytes of the moments on this rank; 0 before the first step.
    pub fn state_bytes(&self) -> u64 {
        let moments =
            self.states.iter().flatten().flat_map(|AdamWState { momentum }| [&momentum.moment_1, &momentum.moment_2]);
        moments.map(|moment| (moment.dims()[0] * moment.dtype().size()) as u64).sum()
    }

    /// Returns the flat moments that this rank saves, keyed `exp_avg.{path}` and `exp_avg_sq.{path}`: a piece of each
    /// parameter, all of it, or nothing. The pieces of all ranks, joined in rank order, are the whole moments, the same
    /// at any world size.
    pub fn pieces(&self, world: &dyn Collective) -> BTreeMap<String, Tensor<1>> {
        let mut pieces = BTreeMap::new();
        for (index, (bucket, state)) in self.buckets.iter().zip(&self.states).enumerate() {
            // State that every rank holds is saved once: the ranks take the buckets in turn.
            if self.share.parts == 1 && index % world.world_size() != world.rank() {
                continue;
            }
            let Some(AdamWState { momentum }) = state else { continue };
            for (name, moment) in [(FIRST_MOMENT, &momentum.moment_1), (SECOND_MOMENT, &momentum.moment_2)] {
                let of_bucket = bucket.unpack(self.share.own(bucket), moment);
                pieces.extend(of_bucket.into_iter().map(|(path, piece)| (format!("{name}.{path}"), piece)));
            }
        }
        pieces
    }

    /// Restores, bit for bit and at any world size, the state returned by [`steps`](Self::steps) and the joined
    /// [`pieces`](Self::pieces). `lengths` holds the lengths of the whole moments; `read` returns a range of one. Only
    /// this rank's part is read.
    ///
    /// `origin` is the source of the moments, for messages.
    ///
    /// # Errors
    /// Input: the state does not fit the module's trainable parameters. Also the errors of `read`. The optimiser is
    /// then unchanged.
    pub fn restore<M: Module>(
        &mut self,
        module: &M,
        steps: &BTreeMap<String, usize>,
        mut lengths: BTreeMap<&str, usize>,
        mut read: impl FnMut(&str, Range<usize>) -> Result<TensorData>,
        origin: &Path,
    ) -> Result<()> {
        let misfit = |problem: String| {
            let remedy = "resume with the configuration that wrote the checkpoint, or start a new run";
            Error::file(origin, problem, remedy)
        };
        let parameters = trainable(module);
        if let Some(path) = steps.keys().find(|path| !parameters.contains_key(*path)) {
            return Err(misfit(format!("holds optimiser state of `{path}`, which is not trained here")));
        }
        for (path, value) in &parameters {
            if !steps.contains_key(path) {
                return Err(misfit(format!("holds no optimiser state of `{path}`, which is trained here")));
            }
            for key in [FIRST_MOMENT, SECOND_MOMENT].map(|name| format!("{name}.{path}")) {
                let found = lengths.remove(key.as_str()).ok_or_else(|| misfit(format!("`{key}` is missing")))?;
                let length = value.dims()[0];
                if found != length {
                    return Err(misfit(format!("`{key}` has {found} elements, the parameter has {length}")));
                }
            }
        }
        if let Some(stray) = lengths.keys().next() {
            return Err(misfit(format!("`{stray}` belongs to no parameter that was stepped")));
        }
        let mut states = Vec::with_capacity(self.buckets.len());
        for bucket in &self.buckets {
            let mut paths = bucket.paths();
            let first = paths.next().unwrap_or_default();
            let (Some(&time), Some(device)) = (steps.get(first), parameters.get(first).map(Tensor::device)) else {
                states.push(None);
                continue;
            };
            if paths.any(|other| steps.get(other) != Some(&time)) {
                return Err(misfit("its parameters have different step counts".into()));
            }
            let own = self.share.own(bucket);
            let mut moment = |name: &str| {
                let pieces = bucket
                    .pieces(own.clone())
                    .map(|(path, piece)| Ok(Tensor::from_data(read(&format!("{name}.{path}"), piece)?, &device)));
                Ok(bucket.join(own.clone(), pieces.collect::<Result<_>>()?, || device.clone()))
            };
            let (first, second) = (moment(FIRST_MOMENT)?, moment(SECOND_MOMENT)?);
            states.push(Some(AdamWState::new(AdaptiveMomentumState::new(time, first, second))));
        }
        self.states = states;
        Ok(())
    }
}

impl Sharding {
    /// Returns this rank's range of a bucket.
    fn own(self, bucket: &Bucket) -> Range<usize> {
        let part = bucket.len() / self.parts;
        self.part * part..(self.part + 1) * part
    }

    /// Cuts this rank's part out of a whole bucket.
    fn part_of(self, bucket: &Bucket, whole: Tensor<1>) -> Tensor<1> {
        if self.parts == 1 { whole } else { whole.slice(self.own(bucket)) }
    }

    /// Gathers a whole bucket from the parts of all ranks.
    fn gather(self, part: Tensor<1>, world: &dyn Collective) -> Result<Pending<'_>> {
        if self.parts == 1 { Ok(Box::new(|| Ok(part))) } else { world.all_gather("the weights of all ranks", part) }
    }
}

/// Collects every trainable parameter by its path, flat, on the plain device.
fn trainable<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    let mut trainable = Trainable::default();
    parameters::visit(module, &mut trainable);
    trainable.0
}

#[derive(Default)]
struct Trainable(BTreeMap<String, Tensor<1>>);

impl ParameterVisitor for Trainable {
    fn visit<const D: usize>(&mut self, path: &str, parameter: &Param<Tensor<D>>) {
        if parameter.is_require_grad() {
            self.0.insert(path.into(), parameter.val().inner().flatten(0, -1));
        }
    }
}

/// Puts values into trainable parameters, and takes out the values of parameters that it has none for. A single zero,
/// broadcast to the shape, replaces what is taken. The values are flat, on the plain device.
#[derive(Default)]
struct Swap(BTreeMap<String, Tensor<1>>);

impl ParameterMapper for Swap {
    fn map<const D: usize>(&mut self, path: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !parameter.is_require_grad() {
            return parameter;
        }
        parameter.map(|old| {
            let value = match self.0.remove(path) {
                Some(value) => value.reshape(old.dims()),
                None => {
                    let stand_in = Tensor::<D>::zeros([1; D], &old.clone().inner().device()).expand(old.dims());
                    self.0.insert(path.into(), old.inner().flatten(0, -1));
                    stand_in
                }
            };
            Tensor::from_inner(value).require_grad()
        })
    }
}
