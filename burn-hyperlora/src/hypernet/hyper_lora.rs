//! The complete hypernetwork.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraWeights};

use super::basis::{AttentionBases, LoraKind};
use super::config::HyperLoraConfig;
use super::id_projector::IdProjector;
use super::init::Init;
use super::resampler::{Resampler, ResamplerPorts};
use crate::parameters::ParameterMapper;

/// Query tokens per attention module: down and up of `to_q`, `to_k`, `to_v`, `to_out`.
pub const TOKENS_PER_SITE: usize = 8;

/// `alpha / rank` of the generated LoRAs: alpha is half the rank for ID-LoRA and Base-LoRA.
pub const LORA_SCALE: f64 = 0.5;

/// Hypernetwork: maps conditions of a portrait to the weights of an ID-LoRA and a Base-LoRA (arXiv 2503.16944).
///
/// Runs on plain and on autodiff devices.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ResamplerConfig};
/// use hyperlora_sdxl::lora::AttentionSite;
///
/// let config = HyperLoraConfig {
///     basis: 4,
///     id_tokens: 2,
///     clip_dim: 16,
///     resampler: ResamplerConfig { dim: 16, depth: 1, heads: 2, head_dim: 8, ff_mult: 2 },
///     ..HyperLoraConfig::default()
/// };
/// // `UNet2DConditionModel::attention_sites` lists those of a base.
/// let path = "mid_block.attentions.0.transformer_blocks.0.attn1".to_string();
/// let sites = [AttentionSite { path, hidden_size: 8, cross_attention_dim: None }];
/// let (seed, device) = (7, Device::flex());
/// let hyper_lora = HyperLora::new(&config, &sites, seed, &device);
/// // Two portraits: 5 states of the image encoder and an ID embedding each.
/// let (states, embeddings) = (Tensor::ones([2, 5, 16], &device), Tensor::ones([2, 512], &device));
/// let lora = hyper_lora.id_lora(states, Some(embeddings));
/// assert_eq!(lora.modules[0].q.down.dims(), [2, 8, config.id_rank]);
/// ```
#[derive(Module, Debug)]
pub struct HyperLora {
    pub(super) resampler: Resampler,
    pub(super) id_projector: IdProjector,
    pub(super) base_resampler: Option<Resampler>,
    pub(super) hyper_lora_modules: Vec<AttentionBases>,
    /// Attention modules in the order of the hypernetwork's tokens and files.
    #[module(skip)]
    pub(super) sites: Vec<AttentionSite>,
    /// Index in `sites` of each attention module of the UNet.
    #[module(skip)]
    pub(super) unet_order: Vec<usize>,
}

impl HyperLora {
    /// Creates a hypernetwork for the attention modules `sites`, given in the UNet's order.
    ///
    /// The values depend on `seed` only, not on the device.
    pub fn new(config: &HyperLoraConfig, sites: &[AttentionSite], seed: u64, device: &Device) -> Self {
        let init = Init::new(seed, device);
        let ports = |second_condition| ResamplerPorts {
            input: config.clip_dim,
            second_condition,
            queries: sites.len() * TOKENS_PER_SITE,
            output: config.basis,
        };
        let bases = init.at("hyper_lora_modules");
        Self {
            resampler: Resampler::new(&init.at("resampler"), &config.resampler, &ports(true)),
            id_projector: IdProjector::new(
                &init.at("id_projector"),
                config.id_embedding_dim,
                config.id_tokens,
                config.clip_dim,
            ),
            base_resampler: (config.base_rank > 0)
                .then(|| Resampler::new(&init.at("base_resampler"), &config.resampler, &ports(false))),
            hyper_lora_modules: (sites.iter().enumerate())
                .map(|(i, site)| AttentionBases::new(&bases.at(i), config, site))
                .collect(),
            sites: sites.to_vec(),
            unet_order: (0..sites.len()).collect(),
        }
    }

    /// Generates the ID-LoRA of one portrait per sample. Without ID embeddings (stage 2), the layers that read them are
    /// off.
    ///
    /// # Shapes
    /// `clip_states: [B, T, clip_dim]` of the masked face, `id_embedding: [B, id_embedding_dim]` of length 1.
    pub fn id_lora(&self, clip_states: Tensor<3>, id_embedding: Option<Tensor<2>>) -> LoraWeights {
        self.id_lora_of(self.id_coefficients(clip_states, id_embedding, 1))
    }

    /// Generates the Base-LoRA of one portrait per sample. `clip_states: [B, T, clip_dim]` are of the crop with a
    /// blurred face.
    ///
    /// # Errors
    /// Input: this hypernetwork has no Base-LoRA.
    pub fn base_lora(&self, clip_states: Tensor<3>) -> Result<LoraWeights> {
        self.base_lora_of(self.base_coefficients(clip_states, 1)?)
    }

