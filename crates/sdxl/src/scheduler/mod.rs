//! Noise schedule of training (diffusers `DDPMScheduler`; Ho et al., arXiv 2006.11239) and the samplers that reverse
//! it, one file each.

use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use hyperlora_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::weights::ConfigText;

mod ddim;
mod dpm_solver;
mod euler;
mod sampler;
mod spacing;

pub use ddim::DdimSampler;
pub use dpm_solver::DpmSolverSampler;
pub use euler::EulerSampler;
pub use sampler::{NoiseSampler, SamplerKind};

/// Image share at a last timestep of pure noise, for samplers that divide by its root: the smallest f16 number, as in
/// diffusers.
const SMALLEST_SHARE: f64 = 1.0 / (1 << 24) as f64;

/// Upper limit of training timesteps in a config; all bases have 1000.
const MOST_TIMESTEPS: usize = 1 << 20;

/// Prediction target of the UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity `sqrt(a) noise - sqrt(1 - a) latents` (Salimans and Ho, arXiv 2202.00512).
    VPrediction,
}

/// Spacing of sampling steps over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// Multiples of `training steps / steps`, from 0, plus `steps_offset`: SDXL.
    Leading,
    /// Multiples of `training steps / steps`, from the last timestep downwards.
    Trailing,
    /// Evenly spaced from the first to the last.
    Linspace,
}

/// Growth of the noise variance over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Linear in beta.
    Linear,
    /// Linear in the square root of beta: Stable Diffusion.
    ScaledLinear,
}

/// Noise level at which sampling ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigmas {
    /// Zero.
    Zero,
    /// Noise level of the first training timestep.
    SigmaMin,
}

/// The keys of a base's `scheduler_config.json` that affect the computation. Other keys are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct ScheduleConfig {
    /// Number of training timesteps, 1000.
    pub num_train_timesteps: usize,
    /// Beta of the first timestep.
    pub beta_start: f64,
    /// Beta of the last timestep.
    pub beta_end: f64,
    /// Interpolation between the two.
    pub beta_schedule: BetaSchedule,
    /// Prediction target of the UNet.
    #[serde(default = "epsilon")]
    pub prediction_type: Prediction,
    /// Spacing of sampling steps; defaults to each sampler's own in diffusers.
    #[serde(default)]
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Offset of the timesteps in leading spacing.
    #[serde(default)]
    pub steps_offset: usize,
    /// Shifts the schedule so that the last timestep is pure noise (Lin et al., arXiv 2305.08891).
    #[serde(default)]
    pub rescale_betas_zero_snr: bool,
    /// Spaces the noise levels of Euler and DPM-Solver after Karras et al., arXiv 2206.00364, equation 5.
    #[serde(default)]
    pub use_karras_sigmas: Option<bool>,
    /// Final noise level of Euler and DPM-Solver.
    #[serde(default = "zero")]
    pub final_sigmas_type: FinalSigmas,
    /// DDIM ends at zero noise instead of the first training timestep's.
    #[serde(default = "yes")]
    pub set_alpha_to_one: bool,
    /// DPM-Solver ends in a first-order step if there are fewer than 15 steps.
    #[serde(default = "yes")]
    pub lower_order_final: bool,
    /// DPM-Solver always ends in a first-order step.
    #[serde(default)]
    pub euler_at_final: bool,
    /// Class name of the sampler that the base was published with.
    #[serde(default, rename = "_class_name")]
    pub class_name: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Config keys that change training, with the supported values. `null` and absence are supported too.
