//! Ranks as real processes, started by mpirun (feature `mpi`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoints;
mod faults;
mod folders;
mod killed;
mod training;
mod vanished;
