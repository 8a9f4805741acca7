//! Pipeline folder in diffusers layout.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use hyperlora_core::{Error, Result};

use crate::source::component::Component;
use crate::weights::{Weights, has_variant};

/// Pipeline folder, in which only the components that are read need to exist.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) variant: Option<String>,
}

impl Folder {
    /// Opens a whole pipeline.
    ///
    /// # Errors
    /// Input: the folder is no pipeline, or no component has the variant.
    pub(super) fn open(path: &Path, variant: Option<&str>) -> Result<Self> {
        if !path.join("unet").is_dir() {
            return Err(Error::file(
                path,
                "is not an SDXL pipeline in diffusers layout: it has no folder `unet`",
                "give a folder with unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2 and scheduler, or a \
                 single .safetensors file",
            ));
        }
        if let Some(variant) = variant
            && !Component::ALL.iter().any(|part| has_variant(&path.join(part.folder()), variant))
        {
            return Err(Error::file(
                path,
                format!("has no weights of the variant {variant}"),
                "leave the variant out, or fetch its files, such as unet/diffusion_pytorch_model.fp16.safetensors",
            ));
        }
        Ok(Self { path: path.into(), variant: variant.map(String::from) })
    }

    /// Tensors of a component.
    ///
    /// # Errors
    /// Same as [`Weights::open`].
    pub(super) fn weights(&self, part: Component, device: &Device) -> Result<Weights> {
        Weights::open_variant(&self.path.join(part.folder()), self.variant.as_deref(), device)
    }
}
