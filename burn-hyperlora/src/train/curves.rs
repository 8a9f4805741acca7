//! Figures of the steps between two entries of the curves.

use std::time::Duration;

use hyperlora_core::Result;
use hyperlora_ranks::Collective;

use crate::metrics::{ProcessMemory, RunningMeans};
use crate::train::rank_figures::{self, RankFigures};
use crate::train::setup::StageWork;
use crate::train::step::StepReport;

/// Curve of the images per second of all ranks.
pub const IMAGES_PER_SECOND: &str = "speed/images_per_second";
/// Curve of the fraction of the main rank's captions, since this start of the stage, that were truncated.
pub const CUT_CAPTIONS: &str = "data/cut_captions";
/// Curve of the number of ranks.
pub const RANKS: &str = rank_figures::COUNT;

/// Collects steps until they are written.
pub struct StepCurves {
    stage: String,
    timesteps: u32,
    clip_norm: Option<f64>,
    means: RunningMeans,
    steps: usize,
    images: usize,
    elapsed: Duration,
    communication: Duration,
}

/// Duration of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTime {
    /// Total time.
    pub elapsed: Duration,
    /// Time in collectives, including the wait for other ranks.
    pub communication: Duration,
}

impl StepCurves {
    /// Creates the curves of the stage named `stage`, whose gradients are clipped to `clip_norm`. The loss quartiles
    /// are those of `timesteps`.
    pub fn new(stage: &str, timesteps: u32, clip_norm: Option<f64>) -> Self {
        Self {
            stage: stage.into(),
            timesteps,
            clip_norm,
            means: RunningMeans::default(),
            steps: 0,
            images: 0,
            elapsed: Duration::ZERO,
            communication: Duration::ZERO,
        }
    }

    /// Adds a step.
    pub fn add(&mut self, report: &StepReport, learning_rate: f64, time: StepTime) {
        let stage = &self.stage;
        for sample in &report.losses {
            let loss = f64::from(sample.loss);
            let quartile = sample.timestep * 4 / self.timesteps.max(1) + 1;
            self.means.add(format!("loss/{stage}"), loss);
            self.means.add(format!("loss_by_scenario/{stage}/{}", sample.scenario.name()), loss);
            self.means.add(format!("loss_by_timestep/{stage}/quartile_{quartile}"), loss);
        }
        self.means.add("optim/learning_rate", learning_rate);
        self.means.add("optim/gradient_norm", report.gradient_norm);
        let clipped = self.clip_norm.map_or(report.gradient_norm, |limit| report.gradient_norm.min(limit));
        self.means.add("optim/gradient_norm_clipped", clipped);
        if let Some(statistics) = report.coefficients {
            self.means.add("coefficients/mean_abs", statistics.mean_abs.into());
            self.means.add("coefficients/effective_bases", statistics.effective_bases.into());
            self.means.add("coefficients/spread", statistics.spread.into());
        }
        for (name, time) in report.phases.named() {
            self.means.add(format!("seconds_per_step/{name}"), time.as_secs_f64());
        }
        self.steps += 1;
        self.images += report.losses.len();
        self.elapsed += time.elapsed;
        self.communication += time.communication;
    }

    /// Returns the names and values of everything collected on all ranks, and resets it. `data_wait_share` and
    /// `moment_bytes`, the memory of the optimiser's moments, are this rank's; `work` is the compute cost of the stage,
    /// if known.
    ///
    /// # Errors
    /// Errors of the collective.
    pub fn take(
        &mut self,
        world: &dyn Collective,
        data_wait_share: f64,
        moment_bytes: u64,
        work: Option<&StageWork>,
    ) -> Result<Vec<(String, f64)>> {
        let seconds = std::mem::take(&mut self.elapsed).as_secs_f64();
        let communication = std::mem::take(&mut self.communication).as_secs_f64();
        let images = std::mem::take(&mut self.images) as f64;
        let steps = std::mem::take(&mut self.steps).max(1) as f64;
        let memory = ProcessMemory::now();
        let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let figures = RankFigures {
            work: (seconds - communication) / steps,
            communication_share: communication / seconds.max(f64::MIN_POSITIVE),
            data_wait_share,
            peak_mib: memory.map_or(0.0, |memory| mebibytes(memory.peak)),
            moments_mib: mebibytes(moment_bytes),
        };
        let mut values = self.means.take();
        values.extend(rank_figures::share(world, figures)?);
        if seconds > 0.0 {
            let (all, one) = (images / seconds, images / seconds / world.world_size() as f64);
            values.push((IMAGES_PER_SECOND.into(), all));
            values.push(("speed/images_per_second_per_rank".into(), one));
            if let Some(work) = work {
                values.push(("speed/tflops_per_rank".into(), work.flops_per_image * one / 1e12));
                let utilisation = work.ideal_seconds_per_image.map(|ideal| ideal * one);
                values.extend(utilisation.map(|share| ("speed/model_flop_utilisation".into(), share)));
            }
        }
        if let Some(memory) = memory {
            values.push(("memory/resident_mib".into(), mebibytes(memory.resident)));
            values.push(("memory/peak_mib".into(), mebibytes(memory.peak)));
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hyperlora_ranks::WorldOfOne;

    use super::*;
    use crate::data::scenario::Scenario;
    use crate::train::step::SampleLoss;

    #[test]
    fn losses_are_sorted_by_scenario_and_quartile() {
        let sample = |loss, scenario, timestep| SampleLoss { loss, scenario, timestep };
        let report = StepReport {
            losses: vec![sample(1.0, Scenario::Full, 0), sample(3.0, Scenario::BaseOnly, 999)],
            gradient_norm: 2.0,
            ..StepReport::default()
        };
        let mut curves = StepCurves::new("id_clip", 1000, Some(1.5));
        let time = StepTime { elapsed: Duration::from_secs(2), communication: Duration::from_millis(500) };
        curves.add(&report, 0.5, time);
        let work = StageWork { flops_per_image: 3e12, ideal_seconds_per_image: Some(0.25) };
        let world = WorldOfOne::new();
        let values: BTreeMap<String, f64> =
            curves.take(&world, 0.125, 1 << 20, Some(&work)).unwrap().into_iter().collect();
        for (name, value) in [
            ("loss/id_clip", 2.0),
            ("loss_by_scenario/id_clip/full", 1.0),
            ("loss_by_scenario/id_clip/base_only", 3.0),
            ("loss_by_timestep/id_clip/quartile_1", 1.0),
            ("loss_by_timestep/id_clip/quartile_4", 3.0),
            ("optim/learning_rate", 0.5),
            ("optim/gradient_norm", 2.0),
            ("optim/gradient_norm_clipped", 1.5),
            ("speed/images_per_second", 1.0),
            ("speed/images_per_second_per_rank", 1.0),
            ("speed/tflops_per_rank", 3.0),
            ("speed/model_flop_utilisation", 0.25),
            ("speed/communication_share", 0.25),
            ("speed/data_wait_share", 0.125),
            ("ranks/seconds_of_work_max", 1.5),
            ("ranks/slowest", 0.0),
        ] {
            assert_eq!(values.get(name), Some(&value), "{name}");
        }
        let empty = curves.take(&world, 0.0, 0, Some(&work)).unwrap();
        assert!(empty.iter().all(|(name, value)| name.starts_with("memory/") || name == RANKS || *value == 0.0));
    }
}
