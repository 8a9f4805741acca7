//! Loads Burn layers from named tensors.

use std::fmt::Display;

use burn::module::{Param, ParamId};
use burn::nn::conv::Conv2d;
use burn::nn::{Embedding, GroupNorm, LayerNorm, LayerNormConfig, Linear, PaddingConfig2d};
use burn::tensor::Tensor;

use crate::weights::Weights;

/// [`Weights`] below a prefix, for one module of a model.
///
/// Its layers are frozen: they are on the plain device and collect no gradients.
#[derive(Debug, Clone)]
pub struct WeightsAt<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Weights {
    /// Returns a handle for the keys that start with `prefix` and a dot, or for all keys if the prefix is empty.
    pub fn at(&self, prefix: impl Into<String>) -> WeightsAt<'_> {
        WeightsAt { weights: self, prefix: prefix.into() }
    }
}

impl<'a> WeightsAt<'a> {
    /// Returns the handle of a submodule.
    #[must_use]
    pub fn at(&self, name: impl Display) -> WeightsAt<'a> {
        WeightsAt { weights: self.weights, prefix: self.key(name) }
    }

    /// Returns the full key of `name`.
    pub fn key(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Returns true if the file holds `name`.
    pub fn has(&self, name: &str) -> bool {
        self.weights.places.contains_key(&self.key(name))
    }

    /// Skips `name`, a buffer that this implementation computes itself.
    pub fn ignore(&self, name: &str) {
        self.weights.record.borrow_mut().asked.insert(self.key(name));
    }

    /// Skips everything below this handle, because the model does not need it.
    pub fn ignore_all(&self) {
        let below = self.key("");
        let names = self.weights.places.keys().filter(|name| name.starts_with(&below)).cloned();
        self.weights.record.borrow_mut().asked.extend(names);
    }

    /// Loads a tensor by name.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Tensor<D> {
        self.weights.tensor(self.key(name), shape)
    }

    /// Loads a linear layer from `weight` `[out, in]` and optionally `bias` `[out]`. Burn stores the transpose.
    pub fn linear(&self, d_input: usize, d_output: usize, bias: bool) -> Linear {
        let name = self.key("weight");
        let place = self.weights.ask(name.clone(), [d_output, d_input]);
        Linear {
            weight: frozen(self.weights.transposed_rows(&name, place, 0..d_output, d_input)),
            bias: bias.then(|| frozen(self.tensor("bias", [d_output]))),
        }
    }

    /// Loads one stored linear with bias as two: the first and second half of its `2 d_half` outputs.
    pub fn linear_halves(&self, d_input: usize, d_half: usize) -> [Linear; 2] {
        let name = self.key("weight");
        let place = self.weights.ask(name.clone(), [2 * d_half, d_input]);
        let bias = self.tensor("bias", [2 * d_half]);
        [0, d_half].map(|start| Linear {
            weight: frozen(self.weights.transposed_rows(&name, place, start..start + d_half, d_input)),
            bias: Some(frozen(bias.clone().narrow(0, start, d_half))),
        })
    }

    /// Loads a convolution from `weight` `[out, in, kernel, kernel]` and `bias` `[out]`, with equal `padding` on all
    /// sides.
    pub fn conv2d(&self, channels: [usize; 2], kernel: usize, stride: usize, padding: usize) -> Conv2d {
        Conv2d {
            weight: frozen(self.tensor("weight", [channels[1], channels[0], kernel, kernel])),
            bias: Some(frozen(self.tensor("bias", [channels[1]]))),
            stride: [stride; 2],
            kernel_size: [kernel; 2],
            dilation: [1; 2],
            groups: 1,
            padding: PaddingConfig2d::Explicit(padding, padding, padding, padding),
        }
    }

    /// Loads a group norm from `weight` and `bias`, both `[channels]`.
    pub fn group_norm(&self, groups: usize, channels: usize, epsilon: f64) -> GroupNorm {
        GroupNorm {
            gamma: Some(frozen(self.tensor("weight", [channels]))),
            beta: Some(frozen(self.tensor("bias", [channels]))),
            num_groups: groups,
            num_channels: channels,
            epsilon,
            affine: true,
        }
    }

    /// Loads a layer norm from `weight` and `bias`, both `[width]`.
    pub fn layer_norm(&self, width: usize, epsilon: f64) -> LayerNorm {
        let mut norm = LayerNormConfig::new(width).with_epsilon(epsilon).init(&self.weights.device);
        norm.gamma = frozen(self.tensor("weight", [width]));
        norm.beta = Some(frozen(self.tensor("bias", [width])));
        norm
    }

    /// Loads a tensor without axes; 0 if it is missing, which [`Weights::finish`] reports.
    pub fn scalar(&self, name: &str) -> f32 {
        let name = self.key(name);
        let values = self.weights.ask(name.clone(), []).and_then(|place| self.weights.read(&name, place, 0, false));
        values.and_then(|values| values.iter::<f32>().next()).unwrap_or_default()
    }

    /// Loads an embedding from `weight` `[entries, width]`.
    pub fn embedding(&self, entries: usize, width: usize) -> Embedding {
        Embedding { weight: frozen(self.tensor("weight", [entries, width])) }
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor).set_require_grad(false)
}
