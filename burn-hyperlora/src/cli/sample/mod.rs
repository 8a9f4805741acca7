//! `hyperlora sample`: pictures, with and without LoRA.

mod args;
mod grid;

use std::path::Path;
use std::process::ExitCode;

use burn::tensor::{Device, Tensor};
use burn_hyperlora::conditioning::FrozenModels;
use burn_hyperlora::metrics::Progress;
use hyperlora_core::files::OutputFile;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::sample::{SampleConfig, picture_format, write_picture};
use hyperlora_sdxl::weights::{self, Weights};
use image::RgbImage;

use self::args::{negative, sampler};
use crate::cli::options::Common;

pub(super) use self::args::SampleArgs;

/// Name of the tensor in a latents file.
const LATENTS: &str = "latents";

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

fn load_latents(path: &Path, base: &FrozenModels, config: &SampleConfig, device: &Device) -> Result<Tensor<4>> {
    let factor = base.vae.config().factor();
    let shape = [1, base.vae.config().latent_channels, config.height / factor, config.width / factor];
    let file = Weights::open(path, device)?;
    let latents = file.at("").tensor(LATENTS, shape);
    file.finish().map_err(|error| error.with_remedy("give latents of one picture, of the same height and width"))?;
    Ok(latents)
}
