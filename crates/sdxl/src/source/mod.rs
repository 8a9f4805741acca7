//! Sources of a base: a diffusers pipeline folder, or a single file in Stability naming.
//!
//! Both yield each component's config and its tensors under diffusers names. A single file holds neither configs nor
//! tokenizers, so those of SDXL-Base-1.0 apply, or those of a folder that the user names (diffusers
//! `from_single_file(config=...)`).

mod component;
pub mod configs;
mod folder;
pub mod key_names;
mod single_file;

use std::path::Path;

use burn::tensor::Device;
use hyperlora_core::{Error, Result};
use serde::Deserialize;

use crate::models::clip_text::ClipTextConfig;
use crate::models::unet::config::UNet2DConditionConfig;
use crate::models::vae::{AutoencoderKl, AutoencoderKlConfig};
use crate::scheduler::NoiseSchedule;
use crate::source::folder::Folder;
use crate::source::key_names::KeyTable;
use crate::source::single_file::SingleFile;
use crate::tokenizer::{ClipTokenizer, END};
use crate::weights::{ConfigText, SafetensorsFile, Weights, parse_json, read_text};

pub use crate::source::component::{Component, ComponentUpdates};

/// A base on disk, opened but not read.
///
/// # Examples
/// ```
/// use burn::tensor::Device;
/// use hyperlora_sdxl::source::{BaseSource, Component};
///
/// # let base = hyperlora_testing::fixture("encoders");
/// // A pipeline folder or a single file.
/// let base = BaseSource::open(&base, None, None)?;
/// assert_eq!(base.schedule()?.alphas_cumprod().len(), 1000);
/// let vae = base.weights(Component::Vae, &Device::flex())?;
/// assert!(vae.shapes().contains_key("decoder.conv_in.weight"));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct BaseSource {
    layout: Layout,
    updates: ComponentUpdates,
}

#[derive(Debug)]
enum Layout {
    Folder(Folder),
    SingleFile(SingleFile),
}

/// The keys of a base's `model_index.json` that affect the computation. Other keys are ignored.
#[derive(Debug, Deserialize)]
struct ModelIndex {
    force_zeros_for_empty_prompt: Option<bool>,
}

impl BaseSource {
    /// Opens a pipeline folder in diffusers layout, or a single safetensors file. `variant` selects among the files of
    /// a folder. `config` is a pipeline folder, with or without weights, that describes a single file.
    ///
    /// # Errors
    /// Input: the path is neither, the file is of another kind or architecture, no component has the variant, or the
    /// options do not suit the layout.
    pub fn open(path: &Path, variant: Option<&str>, config: Option<&Path>) -> Result<Self> {
        let layout = if path.is_dir() {
            if config.is_some() {
                return Err(Error::file(
                    path,
                    "is a folder with its own configs, but others are given",
                    "leave `base.config` out: it is for single-file checkpoints",
                ));
            }
            Layout::Folder(Folder::open(path, variant)?)
        } else {
            if !path.exists() {
                return Err(Error::file(
                    path,
                    "is not there",
                    "point `base.path` or --base at an SDXL pipeline folder or file",
                ));
            }
            Layout::SingleFile(SingleFile::open(path, variant, config)?)
        };
        Ok(Self { layout, updates: ComponentUpdates::new() })
    }

    /// A pipeline folder in which only the components that are read need to exist.
    pub(super) fn folder(path: &Path, variant: Option<&str>) -> Self {
        let folder = Folder { path: path.into(), variant: variant.map(String::from) };
        Self { layout: Layout::Folder(folder), updates: ComponentUpdates::new() }
    }

    /// Adds updates that are applied to the weights as they are read.
    #[must_use]
    pub fn with_updates(self, updates: ComponentUpdates) -> Self {
        Self { updates, ..self }
    }

    /// Path of the folder or file.
    pub fn path(&self) -> &Path {
        match &self.layout {
            Layout::Folder(folder) => &folder.path,
            Layout::SingleFile(single) => single.file.path(),
        }
    }

    /// Folder with configs and tokenizers, if any.
    pub fn config_folder(&self) -> Option<&Path> {
        match &self.layout {
            Layout::Folder(folder) => Some(&folder.path),
            Layout::SingleFile(single) => single.config.as_deref(),
        }
    }

