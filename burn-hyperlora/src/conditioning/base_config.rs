//! Locations of the frozen models: `base:` of an experiment.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use clap::ValueEnum;
use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::source::BaseSource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Locations of the frozen models: `base:` of an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// SDXL pipeline folder in diffusers layout (safetensors, single or sharded), or single-file checkpoint in
    /// Stability naming (`.safetensors`), also in fp8 without scales. Averages, losses and buffers left in a file are
    /// passed over and counted in the log.
    pub path: ConfigPath,
    /// Preferred variant of the files in a pipeline folder, such as `fp16`; parts without it use their plain files.
    /// Default: the plain files, else `fp16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Pipeline folder, with or without weights, whose configs, scheduler and tokenizers describe a single-file
    /// checkpoint of other sizes than SDXL's. Default: those of SDXL-Base-1.0; keys `v_pred` and `ztsnr` in the file
    /// make it a v-prediction base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ConfigPath>,
    /// Float type of the UNet's weights and computation. The other parts are f32: the autoencoder overflows in f16, and
    /// the encoders are small.
    #[serde(default)]
    pub dtype: UnetDtype,
    /// Folder of the CLIP image encoder, or of a whole CLIP model, in transformers layout. Default: the pipeline's
    /// `image_encoder`. Required with a single-file checkpoint, which has none.
    #[serde(default)]
    pub image_encoder: Option<ConfigPath>,
    /// Folder of the image encoder's `preprocessor_config.json`. Default: the pipeline's `feature_extractor`, else the
    /// image encoder's own folder.
    #[serde(default)]
    pub feature_extractor: Option<ConfigPath>,
}

/// Float type of the UNet. All other components are f32: the autoencoder overflows in f16, and the encoders are small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum UnetDtype {
    /// 32-bit float.
    #[default]
    F32,
    /// 16-bit float with the range of f32.
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
    /// Creates the config of the base at `path`, with all defaults.
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

    /// Opens the base; relative paths are resolved against `yaml_folder`.
    ///
    /// # Errors
    /// Same as [`BaseSource::open`], and for a path that cannot be resolved.
    pub fn source(&self, yaml_folder: &Path) -> Result<BaseSource> {
        let config = self.config.as_ref().map(|path| path.resolve(yaml_folder)).transpose()?;
        BaseSource::open(&self.path.resolve(yaml_folder)?, self.variant.as_deref(), config.as_deref())
    }

    /// Locates the folder of the CLIP image encoder.
    ///
    /// # Errors
    /// Input: a single-file base names no image encoder, or a path cannot be resolved.
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

    /// Locates the folder of the image encoder's preprocessing.
    ///
    /// # Errors
    /// Same as [`image_encoder_folder`](Self::image_encoder_folder).
    pub fn feature_extractor_folder(&self, yaml_folder: &Path) -> Result<PathBuf> {
        if let Some(path) = &self.feature_extractor {
            return path.resolve(yaml_folder);
        }
        let in_pipeline = self.pipeline_folder(yaml_folder)?.map(|folder| folder.join("feature_extractor"));
        match in_pipeline {
            Some(folder) if folder.is_dir() => Ok(folder),
            // CLIP's own folders hold the preprocessing beside the weights.
            _ => self.image_encoder_folder(yaml_folder),
        }
    }

    /// Pipeline folder for components other than the weights, if any.
    fn pipeline_folder(&self, yaml_folder: &Path) -> Result<Option<PathBuf>> {
        let path = self.path.resolve(yaml_folder)?;
        match &self.config {
            _ if path.is_dir() => Ok(Some(path)),
            Some(config) => config.resolve(yaml_folder).map(Some),
            None => Ok(None),
        }
    }
}
