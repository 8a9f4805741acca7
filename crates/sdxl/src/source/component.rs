//! Components of a base, with their names in both layouts.

use std::collections::BTreeMap;

use crate::source::configs;
use crate::weights::Updates;

/// A component of SDXL with its own weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The denoiser.
    Unet,
    /// The image autoencoder.
    Vae,
    /// CLIP ViT-L/14's text encoder.
    TextEncoder,
    /// OpenCLIP ViT-bigG/14's text encoder.
    TextEncoder2,
}

impl Component {
    /// All components.
    pub const ALL: [Self; 4] = [Self::Unet, Self::Vae, Self::TextEncoder, Self::TextEncoder2];

    /// Folder of the component in a diffusers pipeline.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
        }
    }

    /// Key prefix of the component in a single file.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Unet => "model.diffusion_model.",
            Self::Vae => "first_stage_model.",
            Self::TextEncoder => "conditioner.embedders.0.transformer.",
            Self::TextEncoder2 => "conditioner.embedders.1.model.",
        }
    }

    /// Config of the component in SDXL-Base-1.0.
    pub(super) fn config(self) -> &'static str {
        match self {
            Self::Unet => configs::UNET,
            Self::Vae => configs::VAE,
            Self::TextEncoder => configs::TEXT_ENCODER,
            Self::TextEncoder2 => configs::TEXT_ENCODER_2,
        }
    }
}

/// Weight updates of each component, by diffusers name.
pub type ComponentUpdates = BTreeMap<Component, Updates>;
