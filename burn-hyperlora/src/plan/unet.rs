//! Cost of the UNet, layer by layer, from its config alone.
//!
//! The layers are those that the real module is built from; tests compare the counts with torch's.

use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::models::unet::config::UNet2DConditionConfig;
use hyperlora_sdxl::models::unet::layout::{LayerKind, LayerPlan, Op, layout};
use hyperlora_sdxl::tokenizer::PROMPT_TOKENS;

/// Floating-point operations of one image; a multiplication and an addition count as two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flops {
    /// Convolutions and linears whose input depends on the latents.
    linear: u128,
    /// The two attention products: queries with keys, scores with values.
    attention: u128,
    /// Linears of the prompt and the timestep, whose inputs need no gradient.
    conditions: u128,
    /// Low-rank updates.
    lora: u128,
    /// Gradients of the low-rank updates: twice the forward pass, but none with respect to the prompt.
    lora_backward: u128,
}

impl Flops {
    pub(super) fn forward(&self) -> u128 {
        self.linear + self.attention + self.conditions + self.lora
    }

    /// Gradients with respect to activations and LoRA, except attention. A frozen linear costs one more product.
    fn linear_backward(&self) -> u128 {
        self.linear + self.lora_backward
    }

    /// Gradients of attention. A product of two activations costs two more products.
    fn attention_backward(&self) -> u128 {
        2 * self.attention
    }

    /// All gradients, as computed by autodiff.
    #[cfg(test)]
    pub(super) fn backward(&self) -> u128 {
        self.linear_backward() + self.attention_backward()
    }

    fn plus(self, other: Self) -> Self {
        Self {
            linear: self.linear + other.linear,
            attention: self.attention + other.attention,
            conditions: self.conditions + other.conditions,
            lora: self.lora + other.lora,
            lora_backward: self.lora_backward + other.lora_backward,
        }
    }
}

/// UNet operations of a training step, per image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnetFlops {
    pub(super) forward: u128,
    /// Second forward pass of every layer from the first one with a LoRA; 0 without recomputation.
    pub(super) recompute: u128,
    /// Gradients of linears, convolutions and LoRA.
    pub(super) backward: u128,
    /// Gradients of attention, computed in f32. Recomputation computes the scores once more.
    pub(super) attention_backward: u128,
}

/// Layers in execution order.
fn layers(config: &UNet2DConditionConfig) -> impl Iterator<Item = LayerPlan> {
    layout(config).into_iter().filter_map(|op| match op {
        Op::Layer(layer) => Some(layer),
        _ => None,
    })
}

/// HypernetSizes of the attention modules in execution order; their paths are empty.
pub(super) fn sites(config: &UNet2DConditionConfig) -> Vec<AttentionSite> {
    let site =
        |hidden_size, cross_attention_dim| AttentionSite { path: String::new(), hidden_size, cross_attention_dim };
    let of_layer = |layer: LayerPlan| match layer.kind {
        LayerKind::Transformer { width, d_context, .. } => vec![site(width, None), site(width, Some(d_context))],
        _ => vec![],
    };
    layers(config).flat_map(of_layer).collect()
}

/// Number of parameters of the whole UNet.
pub(super) fn parameters(config: &UNet2DConditionConfig) -> u64 {
    let time = config.time_embed_dim();
    let linear = |input: usize, output: usize| wide(input) * wide(output) + wide(output);
    let conv = |input: usize, output: usize| 9 * wide(input) * wide(output) + wide(output);
    let of_layer = |layer: LayerPlan| match layer.kind {
        LayerKind::Conv { channels: [input, output], .. } => conv(input, output),
        LayerKind::Upsample { channels } => conv(channels, channels),
        LayerKind::Resnet { channels: [input, output] } => {
            let shortcut = if input == output { 0 } else { linear(input, output) };
            2 * wide(input)
                + conv(input, output)
                + linear(time, output)
                + 2 * wide(output)
                + conv(output, output)
                + shortcut
        }
        LayerKind::TokensIn { width } => 2 * wide(width) + linear(width, width),
        LayerKind::Transformer { width, d_context: context, .. } => {
            let (w, c) = (wide(width), wide(context));
            let norms = 3 * 2 * w;
            let self_attention = 4 * w * w + w;
            let cross_attention = 2 * w * w + 2 * c * w + w;
            // GEGLU: values and gates of 4 w each, then the output projection.
            norms + self_attention + cross_attention + linear(width, 8 * width) + linear(4 * width, width)
        }
        LayerKind::TokensOut { width } => linear(width, width),
        LayerKind::Out { channels: [input, output] } => 2 * wide(input) + conv(input, output),
    };
    let embeddings = [config.block_out_channels[0], config.projection_class_embeddings_input_dim]
        .map(|input| linear(input, time) + linear(time, time));
    layers(config).map(of_layer).chain(embeddings).map(|count| count as u64).sum()
}

