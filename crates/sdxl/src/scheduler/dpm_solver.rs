//! DPM-Solver++ of second order, multistep (diffusers `DPMSolverMultistepScheduler` with `dpmsolver++` and `midpoint`;
//! Lu et al., arXiv 2211.01095, algorithm 2).

use burn::tensor::Tensor;
use hyperlora_core::Result;
use serde_json::{Value, json};

use crate::scheduler::{FinalSigmas, NoiseSchedule, Prediction, TimestepSpacing, spacing};

/// Runs of fewer steps end in a first-order one, where the config's `lower_order_final` says so.
const FEW_STEPS: usize = 15;

/// A run of steps from noise to an image, in the variance-preserving view: `x = alpha * image + sigma * noise`.
#[derive(Debug, Clone)]
pub struct DpmSolverSampler {
    prediction: Prediction,
    timesteps: Vec<f32>,
    /// `sigma / alpha` before each step and after the last.
    ratios: Vec<f64>,
    first_order_at_end: bool,
    /// The image that the last step saw.
    previous: Option<Tensor<4>>,
}

/// Keys of the config that mean something to this sampler, and the values that are supported.
fn keys() -> [(&'static str, Vec<Value>); 9] {
    let off = || vec![json!(false)];
    [
        ("thresholding", off()),
        ("use_exponential_sigmas", off()),
        ("use_beta_sigmas", off()),
        ("use_lu_lambdas", off()),
        ("use_flow_sigmas", off()),
        ("algorithm_type", vec![json!("dpmsolver++")]),
        ("solver_order", vec![json!(2)]),
        ("solver_type", vec![json!("midpoint")]),
        // As diffusers writes its default: nothing is clipped.
        ("lambda_min_clipped", vec![json!("-Infinity")]),
    ]
}

impl DpmSolverSampler {
    /// Lays `steps` over the schedule, as `DPMSolverMultistepScheduler.set_timesteps` with `use_karras_sigmas: karras`.
    ///
    /// # Errors
    /// Input for no steps, for so many that two would fall together, and for keys that it does not support.
    pub fn new(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Self> {
        schedule.check_sampler("dpmpp-2m", &keys())?;
        schedule.check_steps(steps)?;
        let config = &schedule.config;
        let table = schedule.sigmas();
        let (timesteps, mut ratios) = if karras {
            let ratios = spacing::karras(table[table.len() - 1], table[0], steps);
            let places = spacing::places(&table, &ratios);
            (places.into_iter().map(f64::round_ties_even).collect(), ratios)
        } else {
            let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace);
            let timesteps = spacing::solver_timesteps(schedule, spacing, steps)?;
            let ratios = spacing::interpolate(&table, &timesteps);
            (timesteps, ratios)
        };
        ratios.push(match config.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => table[0],
        });
        Ok(Self {
            prediction: config.prediction_type,
            timesteps: timesteps.into_iter().map(|timestep| timestep as f32).collect(),
            ratios,
            first_order_at_end: config.euler_at_final
                || (config.lower_order_final && steps < FEW_STEPS)
                || config.final_sigmas_type == FinalSigmas::Zero,
            previous: None,
        })
    }

    /// The timestep that the UNet is told at each step, falling.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The latents after `step`, given the UNet's `output` for the latents before it. Steps are made in their order.
    pub fn step(&mut self, output: Tensor<4>, latents: Tensor<4>, step: usize) -> Tensor<4> {
        let (ratio, next) = (self.ratios[step], self.ratios[step + 1]);
        let (alpha, sigma) = shares(ratio);
        let image = match self.prediction {
            Prediction::Epsilon => (latents.clone() - output * sigma) / alpha,
            Prediction::VPrediction => latents.clone() * alpha - output * sigma,
        };
        let previous = self.previous.replace(image.clone());

        let last = step + 1 == self.timesteps.len();
        let image = match previous {
            Some(previous) if !(last && self.first_order_at_end) => {
                // The image's slope over the logarithm of alpha / sigma, half a step ahead.
                let (h, h_before) = ((ratio / next).ln(), (self.ratios[step - 1] / ratio).ln());
                image.clone() + (image - previous) * (h / h_before / 2.0)
            }
            _ => image,
        };
        let (alpha_next, sigma_next) = shares(next);
        latents * (sigma_next / sigma) + image * (alpha_next * (1.0 - next / ratio))
    }
}

/// `alpha` and `sigma` of their ratio: their squares add up to one.
fn shares(ratio: f64) -> (f64, f64) {
    let norm = ratio.hypot(1.0);
    (1.0 / norm, ratio / norm)
}
