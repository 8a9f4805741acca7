//! What a UNet consists of, told by its config alone: a flat list of operations.
//!
//! A list instead of a tree lets the same code run forward, under autodiff, and backwards layer by layer: layers are
//! what is differentiated, the other operations only move tensors and know by themselves where gradients go. Without
//! weights the list tells sizes, from which memory and work follow.

use crate::models::unet::config::{DownBlock, UNet2DConditionConfig, UpBlock};

/// One operation of the UNet on the activation `x`, with a stack beside it.
#[derive(Debug, Clone)]
pub enum Op<L> {
    /// Computes.
    Layer(L),
    /// Pushes a copy of `x`.
    Push,
    /// Pops a skip and concatenates it to `x`, which has `channels`.
    PopConcat {
        /// Those of `x` before.
        channels: usize,
    },
    /// Pops a residual and adds it to `x`.
    PopAdd,
}

/// A layer before it has weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// Where its weights stand, diffusers naming; empty for the layer at the end, whose parts stand at the root.
    pub path: String,
    /// What it is.
    pub kind: LayerKind,
    /// How often the latents were halved before its input.
    pub level: usize,
}

impl LayerPlan {
    /// Whether attention, and with it LoRA, happens here.
    pub fn is_transformer(&self) -> bool {
        matches!(self.kind, LayerKind::Transformer { .. })
    }
}

/// What a layer is, and its sizes; `channels` are those in and out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A 3x3 convolution; `stride` 2 halves the resolution.
    Conv {
        /// In, out.
        channels: [usize; 2],
        /// 1 or 2.
        stride: usize,
    },
    /// A residual block.
    Resnet {
        /// In, out.
        channels: [usize; 2],
    },
    /// From the image to tokens.
    TokensIn {
        /// Channels, in and out.
        width: usize,
    },
    /// A transformer layer with two attentions.
    Transformer {
        /// Of a token.
        width: usize,
        /// Width of the prompt embeddings.
        d_context: usize,
        /// Of both attentions.
        heads: usize,
    },
    /// From tokens to the image.
    TokensOut {
        /// Channels, in and out.
        width: usize,
    },
    /// Doubles the resolution.
    Upsample {
        /// In and out.
        channels: usize,
    },
    /// Norm and 3x3 convolution.
    Out {
        /// In, out.
        channels: [usize; 2],
    },
}

/// All operations in the order of execution.
pub fn layout(config: &UNet2DConditionConfig) -> Vec<Op<LayerPlan>> {
    let mut list = List { config, ops: vec![], level: 0 };
    let channels = &config.block_out_channels;
    let last = channels.len() - 1;

    list.layer("conv_in", LayerKind::Conv { channels: [config.in_channels, channels[0]], stride: 1 });
    list.ops.push(Op::Push);
    for block in 0..=last {
        list.down_block(block);
    }
    list.resnet([channels[last]; 2], "mid_block.resnets.0");
    list.transformer(last, "mid_block.attentions.0");
    list.resnet([channels[last]; 2], "mid_block.resnets.1");
    for step in 0..=last {
        list.up_block(step);
    }
    list.layer("", LayerKind::Out { channels: [channels[0], config.out_channels] });
    list.ops
}

struct List<'a> {
    config: &'a UNet2DConditionConfig,
    ops: Vec<Op<LayerPlan>>,
    level: usize,
}

impl List<'_> {
    fn layer(&mut self, path: impl Into<String>, kind: LayerKind) {
        self.ops.push(Op::Layer(LayerPlan { path: path.into(), kind, level: self.level }));
    }

    /// diffusers `DownBlock2D` and `CrossAttnDownBlock2D`.
    fn down_block(&mut self, block: usize) {
        let channels = &self.config.block_out_channels;
        let width = channels[block];
        let mut d_input = channels[block.saturating_sub(1)];
        let is_last = block + 1 == channels.len();
        let path = format!("down_blocks.{block}");

        for index in 0..self.config.layers_per_block.get(block) {
            self.resnet([d_input, width], format!("{path}.resnets.{index}"));
            if self.config.down_block_types[block] == DownBlock::CrossAttnDownBlock2D {
                self.transformer(block, &format!("{path}.attentions.{index}"));
            }
            self.ops.push(Op::Push);
            d_input = width;
        }
        if !is_last {
            self.layer(format!("{path}.downsamplers.0.conv"), LayerKind::Conv { channels: [width, width], stride: 2 });
            self.level += 1;
            self.ops.push(Op::Push);
        }
    }

    /// diffusers `UpBlock2D` and `CrossAttnUpBlock2D`; step 0 is at the coarsest resolution.
    fn up_block(&mut self, step: usize) {
        let channels = &self.config.block_out_channels;
        let block = channels.len() - 1 - step;
        let width = channels[block];
        // What the same block got from above on the way down: its last skip.
        let outermost = channels[block.saturating_sub(1)];
        let mut d_input = channels[(block + 1).min(channels.len() - 1)];
        let layers = self.config.layers_per_block.get(block) + 1;
        let path = format!("up_blocks.{step}");

        for index in 0..layers {
            let d_skip = if index + 1 == layers { outermost } else { width };
            self.ops.push(Op::PopConcat { channels: d_input });
            self.resnet([d_input + d_skip, width], format!("{path}.resnets.{index}"));
            if self.config.up_block_types[step] == UpBlock::CrossAttnUpBlock2D {
                self.transformer(block, &format!("{path}.attentions.{index}"));
            }
            d_input = width;
        }
        if block > 0 {
            self.layer(format!("{path}.upsamplers.0"), LayerKind::Upsample { channels: width });
            self.level -= 1;
        }
    }

    fn resnet(&mut self, channels: [usize; 2], path: impl Into<String>) {
        self.layer(path, LayerKind::Resnet { channels });
    }

    /// diffusers `Transformer2DModel`: a residual around projections and transformer layers.
    fn transformer(&mut self, block: usize, path: &str) {
        let width = self.config.block_out_channels[block];
        let d_context = self.config.cross_attention_dim.get(block);
        let heads = self.config.attention_head_dim.get(block);

        self.ops.push(Op::Push);
        self.layer(path, LayerKind::TokensIn { width });
        for index in 0..self.config.transformer_layers_per_block.get(block) {
            let path = format!("{path}.transformer_blocks.{index}");
            self.layer(path, LayerKind::Transformer { width, d_context, heads });
        }
        self.layer(path, LayerKind::TokensOut { width });
        self.ops.push(Op::PopAdd);
    }
}
