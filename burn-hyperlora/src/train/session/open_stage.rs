//! Stage in progress, and the reason for its end.

use std::rc::Rc;

use hyperlora_ranks::{Ranks, Timed};

use crate::data::loader::Loader;
use crate::metrics::{Progress, WaitClock};
use crate::train::curves::StepCurves;
use crate::train::fixed_set::FixedSet;

/// Stage in progress.
pub(super) struct OpenStage {
    pub(super) loader: Loader,
    pub(super) fixed_set: Option<Rc<FixedSet>>,
    pub(super) curves: StepCurves,
    pub(super) progress: Progress,
    /// Time spent waiting for data.
    pub(super) waits: WaitClock,
    /// Ranks whose collectives are timed by `timed`.
    pub(super) ranks: Ranks,
    pub(super) timed: Rc<Timed>,
    /// Number of passes that run in parallel.
    pub(super) lanes: usize,
    /// Captions truncated before the stage.
    pub(super) cut_before: u64,
    /// Images of this rank since the stage was opened.
    pub(super) images: usize,
}

/// Reason for closing a stage.
pub(super) enum StageEnd {
    /// All steps are done.
    Done,
    /// `max_steps` is reached.
    Paused,
    /// A signal of this name asked for a stop.
    Stopped(&'static str),
}
