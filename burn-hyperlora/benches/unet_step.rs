//! Times the UNet's forward pass and its LoRA gradients on a folder in diffusers layout.
//!
//!     python ci/bench/unet_step.py --folder /tmp/unet        # writes a random UNet, times PyTorch
//!     UNET=/tmp/unet cargo bench --bench unet_step

use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use burn_hyperlora::error::{Error, Result};
use burn_hyperlora::lora::{AttentionLora, LoraPair, LoraWeights};
use burn_hyperlora::sdxl::unet::{UNet2DConditionModel, UnetInput};

const BATCH: usize = 16;
const LATENT: usize = 16;
const TOKENS: usize = 77;
const RANK: usize = 8;
const REPEATS: u32 = 5;

fn main() -> Result<()> {
    let Some(folder) = std::env::var_os("UNET").map(PathBuf::from) else {
        return Err(Error::input("UNET", "is not set", "name the UNet folder that ci/bench/unet_step.py wrote"));
    };
    let device = Device::flex();
    let unet = UNet2DConditionModel::load(&folder, &device)?;
    let config = unet.config();
    let normal = Distribution::Normal(0.0, 1.0);
    let input = UnetInput {
        latents: Tensor::random([BATCH, config.in_channels, LATENT, LATENT], normal, &device),
        timesteps: Tensor::full([BATCH], 500.0, &device),
        prompt_embeds: Tensor::random([BATCH, TOKENS, config.cross_attention_dim.get(0)], normal, &device),
        pooled: Tensor::random([BATCH, config.pooled_dim()], normal, &device),
        time_ids: Tensor::full([BATCH, 6], 64.0, &device),
    };
    let pair = |d_input, d_output| LoraPair {
        down: Tensor::random([BATCH, d_input, RANK], normal, &device) * 0.1,
        up: Tensor::random([BATCH, RANK, d_output], normal, &device) * 0.1,
    };
    let modules = unet.attention_sites().iter().map(|site| {
        let width = site.hidden_size;
        let context = site.cross_attention_dim.unwrap_or(width);
        AttentionLora {
            q: pair(width, width),
            k: pair(context, width),
            v: pair(context, width),
            out: pair(width, width),
        }
    });
    let lora = LoraWeights { modules: modules.collect() };

    time("forward", || {
        let _ = unet.forward(&input, Some(&lora)).into_data();
    });
    for recompute in [true, false] {
        time(&format!("gradients, recompute {recompute}"), || {
            let (loss, ..) =
                unet.loss_and_lora_gradients(&input, lora.clone(), recompute, |prediction| prediction.square().mean());
            let _ = loss.into_data();
        });
    }
    Ok(())
}

fn time(name: &str, mut run: impl FnMut()) {
    run();
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!("{name}: {:.1} ms (best of {REPEATS})", best * 1e3);
}
