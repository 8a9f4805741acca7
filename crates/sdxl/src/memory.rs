//! Memory of the UNet's activations in a training pass, from its config alone.
//!
//! The estimate is the peak between the start of the forward pass and the last LoRA gradient, without weights and LoRA.
//! The factors below count tensors of a layer's own size. They were measured with an allocator on the CPU backend at
//! several sizes of a narrow SDXL and hold there within [`TOLERANCE`]; docs/design/numerics.md compares them with the
//! full width. GPU backends were not measured.

use burn::tensor::FloatDType;

use crate::models::attention::QUERY_CHUNK;
use crate::models::unet::config::UNet2DConditionConfig;
use crate::models::unet::layout::{LayerKind, LayerPlan, Op, layout};

/// Relative error limit of the formula against a measured peak on a narrow SDXL. At small sizes the peak varies with
/// what the CPU backend's threads hold at the same time.
pub const TOLERANCE: f64 = 0.25;

/// Tokens per prompt.
const PROMPT_TOKENS: u64 = 77;

/// Bytes of an f32: type of scores, of norms inside, and of the CPU backend's arithmetic.
const F32: u64 = 4;

/// Pixels that the CPU backend unfolds at a time for a convolution: two threads with tiles of 512.
const UNFOLDED_PIXELS: u64 = 1024;

/// Matrices of `queries x keys` at the peak of an attention: probabilities, their gradient, and one under construction.
const SCORES: u64 = 3;

/// Number of tensors of its own size that a layer holds: in its backward pass, and (`kept`) between forward and
/// backward.
struct Factors {
    /// Bytes of one number.
    bytes: u64,
    /// Tensors of all input and output channels.
    resnet: u64,
    resnet_kept: u64,
    /// Tensors of the tokens' size while the feed-forward is differentiated.
    feed_forward: u64,
    /// Tensors of the tokens' size while the scores are differentiated.
    attention: u64,
    transformer_kept: u64,
    /// Tensors of the input's size.
    projection: u64,
    projection_kept: u64,
    /// Tensors of the output's size.
    upsample: u64,
    /// Tensors of the input's size.
    out: u64,
    out_kept: u64,
    /// Copies of a convolution's weights in f32.
    kernels: u64,
}

const IN_F32: Factors = Factors {
    bytes: 4,
    resnet: 5,
    resnet_kept: 5,
    feed_forward: 38,
    attention: 10,
    transformer_kept: 24,
    projection: 4,
    projection_kept: 2,
    upsample: 4,
    out: 8,
    out_kept: 3,
    kernels: 1,
};

/// Factors in bf16: more tensors, of half the size. Norms are f32 inside, and at each conversion both types exist.
const IN_BF16: Factors = Factors {
    bytes: 2,
    resnet: 8,
    resnet_kept: 6,
    feed_forward: 58,
    attention: 20,
    transformer_kept: 32,
    projection: 10,
    projection_kept: 3,
    upsample: 9,
    out: 14,
    out_kept: 4,
    kernels: 2,
};

/// Estimates the peak activation memory in bytes for a micro-batch of latents of `latents` height and width, with a
/// LoRA on every attention.
///
/// With `recompute`, the inputs of all layers from the first transformer layer on are kept. The backward pass adds the
/// gradients of skips that wait for their layer, and the memory that the current layer needs:
///
/// ```text
/// peak                  = max over layers (inputs kept up to it + waiting gradients + its work)
/// work of a resnet      = 5 (c_in + c_out) pixels + unfolded
/// work of a transformer = max(38 x, 10 x + 3 scores)          x = tokens width
/// scores                = heads min(tokens, QUERY_CHUNK) max(tokens, 77), always f32
/// unfolded              = 9 c_in min(pixels, 1024) + 9 c_in c_out, always f32
/// ```
///
/// Without `recompute`, everything is kept: `5 (c_in + c_out) pixels` of a resnet; `24 x + 3 scores` and the prompt's
/// keys and values of a transformer layer, with the scores of all queries and both attentions at once. In bf16 the
/// factors are 8, 58 and 20; 6 and 32; and `9 c_in c_out` counts twice.
pub fn activation_bytes(
    config: &UNet2DConditionConfig,
    latents: [usize; 2],
    micro_batch: usize,
    dtype: FloatDType,
    recompute: bool,
) -> u64 {
    let factors = if dtype == FloatDType::F32 { IN_F32 } else { IN_BF16 };
    let sizes = ActivationSizes { factors, latents, batch: micro_batch as u64 };
    let ops = layout(config);
    let is_transformer = |op: &Op<LayerPlan>| matches!(op, Op::Layer(layer) if layer.is_transformer());
    let first = ops.iter().position(is_transformer).unwrap_or(ops.len());
    if recompute { sizes.recomputing(&ops[first..]) } else { sizes.keeping(&ops[first..]) }
}

struct ActivationSizes {
    factors: Factors,
    latents: [usize; 2],
    batch: u64,
}

