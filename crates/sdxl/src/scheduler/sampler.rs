//! Sampler choice, and one type for all samplers.

use burn::tensor::Tensor;
use clap::ValueEnum;
use hyperlora_core::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::scheduler::{DdimSampler, DpmSolverSampler, EulerSampler, NoiseSchedule, ScheduleConfig};

/// Sampler kind. The base's `scheduler_config.json` sets its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// Euler.
    Euler,
    /// DPM++ 2M.
    #[serde(rename = "dpmpp-2m")]
    #[value(name = "dpmpp-2m")]
    DpmPp2m,
    /// DPM++ 2M over the noise levels of Karras et al.
    #[serde(rename = "dpmpp-2m-karras")]
    #[value(name = "dpmpp-2m-karras")]
    DpmPp2mKarras,
    /// DDIM without noise.
    Ddim,
}

impl SamplerKind {
    /// Returns the sampler that the base was published with, or Euler if that one is not implemented.
    pub fn of_base(config: &ScheduleConfig) -> Self {
        match config.class_name.as_deref() {
            Some("DPMSolverMultistepScheduler") => Self::DpmPp2m,
            Some("DDIMScheduler") => Self::Ddim,
            _ => Self::Euler,
        }
    }
}

/// A sampling run from noise to an image.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_sdxl::scheduler::{NoiseSampler, NoiseSchedule, SamplerKind};
/// # use hyperlora_sdxl::source::configs::SCHEDULER;
/// # use hyperlora_sdxl::weights::ConfigText;
///
/// # let schedule = NoiseSchedule::parse(&ConfigText::built_in("scheduler_config.json", SCHEDULER))?;
/// # let unet = |input: Tensor<4>, _timestep: f32| input.zeros_like();
/// let mut sampler = NoiseSampler::new(&schedule, Some(SamplerKind::Euler), 20)?;
/// let mut latents = Tensor::ones([1, 4, 8, 8], &Device::flex()) * sampler.init_noise_sigma();
/// for (step, timestep) in sampler.timesteps().to_vec().into_iter().enumerate() {
///     let noise = unet(sampler.scale_model_input(latents.clone(), step), timestep);
///     latents = sampler.step(noise, latents, step);
/// }
/// assert_eq!(latents.dims(), [1, 4, 8, 8]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub enum NoiseSampler {
    /// Euler.
    Euler(EulerSampler),
    /// DPM++ 2M.
    DpmSolver(Box<DpmSolverSampler>),
    /// DDIM.
    Ddim(DdimSampler),
}

impl NoiseSampler {
    /// Distributes `steps` over the noise schedule. Without `kind`, uses the base's own sampler.
    ///
    /// # Errors
    /// Input: zero steps, or more than the sampler can distribute over the schedule.
    pub fn new(schedule: &NoiseSchedule, kind: Option<SamplerKind>, steps: usize) -> Result<Self> {
        let config = schedule.config();
        Ok(match kind.unwrap_or_else(|| SamplerKind::of_base(config)) {
            SamplerKind::Euler => Self::Euler(EulerSampler::new(schedule, steps)?),
            SamplerKind::DpmPp2m => {
                let karras = config.use_karras_sigmas == Some(true);
                Self::DpmSolver(DpmSolverSampler::new(schedule, steps, karras)?.into())
            }
            SamplerKind::DpmPp2mKarras => Self::DpmSolver(DpmSolverSampler::new(schedule, steps, true)?.into()),
            SamplerKind::Ddim => Self::Ddim(DdimSampler::new(schedule, steps)?),
        })
    }

    /// UNet timestep of each step, descending.
    pub fn timesteps(&self) -> &[f32] {
        match self {
            Self::Euler(sampler) => sampler.timesteps(),
            Self::DpmSolver(sampler) => sampler.timesteps(),
            Self::Ddim(sampler) => sampler.timesteps(),
        }
    }

    /// Factor of standard normal noise for the initial latents.
    pub fn init_noise_sigma(&self) -> f32 {
        match self {
            Self::Euler(sampler) => sampler.init_noise_sigma(),
            Self::DpmSolver(_) | Self::Ddim(_) => 1.0,
        }
    }

    /// Scales `latents`, `[B, C, h, w]`, to the UNet's input at `step`, with a variance of about one.
    pub fn scale_model_input(&self, latents: Tensor<4>, step: usize) -> Tensor<4> {
        match self {
            Self::Euler(sampler) => sampler.scale_model_input(latents, step),
            Self::DpmSolver(_) | Self::Ddim(_) => latents,
        }
    }

    /// Computes the latents after `step` from the UNet's `output` for [`scale_model_input`](Self::scale_model_input).
    /// Steps must run in order.
    pub fn step(&mut self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        match self {
            Self::Euler(sampler) => sampler.step(output, latents, step),
            Self::DpmSolver(sampler) => sampler.step(output, latents, step),
            Self::Ddim(sampler) => sampler.step(output, latents, step),
        }
    }
}