    /// Computes the ID-LoRA's coefficients `[B, Q, K]`, of length 1 over K.
    ///
    /// # Shapes
    /// Same as [`id_lora`](Self::id_lora), with `B * images_per_sample` instead of `B`. The images of a sample are
    /// consecutive, and their resampler outputs are averaged.
    pub fn id_coefficients(
        &self,
        clip_states: Tensor<3>,
        id_embedding: Option<Tensor<2>>,
        images_per_sample: usize,
    ) -> Tensor<3> {
        let id_tokens = id_embedding.map(|embedding| self.id_projector.forward(embedding));
        coefficients(self.resampler.forward(id_tokens, Some(clip_states)), images_per_sample)
    }

    /// Computes the Base-LoRA's coefficients `[B, Q, K]` from `B * images_per_sample` images.
    ///
    /// # Errors
    /// Input: this hypernetwork has no Base-LoRA.
    pub fn base_coefficients(&self, clip_states: Tensor<3>, images_per_sample: usize) -> Result<Tensor<3>> {
        let resampler = self.base_resampler.as_ref().ok_or_else(no_base)?;
        Ok(coefficients(resampler.forward(Some(clip_states), None), images_per_sample))
    }

    /// Returns true if the ID-LoRA has been trained. An untrained one is zero for every person.
    pub fn has_learnt_id(&self) -> bool {
        self.hyper_lora_modules.iter().any(AttentionBases::has_learnt_id)
    }

    /// Generates the ID-LoRA from coefficients `[B, Q, K]`, in the UNet's order.
    pub fn id_lora_of(&self, coefficients: Tensor<3>) -> LoraWeights {
        let modules = self.mix(LoraKind::Id, &coefficients).flatten().collect();
        LoraWeights { modules }
    }

    /// Generates the Base-LoRA from coefficients `[B, Q, K]`, in the UNet's order.
    ///
    /// # Errors
    /// Input: this hypernetwork has no Base-LoRA.
    pub fn base_lora_of(&self, coefficients: Tensor<3>) -> Result<LoraWeights> {
        let modules = self.mix(LoraKind::Base, &coefficients).collect::<Option<_>>().ok_or_else(no_base)?;
        Ok(LoraWeights { modules })
    }

    /// Returns true if the hypernetwork has a Base-LoRA.
    pub fn has_base(&self) -> bool {
        self.base_resampler.is_some()
    }

    /// Attention modules of the LoRA weights, in the UNet's order.
    pub fn sites(&self) -> Vec<AttentionSite> {
        self.unet_order.iter().map(|&i| self.sites[i].clone()).collect()
    }

    /// Prepares stage 3: the layers that read the ID embedding start at zero, so that the outputs of stage 2 are
    /// unchanged.
    #[must_use]
    pub fn start_id_embedding_stage(self) -> Self {
        struct Silence;
        impl ParameterMapper for Silence {
            fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if !(name.starts_with("resampler.") && name.ends_with(".attn2.to_out.0.weight")) {
                    return parameter;
                }
                // A new leaf is required: zeros computed from the old values would carry their history.
                let require_grad = parameter.is_require_grad();
                let zeros = Tensor::zeros(parameter.dims(), &parameter.device());
                parameter.map(|_| zeros.set_require_grad(require_grad))
            }
        }
        self.map_parameters(&mut Silence)
    }

    fn mix<'a>(
        &'a self,
        part: LoraKind,
        coefficients: &'a Tensor<3>,
    ) -> impl Iterator<Item = Option<AttentionLora>> + 'a {
        // Slicing per module first and per matrix inside pads small gradients to 8 tokens in the backward pass, and
        // only one gradient per module to all Q.
        self.unet_order.iter().map(move |&i| {
            let tokens = coefficients.clone().narrow(1, i * TOKENS_PER_SITE, TOKENS_PER_SITE); // [B, 8, K]
            self.hyper_lora_modules[i].mix(part, tokens, LORA_SCALE)
        })
    }
}

/// Averages over a sample's images, then normalises to length 1 over K: `[B * n, Q, K]` to `[B, Q, K]`.
fn coefficients(tokens: Tensor<3>, images_per_sample: usize) -> Tensor<3> {
    let [images, queries, basis] = tokens.dims();
    let samples = images / images_per_sample;
    let mean = if images_per_sample == 1 {
        tokens
    } else {
        tokens.reshape([samples, images_per_sample, queries, basis]).mean_dim(1).reshape([samples, queries, basis])
    };
    let length = (mean.clone().square().sum_dim(2) + 1e-8).sqrt(); // [B, Q, 1]
    mean / length
}

fn no_base() -> Error {
    Error::input(
        "Base-LoRA",
        "this hypernetwork was made without one",
        "go without Base-LoRA, or train with base_rank > 0",
    )
}
