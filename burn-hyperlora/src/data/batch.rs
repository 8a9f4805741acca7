//! Samples that go through the models together, and which draws they are.

use crate::data::Reference;
use crate::data::dataset::{Dataset, Pairs};
use crate::data::order::{OrderConfig, Walk};
use crate::data::sample::{Request, Sample};
use crate::data::scenario::Scenarios;
use crate::error::Result;
use crate::random::{Purpose, for_sample};

/// Samples of one forward pass, on the host.
#[derive(Debug, Clone)]
pub struct Batch {
    /// At least one.
    pub samples: Vec<Sample>,
    /// The draw that comes once every rank has learned from its batch of this number: the position in the data.
    pub next_draw: u64,
}

/// Which sample each draw of a stage is: a function of (seed, stage, draw) alone.
pub struct Draws {
    seed: u64,
    stage: u64,
    scenarios: Scenarios,
    pairs: Pairs,
    walk: Walk,
}

/// What makes the draws of a stage.
#[derive(Debug, Clone, Copy)]
pub struct DrawConfig<'a> {
    /// The run's seed.
    pub seed: u64,
    /// The stage's number.
    pub stage: u64,
    /// The split of the targets and of their reference photos.
    pub split: &'a str,
    /// Which photo stands for the person.
    pub reference: Reference,
    /// How often each scenario comes.
    pub scenarios: Scenarios,
    /// See [`crate::data::DataConfig::streams`].
    pub streams: usize,
    /// See [`crate::data::DataConfig::shuffle_window`].
    pub shuffle_window: usize,
}

impl Draws {
    /// The draws of a stage over `dataset`.
    ///
    /// # Errors
    /// Input where the split has no usable target.
    pub fn new(dataset: &Dataset, config: &DrawConfig<'_>) -> Result<Self> {
        let pairs = dataset.pairs(config.split, config.split, config.reference)?;
        let groups = pairs.as_slice().iter().map(|pair| dataset.group(pair.target)).collect();
        let DrawConfig { seed, stage, streams, shuffle_window: window, .. } = *config;
        Ok(Self {
            seed,
            stage,
            scenarios: config.scenarios,
            pairs,
            walk: Walk::new(OrderConfig { seed, stage, streams, window }, groups),
        })
    }

    /// Targets in an epoch.
    pub fn epoch_len(&self) -> usize {
        self.pairs.as_slice().len()
    }

    /// Targets that no reference photo was found for.
    pub fn left_out(&self) -> usize {
        self.pairs.left_out
    }

    /// The sample of draw `draw`.
    pub fn request(&mut self, draw: u64) -> Request {
        let pair = &self.pairs.as_slice()[self.walk.sample(draw)];
        Request {
            target: pair.target,
            reference: pair.reference(&mut for_sample(self.seed, self.stage, draw, Purpose::Reference)),
            scenario: self.scenarios.draw(self.seed, self.stage, draw),
            stage: self.stage,
            draw,
        }
    }
}
