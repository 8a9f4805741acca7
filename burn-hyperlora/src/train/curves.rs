//! The figures of the steps between two entries of the curves.

use std::time::Duration;

use crate::metrics::{Memory, RunningMeans};
use crate::train::step::StepReport;

/// Gathers steps until they are written.
pub struct Curves {
    stage: String,
    timesteps: u32,
    means: RunningMeans,
    images: usize,
    elapsed: Duration,
}

impl Curves {
    /// Of the stage named `stage`; quartiles are those of `timesteps`.
    pub fn new(stage: &str, timesteps: u32) -> Self {
        Self { stage: stage.into(), timesteps, means: RunningMeans::default(), images: 0, elapsed: Duration::ZERO }
    }

    /// Adds a step that took `elapsed`.
    pub fn add(&mut self, report: &StepReport, learning_rate: f64, elapsed: Duration) {
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
        if let Some(statistics) = report.coefficients {
            self.means.add("coefficients/mean_abs", statistics.mean_abs.into());
            self.means.add("coefficients/effective_bases", statistics.effective_bases.into());
            self.means.add("coefficients/spread", statistics.spread.into());
        }
        for (name, time) in report.phases.named() {
            self.means.add(format!("seconds_per_step/{name}"), time.as_secs_f64());
        }
        self.images += report.losses.len();
        self.elapsed += elapsed;
    }

    /// Names and values of everything gathered, which is then forgotten.
    pub fn take(&mut self) -> Vec<(String, f64)> {
        let seconds = std::mem::take(&mut self.elapsed).as_secs_f64();
        let images = std::mem::take(&mut self.images) as f64;
        let mut values = self.means.take();
        if seconds > 0.0 {
            values.push(("speed/images_per_second".into(), images / seconds));
        }
        if let Some(memory) = Memory::now() {
            values.push(("memory/resident_mib".into(), memory.resident as f64 / f64::from(1 << 20)));
            values.push(("memory/peak_mib".into(), memory.peak as f64 / f64::from(1 << 20)));
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

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
        let mut curves = Curves::new("id_clip", 1000);
        curves.add(&report, 0.5, Duration::from_secs(2));
        let values: BTreeMap<String, f64> = curves.take().into_iter().collect();
        for (name, value) in [
            ("loss/id_clip", 2.0),
            ("loss_by_scenario/id_clip/full", 1.0),
            ("loss_by_scenario/id_clip/base_only", 3.0),
            ("loss_by_timestep/id_clip/quartile_1", 1.0),
            ("loss_by_timestep/id_clip/quartile_4", 3.0),
            ("optim/learning_rate", 0.5),
            ("optim/gradient_norm", 2.0),
            ("speed/images_per_second", 1.0),
        ] {
            assert_eq!(values.get(name), Some(&value), "{name}");
        }
        assert!(curves.take().iter().all(|(name, _)| name.starts_with("memory/")));
    }
}
