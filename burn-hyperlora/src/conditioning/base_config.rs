//! `base:` of an experiment: where the frozen models are.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use clap::ValueEnum;
use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::source::BaseSource;
use serde::{Deserialize, Serialize};

/// Where the frozen models are: `base:` of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// An SDXL pipeline folder in diffusers layout, or a single-file checkpoint in Stability naming (.safetensors).
    pub path: ConfigPath,
    /// The files that are preferred in a pipeline folder, such as `fp16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// A pipeline folder, with or without weights, whose configs and tokenizers describe a single-file checkpoint; those of
    /// SDXL-Base-1.0 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ConfigPath>,
    /// What the UNet is kept and computed in.
    #[serde(default)]
    pub dtype: UnetDtype,
    /// Folder of the CLIP image encoder; the pipeline's `image_encoder` where left out.
    #[serde(default)]
    pub image_encoder: Option<ConfigPath>,
    /// Folder of its preprocessing; the pipeline's `feature_extractor`, or the image encoder's own folder, where left out.
    #[serde(default)]
    pub feature_extractor: Option<ConfigPath>,
}

/// The float type of the UNet. All other parts are f32: the autoencoder overflows in f16, and the encoders are small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum UnetDtype {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of f32.
    Bf16,
}

impl From<UnetDtype> for FloatDType {
    fn from(dtype: UnetDtype) -> Self {
        match dtype {
            UnetDtype::F32 => Self::F32,
            UnetDtype::Bf16 => Self::BF16,
        }
    }
}

impl BaseConfig {
    /// The base at `path`, with all defaults.
    pub fn new(path: ConfigPath) -> Self {
        Self {
            path,
            variant: None,
            config: None,
            dtype: UnetDtype::default(),
            image_encoder: None,
            feature_extractor: None,
        }
    }

    /// Opens the base; paths of the YAML are relative to `yaml_folder`.
    ///
    /// # Errors
    /// As [`BaseSource::open`], and for a path that cannot be resolved.
    pub fn source(&self, yaml_folder: &Path) -> Result<BaseSource> {
        let config = self.config.as_ref().map(|path| path.resolve(yaml_folder)).transpose()?;
        BaseSource::open(&self.path.resolve(yaml_folder)?, self.variant.as_deref(), config.as_deref())
    }

    /// The folder of the CLIP image encoder.
    ///
    /// # Errors
    /// Input for a single-file base beside which no image encoder is named, and where a path cannot be resolved.
    pub fn image_encoder_folder(&self, yaml_folder: &Path) -> Result<PathBuf> {
        if let Some(path) = &self.image_encoder {
            return path.resolve(yaml_folder);
        }
        let missing = |place: &Path| {
            Error::file(
                place,
                "holds no CLIP image encoder",
                "set `base.image_encoder` to the folder of CLIP ViT-L/14 in transformers layout",
            )
        };
        let folder = self.pipeline_folder(yaml_folder)?.map(|folder| folder.join("image_encoder"));
        match folder {
            Some(folder) if folder.is_dir() => Ok(folder),
            _ => Err(missing(&self.path.resolve(yaml_folder)?)),
        }
    }

    /// The folder of the image encoder's preprocessing.
    ///
    /// # Errors
    /// As [`image_encoder_folder`](Self::image_encoder_folder).
    pub fn feature_extractor_folder(&self, yaml_folder: &Path) -> Result<PathBuf> {
        if let Some(path) = &self.feature_extractor {
            return path.resolve(yaml_folder);
        }
        let in_pipeline = self.pipeline_folder(yaml_folder)?.map(|folder| folder.join("feature_extractor"));
        match in_pipeline {
            Some(folder) if folder.is_dir() => Ok(folder),
            // CLIP's own folders hold their preprocessing beside the weights.
            _ => self.image_encoder_folder(yaml_folder),
        }
    }

    /// The pipeline folder that parts beside the weights are taken from, where there is one.
    fn pipeline_folder(&self, yaml_folder: &Path) -> Result<Option<PathBuf>> {
        let path = self.path.resolve(yaml_folder)?;
        match &self.config {
            _ if path.is_dir() => Ok(Some(path)),
            Some(config) => config.resolve(yaml_folder).map(Some),
            None => Ok(None),
        }
    }
}
