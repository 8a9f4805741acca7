//! Picture grid during training: the person's photo, without LoRA, with LoRA; one row per person.

use std::fs;
use std::path::Path;

use burn::module::Module;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::LoraWeights;
use hyperlora_sdxl::sample::{SampleConfig, Sampler, tile, write_picture};
use image::{ImageFormat, RgbImage};

use crate::conditioning::FrozenModels;
use crate::data::sample::Sample;
use crate::hypernet::{HyperLora, Stage};
use crate::run::SAMPLES;
use crate::train::config::SamplesConfig;
use crate::train::forward::make_lora;

/// Draws the grid for `people`, from the same noise every time.
///
/// # Errors
/// Input: more steps than the schedule has; Fault: the device cannot return its data.
pub fn grid(
    base: &FrozenModels,
    hyper_lora: &HyperLora,
    kind: Stage,
    people: &[Sample],
    config: &SamplesConfig,
    trigger: &str,
) -> Result<RgbImage> {
    let lora = make_lora(&hyper_lora.valid(), kind, base.portraits(people)?)?.lora;
    let plain = draw(base, people, config, "", None)?;
    let with_lora = draw(base, people, config, trigger, Some(&lora))?;
    let photos = people.iter().map(|sample| sample.pixels.picture(level));
    let rows: Vec<[RgbImage; 3]> =
        photos.zip(plain).zip(with_lora).map(|((photo, plain), with_lora)| [photo, plain, with_lora]).collect();
    Ok(tile(&rows))
}

/// Writes the grid as PNG into the run folder.
///
/// # Errors
/// Input or Disk: a place that cannot be written to.
pub fn write(run: &Path, step: u64, grid: &RgbImage) -> Result<()> {
    let folder = run.join(SAMPLES);
    fs::create_dir_all(&folder).map_err(|source| Error::write(&folder, source))?;
    write_picture(&folder.join(format!("step-{step:08}.png")), grid, ImageFormat::Png)
}

/// Draws one picture for each of `people`, with its caption and from its own noise.
fn draw(
    base: &FrozenModels,
    people: &[Sample],
    config: &SamplesConfig,
    trigger: &str,
    lora: Option<&LoraWeights>,
) -> Result<Vec<RgbImage>> {
    let prompt = base.prompts(people, trigger)?;
    let negative = base.text.negative(&prompt)?;
    let side = people.first().map_or(0, |sample| sample.pixels.side);
    let SamplesConfig { steps, sampler, guidance, .. } = *config;
    let drawing = SampleConfig { steps, sampler, guidance, height: side, width: side, ..SampleConfig::default() };
    let sampler = Sampler { unet: &base.unet, vae: &base.vae, schedule: &base.schedule };
    Ok(sampler.draw(&drawing, base.noise(people), &prompt, &negative, lora, |_| ())?.images)
}

/// Returns the level of a pixel in [-1, 1].
fn level(value: f32) -> u8 {
    ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8
}
