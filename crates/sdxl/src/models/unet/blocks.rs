//! Layers of the UNet, the units of recomputation.

use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::lora::{AttentionLora, AttentionSite};
use crate::models::norms::GroupNorm;
use crate::models::resnet::{ResnetBlock2D, ResnetConfig, Upsample2D};
use crate::models::unet::config::UNet2DConditionConfig;
use crate::models::unet::layout::{LayerKind, LayerPlan, Op, layout};
use crate::models::unet::transformer::{BasicTransformerBlock, TokensIn, TokensOut};
use crate::weights::WeightsAt;

#[derive(Debug)]
pub(super) enum Layer {
    /// First convolution, or one that halves the resolution.
    Conv(Conv2d),
    Resnet(Box<ResnetBlock2D>),
    TokensIn(TokensIn),
    /// Transformer layer; its two attention modules are `site` and `site + 1`.
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
    /// Final norm and convolution.
    Out {
        norm: GroupNorm,
        conv: Conv2d,
    },
}

/// Conditions of every layer besides its input, in the UNet's type. None needs a gradient.
#[derive(Debug)]
pub(super) struct Conditions {
    /// Activated time embedding, `[B, D]`.
    pub(super) time: Tensor<2>,
    /// `[B, 77, C]`
    pub(super) prompt_embeds: Tensor<3>,
    /// Height and width of the latents.
    pub(super) latent_size: [usize; 2],
}

impl Layer {
    /// Maps `[B, C, H, W]` to `[B, C', H', W']`; tokens are `[B, H, W, C]`. `lora` is required by transformer layers
    /// only.
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

    /// Index of the first of the layer's two attention modules, if any.
    pub(super) fn site(&self) -> Option<usize> {
        match self {
            Self::Transformer { site, .. } => Some(*site),
            _ => None,
        }
    }
}

/// Loads every layer of the [`layout`].
pub(super) fn load(config: &UNet2DConditionConfig, root: &WeightsAt<'_>) -> (Vec<Op<Layer>>, Vec<AttentionSite>) {
    let mut sites = vec![];
    let ops = layout(config)
        .into_iter()
        .map(|op| match op {
            Op::Layer(plan) => Op::Layer(layer(&plan, config, root, &mut sites)),
            Op::Push => Op::Push,
            Op::PopConcat { channels } => Op::PopConcat { channels },
            Op::PopAdd => Op::PopAdd,
        })
        .collect();
    (ops, sites)
}

fn layer(
    plan: &LayerPlan,
    config: &UNet2DConditionConfig,
    root: &WeightsAt<'_>,
    sites: &mut Vec<AttentionSite>,
) -> Layer {
    let weights = root.at(&plan.path);
    match plan.kind {
        LayerKind::Conv { channels, stride } => Layer::Conv(weights.conv2d(channels, 3, stride, 1)),
        LayerKind::Resnet { channels: [d_input, d_output] } => Layer::Resnet(Box::new(ResnetBlock2D::load(
            &weights,
            ResnetConfig {
                d_input,
                d_output,
                d_time: Some(config.time_embed_dim()),
                groups: config.norm_num_groups,
                epsilon: config.norm_eps,
            },
        ))),
        LayerKind::TokensIn { width } => Layer::TokensIn(TokensIn::load(&weights, width, config.norm_num_groups)),
        LayerKind::Transformer { width, d_context, heads } => {
            let site = sites.len();
            for (name, cross_attention_dim) in [("attn1", None), ("attn2", Some(d_context))] {
                sites.push(AttentionSite { path: weights.key(name), hidden_size: width, cross_attention_dim });
            }
            let block = Box::new(BasicTransformerBlock::load(&weights, width, d_context, heads));
            Layer::Transformer { block, site }
        }
        LayerKind::TokensOut { width } => Layer::TokensOut(TokensOut::load(&weights, width)),
        LayerKind::Upsample { channels } => {
            Layer::Upsample { upsample: Upsample2D::load(&weights, channels), level: plan.level - 1 }
        }
        LayerKind::Out { channels } => Layer::Out {
            norm: GroupNorm::new(root.at("conv_norm_out").group_norm(
                config.norm_num_groups,
                channels[0],
                config.norm_eps,
            )),
            conv: root.at("conv_out").conv2d(channels, 3, 1, 1),
        },
    }
}
