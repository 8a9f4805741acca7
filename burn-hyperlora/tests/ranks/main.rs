//! Ranks that are real processes, started by mpirun (feature `mpi`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoints;
mod collectives;
#[path = "../common/experiment.rs"]
mod experiment;
mod faults;
mod folders;
mod killed;
#[path = "../common/kills.rs"]
mod kills;
mod mpirun;
#[path = "../common/state.rs"]
mod state;
mod training;
mod vanished;
#[path = "../common/world.rs"]
mod world;
