//! The blocks of the UNet, unrolled into a flat list of operations.
//!
//! A list instead of a tree lets the same code run forward, under autodiff, and backwards layer by layer: layers are
//! what is differentiated, the other operations only move tensors and know by themselves where gradients go.

use burn::nn::GroupNorm;
use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::lora::{AttentionLora, AttentionSite};
use crate::sdxl::attention::{BasicTransformerBlock, TokensIn, TokensOut};
use crate::sdxl::resnet::{ResnetBlock2D, ResnetConfig, Upsample2D};
use crate::sdxl::unet_config::{DownBlock, UNet2DConditionConfig, UpBlock};
use crate::weights::WeightsAt;

/// One operation of the UNet on the activation `x`, with a stack beside it.
#[derive(Debug)]
pub(super) enum Op {
    /// Computes.
    Layer(Box<Layer>),
    /// Pushes a copy of `x`.
    Push,
    /// Pops a skip and concatenates it to `x`, which has `channels`.
    PopConcat { channels: usize },
    /// Pops a residual and adds it to `x`.
    PopAdd,
}

/// What computes: the unit of recomputation.
#[derive(Debug)]
pub(super) enum Layer {
    /// The first convolution, or one that halves the resolution.
    Conv(Conv2d),
    Resnet(Box<ResnetBlock2D>),
    TokensIn(TokensIn),
    /// A transformer layer; its two attention modules are `site` and `site + 1`.
    Transformer {
        block: Box<BasicTransformerBlock>,
        site: usize,
    },
    TokensOut(TokensOut),
    /// Doubles the resolution, up to that of `level`.
    Upsample {
        upsample: Upsample2D,
        level: usize,
    },
    /// Norm and convolution at the end.
    Out {
        norm: GroupNorm,
        conv: Conv2d,
    },
}

/// What every layer may look at besides its input. Nothing here needs a gradient.
#[derive(Debug)]
pub(super) struct Conditions {
    /// The time embedding after its activation, `[B, D]`.
    pub(super) time: Tensor<2>,
    /// `[B, 77, C]`
    pub(super) prompt_embeds: Tensor<3>,
    /// Height and width of the latents.
    pub(super) latent_size: [usize; 2],
}

impl Layer {
    /// `[B, C, H, W]` -> `[B, C', H', W']`; tokens are `[B, H, W, C]`. `lora` is that of a transformer layer.
    pub(super) fn forward(
        &self,
        x: Tensor<4>,
        conditions: &Conditions,
        lora: Option<&[AttentionLora; 2]>,
    ) -> Tensor<4> {
        match self {
            Self::Conv(conv) => conv.forward(x),
            Self::Resnet(resnet) => resnet.forward(x, Some(&conditions.time)),
            Self::TokensIn(tokens) => tokens.forward(x),
            Self::Transformer { block, .. } => block.forward(x, conditions.prompt_embeds.clone(), lora),
            Self::TokensOut(tokens) => tokens.forward(x),
            Self::Upsample { upsample, level } => {
                upsample.forward(x, conditions.latent_size.map(|side| side.div_ceil(1 << level)))
            }
            Self::Out { norm, conv } => conv.forward(silu(norm.forward(x))),
        }
    }

    /// The first of the two attention modules inside, where there are any.
    pub(super) fn site(&self) -> Option<usize> {
        match self {
            Self::Transformer { site, .. } => Some(*site),
            _ => None,
        }
    }
}

/// Loads all blocks and lays their operations out in the order of execution.
pub(super) fn unroll(config: &UNet2DConditionConfig, weights: &WeightsAt<'_>) -> (Vec<Op>, Vec<AttentionSite>) {
    let mut list = List { config, ops: vec![], sites: vec![] };
    let channels = &config.block_out_channels;
    let last = channels.len() - 1;

    list.layer(Layer::Conv(weights.at("conv_in").conv2d([config.in_channels, channels[0]], 3, 1, 1)));
    list.ops.push(Op::Push);
    for block in 0..=last {
        list.down_block(block, &weights.at(format!("down_blocks.{block}")));
    }
    let mid = weights.at("mid_block");
    list.resnet(channels[last], channels[last], &mid.at("resnets.0"));
    list.transformer(last, &mid.at("attentions.0"));
    list.resnet(channels[last], channels[last], &mid.at("resnets.1"));
    for step in 0..=last {
        list.up_block(step, &weights.at(format!("up_blocks.{step}")));
    }
    list.layer(Layer::Out {
        norm: weights.at("conv_norm_out").group_norm(config.norm_num_groups, channels[0], config.norm_eps),
        conv: weights.at("conv_out").conv2d([channels[0], config.out_channels], 3, 1, 1),
    });
    (list.ops, list.sites)
}

