//! AdamW (arXiv 1711.05101) over a module, with its state kept by parameter path so that a checkpoint is plain tensors.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer as _};
use burn::tensor::{Device, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::optim::{GradientMap, OptimConfig};

const FIRST_MOMENT: &str = "exp_avg";
const SECOND_MOMENT: &str = "exp_avg_sq";

/// The optimiser of one training stage: it holds state only for parameters that it has stepped.
pub struct Optimizer {
    adamw: AdamW,
    /// Flat, on the plain device.
    moments: BTreeMap<String, AdamWState<1>>,
}

impl Optimizer {
    /// An optimiser that has not stepped yet.
    pub fn new(config: &OptimConfig) -> Self {
        let [beta_1, beta_2] = config.betas;
        let adamw = AdamWConfig::new()
            .with_beta_1(beta_1)
            .with_beta_2(beta_2)
            .with_epsilon(config.epsilon)
            .with_weight_decay(config.weight_decay)
            .build();
        Self { adamw, moments: BTreeMap::new() }
    }

    /// Moves every parameter that has a gradient; the others, frozen ones among them, stay bit for bit.
    ///
    /// # Panics
    /// When a gradient names no parameter of the module, which only a programming error can cause.
    #[must_use]
    pub fn step<M: Module>(&mut self, module: M, gradients: GradientMap, learning_rate: f64) -> M {
        let mut stepper = Stepper { optimizer: self, gradients, learning_rate, path: Vec::new() };
        let module = module.map(&mut stepper);
        let strays: Vec<&str> = stepper.gradients.iter().map(|(path, _)| path).collect();
        assert!(strays.is_empty(), "gradients of unknown parameters: {strays:?}");
        module
    }

    /// How often each parameter was stepped: with [`tensors`](Self::tensors), all that the next step depends on.
    pub fn steps(&self) -> BTreeMap<String, usize> {
        self.moments.iter().map(|(path, state)| (path.clone(), state.momentum.time)).collect()
    }

    /// The moments, flat, as `exp_avg.{path}` and `exp_avg_sq.{path}`.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor<1>)> {
        self.moments.iter().flat_map(|(path, state)| {
            [(FIRST_MOMENT, &state.momentum.moment_1), (SECOND_MOMENT, &state.momentum.moment_2)]
                .map(|(name, moment)| (format!("{name}.{path}"), moment.clone()))
        })
    }

    /// Takes up the state that [`steps`](Self::steps) and [`tensors`](Self::tensors) gave, bit for bit.
    ///
    /// `origin` is the file that the tensors came from, for messages.
    ///
    /// # Errors
    /// Input when the state does not fit the module's trainable parameters; the optimiser is then unchanged.
    pub fn restore<M: Module>(
        &mut self,
        module: &M,
        steps: &BTreeMap<String, usize>,
        mut tensors: BTreeMap<String, TensorData>,
        origin: &Path,
    ) -> Result<()> {
        let mut lister = Lister::default();
        module.visit(&mut lister);
        let misfit = |problem: String| {
            Error::file(
                origin,
                problem,
                "go on with the configuration that the checkpoint was made with, or start anew",
            )
        };
        let mut moments = BTreeMap::new();
        for (path, &time) in steps {
            let Some((device, len)) = lister.trainable.get(path) else {
                return Err(misfit(format!("holds optimiser state of `{path}`, which is not trained here")));
            };
            let mut moment = |name: &str| {
                let key = format!("{name}.{path}");
                let data = tensors.remove(&key).ok_or_else(|| misfit(format!("`{key}` is missing")))?;
                if data.num_elements() != *len {
                    let found = data.num_elements();
                    return Err(misfit(format!("`{key}` has {found} elements, the parameter has {len}")));
                }
                let (bytes, _, dtype) = data.into_parts();
                Ok(Tensor::<1>::from_data(TensorData::from_bytes(bytes, [*len], dtype), device))
            };
            let momentum = AdaptiveMomentumState::new(time, moment(FIRST_MOMENT)?, moment(SECOND_MOMENT)?);
            moments.insert(path.clone(), AdamWState::new(momentum));
        }
        if let Some(stray) = tensors.keys().next() {
            return Err(misfit(format!("`{stray}` belongs to no parameter that was stepped")));
        }
        self.moments = moments;
        Ok(())
    }
}

struct Stepper<'a> {
    optimizer: &'a mut Optimizer,
    gradients: GradientMap,
    learning_rate: f64,
    path: Vec<String>,
}

impl ModuleMapper for Stepper<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let Some(gradient) = self.gradients.remove(&path) else { return param };
        let Optimizer { adamw, moments } = &mut *self.optimizer;
        let learning_rate = self.learning_rate;
        param.map(|value| {
            let trainable = value.is_require_grad();
            let value = value.inner();
            let shape = value.shape();
            let (stepped, state) = adamw.step(learning_rate, value.flatten(0, -1), gradient, moments.remove(&path));
            if let Some(state) = state {
                moments.insert(path, state);
            }
            Tensor::from_inner(stepped.reshape(shape)).set_require_grad(trainable)
        })
    }
}

/// The plain device and element count of every trainable parameter.
#[derive(Default)]
struct Lister {
    path: Vec<String>,
    trainable: BTreeMap<String, (Device, usize)>,
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
            let value = param.val().inner();
            self.trainable.insert(self.path.join("."), (value.device(), value.shape().num_elements()));
        }
    }
}
