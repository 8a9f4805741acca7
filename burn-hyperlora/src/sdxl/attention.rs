//! Attention with per-sample LoRA, and the transformer layer made of it.

use burn::nn::{GroupNorm, LayerNorm, Linear};
use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, softmax};

use crate::lora::{AttentionLora, LoraPair};
use crate::weights::WeightsAt;

/// Epsilon of the layer norms.
const LAYER_NORM_EPSILON: f64 = 1e-5;

/// Epsilon of the group norm before the tokens.
const TOKEN_NORM_EPSILON: f64 = 1e-6;

/// Multi-head attention without masks (diffusers `Attention`).
#[derive(Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    /// Takes `to_q`, `to_k`, `to_v` (no bias) and `to_out.0`; keys and values come from tokens of width `d_context`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, d_context: usize, heads: usize) -> Self {
        Self {
            to_q: weights.at("to_q").linear(width, width, false),
            to_k: weights.at("to_k").linear(d_context, width, false),
            to_v: weights.at("to_v").linear(d_context, width, false),
            to_out: weights.at("to_out.0").linear(width, width, true),
            heads,
        }
    }

    /// `x` is `[B, N, width]`, `context` `[B, M, d_context]`; the result `[B, N, width]`.
    pub fn forward(&self, x: Tensor<3>, context: Tensor<3>, lora: Option<&AttentionLora>) -> Tensor<3> {
        let [batch, tokens, width] = x.dims();
        let head_width = width / self.heads;
        let scale = (head_width as f64).powf(-0.5);
        // [B, N, width] -> [B, heads, N, head_width]
        let split = |x: Tensor<3>| {
            let [_, tokens, _] = x.dims();
            x.reshape([batch, tokens, self.heads, head_width]).swap_dims(1, 2)
        };

        let q = split(updated(&self.to_q, lora.map(|lora| &lora.q), x).mul_scalar(scale));
        let k = split(updated(&self.to_k, lora.map(|lora| &lora.k), context.clone()));
        let v = split(updated(&self.to_v, lora.map(|lora| &lora.v), context));

        // [B, heads, N, M]
        let scores = softmax(q.matmul(k.swap_dims(2, 3)), 3);
        let heads = scores.matmul(v).swap_dims(1, 2).reshape([batch, tokens, width]);
        updated(&self.to_out, lora.map(|lora| &lora.out), heads)
    }
}

/// `W x + b` plus each sample's own low-rank update.
fn updated(linear: &Linear, lora: Option<&LoraPair>, x: Tensor<3>) -> Tensor<3> {
    match lora {
        Some(lora) => linear.forward(x.clone()) + lora.apply(x),
        None => linear.forward(x),
    }
}

/// Linear with a GELU gate, then linear (diffusers `FeedForward` with GEGLU).
#[derive(Debug)]
struct FeedForward {
    value: Linear,
    gate: Linear,
    out: Linear,
}

impl FeedForward {
    /// Takes `net.0.proj`, whose output halves are the values and their gates, and `net.2`.
    fn load(weights: &WeightsAt<'_>, width: usize) -> Self {
        let inner = 4 * width;
        let [value, gate] = weights.at("net.0.proj").linear_halves(width, inner);
        Self { value, gate, out: weights.at("net.2").linear(inner, width, true) }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.out.forward(self.value.forward(x.clone()) * gelu(self.gate.forward(x)))
    }
}

/// Self-attention, attention to the prompt, feed-forward; pre-norm (diffusers `BasicTransformerBlock`).
#[derive(Debug)]
pub struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl BasicTransformerBlock {
    /// Takes `norm1`, `attn1`, `norm2`, `attn2`, `norm3` and `ff`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, d_context: usize, heads: usize) -> Self {
        let norm = |name| weights.at(name).layer_norm(width, LAYER_NORM_EPSILON);
        Self {
            norm1: norm("norm1"),
            attn1: Attention::load(&weights.at("attn1"), width, width, heads),
            norm2: norm("norm2"),
            attn2: Attention::load(&weights.at("attn2"), width, d_context, heads),
            norm3: norm("norm3"),
            ff: FeedForward::load(&weights.at("ff"), width),
        }
    }

    /// `x` is `[B, H, W, width]`, `context` `[B, M, d_context]`, `lora` holds the updates of `attn1` and `attn2`.
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

/// From the image to tokens: the start of diffusers' `Transformer2DModel` with `use_linear_projection`.
#[derive(Debug)]
pub struct TokensIn {
    norm: GroupNorm,
    proj_in: Linear,
}

impl TokensIn {
    /// Takes `norm` and `proj_in`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, groups: usize) -> Self {
        Self {
            norm: weights.at("norm").group_norm(groups, width, TOKEN_NORM_EPSILON),
            proj_in: weights.at("proj_in").linear(width, width, true),
        }
    }

    /// `[B, C, H, W]` -> `[B, H, W, C]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.proj_in.forward(self.norm.forward(x).permute([0, 2, 3, 1]))
    }
}

/// Back from tokens to the image: the end of `Transformer2DModel`, without its residual.
#[derive(Debug)]
pub struct TokensOut {
    proj_out: Linear,
}

impl TokensOut {
    /// Takes `proj_out`.
    pub fn load(weights: &WeightsAt<'_>, width: usize) -> Self {
        Self { proj_out: weights.at("proj_out").linear(width, width, true) }
    }

    /// `[B, H, W, C]` -> `[B, C, H, W]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.proj_out.forward(x).permute([0, 3, 1, 2])
    }
}