fn trained_keys() -> [(&'static str, Vec<Value>); 3] {
    // A learned variance adds a second UNet output, which is unsupported. The fixed variances affect samplers only.
    let variances = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"];
    [
        ("trained_betas", Vec::new()),
        ("timestep_type", vec![json!("discrete")]),
        ("variance_type", variances.map(Value::from).to_vec()),
    ]
}

fn epsilon() -> Prediction {
    Prediction::Epsilon
}

fn zero() -> FinalSigmas {
    FinalSigmas::Zero
}

fn yes() -> bool {
    true
}

impl ScheduleConfig {
    /// Reports the first of `keys` with an unsupported value.
    fn check_keys(&self, keys: &[(&str, Vec<Value>)]) -> std::result::Result<(), String> {
        for (key, supported) in keys {
            let value = self.others.get(*key).filter(|value| !value.is_null() && !supported.contains(value));
            if let Some(value) = value {
                let supported: Vec<_> = [Value::Null].iter().chain(supported).map(Value::to_string).collect();
                return Err(format!("{key}: {value} is not supported, only {}", supported.join(", ")));
            }
        }
        Ok(())
    }
}

/// Noise schedule: the image's share at each training timestep.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_sdxl::scheduler::NoiseSchedule;
/// use hyperlora_sdxl::source::configs::SCHEDULER;
/// use hyperlora_sdxl::weights::ConfigText;
///
/// // `NoiseSchedule::load` reads the config of a base instead.
/// let schedule = NoiseSchedule::parse(&ConfigText::built_in("scheduler_config.json", SCHEDULER))?;
/// assert_eq!(schedule.alphas_cumprod().len(), 1000);
/// let latents = Tensor::<4>::zeros([2, 4, 8, 8], &Device::flex());
/// let noise = latents.ones_like();
/// // One timestep per sample.
/// let noisy = schedule.add_noise(latents, noise, &[10, 900]);
/// assert_eq!(noisy.dims(), [2, 4, 8, 8]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    config: ScheduleConfig,
    /// Config file, for error messages.
    place: String,
    alphas_cumprod: Vec<f32>,
}

impl NoiseSchedule {
    /// Loads `scheduler_config.json` of a folder (`.../scheduler`).
    ///
    /// # Errors
    /// Input: the file is missing or broken, or the schedule is not supported.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::parse(&ConfigText::read(&folder.join("scheduler_config.json"))?)
    }

    /// Parses and checks a config.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn parse(text: &ConfigText) -> Result<Self> {
        let schedule = Self::new(text.parse()?)
            .map_err(|problem| Error::file(text.origin(), problem, "use the scheduler_config.json of an SDXL base"))?;
        Ok(Self { place: text.origin().display().to_string(), ..schedule })
    }

    /// Computes the noise schedule.
    ///
    /// # Errors
    /// A message with the unsupported key and the problem.
    pub fn new(config: ScheduleConfig) -> std::result::Result<Self, String> {
        let ScheduleConfig { num_train_timesteps: count, beta_start: start, beta_end: end, .. } = config;
        config.check_keys(&trained_keys())?;
        if config.rescale_betas_zero_snr && config.prediction_type == Prediction::Epsilon {
            let problem = "a schedule that ends in pure noise needs prediction_type v_prediction";
            return Err(format!("rescale_betas_zero_snr: {problem}: pure noise says nothing about the image"));
        }
        if !(2..=MOST_TIMESTEPS).contains(&count) {
            return Err(format!("num_train_timesteps: {count} is not within 2 and {MOST_TIMESTEPS}"));
        }
        if config.steps_offset >= count {
            return Err(format!("steps_offset: {} is beyond the last of {count} timesteps", config.steps_offset));
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
        let mut shares: Vec<f64> = (0..count)
            .map(|step| {
                left *= 1.0 - beta(step);
                left
            })
            .collect();
        if shares.first().is_none_or(|&share| share as f32 == 1.0) {
            return Err(format!("beta_start: {start} adds less noise than f32 can represent"));
        }
        if config.rescale_betas_zero_snr {
            end_in_noise(&mut shares);
        }
        let place = "scheduler_config.json".into();
        Ok(Self { config, place, alphas_cumprod: shares.into_iter().map(|share| share as f32).collect() })
    }

    /// Config of the schedule.
    pub fn config(&self) -> &ScheduleConfig {
        &self.config
    }

    /// Alpha-bar: share of the image's variance at each training timestep; falls from about 1 to about 0.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// Noise level at each training timestep for an unscaled image, ascending: `sqrt((1 - a) / a)`.
    fn sigmas(&self) -> Vec<f64> {
        let sigma = |&share: &f32| {
            let share = f64::from(share).max(SMALLEST_SHARE);
            ((1.0 - share) / share).sqrt()
        };
        self.alphas_cumprod.iter().map(sigma).collect()
    }

    /// Checks the number of sampling steps.
    fn check_steps(&self, steps: usize) -> Result<()> {
        let train = self.config.num_train_timesteps;
        if (1..=train).contains(&steps) {
            return Ok(());
        }
        Err(Error::input("steps", format!("{steps} is not within 1 and {train}"), "20 to 30 are usual"))
    }

    /// Checks the config keys that affect `sampler`.
    fn check_sampler(&self, sampler: &str, keys: &[(&str, Vec<Value>)]) -> Result<()> {
        self.config.check_keys(keys).map_err(|problem| {
            let remedy = "draw with another --sampler (train.samples.sampler), or change the key in the base's file";
            Error::input(&self.place, format!("{problem} with the sampler {sampler}"), remedy)
        })
    }

    /// Computes `sqrt(a) latents + sqrt(1 - a) noise`, all `[B, C, h, w]`, with one timestep below
    /// `num_train_timesteps` per sample.
    pub fn add_noise(&self, latents: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        let (image, rest) = self.shares(&latents, timesteps);
        latents * image + noise * rest
    }

    /// Returns the UNet's prediction target for [`add_noise`](Self::add_noise): the noise or the velocity.
    pub fn target(&self, latents: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        match self.config.prediction_type {
            Prediction::Epsilon => noise,
            Prediction::VPrediction => {
                let (image, rest) = self.shares(&latents, timesteps);
                noise * image - latents * rest
            }
        }
    }

    /// Returns `sqrt(a)` and `sqrt(1 - a)` of each sample, `[B, 1, 1, 1]`.
    fn shares(&self, like: &Tensor<4>, timesteps: &[usize]) -> (Tensor<4>, Tensor<4>) {
        let per_sample = |share: fn(f32) -> f32| {
            let values: Vec<f32> = timesteps.iter().map(|&t| share(self.alphas_cumprod[t])).collect();
            let data = TensorData::new(values, [timesteps.len(), 1, 1, 1]);
            Tensor::from_data(data, (&like.device(), like.dtype()))
        };
        (per_sample(f32::sqrt), per_sample(|a| (1.0 - a).sqrt()))
    }
}

