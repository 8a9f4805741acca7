//! Sources of a base: a diffusers pipeline folder, or a single file in Stability naming.
//!
//! Both yield each component's config and its tensors under diffusers names. A single file holds neither configs nor
//! tokenizers, so those of SDXL-Base-1.0 apply, or those of a folder that the user names (diffusers
//! `from_single_file(config=...)`).

pub mod configs;
pub mod key_names;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use hyperlora_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::models::clip_text::ClipTextConfig;
use crate::models::unet::config::UNet2DConditionConfig;
use crate::models::vae::{AutoencoderKl, AutoencoderKlConfig};
use crate::scheduler::NoiseSchedule;
use crate::source::key_names::KeyTable;
use crate::tokenizer::{ClipTokenizer, END};
use crate::weights::{ConfigText, Form, SafetensorsFile, Updates, Weights, has_variant, parse_json, read_text};

/// Keys that mark a noise schedule other than SDXL's in a checkpoint that may otherwise be complete.
const OTHER_NOISE: [(&str, &str); 2] = [
    ("edm_mean", "a checkpoint of Playground 2.5, whose noise is not SDXL's"),
    ("edm_vpred.sigma_max", "a checkpoint with the noise of EDM, which is not SDXL's"),
];

/// Key prefixes that identify other kinds of single files when SDXL components are missing.
const OTHER_KINDS: [(&str, &str); 8] = [
    ("cond_stage_model.", "a checkpoint of Stable Diffusion 1 or 2"),
    ("conditioner.embedders.0.model.transformer.", "a checkpoint of the SDXL refiner"),
    ("model.diffusion_model.joint_blocks.", "a checkpoint of Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.", "a checkpoint of Flux"),
    ("double_blocks.", "a checkpoint of Flux"),
    ("bundle_emb.", "a LoRA with embeddings, not a base"),
    ("lora_", "a LoRA, not a base"),
    ("unet.", "a LoRA in diffusers naming, not a base"),
];

/// Unused keys within a component of a single file; an entry that ends in a dot is a prefix. They are training state
/// (losses, averages), buffers, and OpenCLIP's image half.
const UNNEEDED: [&str; 7] = [
    "conditioner.embedders.0.transformer.text_projection.",
    "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.logit_bias",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.visual.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
];

/// Buffer that text encoders compute themselves; its module differs between files.
const POSITION_IDS: &str = ".position_ids";

/// Number of ignored keys that the log names.
const PASSED_SHOWN: usize = 10;

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

    fn config(self) -> &'static str {
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
    path: PathBuf,
    layout: Layout,
    updates: ComponentUpdates,
}

