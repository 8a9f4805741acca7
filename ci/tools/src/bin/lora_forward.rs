//! Runs the UNet on random inputs with and without a LoRA file, for `ci/parity/check_lora.py` to compare with
//! diffusers: `cargo run -p hyperlora-tools --bin lora_forward -- BASE LORA.safetensors FORWARD.safetensors`.

use std::ffi::OsString;
use std::path::Path;

use burn::tensor::{Device, Distribution, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::weights;

const BATCH: usize = 2;
const TOKENS: usize = 77;

fn main() -> Result<()> {
    let given: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [base, lora, output] = given.iter().map(Path::new).collect::<Vec<_>>()[..] else {
        return Err(Error::input("lora_forward", "three paths are needed", "give BASE LORA FORWARD"));
    };
    let device = Device::flex();
    device.seed(7);
    let source = BaseSource::open(base, None, None)?;
    let updates = sum(&[(LoraFile::open(lora)?, 1.0)], &BaseNames::of(&source)?)?;
    let unet = UNet2DConditionModel::load(&base.join("unet"), &device)?;
    let weights = source.with_updates(updates).weights(Component::Unet, &device)?;
    let with_lora = UNet2DConditionModel::new(unet.config().clone(), weights)?;
    let config = unet.config();
    let normal = Distribution::Normal(0.0, 1.0);
    let side = config.sample_size as f32;
    let input = UnetInput {
        latents: Tensor::random([BATCH, config.in_channels, config.sample_size, config.sample_size], normal, &device),
        timesteps: Tensor::from_floats([120.0, 860.0], &device),
        prompt_embeds: Tensor::random([BATCH, TOKENS, config.cross_attention_dim.get(0)], normal, &device),
        pooled: Tensor::random([BATCH, config.pooled_dim()], normal, &device),
        time_ids: Tensor::<2>::from_floats([[side, side, 0.0, 0.0, side, side]], &device).repeat_dim(0, BATCH),
    };
    let tensors = [
        ("output", with_lora.forward(&input, None).into_data()),
        ("output_without", unet.forward(&input, None).into_data()),
        ("latents", input.latents.into_data()),
        ("timestep", input.timesteps.into_data()),
        ("prompt_embeds", input.prompt_embeds.into_data()),
        ("pooled", input.pooled.into_data()),
        ("time_ids", input.time_ids.into_data()),
    ];
    weights::save(output, tensors.map(|(name, data)| (name.to_owned(), data)))
}
