//! Where the parts of a base come from: a pipeline folder of diffusers, or one file in Stability naming.
//!
//! Both give the same: each part's config and its tensors under the names of diffusers. A single file holds neither
//! configs nor tokenizers; they are SDXL-Base-1.0's own, or those of a folder that the user names (diffusers
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

/// Keys that tell of noise that is not SDXL's, in a file that may be whole otherwise.
const OTHER_NOISE: [(&str, &str); 2] = [
    ("edm_mean", "a checkpoint of Playground 2.5, whose noise is not SDXL's"),
    ("edm_vpred.sigma_max", "a checkpoint with the noise of EDM, which is not SDXL's"),
];

/// What keys begin with that tell what kind of single file it is, where parts of an SDXL are missing.
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

/// Keys of single files that lie among those of a part and that nothing needs; one that ends in a dot stands for all that
/// begin with it. They are what training keeps (losses, averages), buffers, and OpenCLIP's other half.
const UNNEEDED: [&str; 7] = [
    "conditioner.embedders.0.transformer.text_projection.",
    "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.logit_bias",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.visual.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
];

/// A buffer that text encoders compute by themselves, whatever module they keep it in.
const POSITION_IDS: &str = ".position_ids";

/// How many names of keys that are passed over the log spells out.
const PASSED_SHOWN: usize = 10;

/// A part of SDXL with weights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The denoiser.
    Unet,
    /// The image autoencoder.
    Vae,
    /// CLIP ViT-L/14's text encoder.
    TextEncoder,
    /// OpenCLIP ViT-bigG/14's text encoder.
    TextEncoder2,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unet, Self::Vae, Self::TextEncoder, Self::TextEncoder2];

    /// Its folder in a pipeline of diffusers.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
        }
    }

    /// What its keys begin with in a single file.
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

/// Changes to the weights of each part, by diffusers' names.
pub type PartUpdates = BTreeMap<Part, Updates>;

/// A base on disk, opened but not read.
#[derive(Debug)]
pub struct BaseSource {
    path: PathBuf,
    layout: Layout,
    updates: PartUpdates,
}

#[derive(Debug)]
enum Layout {
    Folder {
        variant: Option<String>,
    },
    SingleFile {
        file: Arc<SafetensorsFile>,
        /// A pipeline folder whose configs and tokenizers hold.
        config: Option<PathBuf>,
    },
}

/// The `model_index.json` of a base, as far as it changes what is computed. Other keys are ignored.
#[derive(Debug, Deserialize)]
struct ModelIndex {
    force_zeros_for_empty_prompt: Option<bool>,
}