    /// The single file, unless the base is a folder.
    pub fn single_file(&self) -> Option<&SafetensorsFile> {
        match &self.layout {
            Layout::Folder(_) => None,
            Layout::SingleFile(single) => Some(&single.file),
        }
    }

    /// Config of a component.
    ///
    /// # Errors
    /// Same as [`ConfigText::read`].
    pub fn config(&self, part: Component) -> Result<ConfigText> {
        self.text(&format!("{}/config.json", part.folder()), part.config())
    }

    /// Reads a file of the config folder, or returns `built_in` without such a folder.
    fn text(&self, name: &str, built_in: &str) -> Result<ConfigText> {
        match self.config_folder() {
            Some(folder) => ConfigText::read(&folder.join(name)),
            None => Ok(ConfigText::built_in(&format!("SDXL-Base-1.0's {name}"), built_in)),
        }
    }

    /// Tensors of a component under diffusers names, in f32 on `device` unless changed.
    ///
    /// # Errors
    /// Same as [`Weights::open`]; for a single file, also those of the component's config.
    pub fn weights(&self, part: Component, device: &Device) -> Result<Weights> {
        let weights = match &self.layout {
            Layout::Folder(folder) => folder.weights(part, device)?,
            Layout::SingleFile(single) => single.weights(part, &self.table(part)?, device),
        };
        Ok(match self.updates.get(&part) {
            Some(updates) => weights.with_updates(updates.clone()),
            None => weights,
        })
    }

    /// Key table of a component.
    ///
    /// # Errors
    /// Same as the component's config.
    pub fn table(&self, part: Component) -> Result<KeyTable> {
        let config = self.config(part)?;
        Ok(match part {
            Component::Unet => KeyTable::unet(&UNet2DConditionConfig::parse(&config)?),
            Component::Vae => KeyTable::vae(&AutoencoderKlConfig::parse(&config)?),
            Component::TextEncoder => KeyTable::text_encoder(),
            Component::TextEncoder2 => KeyTable::text_encoder_2(&ClipTextConfig::parse(&config)?),
        })
    }

    /// Loads the autoencoder, in f32.
    ///
    /// # Errors
    /// Same as its config and weights.
    pub fn vae(&self, device: &Device) -> Result<AutoencoderKl> {
        AutoencoderKl::new(
            AutoencoderKlConfig::parse(&self.config(Component::Vae)?)?,
            self.weights(Component::Vae, device)?,
        )
    }

    /// Noise schedule of training. A single file may mark its own.
    ///
    /// # Errors
    /// Input: the config is missing or broken, or the schedule is not supported.
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        let config = self.text("scheduler/scheduler_config.json", configs::SCHEDULER)?;
        match &self.layout {
            Layout::Folder(_) => NoiseSchedule::parse(&config),
            Layout::SingleFile(single) => NoiseSchedule::parse(&single.mark_schedule(&config)?),
        }
    }

    /// Loads both tokenizers.
    ///
    /// # Errors
    /// Same as [`ClipTokenizer::load`].
    pub fn tokenizers(&self) -> Result<[ClipTokenizer; 2]> {
        Ok(match self.config_folder() {
            Some(folder) => {
                [ClipTokenizer::load(&folder.join("tokenizer"))?, ClipTokenizer::load(&folder.join("tokenizer_2"))?]
            }
            // SDXL's second tokenizer pads with `!`, which is token 0.
            None => [ClipTokenizer::built_in(END)?, ClipTokenizer::built_in("!")?],
        })
    }

    /// Returns true if zeros, not the empty prompt's states, replace an empty negative prompt. Without
    /// `model_index.json` the default of diffusers applies.
    ///
    /// # Errors
    /// Input: `model_index.json` is broken.
    pub fn zeros_for_empty_prompt(&self) -> Result<bool> {
        let path = self.config_folder().map(|folder| folder.join("model_index.json"));
        let Some(path) = path.filter(|path| path.exists()) else { return Ok(true) };
        let index: ModelIndex = parse_json(&read_text(&path)?)
            .map_err(|problem| Error::file(&path, problem, "use the model_index.json of an SDXL base"))?;
        Ok(index.force_zeros_for_empty_prompt.unwrap_or(true))
    }
}
