//! UNet layout as a flat list of operations, from its config alone.
//!
//! A flat list, not a tree, lets the same code run forward, under autodiff, and backward layer by layer. Only layers
//! are differentiated; the other operations move tensors, and their gradients follow the same moves. Without weights,
//! the list provides the sizes from which memory and work are computed.

use crate::models::unet::config::{DownBlock, UNet2DConditionConfig, UpBlock};

/// One operation of the UNet on the activation `x` and a stack.
#[derive(Debug, Clone)]
pub enum Op<L> {
    /// Computes a layer.
    Layer(L),
    /// Pushes a copy of `x`.
    Push,
    /// Pops a skip and concatenates it to `x`.
    PopConcat {
        /// Channels of `x` before the concatenation.
        channels: usize,
    },
    /// Pops a residual and adds it to `x`.
    PopAdd,
}

/// A layer without weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// Path of its weights in diffusers naming; empty for the last layer, whose modules are at the root.
    pub path: String,
    /// Kind of the layer.
    pub kind: LayerKind,
    /// Number of times the latents were halved before its input.
    pub level: usize,
}

impl LayerPlan {
    /// Returns true if the layer has attention, and thus LoRA.
    pub fn is_transformer(&self) -> bool {
        matches!(self.kind, LayerKind::Transformer { .. })
    }
}

/// Kind and sizes of a layer; `channels` are input and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A 3x3 convolution; `stride` 2 halves the resolution.
    Conv {
        /// Input and output channels.
        channels: [usize; 2],
        /// Stride, 1 or 2.
        stride: usize,
    },
    /// A residual block.
    Resnet {
        /// Input and output channels.
        channels: [usize; 2],
    },
    /// From image to tokens.
    TokensIn {
        /// Input and output channels.
        width: usize,
    },
    /// A transformer layer with two attentions.
    Transformer {
        /// Token width.
        width: usize,
        /// Width of the prompt embeddings.
        d_context: usize,
        /// Heads of both attentions.
        heads: usize,
    },
    /// From tokens to image.
    TokensOut {
        /// Input and output channels.
        width: usize,
    },
    /// Doubles the resolution.
    Upsample {
        /// Input and output channels.
        channels: usize,
    },
    /// Norm and 3x3 convolution.
    Out {
        /// Input and output channels.
        channels: [usize; 2],
    },
}

/// Lists all operations in execution order.
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

    /// Appends diffusers' `DownBlock2D` or `CrossAttnDownBlock2D`.
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

    /// Appends diffusers' `UpBlock2D` or `CrossAttnUpBlock2D`; step 0 has the coarsest resolution.
    fn up_block(&mut self, step: usize) {
        let channels = &self.config.block_out_channels;
        let block = channels.len() - 1 - step;
        let width = channels[block];
        // Width of the last skip: the input of the same block on the down path.
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

    /// Appends diffusers' `Transformer2DModel`: a residual around projections and transformer layers.
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
