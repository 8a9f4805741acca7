//! User-visible behaviour of the `hyperlora` binary: output, files and exit codes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_checkpoint;
mod bad_input;
mod bad_weights;
mod contract;
mod disk;
mod examples;
mod loras;
mod outputs;
mod pictures;
mod plan;
mod released;
mod runs;
mod status;
mod strangers;
mod support;
mod urls;