#[derive(Debug)]
enum Layout {
    Folder {
        variant: Option<String>,
    },
    SingleFile {
        file: Arc<SafetensorsFile>,
        /// Pipeline folder that provides configs and tokenizers.
        config: Option<PathBuf>,
    },
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
        if path.is_dir() {
            return match config {
                None => Self::open_folder(path, variant),
                Some(_) => Err(Error::file(
                    path,
                    "is a folder with its own configs, but others are given",
                    "leave `base.config` out: it is for single-file checkpoints",
                )),
            };
        }
        if !path.exists() {
            return Err(Error::file(
                path,
                "is not there",
                "point `base.path` or --base at an SDXL pipeline folder or file",
            ));
        }
        let file = SafetensorsFile::open(path)?;
        if variant.is_some() {
            return Err(Error::file(
                path,
                "is a single file, but a variant is given",
                "leave the variant out: it chooses among the files of a pipeline folder",
            ));
        }
        check_kind(&file)?;
        tell_passed_over(&file);
        let layout = Layout::SingleFile { file: Arc::new(file), config: config.map(Path::to_path_buf) };
        Ok(Self { path: path.into(), layout, updates: ComponentUpdates::new() })
    }

    fn open_folder(path: &Path, variant: Option<&str>) -> Result<Self> {
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
        Ok(Self::folder(path, variant))
    }

    /// A pipeline folder in which only the components that are read need to exist.
    pub(super) fn folder(path: &Path, variant: Option<&str>) -> Self {
        let layout = Layout::Folder { variant: variant.map(String::from) };
        Self { path: path.into(), layout, updates: ComponentUpdates::new() }
    }

    /// Adds updates that are applied to the weights as they are read.
    #[must_use]
    pub fn with_updates(self, updates: ComponentUpdates) -> Self {
        Self { updates, ..self }
    }

    /// Path of the folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Folder with configs and tokenizers, if any.
    pub fn config_folder(&self) -> Option<&Path> {
        match &self.layout {
            Layout::Folder { .. } => Some(&self.path),
            Layout::SingleFile { config, .. } => config.as_deref(),
        }
    }

    /// The single file, unless the base is a folder.
    pub fn single_file(&self) -> Option<&SafetensorsFile> {
        match &self.layout {
            Layout::Folder { .. } => None,
            Layout::SingleFile { file, .. } => Some(file),
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
        let weights = self.stored(part, device)?;
        Ok(match self.updates.get(&part) {
            Some(updates) => weights.with_updates(updates.clone()),
            None => weights,
        })
    }

    /// Tensors of a component as stored.
    fn stored(&self, part: Component, device: &Device) -> Result<Weights> {
        let (file, prefix) = match &self.layout {
            Layout::Folder { variant } => {
                return Weights::open_variant(&self.path.join(part.folder()), variant.as_deref(), device);
            }
            Layout::SingleFile { file, .. } => (file, part.prefix()),
        };
        let table = self.table(part)?;
        let rename = |key: &str| {
            let Some(name) = key.strip_prefix(prefix).filter(|_| unneeded(key).is_none()) else {
                return Vec::new();
            };
            let names = table.to_diffusers(name);
            // An unknown key keeps its name, so that the model reports it as unknown.
            if names.is_empty() { vec![(key.to_owned(), Form::Same)] } else { names }
        };
        Ok(Weights::renamed(file, rename, device))
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

    /// Noise schedule of training. A single file may mark itself as predicting velocity (key `v_pred`) and as ending in
    /// pure noise (key `ztsnr`); ComfyUI reads the same marks.
    ///
    /// # Errors
    /// Input: the config is missing or broken, or the schedule is not supported.
    pub fn schedule(&self) -> Result<NoiseSchedule> {
        let config = self.text("scheduler/scheduler_config.json", configs::SCHEDULER)?;
        let Some(file) = self.single_file() else { return NoiseSchedule::parse(&config) };
        let mut keys: Map<String, Value> = config.parse()?;
        for (mark, key, value) in
            [("v_pred", "prediction_type", json!("v_prediction")), ("ztsnr", "rescale_betas_zero_snr", json!(true))]
        {
            if file.entries().any(|entry| entry.name == mark) {
                keys.insert(key.into(), value);
            }
        }
        NoiseSchedule::parse(&config.with_text(Value::Object(keys).to_string()))
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

/// Rejects files that are not an SDXL base.
fn check_kind(file: &SafetensorsFile) -> Result<()> {
    let remedy =
        "give a single-file checkpoint of an SDXL base, such as sd_xl_base_1.0.safetensors, or a pipeline folder";
    let has = |beginning: &str| file.entries().any(|entry| entry.name.starts_with(beginning));
    let is = |kind: &str| Err(Error::file(file.path(), format!("is {kind}"), remedy));
    if let Some((_, kind)) = OTHER_NOISE.iter().find(|(key, _)| file.entries().any(|entry| entry.name == *key)) {
        return is(kind);
    }
    // A file with all components is an SDXL checkpoint, whatever other keys a tool has added.
    let Some(part) = Component::ALL.iter().find(|part| !has(part.prefix())) else { return Ok(()) };
    match OTHER_KINDS.iter().find(|(beginning, _)| has(beginning)) {
        Some((_, kind)) => is(kind),
        None => is(&format!("not a complete SDXL checkpoint: it has no keys {}* ({})", part.prefix(), part.folder())),
    }
}

/// Returns the entry of [`UNNEEDED`] that matches a key.
fn unneeded(key: &str) -> Option<&str> {
    let known = |name: &&str| key == *name || (name.ends_with('.') && key.starts_with(*name));
    let of_text = || key.starts_with("conditioner.embedders.") && key.ends_with(POSITION_IDS);
    UNNEEDED.into_iter().find(known).map(|name| name.trim_end_matches('.')).or_else(|| of_text().then_some(key))
}

/// Logs how many keys of a complete file are not read.
fn tell_passed_over(file: &SafetensorsFile) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for entry in file.entries() {
        let of_a_part = Component::ALL.iter().any(|part| entry.name.starts_with(part.prefix()));
        let beside = || (!of_a_part).then(|| entry.name.split('.').next().unwrap_or_default());
        if let Some(name) = unneeded(&entry.name).or_else(beside) {
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return;
    }
    let mut shown: Vec<_> = counts
        .iter()
        .take(PASSED_SHOWN)
        .map(|(name, count)| if *count == 1 { name.clone() } else { format!("{name}.* ({count})") })
        .collect();
    if counts.len() > PASSED_SHOWN {
        shown.push(format!("and {} more", counts.len() - PASSED_SHOWN));
    }
    let (path, total) = (file.path().display(), counts.values().sum::<usize>());
    tracing::info!("{path}: {total} unused tensors are skipped: {}", shown.join(", "));
}
