//! Generates pictures with the base and a LoRA (diffusers `StableDiffusionXLPipeline`).

use std::io::Cursor;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use hyperlora_core::files::write_whole;
use hyperlora_core::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, RgbImage, imageops};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use crate::lora::LoraWeights;
use crate::models::unet::{UNet2DConditionModel, UnetInput};
use crate::models::vae::AutoencoderKl;
use crate::scheduler::{NoiseSampler, NoiseSchedule, SamplerKind};
use crate::text::PromptStates;

/// Picture file extensions and their formats; WebP is lossless.
const FORMATS: [(&str, ImageFormat); 4] =
    [("png", ImageFormat::Png), ("jpg", ImageFormat::Jpeg), ("jpeg", ImageFormat::Jpeg), ("webp", ImageFormat::WebP)];

/// JPEG quality out of 100, visually lossless.
const JPEG_QUALITY: u8 = 95;

/// Sampling settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Number of steps from noise to picture.
    pub steps: usize,
    /// Sampler; defaults to the base's own.
    pub sampler: Option<SamplerKind>,
    /// Classifier-free guidance scale. At 1 and below, the negative prompt is unused.
    pub guidance: f64,
    /// Height of a picture in pixels, a multiple of the autoencoder's factor.
    pub height: usize,
    /// Width of a picture in pixels, a multiple of the autoencoder's factor.
    pub width: usize,
    /// Seed of the initial noise.
    pub seed: u64,
    /// Photo size and crop that SDXL is conditioned on.
    pub photo: PhotoSize,
}

/// Photo size and crop that SDXL is conditioned on (arXiv 2307.01952, section 2.2), in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PhotoSize {
    /// Height and width before scaling; defaults to the picture's own.
    pub original: Option<[u32; 2]>,
    /// Top and left of the crop.
    pub crop: [u32; 2],
    /// Target height and width; defaults to the picture's own.
    pub target: Option<[u32; 2]>,
}

impl PhotoSize {
    /// Time ids of a picture of this height and width.
    fn time_ids(&self, height: usize, width: usize) -> [f32; 6] {
        let own = [height as u32, width as u32];
        let [original, target] = [self.original, self.target].map(|size| size.unwrap_or(own));
        [original[0], original[1], self.crop[0], self.crop[1], target[0], target[1]].map(|pixels| pixels as f32)
    }
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            steps: 30,
            sampler: None,
            guidance: 5.0,
            height: 1024,
            width: 1024,
            seed: 0,
            photo: PhotoSize::default(),
        }
    }
}

/// Components of a base that generate pictures.
#[derive(Debug, Clone, Copy)]
pub struct Sampler<'a> {
    /// The denoiser.
    pub unet: &'a UNet2DConditionModel,
    /// The autoencoder, which decodes latents to pictures.
    pub vae: &'a AutoencoderKl,
    /// Noise schedule that the denoiser was trained with.
    pub schedule: &'a NoiseSchedule,
}

/// Generated pictures, in prompt order.
#[derive(Debug, Clone)]
pub struct Drawing {
    /// Final scaled latents, `[B, C, h, w]`.
    pub latents: Tensor<4>,
    /// Decoded latents.
    pub images: Vec<RgbImage>,
}

