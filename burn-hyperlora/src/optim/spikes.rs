//! Skipping of harmful steps: a gradient that is not finite, or a loss far outside the recent range.
//!
//! All ranks skip the same steps, because the decision uses the loss and the gradient norm over all ranks, which are
//! the same on each. Several skipped steps in a row mean that the weights themselves are bad: they are rolled back to
//! the last checkpoint that was due, once per stage. Step and data position advance, so the same batches do not return.
//! The next such row ends the run. A stage that ends inside a row is rolled back too, because nothing has shown that
//! its last weights are good.

use std::collections::VecDeque;

use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Rule for skipping steps: `train.spikes`. Steps with NaN or infinity are always skipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SpikeConfig {
    /// Standard deviations above the mean loss of the last `window` steps at which a step is skipped, above 0; `null`
    /// accepts every finite loss.
    pub sigma: Option<f64>,
    /// Number of recent steps that set the limit, 2 to 100000; until there are as many, every finite loss passes.
    pub window: usize,
    /// Skipped steps in a row that roll the weights back to the last checkpoint that was due, at least 1.
    pub most: u32,
}

impl Default for SpikeConfig {
    fn default() -> Self {
        Self { sigma: Some(10.0), window: 100, most: 3 }
    }
}

impl SpikeConfig {
    /// Checks the ranges; `place` names the location of the block.
    ///
    /// # Errors
    /// Input: names the key that is out of range.
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

/// Record of recent steps; part of the state that a resume needs.
///
/// # Examples
/// ```
/// use burn_hyperlora::optim::spikes::{SpikeAction, SpikeConfig, SpikeWatch};
///
/// let config = SpikeConfig { sigma: Some(10.0), window: 4, most: 2 };
/// let mut watch = SpikeWatch::default();
/// [0.9, 1.0, 1.1, 1.0].into_iter().for_each(|loss| watch.good(&config, loss));
/// assert!(watch.loss_limit(&config) < 2.0);
/// assert_eq!(watch.bad(&config), SpikeAction::Skip);
/// assert_eq!(watch.bad(&config), SpikeAction::RollBack);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SpikeWatch {
    /// Losses of the last good steps.
    recent: VecDeque<f64>,
    /// Skipped steps since the last good one.
    pub in_a_row: u32,
    /// Skipped steps of the stage.
    pub skipped: u64,
    rolled_back: bool,
}

/// Action after a skipped step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpikeAction {
    /// Nothing more.
    Skip,
    /// Restore the weights of the last checkpoint that was due.
    RollBack,
    /// End the run, because the rollback did not help.
    Stop,
}

impl SpikeWatch {
    /// Returns the largest loss that passes; infinite until the window is full.
    pub fn loss_limit(&self, config: &SpikeConfig) -> f64 {
        let Some(sigma) = config.sigma.filter(|_| self.recent.len() >= config.window) else { return f64::INFINITY };
        let losses = || self.recent.iter();
        let count = self.recent.len() as f64;
        let mean = losses().sum::<f64>() / count;
        let variance = losses().map(|loss| (loss - mean).powi(2)).sum::<f64>() / count;
        mean + sigma * variance.sqrt()
    }

    /// Records a step that was taken.
    pub fn good(&mut self, config: &SpikeConfig, loss: f64) {
        self.in_a_row = 0;
        self.recent.push_back(loss);
        while self.recent.len() > config.window {
            self.recent.pop_front();
        }
    }

    /// Records the end of the stage. Returns true if the weights must be rolled back first: a last step that was
    /// skipped may be the result of bad weights.
    pub fn end(&mut self) -> bool {
        std::mem::take(&mut self.in_a_row) > 0
    }

    /// Records a skipped step.
    pub fn bad(&mut self, config: &SpikeConfig) -> SpikeAction {
        self.skipped += 1;
        self.in_a_row += 1;
        if self.in_a_row < config.most {
            return SpikeAction::Skip;
        }
        self.in_a_row = 0;
        if std::mem::replace(&mut self.rolled_back, true) { SpikeAction::Stop } else { SpikeAction::RollBack }
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
        assert_eq!(watch.bad(&config), SpikeAction::Skip);
        watch.good(&config, 1.0);
        assert_eq!(
            [(); 4].map(|()| watch.bad(&config)),
            [SpikeAction::Skip, SpikeAction::RollBack, SpikeAction::Skip, SpikeAction::Stop]
        );
        assert_eq!(watch.skipped, 5);
        assert!(!watch.end());
        watch.bad(&config);
        assert!(watch.end() && !watch.end());
    }
}