/// Widens a size, so that products of parameters do not overflow.
fn wide(size: usize) -> u128 {
    size as u128
}

/// Operations of a layer for latents of `height` x `width`; `rank` is the LoRA rank, 0 without a LoRA.
fn flops(layer: &LayerPlan, config: &UNet2DConditionConfig, latents: [usize; 2], rank: usize) -> Flops {
    // `layer.level` is the level of the input; operations count at the output.
    let level = match layer.kind {
        LayerKind::Conv { stride: 2, .. } => layer.level + 1,
        LayerKind::Upsample { .. } => layer.level - 1,
        _ => layer.level,
    };
    let [height, width] = latents.map(|side| wide(side.div_ceil(1 << level)));
    let pixels = height * width;
    let matmul = |rows: u128, input: usize, output: usize| 2 * rows * wide(input) * wide(output);
    let only = |linear: u128| Flops { linear, ..Flops::default() };
    match layer.kind {
        LayerKind::Conv { channels: [input, output], .. } | LayerKind::Out { channels: [input, output] } => {
            only(9 * matmul(pixels, input, output))
        }
        LayerKind::Upsample { channels } => only(9 * matmul(pixels, channels, channels)),
        LayerKind::Resnet { channels: [input, output] } => {
            let shortcut = if input == output { 0 } else { matmul(pixels, input, output) };
            Flops {
                linear: 9 * (matmul(pixels, input, output) + matmul(pixels, output, output)) + shortcut,
                conditions: matmul(1, config.time_embed_dim(), output),
                ..Flops::default()
            }
        }
        LayerKind::TokensIn { width } | LayerKind::TokensOut { width } => only(matmul(pixels, width, width)),
        LayerKind::Transformer { width, d_context: context, .. } => {
            let prompt = wide(PROMPT_TOKENS);
            let square = matmul(pixels, width, width);
            // x @ down, then @ up.
            let pair = |rows, input| matmul(rows, input, rank) + matmul(rows, rank, width);
            let lora = 6 * pair(pixels, width) + 2 * pair(prompt, context);
            Flops {
                // Six square linears, and the feed-forward: two projections to 4 w, one back.
                linear: 6 * square + 12 * square,
                attention: 4 * pixels * pixels * wide(width) + 4 * pixels * prompt * wide(width),
                conditions: 2 * matmul(prompt, context, width),
                lora,
                lora_backward: 2 * lora - 2 * matmul(prompt, context, rank),
            }
        }
    }
}

/// Operations of one forward pass, including the embeddings of timestep, sizes and pooled prompt.
pub(super) fn forward(config: &UNet2DConditionConfig, latents: [usize; 2], rank: usize) -> Flops {
    let time = config.time_embed_dim();
    let embedding = |input: usize| 2 * wide(time) * (wide(input) + wide(time));
    let conditions = embedding(config.block_out_channels[0]) + embedding(config.projection_class_embeddings_input_dim);
    let start = Flops { conditions, ..Flops::default() };
    layers(config).map(|layer| flops(&layer, config, latents, rank)).fold(start, Flops::plus)
}

/// Operations of one image, forward and backward. The backward pass ends at the first layer with a LoRA.
pub(super) fn training(config: &UNet2DConditionConfig, latents: [usize; 2], rank: usize, recompute: bool) -> UnetFlops {
    let touched = layers(config)
        .skip_while(|layer| !matches!(layer.kind, LayerKind::Transformer { .. }))
        .map(|layer| flops(&layer, config, latents, rank))
        .fold(Flops::default(), Flops::plus);
    let again = if recompute { touched.attention / 2 } else { 0 };
    UnetFlops {
        forward: forward(config, latents, rank).forward(),
        recompute: if recompute { touched.forward() } else { 0 },
        backward: touched.linear_backward(),
        attention_backward: touched.attention_backward() + again,
    }
}
