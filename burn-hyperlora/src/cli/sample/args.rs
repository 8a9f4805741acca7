//! Options of `hyperlora sample`.

use std::path::{Path, PathBuf};

use burn_hyperlora::conditioning::{BaseConfig, FrozenModels, UnetDtype};
use burn_hyperlora::run::saved::Source;
use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args};
use hyperlora_core::Result;
use hyperlora_core::config::ConfigPath;
use hyperlora_sdxl::sample::{PhotoSize, SampleConfig, Sampler};
use hyperlora_sdxl::scheduler::SamplerKind;
use hyperlora_sdxl::text::PromptStates;

use crate::cli::formats::finite;
use crate::cli::loras::LoraArgs;
use crate::cli::options::HyperLoraArgs;

/// Maximum side of a picture in pixels, so that a mistyped size does not exhaust the memory.
const LARGEST: u64 = 4096;

/// Draw pictures, with and without LoRA
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("what").required(true).multiple(true).args(["base", "checkpoint"])),
    after_help = "Examples:\n  One picture, from a prompt:\n    hyperlora sample --base sdxl/ --prompt 'a photo of a person' --lora anna.safetensors --lora-weight 0.8 -o anna.png\n  A grid, one row per photo: photo | no LoRA | ID-LoRA | ID-LoRA and Base-LoRA:\n    hyperlora sample --checkpoint runs/quickstart --image a.png --image b.png -o grid.png\n  The same with released weights:\n    hyperlora sample --checkpoint sdxl_hyper_id_lora_v1_fidelity/ --base sdxl/ --image-encoder clip_vit_large_14/ --faces antelopev2/ --image a.png -o grid.png"
)]
pub(crate) struct SampleArgs {
    /// Base model: an SDXL pipeline folder in diffusers layout, or a single-file checkpoint; with --checkpoint,
    /// replaces the run's own
    #[arg(long, value_name = "DIR|FILE")]
    pub(super) base: Option<PathBuf>,
    /// Variant of the pipeline folder's files to prefer, such as fp16
    #[arg(long, value_name = "NAME", requires = "base")]
    pub(super) variant: Option<String>,
    /// Pipeline folder whose configs and tokenizers describe the single file [default: SDXL-Base-1.0's]
    #[arg(long, value_name = "DIR", requires = "base")]
    pub(super) base_config: Option<PathBuf>,
    /// Number type in which the UNet is stored and computed
    #[arg(long, value_enum, default_value_t, requires = "base")]
    pub(super) dtype: UnetDtype,
    /// Prompt to draw [default in a grid: a photo of a person]
    #[arg(long, required_unless_present = "checkpoint")]
    pub(super) prompt: Option<String>,
    /// Negative prompt [default: the base's own empty condition]
    #[arg(long)]
    pub(super) negative_prompt: Option<String>,
    #[command(flatten)]
    pub(super) loras: LoraArgs,
    /// Start from these latents: tensor `latents` [1, 4, h, w] of a safetensors file, standard normal
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
    pub(super) latents: Option<PathBuf>,
    /// Save the final latents in the same format
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
    pub(super) save_latents: Option<PathBuf>,
    #[command(flatten)]
    pub(super) grid: GridArgs,
    /// Sampling steps from noise to picture
    #[arg(long, default_value_t = 30)]
    pub(super) steps: usize,
    /// Sampler [default: the base's own]
    #[arg(long, value_enum)]
    pub(super) sampler: Option<SamplerKind>,
    /// Scale of the classifier-free guidance
    #[arg(long, default_value_t = 5.0, value_parser = finite::<f64>)]
    pub(super) guidance: f64,
    /// Side of the pictures in pixels [default: the base's own size]
    #[arg(long, value_name = "PIXELS", value_parser = pixels())]
    pub(super) size: Option<usize>,
    /// Height of the pictures in pixels, instead of --size
    #[arg(long, value_name = "PIXELS", conflicts_with = "checkpoint", value_parser = pixels())]
    pub(super) height: Option<usize>,
    /// Width of the pictures in pixels, instead of --size
    #[arg(long, value_name = "PIXELS", conflicts_with = "checkpoint", value_parser = pixels())]
    pub(super) width: Option<usize>,
    /// Original photo size that the UNet is conditioned on [default: the picture's own]
    #[arg(long, value_name = "HEIGHTxWIDTH", value_parser = size_pair)]
    pub(super) original_size: Option<[u32; 2]>,
    /// Crop corner that the UNet is conditioned on
    #[arg(long, value_name = "TOP,LEFT", default_value = "0,0", value_parser = corner)]
    pub(super) crop: [u32; 2],
    /// Crop size that the UNet is conditioned on [default: the picture's own]
    #[arg(long, value_name = "HEIGHTxWIDTH", value_parser = size_pair)]
    pub(super) target_size: Option<[u32; 2]>,
    /// Seed of the initial noise
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Picture file: .png, .jpg or .webp (lossless)
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: PathBuf,
}

