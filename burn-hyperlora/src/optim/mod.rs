//! Optimiser: gradient accumulation, reduction over the ranks, clipping, AdamW and the learning rate schedule.

mod adamw;
mod buckets;
mod gradients;
mod schedule;
pub mod spikes;
mod window;

use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use adamw::{Optimizer, ReducedGradients, Sharding};
pub use buckets::bucket_bytes;
pub use gradients::GradientMap;
pub use schedule::{Decay, Schedule};

/// Settings of AdamW. The paper names none of them; the defaults are this project's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Peak learning rate, above 0.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment, each at least 0 and below 1.
    pub betas: [f32; 2],
    /// Added to the square root of the bias-corrected second moment; above 0.
    pub epsilon: f32,
    /// Decoupled weight decay per step, multiplied by the learning rate; 0 or above.
    pub weight_decay: f32,
    /// Largest global gradient norm that passes unscaled, above 0; `null` disables clipping.
    pub clip_norm: Option<f64>,
    /// Warm-up and decay of the learning rate.
    pub schedule: Schedule,
}

/// Scaling of the learning rate with the number of ranks. The batch does not scale: `global_batch` is fixed, so `none`
/// keeps a run the same at any world size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScaling {
    /// No scaling.
    #[default]
    None,
    /// Proportional to the square root of the number of ranks.
    Sqrt,
    /// Proportional to the number of ranks.
    Linear,
}

impl LrScaling {
    /// Returns the learning rate's factor in a world of `ranks`.
    pub fn factor(self, ranks: usize) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Sqrt => (ranks as f64).sqrt(),
            Self::Linear => ranks as f64,
        }
    }
}

/// Type in which gradients travel between ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    /// Full precision.
    #[default]
    F32,
    /// Half the bytes, 8 bits of precision; NCCL only.
    Bf16,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.01,
            clip_norm: Some(1.0),
            schedule: Schedule::default(),
        }
    }
}

impl OptimConfig {
    /// Checks every range; `place` names the location of the block, such as `train.yaml: optim`.
    ///
    /// # Errors
    /// Input: names the first key that is out of range.
    pub fn validate(&self, place: &str) -> Result<()> {
        let beta = |value: f32| (0.0..1.0).contains(&value);
        let min_factor = match self.schedule.decay {
            Decay::Constant => 0.0,
            Decay::Cosine { min_factor } => min_factor,
        };
        let checks = [
            ("learning_rate", positive(self.learning_rate), "a finite number above 0, such as 1e-4"),
            ("betas", self.betas.into_iter().all(beta), "two numbers in [0, 1), such as [0.9, 0.999]"),
            ("epsilon", positive(self.epsilon.into()), "a finite number above 0, such as 1e-8"),
            (
                "weight_decay",
                self.weight_decay.is_finite() && self.weight_decay >= 0.0,
                "a finite number, 0 or above, such as 0.01",
            ),
            ("clip_norm", self.clip_norm.is_none_or(positive), "a finite number above 0, or null for no clipping"),
            ("schedule.decay.cosine.min_factor", (0.0..=1.0).contains(&min_factor), "a number in [0, 1]"),
        ];
        match checks.into_iter().find(|(_, holds, _)| !holds) {
            Some((key, _, wanted)) => {
                Err(Error::input(format!("{place}.{key}"), "the value is out of range", format!("give {wanted}")))
            }
            None => Ok(()),
        }
    }

    /// Returns the learning rate of step `step` (from 0) in a run of `total_steps`.
    ///
    /// # Examples
    /// ```
    /// use burn_hyperlora::optim::{OptimConfig, Schedule};
    ///
    /// let schedule = Schedule { warmup_steps: 100, ..Schedule::default() };
    /// let config = OptimConfig { learning_rate: 1e-4, schedule, ..OptimConfig::default() };
    /// assert_eq!(config.learning_rate_at(49, 1000), 0.5e-4);
    /// assert_eq!(config.learning_rate_at(500, 1000), 1e-4);
    /// ```
    pub fn learning_rate_at(&self, step: u64, total_steps: u64) -> f64 {
        self.learning_rate * self.schedule.factor(step, total_steps)
    }
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_and_the_key_is_named() {
        let config = OptimConfig::default();
        assert!(config.validate("train.yaml: optim").is_ok());
        let broken = [
            (OptimConfig { learning_rate: f64::NAN, ..config.clone() }, "learning_rate"),
            (OptimConfig { betas: [0.9, 1.0], ..config.clone() }, "betas"),
            (OptimConfig { epsilon: 0.0, ..config.clone() }, "epsilon"),
            (OptimConfig { weight_decay: -0.1, ..config.clone() }, "weight_decay"),
            (OptimConfig { clip_norm: Some(0.0), ..config.clone() }, "clip_norm"),
            (
                OptimConfig {
                    schedule: Schedule { warmup_steps: 0, decay: Decay::Cosine { min_factor: 1.5 } },
                    ..config
                },
                "min_factor",
            ),
        ];
        for (config, key) in broken {
            let message = config.validate("train.yaml: optim").map_err(|e| e.to_string());
            assert!(message.is_err_and(|m| m.starts_with("train.yaml: optim.") && m.contains(key)));
        }
    }
}
