//! Norms that compute in f32 for any input type.
//!
//! Burn computes in f32 only for f16 inputs; in bf16, mean and variance would keep 8 bits. PyTorch's kernels compute
//! both in f32.

use burn::module::Param;
use burn::nn;
use burn::tensor::{FloatDType, Tensor};

/// [`nn::GroupNorm`] in f32.
#[derive(Debug)]
pub struct GroupNorm(nn::GroupNorm);

/// [`nn::LayerNorm`] in f32.
#[derive(Debug)]
pub struct LayerNorm(nn::LayerNorm);

impl GroupNorm {
    /// Wraps `norm`, with its parameters in f32.
    pub fn new(norm: nn::GroupNorm) -> Self {
        Self(nn::GroupNorm { gamma: norm.gamma.map(widened), beta: norm.beta.map(widened), ..norm })
    }

    /// Normalises `[B, C, H, W]`; the result has the type of `x`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        in_f32(x, |x| self.0.forward(x))
    }
}

impl LayerNorm {
    /// Wraps `norm`, with its parameters in f32.
    pub fn new(mut norm: nn::LayerNorm) -> Self {
        norm.gamma = widened(norm.gamma);
        norm.beta = norm.beta.map(widened);
        Self(norm)
    }

    /// Normalises `[B, N, C]`; the result has the type of `x`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        in_f32(x, |x| self.0.forward(x))
    }
}

fn in_f32<const D: usize>(x: Tensor<D>, compute: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Tensor<D> {
    let dtype = x.dtype();
    compute(x.cast(FloatDType::F32)).cast(dtype)
}

fn widened(parameter: Param<Tensor<1>>) -> Param<Tensor<1>> {
    parameter.map(|value| value.cast(FloatDType::F32))
}
