//! Trains an experiment from a program: changes its settings in Rust, takes a few steps, and prints the results.
//!
//!     cargo run --release --example train_tiny -- experiments/quickstart/train.yaml runs/tiny

use std::path::PathBuf;

use burn::tensor::Device;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::metrics::RunSummary;
use burn_hyperlora::train::TrainOptions;
use hyperlora_core::{Error, Result};

fn main() -> Result<()> {
    let [yaml, run] = std::env::args().skip(1).map(PathBuf::from).collect::<Vec<_>>().try_into().map_err(|_| {
        Error::input("train_tiny", "takes a YAML and a run folder", "give experiments/quickstart/train.yaml runs/tiny")
    })?;
    let mut experiment = Experiment::load(&yaml)?;
    // One curve point per step, and no pictures during training.
    experiment.train.log_every = 1;
    experiment.train.samples = None;

    let options = TrainOptions { max_steps: Some(3), ..TrainOptions::default() };
    let outcome = experiment.train(&run, &Device::flex(), options)?;
    println!("{outcome:?}");
    for stage in RunSummary::read(&run)?.stages {
        println!("{}: {} steps, {:.1} images/s", stage.name, stage.steps, stage.images_per_second);
    }
    Ok(())
}
