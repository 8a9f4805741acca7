//! Times the phases of one training step of the whole ID-LoRA with a UNet of full size, on random conditions: `cargo
//! run --release -p hyperlora-tools --bin full_size_step -- UNET K PIXELS`.
//!
//! The calls are those of `burn_hyperlora::train::step` without the frozen encoders, whose outputs are replaced by
//! random numbers. UNET is a folder in diffusers layout (`ci/parity/random_sdxl.py` makes one), loaded as bf16 with
//! recomputation; K is the number of bases per matrix (ranks 8 and 4).

use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_hyperlora::conditioning::{IdPortraits, Portraits};
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ParameterGroup, Stage};
use burn_hyperlora::objective::mean_squared_error;
use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding};
use burn_hyperlora::train::forward::make_lora;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::WorldOfOne;
use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
use hyperlora_testing::ALLOCATOR;

/// Pixels per side of a latent.
const VAE_SCALE: usize = 8;

/// Shape of CLIP ViT-L/14's states: 256 patches and the class token.
const CLIP_STATES: [usize; 3] = [1, 257, 1024];

fn main() -> Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let usage = || Error::input("full_size_step", "three arguments are needed", "give UNET K PIXELS");
    let [unet, basis, pixels] = &given[..] else { return Err(usage()) };
    let number = |text: &String| text.parse::<usize>().map_err(|_| usage());
    let (basis, side) = (number(basis)?, number(pixels)? / VAE_SCALE);
    let device = Device::flex();
    let mut clock = Clock(Instant::now());

    let unet = UNet2DConditionModel::load_as(Path::new(unet), FloatDType::BF16, &device)?;
    clock.lap("load the UNet");
    let config = HyperLoraConfig { basis, ..HyperLoraConfig::default() };
    let is_base = |group: &ParameterGroup| matches!(group, ParameterGroup::BaseResampler | ParameterGroup::BaseBases);
    let groups: Vec<_> = ParameterGroup::ALL.into_iter().filter(|group| !is_base(group)).collect();
    let mut hyper_lora =
        HyperLora::new(&config, unet.attention_sites(), 0, &device.clone().autodiff()).trainable(&groups);
    let optim = OptimConfig::default();
    let world = WorldOfOne::new();
    let mut optimizer = Optimizer::new(&optim, &hyper_lora, Sharding::WHOLE);
    let (input, target) = (input(&unet, side, &device), normal([1, 4, side, side], &device));
    let made = make_lora(&hyper_lora, Stage::IdEmbedding, portraits(&config, &device).autodiff())?;
    clock.lap("hypernetwork, its values drawn on the way");
    let made = {
        drop(made);
        make_lora(&hyper_lora, Stage::IdEmbedding, portraits(&config, &device).autodiff())?
    };
    clock.lap("hypernet");
    let plain = made.lora.clone().map(Tensor::inner);
    let (loss, gradients, _) = unet.loss_and_lora_gradients(&input, plain, true, |prediction| {
        mean_squared_error(prediction, Tensor::from_inner(target))
    });
    clock.lap("unet");
    let seeds = made.lora.tensors().zip(gradients.tensors()).filter(|(tensor, _)| tensor.is_tracked());
    let seeds = seeds.map(|(tensor, gradient)| (tensor.clone() * Tensor::from_inner(gradient.clone())).sum());
    let mut backward = Tensor::cat(seeds.collect(), 0).sum().backward();
    let gradients = GradientMap::take(&hyper_lora, &mut backward);
    drop((backward, made));
    clock.lap("backward");
    optimizer.accumulate(gradients)?;
    let reduced = optimizer.reduce(&world)?;
    let norm = reduced.norm;
    let reduced = reduced.clip(optim.clip_norm);
    optimizer.step(&mut hyper_lora, reduced, optim.learning_rate, &world)?;
    clock.lap("update");
    let loss: Vec<f32> = loss.into_data().iter().collect();
    println!("loss {loss:?}, gradient norm {norm:e}, {} parameters by name", hyper_lora.parameter_names().len());
    Ok(())
}

struct Clock(Instant);

impl Clock {
    fn lap(&mut self, phase: &str) {
        let mib = |bytes: usize| bytes >> 20;
        println!(
            "{phase:45} {:8.1} s, memory {:6} MiB, peak {:6} MiB",
            self.0.elapsed().as_secs_f64(),
            mib(ALLOCATOR.current_usage()),
            mib(ALLOCATOR.peak_usage())
        );
        ALLOCATOR.reset_peak_usage();
        self.0 = Instant::now();
    }
}

fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn input(unet: &UNet2DConditionModel, side: usize, device: &Device) -> UnetInput {
    let config = unet.config();
    let size = (side * VAE_SCALE) as f32;
    UnetInput {
        latents: normal([1, config.in_channels, side, side], device),
        timesteps: Tensor::from_floats([500.0], device),
        prompt_embeds: normal([1, 77, config.cross_attention_dim.get(0)], device),
        pooled: normal([1, config.pooled_dim()], device),
        time_ids: Tensor::from_floats([[size, size, 0.0, 0.0, size, size]], device),
    }
}

fn portraits(config: &HyperLoraConfig, device: &Device) -> Portraits {
    Portraits {
        id: Some(IdPortraits {
            states: normal(CLIP_STATES, device),
            embedding: Tensor::full([1, config.id_embedding_dim], (config.id_embedding_dim as f32).powf(-0.5), device),
        }),
        base_states: normal(CLIP_STATES, device),
        id_weight: Tensor::ones([1], device),
        base_weight: Tensor::ones([1], device),
    }
}
