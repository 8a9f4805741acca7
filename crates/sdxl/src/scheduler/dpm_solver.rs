//! DPM-Solver++ of second order, multistep (diffusers `DPMSolverMultistepScheduler` with `dpmsolver++` and `midpoint`;
//! Lu et al., arXiv 2211.01095, algorithm 2).

use burn::tensor::Tensor;
use hyperlora_core::Result;
use serde_json::{Value, json};

use crate::scheduler::{FinalSigmas, NoiseSchedule, Prediction, TimestepSpacing, spacing};

/// Step count below which a run ends in a first-order step, if the config sets `lower_order_final`.
const FEW_STEPS: usize = 15;

/// A sampling run from noise to an image, in variance-preserving form: `x = alpha * image + sigma * noise`.
#[derive(Debug, Clone)]
pub struct DpmSolverSampler {
    prediction: Prediction,
    timesteps: Vec<f32>,
    /// `sigma / alpha` before each step and after the last.
    ratios: Vec<f64>,
    first_order_at_end: bool,
    /// Predicted image of the last step.
    previous: Option<Tensor<4>>,
}

/// Config keys that affect this sampler, with the supported values.
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
        // Diffusers writes its default, no clipping, this way.
        ("lambda_min_clipped", vec![json!("-Infinity")]),
    ]
}

impl DpmSolverSampler {
    /// Distributes `steps` over the schedule, as `DPMSolverMultistepScheduler.set_timesteps` with `use_karras_sigmas:
    /// karras`.
    ///
    /// # Errors
    /// Input: zero steps, so many that two would coincide, or unsupported config keys.
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

    /// UNet timestep of each step, descending.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// Computes the latents after `step` from the UNet's `output` for the latents before it. Steps must run in order.
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
                // Extrapolates the image by half a step, using its slope over ln(alpha / sigma).
                let (h, h_before) = ((ratio / next).ln(), (self.ratios[step - 1] / ratio).ln());
                image.clone() + (image - previous) * (h / h_before / 2.0)
            }
            _ => image,
        };
        let (alpha_next, sigma_next) = shares(next);
        latents * (sigma_next / sigma) + image * (alpha_next * (1.0 - next / ratio))
    }
}

/// Splits a ratio into `alpha` and `sigma` whose squares add up to one.
fn shares(ratio: f64) -> (f64, f64) {
    let norm = ratio.hypot(1.0);
    (1.0 / norm, ratio / norm)
}
