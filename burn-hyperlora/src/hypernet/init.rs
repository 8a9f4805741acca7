//! Parameter initialisation from a seed and the parameter's name, identical on every device.

use burn::module::{Param, ParamId};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

/// Initialises the parameters below one name prefix.
///
/// Each parameter draws from its own stream, so that adding one leaves the others unchanged. Values are drawn on first
/// access, so that a module loaded from files never draws any.
#[derive(Clone)]
pub(super) struct Init {
    seed: u64,
    prefix: String,
    device: Device,
}

impl Init {
    pub(super) fn new(seed: u64, device: &Device) -> Self {
        Self { seed, prefix: String::new(), device: device.clone() }
    }

    /// Returns the initialiser of everything below `name`.
    pub(super) fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// Draws normal values with mean 0.
    pub(super) fn normal<const D: usize>(&self, name: &str, shape: [usize; D], std: f64) -> Param<Tensor<D>> {
        let (seed, stream) = (self.seed, fnv1a(&format!("{}{name}", self.prefix)));
        self.lazy(shape, move || {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            let standard = StandardNormal.sample_iter(&mut rng);
            standard.map(|value: f32| value * std as f32).take(shape.iter().product()).collect()
        })
    }

    /// Returns zeros.
    pub(super) fn zeros<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D>> {
        self.lazy(shape, move || vec![0.0; shape.iter().product()])
    }

    /// Creates a linear layer with zero bias and weights of std `1 / sqrt(in)`, which keeps the variance of normalised
    /// inputs at any width. A fixed std of 0.02 would mute a narrow resampler.
    pub(super) fn linear(&self, name: &str, input: usize, output: usize, bias: bool) -> Linear {
        let below = self.at(name);
        Linear {
            weight: below.normal("weight", [input, output], (input as f64).sqrt().recip()),
            bias: bias.then(|| below.zeros([output])),
        }
    }

    /// Creates a layer norm with identity scale and zero shift.
    pub(super) fn layer_norm(&self, width: usize) -> LayerNorm {
        LayerNormConfig::new(width).init(&self.device)
    }

    fn lazy<const D: usize>(
        &self,
        shape: [usize; D],
        values: impl FnOnce() -> Vec<f32> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        let make = move |device: &Device, require_grad| {
            Tensor::from_data(TensorData::new(values(), shape), device).set_require_grad(require_grad)
        };
        Param::uninitialized(ParamId::new(), make, self.device.clone(), true, shape.into())
    }
}

/// FNV-1a hash, 64 bit. Distributes parameter names over the generator's streams.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
