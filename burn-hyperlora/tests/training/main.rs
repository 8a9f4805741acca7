//! Data and whole training runs, on synthetic people and a tiny random pipeline.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod dataset;
mod killed;
mod runs;
mod stopped;
mod streams;
