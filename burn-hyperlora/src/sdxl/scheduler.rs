//! The noise schedule of training (diffusers `DDPMScheduler`; Ho et al., arXiv 2006.11239) and the Euler sampler
//! (diffusers `EulerDiscreteScheduler`; Karras et al., arXiv 2206.00364, algorithm 2 without churn).

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use serde::Deserialize;

use crate::error::{Error, Result};

/// What the UNet predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity `sqrt(a) noise - sqrt(1 - a) latents` (Salimans and Ho, arXiv 2202.00512).
    VPrediction,
}

/// How sampling steps are laid over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Multiples of `training steps / steps`, from 0, plus `steps_offset`: SDXL.
    Leading,
    /// Multiples of `training steps / steps`, from the last timestep downwards.
    Trailing,
    /// Evenly from the first to the last.
    Linspace,
}

/// How the noise variance grows over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly in beta.
    Linear,
    /// Evenly in the square root of beta: Stable Diffusion.
    ScaledLinear,
}

/// The `scheduler_config.json` of a base, as far as it changes what is computed. Other keys are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct ScheduleConfig {
    /// Training timesteps, 1000.
    pub num_train_timesteps: usize,
    /// Beta of the first timestep.
    pub beta_start: f64,
    /// Beta of the last timestep.
    pub beta_end: f64,
    /// The way from the first to the last.
    pub beta_schedule: BetaSchedule,
    /// What the UNet predicts.
    #[serde(default = "epsilon")]
    pub prediction_type: Prediction,
    /// The spacing of sampling steps.
    #[serde(default = "leading")]
    pub timestep_spacing: TimestepSpacing,
    /// Added to the timesteps of leading spacing.
    #[serde(default)]
    pub steps_offset: usize,
    #[serde(default)]
    trained_betas: Option<Vec<f64>>,
    #[serde(default)]
    rescale_betas_zero_snr: bool,
}

fn epsilon() -> Prediction {
    Prediction::Epsilon
}

fn leading() -> TimestepSpacing {
    TimestepSpacing::Leading
}

/// How much of an image is left at each training timestep.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    config: ScheduleConfig,
    alphas_cumprod: Vec<f32>,
}

impl NoiseSchedule {
    /// Loads `scheduler_config.json` of a folder (`.../scheduler`).
    ///
    /// # Errors
    /// Input for a missing or broken file and for a schedule that is not supported.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("scheduler_config.json");
        let remedy = "use the scheduler_config.json of an SDXL base";
        let text = std::fs::read_to_string(&path).map_err(|source| Error::read(&path, source))?;
        let config: ScheduleConfig =
            serde_json::from_str(&text).map_err(|problem| Error::file(&path, problem, remedy))?;
        Self::new(config).map_err(|problem| Error::file(&path, problem, remedy))
    }

    /// Computes the schedule; an error tells the key that does not hold.
    ///
    /// # Errors
    /// The key and the problem, as a message.
    pub fn new(config: ScheduleConfig) -> std::result::Result<Self, String> {
        let ScheduleConfig { num_train_timesteps: count, beta_start: start, beta_end: end, .. } = config;
        if config.trained_betas.is_some() {
            return Err("trained_betas: is not supported, only null".into());
        }
        if config.rescale_betas_zero_snr {
            return Err("rescale_betas_zero_snr: is not supported, only false".into());
        }
        if count < 2 {
            return Err(format!("num_train_timesteps: {count} is too few"));
        }
        if !(start > 0.0 && start <= end && end < 1.0) {
            return Err(format!("beta_start, beta_end: {start} to {end} do not rise between 0 and 1"));
        }
        let beta = |step: usize| {
            let share = step as f64 / (count - 1) as f64;
            match config.beta_schedule {
                BetaSchedule::Linear => start + (end - start) * share,
                BetaSchedule::ScaledLinear => (start.sqrt() + (end.sqrt() - start.sqrt()) * share).powi(2),
            }
        };
        let mut left = 1.0;
        let alphas_cumprod = (0..count)
            .map(|step| {
                left *= 1.0 - beta(step);
                left as f32
            })
            .collect();
        Ok(Self { config, alphas_cumprod })
    }

    /// What the schedule was made from.
    pub fn config(&self) -> &ScheduleConfig {
        &self.config
    }

    /// The share of the image's variance left at each training timestep; falls from about 1 to about 0.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// `sqrt(a) latents + sqrt(1 - a) noise`, all `[B, C, h, w]`, with one timestep below `num_train_timesteps` per sample.
    pub fn add_noise(&self, latents: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        let (image, rest) = self.shares(&latents, timesteps);
        latents * image + noise * rest
    }

    /// What the UNet shall predict for [`add_noise`](Self::add_noise)'s result: the noise or the velocity.
    pub fn target(&self, latents: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        match self.config.prediction_type {
            Prediction::Epsilon => noise,
            Prediction::VPrediction => {
                let (image, rest) = self.shares(&latents, timesteps);
                noise * image - latents * rest
            }
        }
    }

    /// `sqrt(a)` and `sqrt(1 - a)` of each sample, `[B, 1, 1, 1]`.
    fn shares(&self, like: &Tensor<4>, timesteps: &[usize]) -> (Tensor<4>, Tensor<4>) {
        let per_sample = |share: fn(f32) -> f32| {
            let values: Vec<f32> = timesteps.iter().map(|&t| share(self.alphas_cumprod[t])).collect();
            let data = TensorData::new(values, [timesteps.len(), 1, 1, 1]);
            Tensor::from_data(data, (&like.device(), like.dtype()))
        };
        (per_sample(f32::sqrt), per_sample(|a| (1.0 - a).sqrt()))
    }
}

