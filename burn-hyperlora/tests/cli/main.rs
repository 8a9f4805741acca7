//! The `hyperlora` binary as its user meets it: what it prints, leaves on the disk and exits with.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_checkpoint;
mod bad_input;
mod bad_weights;
mod contract;
mod disk;
#[path = "../../../data-prep/tests/file_server/mod.rs"]
mod file_server;
mod loras;
mod outputs;
mod pictures;
mod plan;
mod released;
mod runs;
#[path = "../common/stability.rs"]
mod stability;
mod status;
mod strangers;
mod support;
mod urls;
#[path = "../common/world.rs"]
mod world;
