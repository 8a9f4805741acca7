//! DDIM steps without noise (diffusers `DDIMScheduler` with `eta` 0 and `clip_sample` off; Song et al., arXiv
//! 2010.02502, equation 12).

use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};
use serde_json::{Value, json};

use crate::scheduler::{NoiseSchedule, Prediction, TimestepSpacing, spacing};

/// A sampling run from noise to an image, in variance-preserving form: `x = sqrt(a) * image + sqrt(1 - a) * noise`.
#[derive(Debug, Clone)]
pub struct DdimSampler {
    prediction: Prediction,
    timesteps: Vec<f32>,
    /// `a` before and after each step.
    shares: Vec<[f64; 2]>,
}

/// Config keys that affect this sampler, with the supported values.
fn keys() -> [(&'static str, Vec<Value>); 2] {
    [("clip_sample", vec![json!(false)]), ("thresholding", vec![json!(false)])]
}

impl DdimSampler {
    /// Distributes `steps` over the schedule, as `DDIMScheduler.set_timesteps`.
    ///
    /// # Errors
    /// Input: `steps` is not within 1 and the number of training timesteps (fewer if `steps_offset` points beyond
    /// them), or unsupported config keys.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        schedule.check_sampler("ddim", &keys())?;
        schedule.check_steps(steps)?;
        let config = &schedule.config;
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
        let places = spacing::timesteps(schedule, spacing, steps);
        let timesteps: Vec<usize> = places.into_iter().map(|place| place.round_ties_even() as usize).collect();
        let share = |timestep: usize| schedule.alphas_cumprod.get(timestep).copied().map(f64::from);
        let end = if config.set_alpha_to_one { Some(1.0) } else { share(0) };
        let stride = config.num_train_timesteps / steps;
        let shares = timesteps.iter().map(|&timestep| {
            let after = timestep.checked_sub(stride).map_or(end, share);
            Some([share(timestep)?, after?])
        });
        let shares = shares.collect::<Option<Vec<_>>>().ok_or_else(|| {
            let problem = format!("{steps} lead beyond the last training timestep: steps_offset is added to them");
            Error::input("steps", problem, "take fewer")
        })?;
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f32).collect();
        Ok(Self { prediction: config.prediction_type, timesteps, shares })
    }

    /// UNet timestep of each step, descending.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// Computes the latents after `step` from the UNet's `output` for the latents before it.
    pub fn step(&self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        let [before, after] = self.shares[step];
        let (alpha, sigma) = (before.sqrt(), (1.0 - before).sqrt());
        let (image, noise) = match self.prediction {
            Prediction::Epsilon => ((latents - output.clone() * sigma) / alpha, output),
            Prediction::VPrediction => {
                (latents.clone() * alpha - output.clone() * sigma, output * alpha + latents * sigma)
            }
        };
        image * after.sqrt() + noise * (1.0 - after).sqrt()
    }
}
