//! How a rank that fails tells the others, and how one ends that lost the others.

use std::io::{Write, stdout};

use hyperlora_core::Error;
use serde::{Deserialize, Serialize};

use super::Collective;

/// A rank's error, in a note to the others: they end with the same exit code, so that a launcher which asks any of them learns
/// whether starting again would help.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    exit_code: u8,
    /// What is wrong, on one line.
    problem: String,
}

impl Failure {
    /// What the others are told of `error`.
    pub fn of(error: &Error) -> Self {
        let problem = error.to_string().lines().next().unwrap_or_default().to_owned();
        Self { exit_code: error.exit_code(), problem }
    }

    /// The error of a rank that hears this from `rank`.
    pub fn heard_from(self, rank: usize, world: &dyn Collective) -> Error {
        Error::PeerFailed { rank: world.name_of(rank), problem: self.problem, exit_code: self.exit_code }
    }
}

/// Ends the process at once with `code`, after what is still to be written on stdout: without the exit handlers of libraries.
///
/// Those of CUDA and NCCL wait for the GPU, where a kernel may wait for a rank that is gone. Files are the caller's affair.
pub fn end_process(code: u8) -> ! {
    // Nobody is left to be told.
    let _ = stdout().flush();
    signal_hook::low_level::exit(code.into())
}