impl ActivationSizes {
    fn keeping(&self, ops: &[Op<LayerPlan>]) -> u64 {
        layers(ops).map(|layer| self.kept(layer)).sum()
    }

    fn recomputing(&self, ops: &[Op<LayerPlan>]) -> u64 {
        let mut inputs: u64 = layers(ops).map(|layer| self.input(layer)).sum();
        let mut waiting = vec![];
        let (mut gradient, mut channel, mut peak) = (0, 0, 0);
        for op in ops.iter().rev() {
            match op {
                Op::Layer(layer) => {
                    peak = peak.max(inputs + waiting.iter().sum::<u64>() + self.work(layer));
                    gradient = self.input(layer);
                    inputs -= gradient;
                    channel = self.factors.bytes * self.pixels(layer.level);
                }
                Op::Push => _ = waiting.pop(),
                Op::PopConcat { channels } => {
                    let here = *channels as u64 * channel;
                    waiting.push(gradient - here);
                    gradient = here;
                }
                Op::PopAdd => waiting.push(gradient),
            }
        }
        peak
    }

    /// Pixels of the whole micro-batch.
    fn pixels(&self, level: usize) -> u64 {
        self.batch * self.latents.map(|side| side.div_ceil(1 << level) as u64).iter().product::<u64>()
    }

    /// Size of a layer's input in bytes.
    fn input(&self, layer: &LayerPlan) -> u64 {
        let channels = match layer.kind {
            LayerKind::Conv { channels: [input, _], .. }
            | LayerKind::Resnet { channels: [input, _] }
            | LayerKind::Out { channels: [input, _] } => input,
            LayerKind::TokensIn { width } | LayerKind::Transformer { width, .. } | LayerKind::TokensOut { width } => {
                width
            }
            LayerKind::Upsample { channels } => channels,
        };
        self.factors.bytes * self.pixels(layer.level) * channels as u64
    }

    /// Bytes in use while a layer is differentiated by itself.
    fn work(&self, layer: &LayerPlan) -> u64 {
        let Factors { bytes, .. } = self.factors;
        let (input, pixels) = (self.input(layer), self.pixels(layer.level));
        match layer.kind {
            LayerKind::Conv { channels, .. } => 2 * input + self.unfolded(channels, pixels / 4),
            LayerKind::Resnet { channels } => {
                let both = channels.iter().sum::<usize>() as u64;
                self.factors.resnet * both * pixels * bytes + self.unfolded(channels, pixels)
            }
            LayerKind::TokensIn { .. } | LayerKind::TokensOut { .. } => self.factors.projection * input,
            LayerKind::Transformer { heads, .. } => {
                let tokens = pixels / self.batch;
                let scores = heads as u64 * tokens.min(QUERY_CHUNK as u64) * tokens.max(PROMPT_TOKENS);
                let attention = self.factors.attention * input + SCORES * F32 * self.batch * scores;
                attention.max(self.factors.feed_forward * input)
            }
            LayerKind::Upsample { channels } => {
                4 * self.factors.upsample * input + self.unfolded([channels; 2], 4 * pixels)
            }
            LayerKind::Out { channels } => self.factors.out * input + self.unfolded(channels, pixels),
        }
    }

    /// Bytes that a layer keeps for its backward pass when all layers are differentiated at once.
    fn kept(&self, layer: &LayerPlan) -> u64 {
        let Factors { bytes, .. } = self.factors;
        let (input, pixels) = (self.input(layer), self.pixels(layer.level));
        match layer.kind {
            LayerKind::Conv { channels: [_, output], .. } => output as u64 * pixels / 4 * bytes,
            LayerKind::Resnet { channels } => {
                self.factors.resnet_kept * channels.iter().sum::<usize>() as u64 * pixels * bytes
            }
            LayerKind::TokensIn { .. } => self.factors.projection_kept * input,
            LayerKind::TokensOut { .. } => 0,
            LayerKind::Transformer { width, heads, .. } => {
                let scores = heads as u64 * pixels * (pixels / self.batch + PROMPT_TOKENS);
                let prompt = 2 * self.batch * PROMPT_TOKENS * width as u64 * F32;
                self.factors.transformer_kept * input + SCORES * F32 * scores + prompt
            }
            LayerKind::Upsample { .. } => 2 * 4 * input,
            LayerKind::Out { .. } => self.factors.out_kept * input,
        }
    }

    /// Bytes that the CPU backend unfolds for a 3x3 convolution, plus its copies of the weights: one in the order for a
    /// matrix product and, for bf16, one in f32 before that.
    fn unfolded(&self, [input, output]: [usize; 2], pixels: u64) -> u64 {
        F32 * 9 * input as u64 * (pixels.min(UNFOLDED_PIXELS) + self.factors.kernels * output as u64)
    }
}

fn layers(ops: &[Op<LayerPlan>]) -> impl Iterator<Item = &LayerPlan> {
    ops.iter().filter_map(|op| match op {
        Op::Layer(layer) => Some(layer),
        _ => None,
    })
}
