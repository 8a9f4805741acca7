//! Batches of samples, and the mapping from draws to samples.

use std::ops::Range;
use std::sync::Arc;

use hyperlora_core::random::{Purpose, below, for_sample};
use hyperlora_core::{Error, Result};

use crate::data::Reference;
use crate::data::dataset::Dataset;
use crate::data::order::{OrderConfig, Walk};
use crate::data::pairs::Pairs;
use crate::data::sample::{Request, Sample};
use crate::data::scenario::Scenarios;

/// Samples of one forward pass, on the host.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Samples, at least one.
    pub samples: Vec<Sample>,
    /// Data position: the next draw after every rank has trained on its batch of this number.
    pub next_draw: u64,
}

/// Maps each draw of a stage to a sample: a function of (seed, stage, draw) alone.
pub struct Draws {
    plan: Arc<DrawPlan>,
    walk: Walk,
}

/// Targets of a stage, with everything that is drawn for them.
pub struct DrawPlan {
    seed: u64,
    stage: u64,
    scenarios: Scenarios,
    pairs: Pairs,
    /// Index ranges of the pairs, per row group.
    groups: Vec<Range<usize>>,
}

/// Inputs that determine a stage's draws.
#[derive(Debug, Clone, Copy)]
pub struct DrawConfig<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the stage.
    pub stage: u64,
    /// Split of the targets and of their reference photos.
    pub split: &'a str,
    /// Choice of the reference photo.
    pub reference: Reference,
    /// Weights of the scenarios.
    pub scenarios: Scenarios,
    /// Canonical streams, see [`crate::data::DataConfig::streams`].
    pub streams: usize,
    /// Shuffle window, see [`crate::data::DataConfig::shuffle_window`].
    pub shuffle_window: usize,
}

impl Draws {
    /// Creates the draws of a stage over `dataset`.
    ///
    /// # Errors
    /// Input: the split has no usable target.
    pub fn new(dataset: &Dataset, config: &DrawConfig<'_>) -> Result<Self> {
        let pairs = dataset.pairs(config.split, config.split, config.reference)?;
        let groups: Vec<u32> = pairs.as_slice().iter().map(|pair| dataset.group(pair.target)).collect();
        let DrawConfig { seed, stage, scenarios, streams, shuffle_window: window, .. } = *config;
        let plan = DrawPlan { seed, stage, scenarios, pairs, groups: spans(&groups) };
        Ok(Self { plan: Arc::new(plan), walk: Walk::new(OrderConfig { seed, stage, streams, window }, groups) })
    }

    /// Number of targets in an epoch.
    pub fn epoch_len(&self) -> usize {
        self.plan.pairs.as_slice().len()
    }

    /// Number of targets without a reference photo.
    pub fn left_out(&self) -> usize {
        self.plan.pairs.left_out
    }

    /// Returns the sample request of draw `draw`.
    pub fn request(&mut self, draw: u64) -> Request {
        let DrawPlan { seed, stage, scenarios, ref pairs, .. } = *self.plan;
        let pair = &pairs.as_slice()[self.walk.sample(draw)];
        Request {
            target: pair.target,
            reference: pair.reference(&mut for_sample(seed, stage, draw, Purpose::Reference)),
            scenario: scenarios.draw(seed, stage, draw),
            stage,
            draw,
        }
    }

    /// Returns the plan of the draws, shared with loader threads.
    pub fn plan(&self) -> Arc<DrawPlan> {
        Arc::clone(&self.plan)
    }
}

/// Number of replacements tried before giving up.
const ATTEMPTS: usize = 1000;

impl DrawPlan {
    /// Returns the request if its photos are readable, otherwise replaces the unreadable ones. Another photo of the
    /// person replaces a reference. A photo of another row group replaces a target; within an epoch, one group replaces
    /// the whole damaged group. The replacement depends on the draw and the damage only, so that it is the same for
    /// every world size.
    ///
    /// # Errors
    /// Same as [`Dataset::is_readable`]; Input: nothing readable is found.
    pub fn readable(&self, dataset: &Dataset, request: Request) -> Result<Request> {
        let pairs = self.pairs.as_slice();
        let own = pairs.partition_point(|pair| pair.target < request.target);
        if let Some(reference) = self.usable_reference(dataset, own, request.draw)? {
            return Ok(Request { reference, ..request });
        }
        let group = self.groups.partition_point(|span| span.end <= own);
        let place = own - self.groups[group].start;
        let epoch = request.draw / pairs.len() as u64;
        let case = epoch * self.groups.len() as u64 + group as u64;
        let mut generator = for_sample(self.seed, self.stage, case, Purpose::StandIn);
        for _ in 0..ATTEMPTS {
            let span = &self.groups[below(&mut generator, self.groups.len() as u64) as usize];
            let stand_in = span.start + place % span.len();
            if let Some(reference) = self.usable_reference(dataset, stand_in, request.draw)? {
                return Ok(Request { target: pairs[stand_in].target, reference, ..request });
            }
        }
        Err(Error::file(dataset.path(), "no readable photo is left to train on", "prepare the data again"))
    }

    /// Returns the first readable reference of a pair whose target is readable.
    fn usable_reference(&self, dataset: &Dataset, pair: usize, draw: u64) -> Result<Option<usize>> {
        let pair = &self.pairs.as_slice()[pair];
        if !dataset.is_readable(pair.target)? {
            return Ok(None);
        }
        let mut generator = for_sample(self.seed, self.stage, draw, Purpose::Reference);
        for reference in pair.references_from(&mut generator) {
            if dataset.is_readable(reference)? {
                return Ok(Some(reference));
            }
        }
        Ok(None)
    }
}

/// Index range of each run of equal numbers.
fn spans(groups: &[u32]) -> Vec<Range<usize>> {
    let mut end = 0;
    let span = |run: &[u32]| {
        end += run.len();
        end - run.len()..end
    };
    groups.chunk_by(|a, b| a == b).map(span).collect()
}
