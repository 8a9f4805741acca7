//! `hyperlora sample --checkpoint`: grid of pictures drawn with a hypernetwork's LoRAs.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_hyperlora::conditioning::{BaseConfig, FrozenModels};
use burn_hyperlora::generate::Generator;
use burn_hyperlora::generate::photos::{PhotoReader, Portrait};
use burn_hyperlora::metrics::Progress;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::sample::tile;
use image::RgbImage;
use image::imageops::{self, FilterType};

use super::args::{SampleArgs, negative, sampler};
use crate::cli::options::Common;

/// Draws one row per photo, with every column from the same noise: photo | no LoRA | ID-LoRA | ID-LoRA and Base-LoRA.
pub(super) fn draw(args: &SampleArgs, checkpoint: &Path, common: &Common, device: &Device) -> Result<RgbImage> {
    let options = &args.grid;
    let mut generator = Generator::open(checkpoint, options.models.head_dim, device)?;
    let (base_config, base_from) = base_of(args, checkpoint, &generator)?;
    let mut reader = PhotoReader::open(&generator, &options.models.photo_models())?;
    let portraits = options.images.iter().map(|path| reader.portrait(path)).collect::<Result<Vec<Portrait>>>()?;
    let base = FrozenModels::load_for_drawing(&base_config, &base_from, device)?;
    generator.order_for(base.unet.attention_sites())?;
    let mut config = args.config(&base);
    let text = args.prompt.as_deref().unwrap_or("a photo of a person");
    let plain = base.text.encode(&[text])?;
    let triggered =
        base.text.encode_and_warn("--prompt with the trigger words", &format!("{}{text}", generator.trigger()))?;

    let mut progress = Progress::new("grid", 0, portraits.len() as u64, common.display());
    let mut rows = Vec::with_capacity(portraits.len());
    for (row, portrait) in portraits.chunks(1).enumerate() {
        config.seed = args.seed + row as u64;
        let initial = sampler(&base).initial_latents(&config, 1, device)?;
        let mut columns = vec![reference(&portrait[0], &reader, config.width as u32)];
        let person = reader.person(portrait, generator.has_base());
        let id = generator.lora(&person, options.id_weight, 0.0)?;
        let mut loras = vec![(&plain, None), (&triggered, Some(id))];
        if generator.has_base() {
            loras.push((&triggered, Some(generator.lora(&person, options.id_weight, options.base_weight)?)));
        }
        for (prompt, lora) in loras {
            let negative = negative(args, &base, prompt)?;
            columns.extend(
                sampler(&base).draw(&config, initial.clone(), prompt, &negative, lora.as_ref(), |_| ())?.images,
            );
        }
        rows.push(columns);
        progress.step(row as u64 + 1, None, 1);
    }
    progress.finish();
    Ok(tile(&rows))
}

/// Returns the base to draw with, that of the command before that of the run, and the folder that its relative paths
/// start from.
fn base_of(args: &SampleArgs, checkpoint: &Path, generator: &Generator) -> Result<(BaseConfig, PathBuf)> {
    match (&args.base, generator.experiment()) {
        (Some(base), _) => Ok((args.base_config(base), PathBuf::new())),
        (None, Some(experiment)) => Ok((experiment.base.clone(), experiment.folder().into())),
        (None, None) => Err(Error::file(
            checkpoint,
            "is a HyperLoRA folder without a run: it does not say which base to draw with",
            "give the base with --base",
        )),
    }
}

/// Cuts the part of the photo that training would see, at the size of the pictures.
fn reference(portrait: &Portrait, reader: &PhotoReader, side: u32) -> RgbImage {
    let square = reader.square(portrait);
    imageops::resize(&square.cut(&portrait.photo, square.side), side, side, FilterType::CatmullRom)
}
