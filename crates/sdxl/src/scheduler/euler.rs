//! Euler steps (diffusers `EulerDiscreteScheduler`; Karras et al., arXiv 2206.00364, algorithm 2 without churn).

use burn::tensor::Tensor;
use hyperlora_core::Result;
use serde_json::{Value, json};

use crate::scheduler::{FinalSigmas, NoiseSchedule, Prediction, TimestepSpacing, spacing};

/// A run of Euler steps from noise to an image, in variance-exploding form: `x = image + sigma * noise`.
#[derive(Debug, Clone)]
pub struct EulerSampler {
    prediction: Prediction,
    spacing: TimestepSpacing,
    timesteps: Vec<f32>,
    /// Noise levels, one more than timesteps.
    sigmas: Vec<f32>,
}

/// Config keys that affect this sampler, with the supported values.
fn keys() -> [(&'static str, Vec<Value>); 5] {
    [
        ("interpolation_type", vec![json!("linear")]),
        ("sigma_min", Vec::new()),
        ("sigma_max", Vec::new()),
        ("use_exponential_sigmas", vec![json!(false)]),
        ("use_beta_sigmas", vec![json!(false)]),
    ]
}

impl EulerSampler {
    /// Distributes `steps` over the schedule, as `EulerDiscreteScheduler.set_timesteps`.
    ///
    /// # Errors
    /// Input: `steps` is not within 1 and the number of training timesteps, or unsupported config keys.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        schedule.check_sampler("euler", &keys())?;
        schedule.check_steps(steps)?;
        let config = &schedule.config;
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace);
        let mut timesteps = spacing::timesteps(schedule, spacing, steps);
        let table = schedule.sigmas();
        let mut sigmas = spacing::interpolate(&table, &timesteps);
        if config.use_karras_sigmas == Some(true) {
            sigmas = spacing::karras(sigmas[0], sigmas[steps - 1], steps);
            timesteps = spacing::places(&table, &sigmas);
        }
        sigmas.push(match config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => table[0],
        });
        Ok(Self {
            prediction: config.prediction_type,
            spacing,
            timesteps: timesteps.into_iter().map(|timestep| timestep as f32).collect(),
            sigmas: sigmas.into_iter().map(|sigma| sigma as f32).collect(),
        })
    }

    /// UNet timestep of each step, descending.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// Noise level before each step, and the one after the last.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Factor of standard normal noise for the initial latents.
    pub fn init_noise_sigma(&self) -> f32 {
        let highest = self.sigmas[0];
        match self.spacing {
            TimestepSpacing::Leading => highest.hypot(1.0),
            TimestepSpacing::Trailing | TimestepSpacing::Linspace => highest,
        }
    }

    /// Scales `latents` to the UNet's input at `step`, with a variance of about one.
    pub fn scale_model_input(&self, latents: Tensor<4>, step: usize) -> Tensor<4> {
        latents / self.sigmas[step].hypot(1.0)
    }

    /// Computes the latents after `step` from the UNet's `output` for [`scale_model_input`](Self::scale_model_input).
    pub fn step(&self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        let (sigma, next) = (self.sigmas[step], self.sigmas[step + 1]);
        match self.prediction {
            Prediction::Epsilon => latents + output * (next - sigma),
            // x + (x - image) / sigma * (next - sigma) with image = x / norm^2 - output * sigma / norm. The factors of
            // x are combined because they nearly cancel for large sigma.
            Prediction::VPrediction => {
                let norm = sigma.hypot(1.0);
                latents * ((1.0 + sigma * next) / (norm * norm)) + output * ((next - sigma) / norm)
            }
        }
    }
}