impl Sampler<'_> {
    /// Generates standard normal noise `[count, C, h, w]`. Picture `i` gets the same noise for any count.
    ///
    /// # Errors
    /// Input: the size is not a multiple of the autoencoder's factor.
    pub fn initial_latents(&self, config: &SampleConfig, count: usize, device: &Device) -> Result<Tensor<4>> {
        let shape = self.latent_shape(config, count)?;
        let per_picture = shape[1] * shape[2] * shape[3];
        let picture = |stream: usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(config.seed);
            generator.set_stream(stream as u64);
            StandardNormal.sample_iter(generator).take(per_picture)
        };
        let values: Vec<f32> = (0..count).flat_map(picture).collect();
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }

    /// Generates one picture per row of `prompt` from standard normal `initial` latents with the shape of
    /// [`initial_latents`](Self::initial_latents).
    ///
    /// `lora` holds one update for all pictures or one for each; it applies to both prompts. `progress` is called after
    /// every step.
    ///
    /// # Errors
    /// Input: shapes of config, latents, prompts and LoRA do not agree, or there are too few or too many steps.
    pub fn draw(
        &self,
        config: &SampleConfig,
        initial: Tensor<4>,
        prompt: &PromptStates,
        negative: &PromptStates,
        lora: Option<&LoraWeights>,
        progress: impl FnMut(usize),
    ) -> Result<Drawing> {
        let latents = self.denoise(config, initial, prompt, negative, lora, progress)?;
        Ok(Drawing { images: self.decode(latents.clone())?, latents })
    }

    fn denoise(
        &self,
        config: &SampleConfig,
        initial: Tensor<4>,
        prompt: &PromptStates,
        negative: &PromptStates,
        lora: Option<&LoraWeights>,
        mut progress: impl FnMut(usize),
    ) -> Result<Tensor<4>> {
        // 1. Prepare what is constant over the steps, with the negative prompt's half first.
        let [count, ..] = initial.dims();
        self.check(config, &initial, [prompt, negative], lora)?;
        let device = initial.device();
        let guided = config.guidance > 1.0;
        let prompts = if guided { vec![negative, prompt] } else { vec![prompt] };
        let halves = prompts.len();
        let prompt_embeds = Tensor::cat(prompts.iter().map(|p| p.prompt_embeds.clone()).collect(), 0);
        let pooled = Tensor::cat(prompts.iter().map(|p| p.pooled.clone()).collect(), 0);
        let time_ids = Tensor::<2>::from_data([config.photo.time_ids(config.height, config.width)], &device);
        let time_ids = time_ids.repeat_dim(0, halves * count);
        let lora = lora.map(|lora| for_batch(lora, count, halves));
        // 2. Step from noise to latents.
        let mut sampler = NoiseSampler::new(self.schedule, config.sampler, config.steps)?;
        let mut latents = initial * sampler.init_noise_sigma();
        for (step, timestep) in sampler.timesteps().to_vec().into_iter().enumerate() {
            let input = UnetInput {
                latents: sampler.scale_model_input(latents.clone(), step).repeat_dim(0, halves),
                timesteps: Tensor::from_data([timestep], &device).repeat_dim(0, halves * count),
                prompt_embeds: prompt_embeds.clone(),
                pooled: pooled.clone(),
                time_ids: time_ids.clone(),
            };
            let mut output = self.unet.forward(&input, lora.as_ref());
            if guided {
                let unconditional = output.clone().narrow(0, 0, count);
                let conditional = output.narrow(0, count, count);
                output = unconditional.clone() + (conditional - unconditional) * config.guidance;
            }
            latents = sampler.step(output, latents, step);
            progress(step + 1);
        }
        Ok(latents)
    }

    /// Decodes scaled latents `[B, C, h, w]` to pictures, one at a time to save memory.
    ///
    /// # Errors
    /// Fault: the device fails to return the pixels.
    pub fn decode(&self, latents: Tensor<4>) -> Result<Vec<RgbImage>> {
        latents.split(1, 0).into_iter().map(|one| to_picture(self.vae.decode(one))).collect()
    }

    fn latent_shape(&self, config: &SampleConfig, count: usize) -> Result<[usize; 4]> {
        let factor = self.vae.config().factor();
        for (key, side) in [("height", config.height), ("width", config.width)] {
            if side == 0 || !side.is_multiple_of(factor) {
                let problem = format!("{side} is not a multiple of {factor}");
                return Err(Error::input(key, problem, "choose a size that the autoencoder's factor divides"));
            }
        }
        Ok([count, self.vae.config().latent_channels, config.height / factor, config.width / factor])
    }

    fn check(
        &self,
        config: &SampleConfig,
        initial: &Tensor<4>,
        prompts: [&PromptStates; 2],
        lora: Option<&LoraWeights>,
    ) -> Result<()> {
        let [count, ..] = initial.dims();
        let expected = self.latent_shape(config, count)?;
        if initial.dims() != expected || count == 0 {
            let problem = format!("shape {:?}, expected {expected:?}", initial.dims());
            return Err(Error::input("initial latents", problem, "make them for the given height and width"));
        }
        if let Some(other) = prompts.map(|p| p.prompt_embeds.dims()[0]).into_iter().find(|&rows| rows != count) {
            let problem = format!("{other} prompts for {count} pictures");
            return Err(Error::input("prompts", problem, "give one prompt and one negative prompt per picture"));
        }
        let rows = lora.and_then(|lora| lora.tensors().next()).map_or(count, |tensor| tensor.dims()[0]);
        if rows != count && rows != 1 {
            let problem = format!("{rows} LoRAs for {count} pictures");
            return Err(Error::input("LoRA", problem, "give one for all pictures or one for each"));
        }
        Ok(())
    }
}