/// Shifts and scales the roots of `shares` so that the last becomes 0 and the first stays (Lin et al., arXiv
/// 2305.08891).
fn end_in_noise(shares: &mut [f64]) {
    let root = |share: Option<&f64>| share.copied().unwrap_or_default().sqrt();
    let (first, last) = (root(shares.first()), root(shares.last()));
    for share in shares {
        *share = ((share.sqrt() - last) * first / (first - last)).powi(2);
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
        assert_eq!(with("solver_order", Value::Null), Ok(()));
        for (key, value) in [
            ("num_train_timesteps", 1.into()),
            ("beta_start", (-0.1).into()),
            ("beta_end", 1.5.into()),
            ("beta_schedule", "squaredcos_cap_v2".into()),
            ("prediction_type", "sample".into()),
            ("trained_betas", vec![0.1].into()),
            ("rescale_betas_zero_snr", true.into()),
            ("timestep_type", "continuous".into()),
            ("variance_type", "learned_range".into()),
        ] {
            assert!(with(key, value).is_err(), "{key} was accepted");
        }
    }

    #[test]
    fn only_the_sampler_that_a_key_is_for_refuses_it() {
        let samplers = [SamplerKind::Euler, SamplerKind::DpmPp2m, SamplerKind::DpmPp2mKarras, SamplerKind::Ddim];
        for (key, value, refusing) in [
            ("variance_type", json!("fixed_small"), &samplers[4..]),
            ("lambda_min_clipped", json!("-Infinity"), &samplers[4..]),
            ("lambda_min_clipped", json!(-5.1), &samplers[1..3]),
            ("clip_sample", json!(true), &samplers[3..]),
            ("thresholding", json!(true), &samplers[1..]),
            ("sigma_max", json!("Infinity"), &samplers[..1]),
            ("use_beta_sigmas", json!(true), &samplers[..3]),
            ("solver_order", json!(3), &samplers[1..3]),
            ("algorithm_type", json!("sde-dpmsolver++"), &samplers[1..3]),
        ] {
            let mut config = json!({
                "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            });
            config[key] = value;
            let config = serde_json::from_value::<ScheduleConfig>(config).map_err(|problem| problem.to_string());
            let schedule = config.and_then(NoiseSchedule::new).expect("training needs none of these keys");
            for sampler in samplers {
                let made = NoiseSampler::new(&schedule, Some(sampler), 20);
                assert_eq!(made.is_err(), refusing.contains(&sampler), "{key}, {sampler:?}");
                assert!(made.map_err(|error| error.to_string()).err().is_none_or(|told| told.contains(key)));
            }
        }
    }
}
