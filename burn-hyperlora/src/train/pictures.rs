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
    let photos = people.iter().map(|sample| photo(&sample.pixels));
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
    let side = people.first().map_or(0, |sample| (sample.pixels.len() / 3).isqrt());
    let SamplesConfig { steps, sampler, guidance, .. } = *config;
    let drawing = SampleConfig { steps, sampler, guidance, height: side, width: side, ..SampleConfig::default() };
    let sampler = Sampler { unet: &base.unet, vae: &base.vae, schedule: &base.schedule };
    Ok(sampler.draw(&drawing, base.noise(people), &prompt, &negative, lora, |_| ())?.images)
}

/// Converts flat `[3, H, W]` pixels in [-1, 1] to a square picture.
fn photo(pixels: &[f32]) -> RgbImage {
    let plane = pixels.len() / 3;
    let side = plane.isqrt();
    RgbImage::from_fn(side as u32, side as u32, |x, y| {
        let at = y as usize * side + x as usize;
        image::Rgb(
            [0, 1, 2].map(|channel| ((pixels[channel * plane + at] + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_clamped_and_laid_out_by_channel() {
        let mut pixels = vec![-1.0; 12];
        pixels[1] = 2.0; // red of the pixel to the right
        pixels[4 + 2] = 0.0; // green of the pixel below
        let drawn = photo(&pixels);
        assert_eq!(drawn.get_pixel(1, 0).0, [255, 0, 0]);
        assert_eq!(drawn.get_pixel(0, 1).0, [0, 128, 0]);
        assert_eq!(drawn.get_pixel(1, 1).0, [0, 0, 0]);
    }
}
