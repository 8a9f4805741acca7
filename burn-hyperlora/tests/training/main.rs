//! Data and training as a whole, on synthetic people and a tiny random pipeline.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod dataset;
#[path = "../common/experiment.rs"]
mod experiment;
mod killed;
#[path = "../common/kills.rs"]
mod kills;
mod runs;
#[path = "../common/state.rs"]
mod state;
mod stopped;
mod streams;
#[path = "../common/world.rs"]
mod world;
