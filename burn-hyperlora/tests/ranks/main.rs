//! Ranks that are real processes, started by mpirun (feature `mpi`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoints;
mod collectives;
mod faults;
mod mpirun;
mod training;
#[path = "../training/world.rs"]
mod world;
