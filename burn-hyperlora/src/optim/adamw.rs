//! AdamW (arXiv 1711.05101) over a module's flat parameters, its state divided among the ranks (ZeRO stage 1, arXiv 1910.02054).
//!
//! The trainable parameters lie in [buckets](super::buckets). Each rank owns one part of each bucket: it receives the mean
//! gradient of that part, steps it, and gives the result to the others. A world of one owns everything: the same code.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer as _};
use burn::tensor::{FloatDType, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, Pending};

use super::buckets::{Bucket, bucket_numbers, cut};
use super::window::Window;
use crate::optim::{GradientMap, OptimConfig, Wire};

const FIRST_MOMENT: &str = "exp_avg";
const SECOND_MOMENT: &str = "exp_avg_sq";

/// The optimiser of one training stage.
pub struct Optimizer {
    adamw: AdamW,
    buckets: Vec<Bucket>,
    share: Share,
    /// Of this rank's part of each bucket, on the plain device; `None` before the first step.
    states: Vec<Option<AdamWState<1>>>,
    window: Window,
}

/// Which part of the optimiser's state lies on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    part: usize,
    parts: usize,
    wire: Wire,
    /// In a world of one.
    alone: bool,
}

impl Share {
    /// All of it, in a world of one.
    pub const WHOLE: Self = Self { part: 0, parts: 1, wire: Wire::F32, alone: true };

    /// This rank's part where the state is divided (`sharded`), else all of it. Gradients travel as `wire`, where they travel.
    pub fn of(world: &dyn Collective, sharded: bool, wire: Wire) -> Self {
        let (part, parts) = if sharded { (world.rank(), world.world_size()) } else { (0, 1) };
        let alone = world.world_size() == 1;
        Self { part, parts, wire: if alone { Wire::F32 } else { wire }, alone }
    }

    /// Numbers of a bucket, at least. Alone, every parameter is a bucket by itself: packing would only copy.
    fn bucket_numbers(self) -> usize {
        if self.alone { 1 } else { bucket_numbers(self.parts) }
    }
}

/// The gradients' mean over all ranks, of which this rank has its part.
pub struct ReducedGradients {
    /// Whole buckets: beside this rank's part of each is what it sent.
    buckets: Vec<Tensor<1>>,
    /// The global L2 norm, the same on all ranks. NaN or infinite where a gradient is: then they must not be applied.
    pub norm: f64,
    /// What they are multiplied with before they are applied, at most 1.
    factor: f64,
}

impl ReducedGradients {
    /// Scales so that the global norm is at most `max_norm` (as `torch.nn.utils.clip_grad_norm_`).
    #[must_use]
    pub fn clip(self, max_norm: Option<f64>) -> Self {
        let factor = max_norm.map_or(1.0, |max| max / (self.norm + 1e-6));
        Self { factor: factor.min(1.0), ..self }
    }
}

