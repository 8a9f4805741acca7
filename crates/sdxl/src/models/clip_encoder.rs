//! Transformer shared by CLIP's text and image encoders (transformers `CLIPEncoder`; Radford et al., arXiv 2103.00020).

use burn::nn::{LayerNorm, Linear};
use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, sigmoid};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use serde::Deserialize;

use crate::weights::WeightsAt;

/// Activation in the MLPs, `hidden_act` of a CLIP config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`: OpenAI's CLIP.
    QuickGelu,
    /// Exact GELU: OpenCLIP.
    Gelu,
}

/// Sizes of a CLIP transformer, with the keys of both encoders' `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct ClipEncoderConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Hidden width of the MLPs.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads; a divisor of the width.
    pub num_attention_heads: usize,
    /// Activation between the two linears of an MLP.
    pub hidden_act: Activation,
    /// Epsilon of every layer norm.
    #[serde(default = "layer_norm_eps")]
    pub layer_norm_eps: f64,
}

fn layer_norm_eps() -> f64 {
    1e-5
}

/// Size limit of a config; larger sizes are typing errors, and products of two sizes still fit memory sizes.
const LARGEST: usize = 1 << 16;

/// Layer count limit of a config; CLIP's largest encoders have 48.
const MOST_LAYERS: usize = 256;

impl ClipEncoderConfig {
    /// Returns the key and the problem of impossible sizes.
    pub(crate) fn problem(&self) -> Option<(&'static str, String)> {
        let (width, heads, layers) = (self.hidden_size, self.num_attention_heads, self.num_hidden_layers);
        if width == 0 || heads == 0 || !width.is_multiple_of(heads) {
            return Some(("num_attention_heads", format!("{heads} does not divide hidden_size {width}")));
        }
        for (key, size, most) in [
            ("hidden_size", width, LARGEST),
            ("intermediate_size", self.intermediate_size, LARGEST),
            ("num_hidden_layers", layers, MOST_LAYERS),
        ] {
            if !(1..=most).contains(&size) {
                return Some((key, format!("{size} is not within 1 and {most}")));
            }
        }
        if self.layer_norm_eps < 0.0 {
            return Some(("layer_norm_eps", format!("{} is negative", self.layer_norm_eps)));
        }
        // With one layer, the penultimate states are the embeddings, untouched by any layer.
        (layers < 2).then(|| ("num_hidden_layers", format!("{layers} is too few: the penultimate layer is needed")))
    }
}

/// A stack of pre-norm transformer layers.
#[derive(Debug)]
pub(crate) struct ClipEncoder {
    layers: Vec<ClipLayer>,
}

impl ClipEncoder {
    /// Loads the first `layers` of the encoder at `at`.
    pub(crate) fn new(at: &WeightsAt<'_>, config: &ClipEncoderConfig, layers: usize) -> Self {
        Self { layers: (0..layers).map(|i| ClipLayer::new(&at.at("layers").at(i), config)).collect() }
    }

    /// Computes hidden states `[B, T, C]`. `causal` hides later positions from earlier ones.
    pub(crate) fn forward(&self, x: Tensor<3>, causal: bool) -> Tensor<3> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x, causal))
    }
}

#[derive(Debug)]
pub(crate) struct ClipLayer {
    heads: usize,
    activation: Activation,
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl ClipLayer {
    pub(crate) fn new(at: &WeightsAt<'_>, config: &ClipEncoderConfig) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let square = |name| at.at("self_attn").at(name).linear(width, width, true);
        Self {
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            norm1: at.at("layer_norm1").layer_norm(width, config.layer_norm_eps),
            q: square("q_proj"),
            k: square("k_proj"),
            v: square("v_proj"),
            out: square("out_proj"),
            norm2: at.at("layer_norm2").layer_norm(width, config.layer_norm_eps),
            fc1: at.at("mlp.fc1").linear(width, inner, true),
            fc2: at.at("mlp.fc2").linear(inner, width, true),
        }
    }

    pub(crate) fn forward(&self, x: Tensor<3>, causal: bool) -> Tensor<3> {
        let [b, t, c] = x.dims();
        // 1. Self-attention, one batch per head: [B, T, C] -> [B, heads, T, C / heads].
        let normed = self.norm1.forward(x.clone());
        let [q, k, v] = [&self.q, &self.k, &self.v]
            .map(|linear| linear.forward(normed.clone()).reshape([b, t, self.heads, c / self.heads]).swap_dims(1, 2));
        let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
        let mixed = attention(q, k, v, None, None, options).swap_dims(1, 2).reshape([b, t, c]);
        let x = x + self.out.forward(mixed);
        // 2. MLP.
        let inner = self.fc1.forward(self.norm2.forward(x.clone()));
        let inner = match self.activation {
            Activation::QuickGelu => inner.clone() * sigmoid(inner * 1.702),
            Activation::Gelu => gelu(inner),
        };
        x + self.fc2.forward(inner)
    }
}