/// Repeats the LoRA for each row of a batch: `count` pictures, `halves` times.
fn for_batch(lora: &LoraWeights, count: usize, halves: usize) -> LoraWeights {
    lora.clone().map(|tensor| {
        let times = if tensor.dims()[0] == count { halves } else { halves * count };
        tensor.repeat_dim(0, times)
    })
}

/// Arranges pictures of equal size in rows and columns; short rows end in black.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::sample::tile;
/// use image::RgbImage;
///
/// let picture = RgbImage::new(64, 32);
/// let grid = tile(&[vec![picture.clone(), picture.clone()], vec![picture]]);
/// assert_eq!(grid.dimensions(), (128, 64));
/// ```
pub fn tile<Row: AsRef<[RgbImage]>>(rows: &[Row]) -> RgbImage {
    let (width, height) = rows.first().and_then(|row| row.as_ref().first()).map_or((1, 1), RgbImage::dimensions);
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0) as u32;
    let mut grid = RgbImage::new(columns * width, rows.len() as u32 * height);
    for (y, row) in (0..).zip(rows) {
        for (x, picture) in (0..).zip(row.as_ref()) {
            imageops::replace(&mut grid, picture, x * i64::from(width), y * i64::from(height));
        }
    }
    grid
}

/// Picture format of a file name; PNG without an extension.
///
/// # Errors
/// Input: the extension belongs to another format.
pub fn picture_format(path: &Path) -> Result<ImageFormat> {
    let Some(ending) = path.extension() else { return Ok(ImageFormat::Png) };
    let ending = ending.to_string_lossy().to_lowercase();
    match FORMATS.into_iter().find(|(known, _)| *known == ending) {
        Some((_, format)) => Ok(format),
        None => {
            let known = FORMATS.map(|(known, _)| format!(".{known}")).join(", ");
            Err(Error::file(
                path,
                format!("pictures cannot be written as .{ending}"),
                format!("end the name in one of {known}"),
            ))
        }
    }
}

/// Writes a picture atomically, in a format from [`picture_format`].
///
/// # Errors
/// Input: the path is not writable, or the picture is too large for the format; Disk: the disk is full or failing.
pub fn write_picture(path: &Path, picture: &RgbImage, format: ImageFormat) -> Result<()> {
    let mut file = Cursor::new(Vec::new());
    let encoded = match format {
        ImageFormat::Jpeg => picture.write_with_encoder(JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY)),
        format => picture.write_to(&mut file, format),
    };
    encoded.map_err(|problem| Error::file(path, format!("the picture cannot be encoded: {problem}"), "write a PNG"))?;
    write_whole(path, file.get_ref())
}

/// Converts `image`, `[1, 3, H, W]` in -1..1, to an RGB picture; values outside are clamped.
fn to_picture(image: Tensor<4>) -> Result<RgbImage> {
    let [_, _, height, width] = image.dims();
    let levels = ((image / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).permute([0, 2, 3, 1]);
    let levels =
        levels.try_into_data_as::<f32>().map_err(|problem| Error::Fault(format!("decoded picture: {problem}")))?;
    let levels: Vec<u8> = levels.iter::<f32>().map(|level| level.round() as u8).collect();
    RgbImage::from_raw(width as u32, height as u32, levels)
        .ok_or_else(|| Error::Fault(format!("decoded picture: not {width} x {height} RGB pixels")))
}
