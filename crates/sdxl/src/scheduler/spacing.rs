//! Distribution of sampling steps over the training timesteps.

use hyperlora_core::{Error, Result};

use crate::scheduler::{NoiseSchedule, TimestepSpacing};

/// Curvature of [`karras`], from the paper.
const RHO: f64 = 7.0;

/// Returns `steps` timesteps, descending, for samplers that allow timesteps between training timesteps (diffusers
/// `EulerDiscreteScheduler`) and, rounded, for `DDIMScheduler`.
pub(super) fn timesteps(schedule: &NoiseSchedule, spacing: TimestepSpacing, steps: usize) -> Vec<f64> {
    let (train, offset) = (schedule.config.num_train_timesteps, schedule.config.steps_offset);
    let (last, ratio) = ((train - 1) as f64, train as f64 / steps as f64);
    let timestep = |step: usize| match spacing {
        TimestepSpacing::Leading => ((steps - 1 - step) * (train / steps) + offset) as f64,
        TimestepSpacing::Trailing => (train as f64 - step as f64 * ratio).round_ties_even() - 1.0,
        TimestepSpacing::Linspace if steps == 1 => 0.0,
        TimestepSpacing::Linspace => last * (steps - 1 - step) as f64 / (steps - 1) as f64,
    };
    (0..steps).map(timestep).collect()
}

/// Returns the timesteps of `DPMSolverMultistepScheduler`, which distributes one more step and drops the last, at
/// timestep 0.
///
/// # Errors
/// Input: so many steps that two would coincide.
pub(super) fn solver_timesteps(schedule: &NoiseSchedule, spacing: TimestepSpacing, steps: usize) -> Result<Vec<f64>> {
    let (train, offset) = (schedule.config.num_train_timesteps, schedule.config.steps_offset);
    if spacing == TimestepSpacing::Trailing {
        return Ok(timesteps(schedule, spacing, steps));
    }
    if steps >= train {
        return Err(Error::input("steps", format!("{steps} is not within 1 and {}", train - 1), "20 to 30 are usual"));
    }
    let timestep = |step: usize| match spacing {
        TimestepSpacing::Leading => ((steps - step) * (train / (steps + 1)) + offset) as f64,
        _ => ((train - 1) as f64 * (steps - step) as f64 / steps as f64).round_ties_even(),
    };
    Ok((0..steps).map(timestep).collect())
}

/// Interpolates `table`, given at 0, 1, 2, ..., linearly at `places`; constant beyond the ends.
pub(super) fn interpolate(table: &[f64], places: &[f64]) -> Vec<f64> {
    let last = table.len() - 1;
    let value = |&place: &f64| {
        let place = place.clamp(0.0, last as f64);
        let below = place.floor() as usize;
        let share = place - below as f64;
        table[below] * (1.0 - share) + table[(below + 1).min(last)] * share
    };
    places.iter().map(value).collect()
}

/// Returns `steps` noise levels from `highest` down to `lowest` (Karras et al., arXiv 2206.00364, equation 5).
pub(super) fn karras(highest: f64, lowest: f64, steps: usize) -> Vec<f64> {
    let (from, to) = (highest.powf(1.0 / RHO), lowest.powf(1.0 / RHO));
    let level = |step: usize| (from + (to - from) * step as f64 / (steps - 1).max(1) as f64).powf(RHO);
    (0..steps).map(level).collect()
}

/// Locates each of `sigmas` in the ascending `table`, interpolating linearly in the logarithm.
pub(super) fn places(table: &[f64], sigmas: &[f64]) -> Vec<f64> {
    let place = |sigma: &f64| {
        let below = table.partition_point(|level| level <= sigma).saturating_sub(1).min(table.len() - 2);
        let (low, high) = (table[below].ln(), table[below + 1].ln());
        below as f64 + ((low - sigma.ln()) / (low - high)).clamp(0.0, 1.0)
    };
    sigmas.iter().map(place).collect()
}
