//! `hyperlora sample`: pictures, with and without LoRA.

mod grid;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::{Device, Tensor};
use burn_hyperlora::conditioning::{BaseConfig, FrozenModels, UnetDtype};
use burn_hyperlora::metrics::Progress;
use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args};
use hyperlora_core::config::ConfigPath;
use hyperlora_core::files::OutputFile;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::sample::{PhotoSize, SampleConfig, Sampler, picture_format, write_picture};
use hyperlora_sdxl::scheduler::SamplerKind;
use hyperlora_sdxl::text::PromptStates;
use hyperlora_sdxl::weights::{self, Weights};
use image::RgbImage;

use self::grid::GridArgs;

use crate::cli::formats::finite;
use crate::cli::loras::LoraArgs;
use crate::cli::options::Common;

/// Name of the tensor in a latents file.
const LATENTS: &str = "latents";

/// Maximum side of a picture in pixels, so that a mistyped size does not exhaust the memory.
const LARGEST: u64 = 4096;

/// Draw pictures, with and without LoRA
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("what").required(true).multiple(true).args(["base", "checkpoint"])),
    after_help = "Examples:\n  One picture, from a prompt:\n    hyperlora sample --base sdxl/ --prompt 'a photo of a person' --lora anna.safetensors --lora-weight 0.8 -o anna.png\n  A grid, one row per photo: photo | no LoRA | ID-LoRA | ID-LoRA and Base-LoRA:\n    hyperlora sample --checkpoint runs/quickstart --image a.png --image b.png -o grid.png\n  The same with released weights:\n    hyperlora sample --checkpoint sdxl_hyper_id_lora_v1_fidelity/ --base sdxl/ --image-encoder clip_vit_large_14/ --faces antelopev2/ --image a.png -o grid.png"
)]
pub(super) struct SampleArgs {
    /// Base model: an SDXL pipeline folder in diffusers layout, or a single-file checkpoint; with --checkpoint,
    /// replaces the run's own
    #[arg(long, value_name = "DIR|FILE")]
    base: Option<PathBuf>,
    /// Variant of the pipeline folder's files to prefer, such as fp16
    #[arg(long, value_name = "NAME", requires = "base")]
    variant: Option<String>,
    /// Pipeline folder whose configs and tokenizers describe the single file [default: SDXL-Base-1.0's]
    #[arg(long, value_name = "DIR", requires = "base")]
    base_config: Option<PathBuf>,
    /// Number type in which the UNet is stored and computed
    #[arg(long, value_enum, default_value_t, requires = "base")]
    dtype: UnetDtype,
    /// Prompt to draw [default in a grid: a photo of a person]
    #[arg(long, required_unless_present = "checkpoint")]
    prompt: Option<String>,
    /// Negative prompt [default: the base's own empty condition]
    #[arg(long)]
    negative_prompt: Option<String>,
    #[command(flatten)]
    loras: LoraArgs,
    /// Start from these latents: tensor `latents` [1, 4, h, w] of a safetensors file, standard normal
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
    latents: Option<PathBuf>,
    /// Save the final latents in the same format
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
    save_latents: Option<PathBuf>,
    #[command(flatten)]
    grid: GridArgs,
    /// Sampling steps from noise to picture
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// Sampler [default: the base's own]
    #[arg(long, value_enum)]
    sampler: Option<SamplerKind>,
    /// Scale of the classifier-free guidance
    #[arg(long, default_value_t = 5.0, value_parser = finite::<f64>)]
    guidance: f64,
    /// Side of the pictures in pixels [default: the base's own size]
    #[arg(long, value_name = "PIXELS", value_parser = pixels())]
    size: Option<usize>,
    /// Height of the pictures in pixels, instead of --size
    #[arg(long, value_name = "PIXELS", conflicts_with = "checkpoint", value_parser = pixels())]
    height: Option<usize>,
    /// Width of the pictures in pixels, instead of --size
    #[arg(long, value_name = "PIXELS", conflicts_with = "checkpoint", value_parser = pixels())]
    width: Option<usize>,
    /// Original photo size that the UNet is conditioned on [default: the picture's own]
    #[arg(long, value_name = "HEIGHTxWIDTH", value_parser = size_pair)]
    original_size: Option<[u32; 2]>,
    /// Crop corner that the UNet is conditioned on
    #[arg(long, value_name = "TOP,LEFT", default_value = "0,0", value_parser = corner)]
    crop: [u32; 2],
    /// Crop size that the UNet is conditioned on [default: the picture's own]
    #[arg(long, value_name = "HEIGHTxWIDTH", value_parser = size_pair)]
    target_size: Option<[u32; 2]>,
    /// Seed of the initial noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Picture file: .png, .jpg or .webp (lossless)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &SampleArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    common.start_log(None)?;
    let format = picture_format(&args.output)?;
    args.save_latents.as_deref().map_or(Ok(()), weights::check_name)?;
    let output = OutputFile::claim(&args.output, args.inputs())?;
    let latents = args.save_latents.as_ref().map(|path| OutputFile::claim(path, args.inputs())).transpose()?;
    let picture = match (&args.grid.checkpoint, &args.base) {
        (Some(checkpoint), _) => grid::draw(args, checkpoint, common, device)?,
        (None, Some(base)) => from_prompt(args, base, latents.as_ref(), common, device)?,
        (None, None) => return Err(Error::input("hyperlora sample", "nothing to draw", "give --base or --checkpoint")),
    };
    write_picture(output.path(), &picture, format)?;
    tracing::info!("{}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

impl SampleArgs {
    /// Lists the files and folders that are read.
    fn inputs(&self) -> Vec<PathBuf> {
        let named = [&self.base, &self.base_config, &self.latents].into_iter().flatten().cloned();
        named.chain(self.loras.paths().iter().cloned()).chain(self.grid.inputs()).collect()
    }

    fn base_config(&self, path: &Path) -> BaseConfig {
        BaseConfig {
            variant: self.variant.clone(),
            config: self.base_config.clone().map(ConfigPath::new),
            dtype: self.dtype,
            ..BaseConfig::new(ConfigPath::new(path))
        }
    }

    fn config(&self, base: &FrozenModels) -> SampleConfig {
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

fn sampler(base: &FrozenModels) -> Sampler<'_> {
    Sampler { unet: &base.unet, vae: &base.vae, schedule: &base.schedule }
}

fn from_prompt(
    args: &SampleArgs,
    path: &Path,
    save_latents: Option<&OutputFile>,
    common: &Common,
    device: &Device,
) -> Result<RgbImage> {
    let source = args.base_config(path).source(Path::new(""))?;
    let updates = args.loras.updates(&source)?;
    let base = FrozenModels::from_source(&source.with_updates(updates), args.dtype, device)?;
    let config = args.config(&base);

    let prompt = base.text.encode_and_warn("--prompt", args.prompt.as_deref().unwrap_or_default())?;
    let negative = negative(args, &base, &prompt)?;
    let initial = match &args.latents {
        Some(path) => load_latents(path, &base, &config, device)?,
        None => sampler(&base).initial_latents(&config, 1, device)?,
    };
    let mut progress = Progress::new("sample", 0, config.steps as u64, common.display());
    let drawing = sampler(&base).draw(&config, initial, &prompt, &negative, None, |step| {
        progress.step(step as u64, None, 1);
    })?;
    progress.finish();
    if let Some(output) = save_latents {
        weights::save(output.path(), [(LATENTS.to_owned(), drawing.latents.into_data())])?;
    }
    drawing.images.into_iter().next().ok_or_else(|| Error::Fault("no picture was drawn".into()))
}

/// Encodes the negative prompt: `--negative-prompt`, or what the base was trained with.
fn negative(args: &SampleArgs, base: &FrozenModels, prompt: &PromptStates) -> Result<PromptStates> {
    match &args.negative_prompt {
        Some(text) => base.text.encode_and_warn("--negative-prompt", text),
        None => base.text.negative(prompt),
    }
}

fn load_latents(path: &Path, base: &FrozenModels, config: &SampleConfig, device: &Device) -> Result<Tensor<4>> {
    let factor = base.vae.config().factor();
    let shape = [1, base.vae.config().latent_channels, config.height / factor, config.width / factor];
    let file = Weights::open(path, device)?;
    let latents = file.at("").tensor(LATENTS, shape);
    file.finish().map_err(|error| error.with_remedy("give latents of one picture, of the same height and width"))?;
    Ok(latents)
}
