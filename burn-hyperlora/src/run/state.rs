//! Training state that the next step depends on, other than the weights and the moments of the optimiser.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::metrics::StageSummary;
use crate::optim::spikes::SpikeWatch;

/// Position of a run. Together with the weights and the optimiser's moments, the next step depends on nothing else.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Index of the stage of the next step; the number of stages when all are done.
    pub stage: usize,
    /// Steps done in that stage.
    pub stage_step: u64,
    /// Steps done in total.
    pub global_step: u64,
    /// Next draw of that stage: the position in the data.
    pub next_draw: u64,
    /// One entry per stage that was begun.
    pub records: Vec<StageSummary>,
    /// Record of the stage's recent steps.
    #[serde(default)]
    pub spikes: SpikeWatch,
    /// Step of the last checkpoint that was due, by its interval or at the end of a stage. A rollback restores that
    /// one, so it does not depend on where a run was interrupted and saved in between.
    #[serde(default)]
    pub last_due: Option<u64>,
}

impl TrainState {
    /// Counts a step over `images` samples of all ranks; `next_draw` is the next position in the data.
    pub fn count(&mut self, next_draw: u64, images: usize, elapsed: Duration) {
        self.stage_step += 1;
        self.global_step += 1;
        self.next_draw = next_draw;
        if let Some(record) = self.records.last_mut() {
            let images = record.images_per_second * record.seconds + images as f64;
            record.steps = self.stage_step;
            record.seconds += elapsed.as_secs_f64();
            record.images_per_second = images / record.seconds.max(f64::MIN_POSITIVE);
        }
    }

    /// Moves on to the next stage.
    pub fn finish_stage(&mut self) {
        self.stage += 1;
        self.stage_step = 0;
        self.next_draw = 0;
        self.spikes = SpikeWatch::default();
        self.last_due = Some(self.global_step);
    }
}
