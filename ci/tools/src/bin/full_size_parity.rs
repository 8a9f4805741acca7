//! Runs one component of a base on inputs from a file: our side of `ci/parity/full_size.py`.
//!
//!     cargo run -p hyperlora-tools --bin full_size_parity -- BASE PART CASE OUT f32|bf16
//!
//! BASE is a pipeline folder or a single file; PART is `unet`, `vae`, `text_encoder`, `text_encoder_2`, or, in a
//! folder, `image_encoder`. CASE and OUT are safetensors files with the inputs and the results. The float type applies
//! to the UNet; the other components compute in f32.

use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::models::clip_text::{ClipTextConfig, ClipTextModel};
use hyperlora_sdxl::models::clip_vision::{ClipVisionModel, ImageProcessor};
use hyperlora_sdxl::models::unet::{UNet2DConditionConfig, UNet2DConditionModel, UnetInput};
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::weights::{Weights, save};
use image::RgbImage;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = |problem: &str| Error::input("full_size_parity", problem, "give BASE PART CASE OUT f32|bf16");
    let [base, part, case, out, dtype] = arguments.as_slice() else {
        return Err(usage("needs five arguments"));
    };
    let dtype = match dtype.as_str() {
        "f32" => FloatDType::F32,
        "bf16" => FloatDType::BF16,
        other => return Err(usage(&format!("{other} is not a type"))),
    };
    let (base, device) = (Path::new(base), Device::flex());
    let case = Case { weights: Weights::open(Path::new(case), &device)? };
    let start = Instant::now();
    let results = match part.as_str() {
        "unet" => unet(base, &case, dtype, start)?,
        "vae" => vae(base, &case, start)?,
        "text_encoder" => text(base, Component::TextEncoder, &case, start)?,
        "text_encoder_2" => text(base, Component::TextEncoder2, &case, start)?,
        "image_encoder" => vision(base, &case, start)?,
        other => return Err(usage(&format!("{other} is no part"))),
    };
    save(Path::new(out), results)
}

type Results = Vec<(String, TensorData)>;

fn unet(base: &Path, case: &Case, dtype: FloatDType, start: Instant) -> Result<Results> {
    let source = BaseSource::open(base, None, None)?;
    let config = UNet2DConditionConfig::parse(&source.config(Component::Unet)?)?;
    let unet = UNet2DConditionModel::new(config, source.weights(Component::Unet, &Device::flex())?.with_dtype(dtype))?;
    let input = UnetInput {
        latents: case.tensor("latents")?,
        timesteps: case.tensor("timesteps")?,
        prompt_embeds: case.tensor("prompt_embeds")?,
        pooled: case.tensor("pooled")?,
        time_ids: case.tensor("time_ids")?,
    };
    Ok(timed(start, || vec![named("prediction", unet.forward(&input, None))]))
}

fn vae(base: &Path, case: &Case, start: Instant) -> Result<Results> {
    let vae = BaseSource::open(base, None, None)?.vae(&Device::flex())?;
    let (images, latents) = (case.tensor("images")?, case.tensor("latents")?);
    Ok(timed(start, || {
        let (mean, logvar) = vae.encode_mean_logvar(images);
        vec![named("mean", mean), named("logvar", logvar), named("decoded", vae.decode(latents))]
    }))
}

fn text(base: &Path, part: Component, case: &Case, start: Instant) -> Result<Results> {
    let source = BaseSource::open(base, None, None)?;
    let config = ClipTextConfig::parse(&source.config(part)?)?;
    let model = ClipTextModel::new(config, source.weights(part, &Device::flex())?)?;
    let ids = case.tensor::<2>("ids")?;
    let [_, length] = ids.dims();
    let ids: Vec<i32> = ids.into_data().iter().collect();
    let prompts: Vec<Vec<i32>> = ids.chunks(length).map(<[i32]>::to_vec).collect();
    Ok(timed(start, || {
        let states = model.forward(&prompts);
        let pooled = states.pooled.map(|pooled| named("pooled", pooled));
        std::iter::once(named("penultimate", states.penultimate)).chain(pooled).collect()
    }))
}

fn vision(base: &Path, case: &Case, start: Instant) -> Result<Results> {
    let processor = ImageProcessor::load(&base.join("feature_extractor"))?;
    let model = ClipVisionModel::load(&base.join("image_encoder"), &Device::flex())?;
    let picture = case.tensor::<3>("picture")?;
    let [height, width, _] = picture.dims();
    let levels = picture.into_data().iter::<f32>().map(|level| level as u8).collect();
    let picture = RgbImage::from_raw(width as u32, height as u32, levels)
        .ok_or_else(|| Error::Fault("the picture is not [height, width, 3]".into()))?;
    Ok(timed(start, || {
        let pixels = processor.process(&[picture], &Device::flex());
        vec![named("pixel_values", pixels.clone()), named("penultimate", model.penultimate(pixels))]
    }))
}

/// Runs `compute` and prints its time, and the time of loading since `start`.
fn timed(start: Instant, compute: impl FnOnce() -> Results) -> Results {
    let loaded = Instant::now();
    let results = compute();
    let seconds = [loaded - start, loaded.elapsed()].map(|time| time.as_secs_f64());
    println!("load {:.1} s, compute {:.1} s", seconds[0], seconds[1]);
    results
}

fn named<const D: usize>(name: &str, tensor: Tensor<D>) -> (String, TensorData) {
    (name.into(), tensor.into_data())
}

/// Inputs and expected outputs.
struct Case {
    weights: Weights,
}

impl Case {
    fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let shape = self.weights.shapes().get(name).and_then(|shape| <[usize; D]>::try_from(*shape).ok());
        let shape = shape.ok_or_else(|| {
            let problem = format!("has no {name} of {D} dimensions");
            Error::file(self.weights.path(), problem, "use a file that ci/parity/full_size.py wrote")
        })?;
        Ok(self.weights.at("").tensor(name, shape))
    }
}
