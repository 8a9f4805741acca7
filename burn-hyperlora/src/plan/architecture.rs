//! Configs of the frozen models: those on disk, or SDXL-Base-1.0's if the base is missing.

use std::path::Path;

use burn::tensor::FloatDType;
use hyperlora_core::Result;
use hyperlora_sdxl::models::clip_text::ClipTextConfig;
use hyperlora_sdxl::models::clip_vision::ClipVisionConfig;
use hyperlora_sdxl::models::unet::config::UNet2DConditionConfig;
use hyperlora_sdxl::models::vae::AutoencoderKlConfig;
use hyperlora_sdxl::source::{Component, configs};
use hyperlora_sdxl::weights::ConfigText;

use crate::conditioning::BaseConfig;

/// Configs of the frozen models.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// The denoiser.
    pub unet: UNet2DConditionConfig,
    /// Float type of the UNet's weights.
    pub unet_dtype: FloatDType,
    /// Autoencoder: images to latents.
    pub vae: AutoencoderKlConfig,
    /// Both text encoders.
    pub text: [ClipTextConfig; 2],
    /// Image encoder: condition images to states.
    pub vision: ClipVisionConfig,
    /// Assumptions about models that are not on disk, for the reader.
    pub assumed: Vec<String>,
}

impl Architecture {
    /// Reads the configs that `base` names, and nothing else.
    ///
    /// # Errors
    /// Input: a config is broken or of another architecture.
    pub fn read(base: &BaseConfig, yaml_folder: &Path) -> Result<Self> {
        let path = base.path.resolve(yaml_folder)?;
        let mut assumed = Vec::new();
        let source = match path.exists() {
            true => Some(base.source(yaml_folder)?),
            false => None,
        };
        if source.is_none() {
            assumed.push(format!("SDXL-Base-1.0: {} is not there", path.display()));
        }
        let vision_folder = match &base.image_encoder {
            Some(path) => path.resolve(yaml_folder)?,
            None => path.join("image_encoder"),
        };
        let vision_from_disk = vision_folder.is_dir();
        if !vision_from_disk {
            assumed.push(format!("CLIP ViT-L/14 as image encoder: {} is not there", vision_folder.display()));
        }
        let config = |part: Component, built_in| match &source {
            Some(source) => source.config(part),
            None => Ok(ConfigText::built_in(part.folder(), built_in)),
        };
        let vision = match vision_from_disk {
            true => ConfigText::read(&vision_folder.join("config.json"))?,
            false => ConfigText::built_in("image_encoder", configs::IMAGE_ENCODER),
        };
        Ok(Self {
            unet: UNet2DConditionConfig::parse(&config(Component::Unet, configs::UNET)?)?,
            unet_dtype: base.dtype.into(),
            vae: AutoencoderKlConfig::parse(&config(Component::Vae, configs::VAE)?)?,
            text: [
                ClipTextConfig::parse(&config(Component::TextEncoder, configs::TEXT_ENCODER)?)?,
                ClipTextConfig::parse(&config(Component::TextEncoder2, configs::TEXT_ENCODER_2)?)?,
            ],
            vision: ClipVisionConfig::parse(&vision)?,
            assumed,
        })
    }

    /// Side of an image's latents.
    pub fn latent_side(&self, image_size: usize) -> usize {
        image_size / self.vae.factor()
    }
}