impl Optimizer {
    /// An optimiser of the module's trainable parameters that has not stepped yet.
    pub fn new<M: Module>(config: &OptimConfig, module: &M, share: Share) -> Self {
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
    /// Fault when a trainable parameter has no gradient.
    pub fn accumulate(&mut self, gradients: GradientMap) -> Result<()> {
        self.window.add(&self.buckets, gradients)
    }

    /// The mean of all that was [accumulated](Self::accumulate) on all ranks since the last call, of which each rank gets what
    /// it owns. It is reduced in its place: one bucket is on the wire while the next is made ready.
    ///
    /// # Errors
    /// Those of the collective.
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

    /// The L2 norm over the parts of all ranks.
    fn norm(&self, reduced: &[Tensor<1>], world: &dyn Collective) -> Result<f64> {
        if reduced.is_empty() {
            return Ok(0.0);
        }
        let own = self.buckets.iter().zip(reduced).map(|(bucket, whole)| self.share.part_of(bucket, whole.clone()));
        let squares = own.map(|part| part.square().sum()).collect();
        // One read from the device; the sum over buckets and ranks is in f64, in the same order everywhere.
        let own = Tensor::cat(squares, 0).into_data().iter::<f64>().sum::<f64>();
        let all = world.exchange("the gradient norms of all ranks", &own.to_le_bytes())?;
        let numbers = all.iter().map(|note| note.as_slice().try_into().map_or(f64::NAN, f64::from_le_bytes));
        // Where every rank has all of it, rank 0's number counts: a GPU does not add twice in the same order, and ranks that clip
        // by different numbers drift apart.
        let counted = if self.share.parts == 1 { 1 } else { all.len() };
        Ok(numbers.take(counted).sum::<f64>().sqrt())
    }

    /// Moves every trainable parameter of `module`; frozen ones stay bit for bit. Each rank steps its own part, and all get
    /// all of it. New weights take the place of the old ones bucket by bucket: unless somebody else holds the old ones, at
    /// most a few buckets are in memory twice.
    ///
    /// # Errors
    /// Those of the collective: some parameters and their state are then moved, others are not.
    pub fn step<M: Module>(
        &mut self,
        module: &mut M,
        gradients: ReducedGradients,
        learning_rate: f64,
        world: &dyn Collective,
    ) -> Result<()> {
        let mut swap = Swap::default();
        *module = module.clone().map(&mut swap);
        let stepped = self.step_values(&mut swap.values, gradients, learning_rate, world);
        *module = module.clone().map(&mut swap);
        stepped
    }

    /// [`step`](Self::step) of the trainable parameters, flat.
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

    /// How often each parameter was stepped: with the [`pieces`](Self::pieces) of all ranks, all that the next step depends on.
    pub fn steps(&self) -> BTreeMap<String, usize> {
        let stepped =
            self.buckets.iter().zip(&self.states).filter_map(|(bucket, state)| Some((bucket, state.as_ref()?)));
        stepped.flat_map(|(bucket, state)| bucket.paths().map(|path| (path.into(), state.momentum.time))).collect()
    }

    /// Bytes of the moments that lie on this rank; 0 before the first step.
    pub fn state_bytes(&self) -> u64 {
        let moments =
            self.states.iter().flatten().flat_map(|AdamWState { momentum }| [&momentum.moment_1, &momentum.moment_2]);
        moments.map(|moment| (moment.dims()[0] * moment.dtype().size()) as u64).sum()
    }

    /// The moments that this rank of the world saves, by parameter, flat, as `exp_avg.{path}` and `exp_avg_sq.{path}`: of
    /// every parameter a piece, all of it, or nothing. The pieces of all ranks, in the order of the ranks, are the whole, the
    /// same at any world size.
    pub fn pieces(&self, world: &dyn Collective) -> BTreeMap<String, Tensor<1>> {
        let mut pieces = BTreeMap::new();
        for (index, (bucket, state)) in self.buckets.iter().zip(&self.states).enumerate() {
            // What every rank has, each bucket's rank saves.
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

    /// Takes up the state that [`steps`](Self::steps) gave and [`pieces`](Self::pieces), put together, at whatever world size,
    /// bit for bit. `lengths` are those of the whole moments, `read` gives numbers of one; only what lies on this rank is
    /// read.
    ///
    /// `origin` is where the moments come from, for messages.
    ///
    /// # Errors
    /// Input when the state does not fit the module's trainable parameters, those of `read`; the optimiser is then unchanged.
    pub fn restore<M: Module>(
        &mut self,
        module: &M,
        steps: &BTreeMap<String, usize>,
        mut lengths: BTreeMap<&str, usize>,
        mut read: impl FnMut(&str, Range<usize>) -> Result<TensorData>,
        origin: &Path,
    ) -> Result<()> {
        let misfit = |problem: String| {
            let remedy = "go on with the configuration that the checkpoint was made with, or start anew";
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
                return Err(misfit("its parameters were stepped unequally often".into()));
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

impl Share {
    /// The numbers of a bucket that are this rank's.
    fn own(self, bucket: &Bucket) -> Range<usize> {
        let part = bucket.len() / self.parts;
        self.part * part..(self.part + 1) * part
    }

    /// This rank's part of a whole bucket.
    fn part_of(self, bucket: &Bucket, whole: Tensor<1>) -> Tensor<1> {
        if self.parts == 1 { whole } else { whole.slice(self.own(bucket)) }
    }

    /// A whole bucket of the ranks' parts.
    fn gather<'a>(self, part: Tensor<1>, world: &'a dyn Collective) -> Result<Pending<'a>> {
        if self.parts == 1 { Ok(Box::new(|| Ok(part))) } else { world.all_gather("the weights of all ranks", part) }
    }
}

/// Every trainable parameter by its path, flat, on the plain device.
fn trainable<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    let mut lister = Lister::default();
    module.visit(&mut lister);
    lister.trainable
}

#[derive(Default)]
struct Lister {
    path: Vec<String>,
    trainable: BTreeMap<String, Tensor<1>>,
}

impl ModuleVisitor for Lister {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.trainable.insert(self.path.join("."), param.val().inner().flatten(0, -1));
        }
    }
}

/// Puts values into trainable parameters, and takes out those of the parameters that it has none for; a single zero, spread
/// over the shape, stands in for what is taken.
#[derive(Default)]
struct Swap {
    path: Vec<String>,
    /// Flat, on the plain device.
    values: BTreeMap<String, Tensor<1>>,
}

impl ModuleMapper for Swap {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let path = self.path.join(".");
        param.map(|old| {
            let value = match self.values.remove(&path) {
                Some(value) => value.reshape(old.dims()),
                None => {
                    let stand_in = Tensor::<D>::zeros([1; D], &old.clone().inner().device()).expand(old.dims());
                    self.values.insert(path, old.inner().flatten(0, -1));
                    stand_in
                }
            };
            Tensor::from_inner(value).require_grad()
        })
    }
}
