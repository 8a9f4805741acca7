//! SDXL UNet (arXiv 2307.01952; diffusers `UNet2DConditionModel`), frozen, with per-sample LoRA.

pub mod blocks;
pub mod config;
mod gradients;
pub mod layout;
pub(super) mod leaves;
pub mod transformer;
mod transformer_gradients;

use std::path::Path;

use burn::tensor::activation::silu;
use burn::tensor::{Device, FloatDType, Tensor};
use hyperlora_core::Result;

use crate::lora::{AttentionLora, AttentionSite, LoraWeights};
use crate::models::embeddings::{TimestepEmbedding, sinusoids};
use crate::models::unet::blocks::{Conditions, Layer};
use crate::models::unet::config::TIME_IDS;
use crate::models::unet::layout::Op;
use crate::weights::Weights;

pub use crate::models::unet::config::UNet2DConditionConfig;

/// A noisy batch and its conditions. All tensors are f32 and on the plain device.
#[derive(Debug, Clone)]
pub struct UnetInput {
    /// Noisy latents, `[B, 4, h, w]`.
    pub latents: Tensor<4>,
    /// Timesteps, `[B]`, 0..1000.
    pub timesteps: Tensor<1>,
    /// Prompt embeddings, `[B, 77, C]`.
    pub prompt_embeds: Tensor<3>,
    /// Pooled prompt embeddings, `[B, P]`.
    pub pooled: Tensor<2>,
    /// Time ids, `[B, 6]`: original height and width, top and left of the crop, target height and width, in pixels.
    pub time_ids: Tensor<2>,
}

/// The UNet as a flat list of operations.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
///
/// # let folder = hyperlora_testing::fixture("unet");
/// let device = Device::flex();
/// let unet = UNet2DConditionModel::load(&folder, &device)?;
/// let (prompt_dim, pooled_dim) = (unet.config().cross_attention_dim.get(0), unet.config().pooled_dim());
/// let input = UnetInput {
///     latents: Tensor::zeros([1, 4, 8, 8], &device),
///     timesteps: Tensor::from_floats([999.0], &device),
///     prompt_embeds: Tensor::zeros([1, 77, prompt_dim], &device),
///     pooled: Tensor::zeros([1, pooled_dim], &device),
///     time_ids: Tensor::zeros([1, 6], &device),
/// };
/// // A LoRA for each sample is optional.
/// let noise = unet.forward(&input, None);
/// assert_eq!(noise.dims(), [1, 4, 8, 8]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct UNet2DConditionModel {
    config: UNet2DConditionConfig,
    time_embedding: TimestepEmbedding,
    add_embedding: TimestepEmbedding,
    ops: Vec<Op<Layer>>,
    dtype: FloatDType,
    sites: Vec<AttentionSite>,
}

impl UNet2DConditionModel {
    /// Loads a UNet folder in diffusers layout: `config.json` and safetensors weights. Computes in f32.
    ///
    /// # Errors
    /// Input: a file is missing or broken, the config has another architecture, or the weights do not fit it.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        Self::load_as(folder, FloatDType::F32, device)
    }

    /// Loads a UNet like [`load`](Self::load), computing in `dtype`, f32 or bf16. Inputs and outputs stay f32.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn load_as(folder: &Path, dtype: FloatDType, device: &Device) -> Result<Self> {
        Self::new(UNet2DConditionConfig::load(folder)?, Weights::open(folder, device)?.with_dtype(dtype))
    }

    /// Builds the UNet from `weights` and computes in their type.
    ///
    /// # Errors
    /// Input: the weights do not fit the config.
    pub fn new(config: UNet2DConditionConfig, weights: Weights) -> Result<Self> {
        let dtype = weights.dtype();
        let root = weights.at("");
        let d_time = config.time_embed_dim();
        let add_input = config.projection_class_embeddings_input_dim;
        let time_embedding = TimestepEmbedding::load(&root.at("time_embedding"), config.block_out_channels[0], d_time);
        let add_embedding = TimestepEmbedding::load(&root.at("add_embedding"), add_input, d_time);
        let (ops, sites) = blocks::load(&config, &root);
        weights.finish()?;
        Ok(Self { config, time_embedding, add_embedding, ops, dtype, sites })
    }

    /// Config of the UNet.
    pub fn config(&self) -> &UNet2DConditionConfig {
        &self.config
    }

    /// Attention modules in execution order: down, mid, up. [`LoraWeights`] follow this order.
    pub fn attention_sites(&self) -> &[AttentionSite] {
        &self.sites
    }

    /// Predicts noise or velocity, `[B, 4, h, w]`, in f32.
    ///
    /// # Panics
    /// If `lora` was made for another UNet or batch size, which only a programming error can cause.
    pub fn forward(&self, input: &UnetInput, lora: Option<&LoraWeights>) -> Tensor<4> {
        let conditions = self.conditions(input);
        self.run(input.latents.clone(), lora, |layer, x, lora| layer.forward(x, &conditions, lora))
    }

    /// Runs the operations; `compute` applies a layer to its input and LoRA.
    fn run(
        &self,
        latents: Tensor<4>,
        lora: Option<&LoraWeights>,
        mut compute: impl FnMut(&Layer, Tensor<4>, Option<&[AttentionLora; 2]>) -> Tensor<4>,
    ) -> Tensor<4> {
        if let Some(lora) = lora {
            assert_eq!(lora.modules.len(), self.sites.len(), "LoRA of another UNet");
        }
        let mut stack = vec![];
        let mut x = latents.cast(self.dtype);
        for op in &self.ops {
            x = match op {
                Op::Layer(layer) => compute(layer, x, lora.and_then(|lora| pair_of(lora, layer)).as_ref()),
                Op::Push => {
                    stack.push(x.clone());
                    x
                }
                Op::PopConcat { .. } => Tensor::cat(std::iter::once(x).chain(stack.pop()).collect(), 1),
                Op::PopAdd => stack.pop().into_iter().fold(x, |x, residual| residual + x),
            };
        }
        x.cast(FloatDType::F32)
    }

    /// Computes the conditions of all layers, once per call, on the plain device. Sinusoids are computed in f32,
    /// because bf16 cannot represent every timestep.
    fn conditions(&self, input: &UnetInput) -> Conditions {
        let [batch, ..] = input.latents.dims();
        let time = sinusoids(input.timesteps.clone(), self.config.block_out_channels[0]);
        let width = self.config.addition_time_embed_dim;
        let ids = sinusoids(input.time_ids.clone().reshape([batch * TIME_IDS]), width);
        let ids = ids.reshape([batch, TIME_IDS * width]);
        let added = Tensor::cat(vec![input.pooled.clone(), ids], 1).cast(self.dtype);
        let [_, _, height, width] = input.latents.dims();
        Conditions {
            time: silu(self.time_embedding.forward(time.cast(self.dtype)) + self.add_embedding.forward(added)),
            prompt_embeds: input.prompt_embeds.clone().cast(self.dtype),
            latent_size: [height, width],
        }
    }
}

/// LoRA of a layer's two attention modules.
fn pair_of(lora: &LoraWeights, layer: &Layer) -> Option<[AttentionLora; 2]> {
    layer.site().map(|site| [lora.modules[site].clone(), lora.modules[site + 1].clone()])
}