/// A run of Euler steps from noise to an image, in the variance-exploding view: `x = image + sigma * noise`.
#[derive(Debug, Clone)]
pub struct EulerSampler {
    prediction: Prediction,
    spacing: TimestepSpacing,
    timesteps: Vec<f32>,
    /// One more than timesteps: the last is 0.
    sigmas: Vec<f32>,
}

impl EulerSampler {
    /// Lays `steps` over the schedule, as `EulerDiscreteScheduler.set_timesteps`.
    ///
    /// # Errors
    /// Input unless `steps` is within 1 and the number of training timesteps.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        let ScheduleConfig { num_train_timesteps: train, prediction_type, timestep_spacing, steps_offset, .. } =
            schedule.config;
        if steps == 0 || steps > train {
            return Err(Error::input("steps", format!("{steps} is not within 1 and {train}"), "20 to 30 are usual"));
        }
        let (last, ratio) = ((train - 1) as f64, train as f64 / steps as f64);
        let timestep = |step: usize| match timestep_spacing {
            TimestepSpacing::Leading => ((steps - 1 - step) * (train / steps) + steps_offset) as f64,
            TimestepSpacing::Trailing => (train as f64 - step as f64 * ratio).round_ties_even() - 1.0,
            TimestepSpacing::Linspace if steps == 1 => 0.0,
            TimestepSpacing::Linspace => last * (steps - 1 - step) as f64 / (steps - 1) as f64,
        };
        let sigma_at = |timestep: f64| {
            let sigma = |index: usize| {
                let a = f64::from(schedule.alphas_cumprod[index]);
                ((1.0 - a) / a).sqrt()
            };
            let below = timestep.clamp(0.0, last).floor() as usize;
            let above = (below + 1).min(train - 1);
            let share = timestep.clamp(0.0, last) - below as f64;
            (sigma(below) * (1.0 - share) + sigma(above) * share) as f32
        };
        let timesteps: Vec<f64> = (0..steps).map(timestep).collect();
        Ok(Self {
            prediction: prediction_type,
            spacing: timestep_spacing,
            sigmas: timesteps.iter().copied().map(sigma_at).chain([0.0]).collect(),
            timesteps: timesteps.into_iter().map(|timestep| timestep as f32).collect(),
        })
    }

    /// The timestep that the UNet is told at each step, falling.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The noise level before each step, and the 0 after the last.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// What standard normal noise is multiplied by to start.
    pub fn init_noise_sigma(&self) -> f32 {
        let highest = self.sigmas[0];
        match self.spacing {
            TimestepSpacing::Leading => highest.hypot(1.0),
            TimestepSpacing::Trailing | TimestepSpacing::Linspace => highest,
        }
    }

    /// What the UNet sees of `latents` at `step`: their variance brought to about one.
    pub fn scale_model_input(&self, latents: Tensor<4>, step: usize) -> Tensor<4> {
        latents / self.sigmas[step].hypot(1.0)
    }

    /// The latents after `step`, given the UNet's `output` for [`scale_model_input`](Self::scale_model_input).
    pub fn step(&self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        let (sigma, next) = (self.sigmas[step], self.sigmas[step + 1]);
        let slope = match self.prediction {
            Prediction::Epsilon => output,
            // (x - image) / sigma with image = x / (s^2 + 1) - output * s / sqrt(s^2 + 1)
            Prediction::VPrediction => {
                let norm = sigma.hypot(1.0);
                latents.clone() * (sigma / (norm * norm)) + output / norm
            }
        };
        latents + slope * (next - sigma)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_that_cannot_be_computed_are_refused_by_key() {
        let with = |key: &str, value: serde_json::Value| {
            let mut config = serde_json::json!({
                "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            });
            config[key] = value;
            let config = serde_json::from_value::<ScheduleConfig>(config).map_err(|problem| problem.to_string());
            config.and_then(NoiseSchedule::new).map(|_| ())
        };
        assert_eq!(with("unknown_key", 1.into()), Ok(()));
        for (key, value) in [
            ("num_train_timesteps", 1.into()),
            ("beta_start", (-0.1).into()),
            ("beta_end", 1.5.into()),
            ("beta_schedule", "squaredcos_cap_v2".into()),
            ("prediction_type", "sample".into()),
            ("trained_betas", vec![0.1].into()),
            ("rescale_betas_zero_snr", true.into()),
        ] {
            assert!(with(key, value).is_err(), "{key} was accepted");
        }
    }
}