impl BaseSource {
    /// Opens a pipeline folder in diffusers layout, or a single safetensors file. `variant` chooses among the files of a
    /// folder; `config`, a pipeline folder that needs no weights, is what describes a single file.
    ///
    /// # Errors
    /// Input for a path that is neither, a file of another kind or architecture, a variant that no part has, and options
    /// that do not go with the layout.
    pub fn open(path: &Path, variant: Option<&str>, config: Option<&Path>) -> Result<Self> {
        if path.is_dir() {
            return match config {
                None => Self::open_folder(path, variant),
                Some(_) => Err(Error::file(
                    path,
                    "is a folder with configs of its own, and others are given",
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
                "is a single file, and a variant is asked for",
                "leave the variant out: it chooses among the files of a pipeline folder",
            ));
        }
        check_kind(&file)?;
        tell_passed_over(&file);
        let layout = Layout::SingleFile { file: Arc::new(file), config: config.map(Path::to_path_buf) };
        Ok(Self { path: path.into(), layout, updates: PartUpdates::new() })
    }

    fn open_folder(path: &Path, variant: Option<&str>) -> Result<Self> {
        if !path.join("unet").is_dir() {
            return Err(Error::file(
                path,
                "is no SDXL pipeline in diffusers layout: it has no folder `unet`",
                "give a folder with unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2 and scheduler, or a \
                 single .safetensors file",
            ));
        }
        if let Some(variant) = variant
            && !Part::ALL.iter().any(|part| has_variant(&path.join(part.folder()), variant))
        {
            return Err(Error::file(
                path,
                format!("has no weights of the variant {variant}"),
                "leave the variant out, or fetch its files, such as unet/diffusion_pytorch_model.fp16.safetensors",
            ));
        }
        Ok(Self::folder(path, variant))
    }

    /// A pipeline folder, of which only some parts need be there.
    pub(super) fn folder(path: &Path, variant: Option<&str>) -> Self {
        let layout = Layout::Folder { variant: variant.map(String::from) };
        Self { path: path.into(), layout, updates: PartUpdates::new() }
    }

    /// Adds changes to the weights while they are read.
    #[must_use]
    pub fn with_updates(self, updates: PartUpdates) -> Self {
        Self { updates, ..self }
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder with configs and tokenizers, where there is one.
    pub fn config_folder(&self) -> Option<&Path> {
        match &self.layout {
            Layout::Folder { .. } => Some(&self.path),
            Layout::SingleFile { config, .. } => config.as_deref(),
        }
    }

    /// The file, where it is a single one.
    pub fn single_file(&self) -> Option<&SafetensorsFile> {
        match &self.layout {
            Layout::Folder { .. } => None,
            Layout::SingleFile { file, .. } => Some(file),
        }
    }

    /// The config of a part.
    ///
    /// # Errors
    /// As [`ConfigText::read`].
    pub fn config(&self, part: Part) -> Result<ConfigText> {
        self.text(&format!("{}/config.json", part.folder()), part.config())
    }

    /// A file of the config folder, or `built_in` where there is no such folder.
    fn text(&self, name: &str, built_in: &str) -> Result<ConfigText> {
        match self.config_folder() {
            Some(folder) => ConfigText::read(&folder.join(name)),
            None => Ok(ConfigText::built_in(&format!("SDXL-Base-1.0's {name}"), built_in)),
        }
    }

    /// The tensors of a part under the names of diffusers, in f32 on `device` unless changed.
    ///
    /// # Errors
    /// As [`Weights::open`]; for a single file, those of the part's config.
    pub fn weights(&self, part: Part, device: &Device) -> Result<Weights> {
        let weights = self.stored(part, device)?;
        Ok(match self.updates.get(&part) {
            Some(updates) => weights.with_updates(updates.clone()),
            None => weights,
        })
    }

    /// The tensors of a part as they are stored.
    fn stored(&self, part: Part, device: &Device) -> Result<Weights> {
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
            // An unknown key keeps its name, under which the model will not know it.
            if names.is_empty() { vec![(key.to_owned(), Form::Same)] } else { names }
        };
        Ok(Weights::renamed(file, rename, device))
    }

    /// The names of a part in both namings.
    ///
    /// # Errors
    /// Those of the part's config.
    pub fn table(&self, part: Part) -> Result<KeyTable> {
        let config = self.config(part)?;
        Ok(match part {
            Part::Unet => KeyTable::unet(&UNet2DConditionConfig::parse(&config)?),
            Part::Vae => KeyTable::vae(&AutoencoderKlConfig::parse(&config)?),
            Part::TextEncoder => KeyTable::text_encoder(),
            Part::TextEncoder2 => KeyTable::text_encoder_2(&ClipTextConfig::parse(&config)?),
        })
    }

    /// The autoencoder, in f32.
    ///
    /// # Errors
    /// Those of its config and weights.
    pub fn vae(&self, device: &Device) -> Result<AutoencoderKl> {
        AutoencoderKl::new(AutoencoderKlConfig::parse(&self.config(Part::Vae)?)?, self.weights(Part::Vae, device)?)
    }

    /// The noise of training. A single file may mark itself as one that predicts velocities (key `v_pred`), with a
    /// schedule that ends in pure noise (key `ztsnr`), as ComfyUI reads them.
    ///
    /// # Errors
    /// Input for a missing or broken config and for a schedule that is not supported.
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

    /// Both tokenizers.
    ///
    /// # Errors
    /// As [`ClipTokenizer::load`].
    pub fn tokenizers(&self) -> Result<[ClipTokenizer; 2]> {
        Ok(match self.config_folder() {
            Some(folder) => {
                [ClipTokenizer::load(&folder.join("tokenizer"))?, ClipTokenizer::load(&folder.join("tokenizer_2"))?]
            }
            // SDXL's second tokenizer pads with `!`, which is token 0.
            None => [ClipTokenizer::built_in(END)?, ClipTokenizer::built_in("!")?],
        })
    }

    /// Whether zeros stand for the empty negative prompt, instead of its states. Where there is no `model_index.json` the
    /// default of diffusers holds.
    ///
    /// # Errors
    /// Input for a broken `model_index.json`.
    pub fn zeros_for_empty_prompt(&self) -> Result<bool> {
        let path = self.config_folder().map(|folder| folder.join("model_index.json"));
        let Some(path) = path.filter(|path| path.exists()) else { return Ok(true) };
        let index: ModelIndex = parse_json(&read_text(&path)?)
            .map_err(|problem| Error::file(&path, problem, "use the model_index.json of an SDXL base"))?;
        Ok(index.force_zeros_for_empty_prompt.unwrap_or(true))
    }
}

/// Refuses files that hold something else than an SDXL base.
fn check_kind(file: &SafetensorsFile) -> Result<()> {
    let remedy =
        "give a single-file checkpoint of an SDXL base, such as sd_xl_base_1.0.safetensors, or a pipeline folder";
    let has = |beginning: &str| file.entries().any(|entry| entry.name.starts_with(beginning));
    let is = |kind: &str| Err(Error::file(file.path(), format!("is {kind}"), remedy));
    if let Some((_, kind)) = OTHER_NOISE.iter().find(|(key, _)| file.entries().any(|entry| entry.name == *key)) {
        return is(kind);
    }
    // What is whole is an SDXL, whatever else somebody's tool has left in the file.
    let Some(part) = Part::ALL.iter().find(|part| !has(part.prefix())) else { return Ok(()) };
    match OTHER_KINDS.iter().find(|(beginning, _)| has(beginning)) {
        Some((_, kind)) => is(kind),
        None => is(&format!("no whole SDXL checkpoint: it has no keys {}* ({})", part.prefix(), part.folder())),
    }
}

/// Which of the [`UNNEEDED`] a key is, where it is one.
fn unneeded(key: &str) -> Option<&str> {
    let known = |name: &&str| key == *name || (name.ends_with('.') && key.starts_with(*name));
    let of_text = || key.starts_with("conditioner.embedders.") && key.ends_with(POSITION_IDS);
    UNNEEDED.into_iter().find(known).map(|name| name.trim_end_matches('.')).or_else(|| of_text().then_some(key))
}

/// Counts in the log what a whole file holds beside the parts that are read.
fn tell_passed_over(file: &SafetensorsFile) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for entry in file.entries() {
        let of_a_part = Part::ALL.iter().any(|part| entry.name.starts_with(part.prefix()));
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
    tracing::info!("{path}: {total} tensors that nothing needs are passed over: {}", shown.join(", "));
}