struct List<'a> {
    config: &'a UNet2DConditionConfig,
    ops: Vec<Op>,
    sites: Vec<AttentionSite>,
}

impl List<'_> {
    fn layer(&mut self, layer: Layer) {
        self.ops.push(Op::Layer(Box::new(layer)));
    }

    /// diffusers `DownBlock2D` and `CrossAttnDownBlock2D`.
    fn down_block(&mut self, block: usize, weights: &WeightsAt<'_>) {
        let channels = &self.config.block_out_channels;
        let width = channels[block];
        let mut d_input = channels[block.saturating_sub(1)];
        let is_last = block + 1 == channels.len();

        for index in 0..self.config.layers_per_block.get(block) {
            self.resnet(d_input, width, &weights.at(format!("resnets.{index}")));
            if self.config.down_block_types[block] == DownBlock::CrossAttnDownBlock2D {
                self.transformer(block, &weights.at(format!("attentions.{index}")));
            }
            self.ops.push(Op::Push);
            d_input = width;
        }
        if !is_last {
            self.layer(Layer::Conv(weights.at("downsamplers.0.conv").conv2d([width, width], 3, 2, 1)));
            self.ops.push(Op::Push);
        }
    }

    /// diffusers `UpBlock2D` and `CrossAttnUpBlock2D`; step 0 is at the coarsest resolution.
    fn up_block(&mut self, step: usize, weights: &WeightsAt<'_>) {
        let channels = &self.config.block_out_channels;
        let block = channels.len() - 1 - step;
        let width = channels[block];
        // What the same block got from above on the way down: its last skip.
        let outermost = channels[block.saturating_sub(1)];
        let mut d_input = channels[(block + 1).min(channels.len() - 1)];
        let layers = self.config.layers_per_block.get(block) + 1;

        for index in 0..layers {
            let d_skip = if index + 1 == layers { outermost } else { width };
            self.ops.push(Op::PopConcat { channels: d_input });
            self.resnet(d_input + d_skip, width, &weights.at(format!("resnets.{index}")));
            if self.config.up_block_types[step] == UpBlock::CrossAttnUpBlock2D {
                self.transformer(block, &weights.at(format!("attentions.{index}")));
            }
            d_input = width;
        }
        if block > 0 {
            let upsample = Upsample2D::load(&weights.at("upsamplers.0"), width);
            self.layer(Layer::Upsample { upsample, level: block - 1 });
        }
    }

    fn resnet(&mut self, d_input: usize, d_output: usize, weights: &WeightsAt<'_>) {
        let config = ResnetConfig {
            d_input,
            d_output,
            d_time: Some(self.config.time_embed_dim()),
            groups: self.config.norm_num_groups,
            epsilon: self.config.norm_eps,
        };
        self.layer(Layer::Resnet(Box::new(ResnetBlock2D::load(weights, config))));
    }

    /// diffusers `Transformer2DModel`: a residual around projections and transformer layers.
    fn transformer(&mut self, block: usize, weights: &WeightsAt<'_>) {
        let width = self.config.block_out_channels[block];
        let d_context = self.config.cross_attention_dim.get(block);
        let heads = self.config.attention_head_dim.get(block);

        self.ops.push(Op::Push);
        self.layer(Layer::TokensIn(TokensIn::load(weights, width, self.config.norm_num_groups)));
        for index in 0..self.config.transformer_layers_per_block.get(block) {
            let weights = weights.at(format!("transformer_blocks.{index}"));
            let block = Box::new(BasicTransformerBlock::load(&weights, width, d_context, heads));
            self.layer(Layer::Transformer { block, site: self.sites.len() });
            for (name, cross_attention_dim) in [("attn1", None), ("attn2", Some(d_context))] {
                self.sites.push(AttentionSite { path: weights.key(name), hidden_size: width, cross_attention_dim });
            }
        }
        self.layer(Layer::TokensOut(TokensOut::load(weights, width)));
        self.ops.push(Op::PopAdd);
    }
}
