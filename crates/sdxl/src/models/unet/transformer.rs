//! Transformer layer of the UNet, and the projections around a sequence of them.

use burn::nn::Linear;
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;

use crate::lora::AttentionLora;
use crate::models::attention::Attention;
use crate::models::norms::{GroupNorm, LayerNorm};
use crate::weights::WeightsAt;

/// Epsilon of the layer norms.
const LAYER_NORM_EPSILON: f64 = 1e-5;

/// Epsilon of the group norm before the token projection.
const TOKEN_NORM_EPSILON: f64 = 1e-6;

/// Linear with a GELU gate, then linear (diffusers `FeedForward` with GEGLU).
#[derive(Debug)]
pub(super) struct FeedForward {
    value: Linear,
    gate: Linear,
    out: Linear,
}

impl FeedForward {
    /// Loads `net.0.proj`, whose output halves are values and gates, and `net.2`.
    fn load(weights: &WeightsAt<'_>, width: usize) -> Self {
        let inner = 4 * width;
        let [value, gate] = weights.at("net.0.proj").linear_halves(width, inner);
        Self { value, gate, out: weights.at("net.2").linear(inner, width, true) }
    }

    pub(super) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.out.forward(self.value.forward(x.clone()) * gelu(self.gate.forward(x)))
    }
}

/// Self-attention, cross-attention to the prompt, feed-forward; pre-norm (diffusers `BasicTransformerBlock`).
#[derive(Debug)]
pub struct BasicTransformerBlock {
    pub(super) norm1: LayerNorm,
    pub(super) attn1: Attention,
    pub(super) norm2: LayerNorm,
    pub(super) attn2: Attention,
    pub(super) norm3: LayerNorm,
    pub(super) ff: FeedForward,
}

impl BasicTransformerBlock {
    /// Loads `norm1`, `attn1`, `norm2`, `attn2`, `norm3` and `ff`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, d_context: usize, heads: usize) -> Self {
        let norm = |name| LayerNorm::new(weights.at(name).layer_norm(width, LAYER_NORM_EPSILON));
        Self {
            norm1: norm("norm1"),
            attn1: Attention::load(&weights.at("attn1"), width, width, heads),
            norm2: norm("norm2"),
            attn2: Attention::load(&weights.at("attn2"), width, d_context, heads),
            norm3: norm("norm3"),
            ff: FeedForward::load(&weights.at("ff"), width),
        }
    }

    /// Maps `x` `[B, H, W, width]` with `context` `[B, M, d_context]`; `lora` holds the updates of `attn1` and `attn2`.
    pub fn forward(&self, x: Tensor<4>, context: Tensor<3>, lora: Option<&[AttentionLora; 2]>) -> Tensor<4> {
        let shape = x.shape();
        let [batch, height, width, channels] = x.dims();
        let x = x.reshape([batch, height * width, channels]);

        let normed = self.norm1.forward(x.clone());
        let x = x + self.attn1.forward(normed.clone(), normed, lora.map(|lora| &lora[0]));
        let x = x.clone() + self.attn2.forward(self.norm2.forward(x), context, lora.map(|lora| &lora[1]));
        let x = x.clone() + self.ff.forward(self.norm3.forward(x));
        x.reshape(shape)
    }
}

/// Projection from image to tokens: the start of diffusers' `Transformer2DModel` with `use_linear_projection`.
#[derive(Debug)]
pub struct TokensIn {
    norm: GroupNorm,
    proj_in: Linear,
}

impl TokensIn {
    /// Loads `norm` and `proj_in`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, groups: usize) -> Self {
        Self {
            norm: GroupNorm::new(weights.at("norm").group_norm(groups, width, TOKEN_NORM_EPSILON)),
            proj_in: weights.at("proj_in").linear(width, width, true),
        }
    }

    /// Maps `[B, C, H, W]` to `[B, H, W, C]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.proj_in.forward(self.norm.forward(x).permute([0, 2, 3, 1]))
    }
}

/// Projection from tokens to image: the end of diffusers' `Transformer2DModel`, without its residual.
#[derive(Debug)]
pub struct TokensOut {
    proj_out: Linear,
}

impl TokensOut {
    /// Loads `proj_out`.
    pub fn load(weights: &WeightsAt<'_>, width: usize) -> Self {
        Self { proj_out: weights.at("proj_out").linear(width, width, true) }
    }

    /// Maps `[B, H, W, C]` to `[B, C, H, W]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.proj_out.forward(x).permute([0, 3, 1, 2])
    }
}
