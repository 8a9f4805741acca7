//! Steps that would do harm: a gradient that is not finite, or a loss far outside of what it was.
//!
//! Such a step is skipped, on all ranks alike: what decides, the loss and the gradient norm of all ranks, is the same on each.
//! Several in a row mean that the weights themselves are bad: then they go back to the last checkpoint that was due, once in a
//! stage, while step and data go on, so that the same batches do not come again. The next such row ends the run. A stage that
//! ends in the middle of a row goes back too: nothing has shown that its last weights are good.

use std::collections::VecDeque;

use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// When a step is skipped: `train.spikes`. Steps with NaN or infinity always are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpikeConfig {
    /// Standard deviations above the mean of the last `window` steps' losses; `null` lets every finite loss pass.
    pub sigma: Option<f64>,
    /// Steps that are looked back at; fewer do not judge.
    pub window: usize,
    /// Skipped steps in a row that send the weights back to the last checkpoint that was due.
    pub most: u32,
}

impl Default for SpikeConfig {
    fn default() -> Self {
        Self { sigma: Some(10.0), window: 100, most: 3 }
    }
}

impl SpikeConfig {
    /// Checks the ranges; `place` is where the block stands.
    ///
    /// # Errors
    /// Input, naming the key.
    pub fn validate(&self, place: &str) -> Result<()> {
        let refuse = |key: &str, wanted: &str| {
            Err(Error::input(format!("{place}.{key}"), "the value is out of range", format!("give {wanted}")))
        };
        match self {
            Self { sigma: Some(sigma), .. } if !(sigma.is_finite() && *sigma > 0.0) => {
                refuse("sigma", "a number above 0, such as 10, or null")
            }
            Self { window: 0..2 | 100_001.., .. } => refuse("window", "2 to 100000 steps"),
            Self { most: 0, .. } => refuse("most", "at least 1"),
            _ => Ok(()),
        }
    }
}

/// What the last steps were like: part of the state that a resume needs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SpikeWatch {
    /// The last good losses.
    recent: VecDeque<f64>,
    /// Skipped steps since the last good one.
    pub in_a_row: u32,
    /// Skipped steps of the stage.
    pub skipped: u64,
    rolled_back: bool,
}

/// What to do after a skipped step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing more.
    Skip,
    /// Take the weights of the last checkpoint that was due.
    RollBack,
    /// End the run: going back did not help.
    Stop,
}

impl SpikeWatch {
    /// The largest loss that passes; infinite as long as there is too little to judge by.
    pub fn loss_limit(&self, config: &SpikeConfig) -> f64 {
        let Some(sigma) = config.sigma.filter(|_| self.recent.len() >= config.window) else { return f64::INFINITY };
        let losses = || self.recent.iter();
        let count = self.recent.len() as f64;
        let mean = losses().sum::<f64>() / count;
        let variance = losses().map(|loss| (loss - mean).powi(2)).sum::<f64>() / count;
        mean + sigma * variance.sqrt()
    }

    /// Notes a step that was taken.
    pub fn good(&mut self, config: &SpikeConfig, loss: f64) {
        self.in_a_row = 0;
        self.recent.push_back(loss);
        while self.recent.len() > config.window {
            self.recent.pop_front();
        }
    }

    /// Notes that the stage ended; whether the weights must go back first: a step that was skipped last may have met bad ones.
    pub fn end(&mut self) -> bool {
        std::mem::take(&mut self.in_a_row) > 0
    }

    /// Notes a step that was skipped.
    pub fn bad(&mut self, config: &SpikeConfig) -> Remedy {
        self.skipped += 1;
        self.in_a_row += 1;
        if self.in_a_row < config.most {
            return Remedy::Skip;
        }
        self.in_a_row = 0;
        if std::mem::replace(&mut self.rolled_back, true) { Remedy::Stop } else { Remedy::RollBack }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_follows_the_last_losses_once_there_are_enough() {
        let config = SpikeConfig { sigma: Some(3.0), window: 4, most: 3 };
        let mut watch = SpikeWatch::default();
        for (loss, limit) in [(9.0, f64::INFINITY), (1.0, f64::INFINITY), (3.0, f64::INFINITY), (1.0, 13.3), (3.0, 5.0)]
        {
            watch.good(&config, loss);
            assert!((watch.loss_limit(&config) - limit).abs() < 0.1 || limit.is_infinite(), "{watch:?}");
            assert_eq!(watch.loss_limit(&config).is_infinite(), limit.is_infinite());
        }
        assert!(watch.loss_limit(&SpikeConfig { sigma: None, ..config }).is_infinite());
    }

    #[test]
    fn a_row_of_bad_steps_goes_back_once_and_stops_the_second_time() {
        let config = SpikeConfig { most: 2, ..SpikeConfig::default() };
        let mut watch = SpikeWatch::default();
        assert_eq!(watch.bad(&config), Remedy::Skip);
        watch.good(&config, 1.0);
        assert_eq!([(); 4].map(|()| watch.bad(&config)), [Remedy::Skip, Remedy::RollBack, Remedy::Skip, Remedy::Stop]);
        assert_eq!(watch.skipped, 5);
        assert!(!watch.end());
        watch.bad(&config);
        assert!(watch.end() && !watch.end());
    }
}
