//! Failure of a rank: how it tells the others, and how a rank that lost the others ends.

use std::io::{Write, stdout};

use hyperlora_core::Error;
use serde::{Deserialize, Serialize};

use super::Collective;

/// A rank's error, in a note to the others. They end with the same exit code, so that a launcher that asks any of them
/// learns whether a new start would help.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    exit_code: u8,
    /// The problem, on one line.
    problem: String,
}

impl Failure {
    /// Makes the note that tells the others about `error`.
    pub fn of(error: &Error) -> Self {
        let problem = error.to_string().lines().next().unwrap_or_default().to_owned();
        Self { exit_code: error.exit_code(), problem }
    }

    /// Returns the error of a rank that receives this from `rank`.
    pub fn heard_from(self, rank: usize, world: &dyn Collective) -> Error {
        Error::PeerFailed { rank: world.name_of(rank), problem: self.problem, exit_code: self.exit_code }
    }
}

/// Ends the process at once with `code`, after flushing stdout. Skips the exit handlers of libraries.
///
/// Those of CUDA and NCCL wait for the GPU, where a kernel may wait for a lost rank. Files are the caller's
/// responsibility.
pub fn end_process(code: u8) -> ! {
    // A failure cannot be reported to anybody.
    let _ = stdout().flush();
    signal_hook::low_level::exit(code.into())
}
