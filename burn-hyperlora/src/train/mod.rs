//! Training: three stages, one step function, and a state from which a run resumes bit for bit.
//!
//! [`Session`] is a run in progress. [`run`] is its loop in `hyperlora train`; a custom loop starts with
//! [`Session::open`].

pub mod config;
pub mod curves;
mod fingerprint;
pub mod fixed_set;
pub mod forward;
pub mod pictures;
mod rank_figures;
pub mod session;
mod settings;
mod setup;
mod start;
pub mod step;

use hyperlora_core::Result;

use crate::objective::Denoising;

pub use session::{Gradients, Session, Window};
pub use setup::{Outcome, StageWork, TrainOptions, TrainSetup, open_dataset};

/// Trains, or resumes from the latest checkpoint of the run folder.
///
/// # Errors
/// Input: a problem with what the YAML names, a checkpoint of other settings, another process that trains into the run
/// folder, or ranks with different run folders; Disk: a failing disk; Fault: a training that diverged.
pub fn run(setup: TrainSetup, options: TrainOptions) -> Result<Outcome> {
    let mut session = Session::begin(setup, options)?;
    let mut train = || {
        while let Some(window) = session.next_window()? {
            let gradients = session.gradients(&window, &Denoising)?;
            session.apply(gradients, window.learning_rate)?;
        }
        session.outcome()
    };
    train().inspect_err(|_| session.fail())
}