/// Options of a grid.
#[derive(Debug, Args)]
pub(super) struct GridArgs {
    /// Draw a grid with the LoRAs of this run folder (its latest checkpoint), checkpoint, or HyperLoRA folder in the
    /// released layout, which needs --base
    #[arg(long, value_name = "DIR", requires = "images", conflicts_with_all = ["loras", "lora_weights"])]
    pub(super) checkpoint: Option<PathBuf>,
    /// Photo for one row of the grid; may be repeated
    #[arg(long = "image", value_name = "FILE", requires = "checkpoint")]
    pub(super) images: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) models: HyperLoraArgs,
    /// Weight of the ID-LoRA in the grid
    #[arg(long, default_value_t = 1.0, requires = "checkpoint", value_parser = finite::<f32>, allow_negative_numbers = true)]
    pub(super) id_weight: f32,
    /// Weight of the Base-LoRA in the grid's last column
    #[arg(long, default_value_t = 0.4, requires = "checkpoint", value_parser = finite::<f32>, allow_negative_numbers = true)]
    pub(super) base_weight: f32,
}

impl GridArgs {
    /// Lists the files and folders that are read.
    pub(super) fn inputs(&self) -> Vec<PathBuf> {
        let checkpoint = self.checkpoint.as_deref().map(Source::inputs).unwrap_or_default();
        [&self.images[..], &self.models.folders(), &checkpoint].concat()
    }
}

impl SampleArgs {
    /// Lists the files and folders that are read.
    pub(super) fn inputs(&self) -> Vec<PathBuf> {
        let named = [&self.base, &self.base_config, &self.latents].into_iter().flatten().cloned();
        named.chain(self.loras.paths().iter().cloned()).chain(self.grid.inputs()).collect()
    }

    pub(super) fn base_config(&self, path: &Path) -> BaseConfig {
        BaseConfig {
            variant: self.variant.clone(),
            config: self.base_config.clone().map(ConfigPath::new),
            dtype: self.dtype,
            ..BaseConfig::new(ConfigPath::new(path))
        }
    }

    pub(super) fn config(&self, base: &FrozenModels) -> SampleConfig {
        let side = self.size.unwrap_or_else(|| base.image_size());
        SampleConfig {
            steps: self.steps,
            sampler: self.sampler,
            guidance: self.guidance,
            height: self.height.unwrap_or(side),
            width: self.width.unwrap_or(side),
            seed: self.seed,
            photo: PhotoSize { original: self.original_size, crop: self.crop, target: self.target_size },
        }
    }
}

fn pixels() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=LARGEST)
}

fn size_pair(text: &str) -> std::result::Result<[u32; 2], String> {
    pair(text, 'x').ok_or_else(|| "expected height x width in pixels, for example 1024x1024".into())
}

fn corner(text: &str) -> std::result::Result<[u32; 2], String> {
    pair(text, ',').ok_or_else(|| "expected top,left in pixels, for example 0,0".into())
}

fn pair(text: &str, between: char) -> Option<[u32; 2]> {
    let (first, second) = text.split_once(between)?;
    Some([first.trim().parse().ok()?, second.trim().parse().ok()?])
}

pub(super) fn sampler(base: &FrozenModels) -> Sampler<'_> {
    Sampler { unet: &base.unet, vae: &base.vae, schedule: &base.schedule }
}

/// Encodes the negative prompt: `--negative-prompt`, or what the base was trained with.
pub(super) fn negative(args: &SampleArgs, base: &FrozenModels, prompt: &PromptStates) -> Result<PromptStates> {
    match &args.negative_prompt {
        Some(text) => base.text.encode_and_warn("--negative-prompt", text),
        None => base.text.negative(prompt),
    }
}
