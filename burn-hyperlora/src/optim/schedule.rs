//! Learning rate schedule: a pure function of the step, with nothing to save and no influence of the world size.

use std::f64::consts::PI;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Learning rate schedule: warm-up, then decay.
///
/// # Examples
/// ```
/// use burn_hyperlora::optim::{Decay, Schedule};
///
/// let schedule = Schedule { warmup_steps: 10, decay: Decay::Cosine { min_factor: 0.1 } };
/// let factors = [0, 10, 60, 110].map(|step| schedule.factor(step, 110));
/// for (factor, expected) in factors.into_iter().zip([0.1, 1.0, 0.55, 0.1]) {
///     assert!((factor - expected).abs() < 1e-12);
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Steps of linear warm-up; the first step uses `1 / warmup_steps` of the peak.
    pub warmup_steps: u64,
    /// Decay after the warm-up.
    pub decay: Decay,
}

/// Decay of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Falls along half a cosine to `min_factor` of the peak at the end of the run.
    Cosine {
        /// Fraction of the peak, 0 to 1.
        #[serde(default)]
        min_factor: f64,
    },
}

impl Schedule {
    /// Returns the fraction of the peak rate that step `step` (from 0) of `total_steps` uses, in `[0, 1]`.
    pub fn factor(&self, step: u64, total_steps: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine { min_factor } => {
                let decaying = total_steps.saturating_sub(self.warmup_steps).max(1);
                let progress = ((step - self.warmup_steps) as f64 / decaying as f64).min(1.0);
                min_factor + (1.0 - min_factor) * 0.5 * (1.0 + (PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls_to_the_floor_and_stays_there() {
        let schedule = Schedule { warmup_steps: 4, decay: Decay::Cosine { min_factor: 0.1 } };
        let factors: Vec<f64> = [0, 3, 4, 9, 14, 99].map(|step| schedule.factor(step, 14)).to_vec();
        for (factor, expected) in factors.iter().zip([0.25, 1.0, 1.0, 0.55, 0.1, 0.1]) {
            assert!((factor - expected).abs() < 1e-12, "{factors:?}");
        }
    }

    #[test]
    fn constant_stays_and_a_warm_up_longer_than_the_run_never_divides_by_zero() {
        assert_eq!(Schedule::default().factor(1_000, 10), 1.0);
        let schedule = Schedule { warmup_steps: 20, decay: Decay::Cosine { min_factor: 0.0 } };
        assert_eq!(schedule.factor(9, 10), 0.5);
        assert_eq!(schedule.factor(20, 10), 1.0);
    }
}
