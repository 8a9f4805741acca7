//! Samples that go through the models together, and which draws they are.

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
    /// At least one.
    pub samples: Vec<Sample>,
    /// The draw that comes once every rank has learned from its batch of this number: the position in the data.
    pub next_draw: u64,
}

/// Which sample each draw of a stage is: a function of (seed, stage, draw) alone.
pub struct Draws {
    plan: Arc<DrawPlan>,
    walk: Walk,
}

/// The targets of a stage and what is drawn for each.
pub struct DrawPlan {
    seed: u64,
    stage: u64,
    scenarios: Scenarios,
    pairs: Pairs,
    /// The pairs of every row group.
    groups: Vec<Range<usize>>,
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
        let groups: Vec<u32> = pairs.as_slice().iter().map(|pair| dataset.group(pair.target)).collect();
        let DrawConfig { seed, stage, scenarios, streams, shuffle_window: window, .. } = *config;
        let plan = DrawPlan { seed, stage, scenarios, pairs, groups: spans(&groups) };
        Ok(Self { plan: Arc::new(plan), walk: Walk::new(OrderConfig { seed, stage, streams, window }, groups) })
    }

    /// Targets in an epoch.
    pub fn epoch_len(&self) -> usize {
        self.plan.pairs.as_slice().len()
    }

    /// Targets that no reference photo was found for.
    pub fn left_out(&self) -> usize {
        self.plan.pairs.left_out
    }

    /// The sample of draw `draw`.
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

    /// What the draws are made from, for threads that work on them.
    pub fn plan(&self) -> Arc<DrawPlan> {
        Arc::clone(&self.plan)
    }
}

/// Stand-ins that are looked at before giving up.
const ATTEMPTS: usize = 1000;

impl DrawPlan {
    /// The request itself where its photos can be read. In the place of an unreadable reference comes another photo of the
    /// person; in the place of a target one of another row group, the same group for a whole row group in an epoch. All of it
    /// follows from the draw and from what is damaged, so that every world size fills a place alike.
    ///
    /// # Errors
    /// As [`Dataset::is_readable`]; Input when nothing readable is found.
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
        Err(Error::file(dataset.path(), "no readable photo is left to learn from", "prepare the data again"))
    }

    /// The first readable reference of a pair whose target is readable.
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

/// Where each run of equal numbers lies.
fn spans(groups: &[u32]) -> Vec<Range<usize>> {
    let mut end = 0;
    let span = |run: &[u32]| {
        end += run.len();
        end - run.len()..end
    };
    groups.chunk_by(|a, b| a == b).map(span).collect()
}
