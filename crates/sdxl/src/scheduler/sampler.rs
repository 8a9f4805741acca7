//! The samplers as one, and the choice among them.

use burn::tensor::Tensor;
use clap::ValueEnum;
use hyperlora_core::Result;
use serde::{Deserialize, Serialize};

use crate::scheduler::{DdimSampler, DpmSolverSampler, EulerSampler, NoiseSchedule, ScheduleConfig};

/// Which sampler draws. What it leaves open, the base's `scheduler_config.json` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
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
    /// The sampler that the base was published with, Euler where that one is not here.
    pub fn of_base(config: &ScheduleConfig) -> Self {
        match config.class_name.as_deref() {
            Some("DPMSolverMultistepScheduler") => Self::DpmPp2m,
            Some("DDIMScheduler") => Self::Ddim,
            _ => Self::Euler,
        }
    }
}

/// A run of steps from noise to an image.
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
    /// Lays `steps` of `kind` over the schedule; of the base's own kind where none is given.
    ///
    /// # Errors
    /// Input for no steps, and for more than the sampler can lay over the schedule.
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

    /// The timestep that the UNet is told at each step, falling.
    pub fn timesteps(&self) -> &[f32] {
        match self {
            Self::Euler(sampler) => sampler.timesteps(),
            Self::DpmSolver(sampler) => sampler.timesteps(),
            Self::Ddim(sampler) => sampler.timesteps(),
        }
    }

    /// What standard normal noise is multiplied by to start.
    pub fn init_noise_sigma(&self) -> f32 {
        match self {
            Self::Euler(sampler) => sampler.init_noise_sigma(),
            Self::DpmSolver(_) | Self::Ddim(_) => 1.0,
        }
    }

    /// What the UNet sees of `latents`, `[B, C, h, w]`, at `step`: their variance is about one.
    pub fn scale_model_input(&self, latents: Tensor<4>, step: usize) -> Tensor<4> {
        match self {
            Self::Euler(sampler) => sampler.scale_model_input(latents, step),
            Self::DpmSolver(_) | Self::Ddim(_) => latents,
        }
    }

    /// The latents after `step`, given the UNet's `output` for [`scale_model_input`](Self::scale_model_input). Steps are
    /// made in their order.
    pub fn step(&mut self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        match self {
            Self::Euler(sampler) => sampler.step(output, latents, step),
            Self::DpmSolver(sampler) => sampler.step(output, latents, step),
            Self::Ddim(sampler) => sampler.step(output, latents, step),
        }
    }
}
