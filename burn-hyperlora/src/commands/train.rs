//! `hyperlora train`: from a YAML to a trained hypernetwork.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use clap::Args;

use crate::collective::{self, JoinConfig, Placement};
use crate::commands::Common;
use crate::error::Result;
use crate::experiment::Experiment;
use crate::plan::{self, hardware::Gpu};
use crate::signals::StopFlag;
use crate::train::{self, Outcome, TrainOptions};

/// Train a hypernetwork, or go on where its run stands
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora train experiments/quickstart/train.yaml --out runs/quickstart")]
pub(super) struct TrainArgs {
    /// The experiment's YAML
    config: PathBuf,
    /// The run folder; runs/<name> where left out
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Stop, with a checkpoint, once this many optimiser steps are done in all
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Begin anew; the old run folder is kept aside. Where the launcher starts the run again, it goes on
    #[arg(long)]
    restart: bool,
    /// The GPU of each rank, for the model FLOP utilisation in the curves: a name as `hyperlora plan` knows
    #[arg(long, value_name = "NAME")]
    gpu: Option<Gpu>,
}

pub(super) fn run(args: &TrainArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    let experiment = Experiment::load(&args.config)?;
    let run = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&experiment.name));
    let placement = Placement::of_process()?;
    match placement.as_ref().map_or(0, |placement| placement.rank) {
        0 => {
            // Launchers repeat the whole command: only their first start begins anew.
            let earlier = collective::earlier_lives().filter(|_| args.restart);
            let aside = if args.restart && earlier.is_none() { train::move_aside(&run)? } else { None };
            common.start_log(Some(&run))?;
            if let Some(told) = earlier {
                tracing::warn!("--restart is passed over: the launcher has started this run before ({told})");
            }
            if let Some(aside) = aside {
                tracing::info!("the old run is kept in {}", aside.display());
            }
        }
        rank => common.start_follower_log(rank)?,
    }
    let stop = StopFlag::install()?;
    let train = &experiment.train;
    let timeouts = JoinConfig { timeout: train.collective_timeout(), start_timeout: train.long_timeout() };
    let world = collective::join(placement.as_ref(), device, &timeouts)?;
    let options = TrainOptions {
        max_steps: args.max_steps,
        stop,
        display: common.display(),
        work: plan::work(&experiment, args.gpu),
    };
    let outcome = experiment.train_together(&*world, &run, device, &options)?;
    world.barrier("all ranks to end", train.long_timeout())?;
    world.leave();
    Ok(tell(&outcome))
}

/// Says how the run ended; the exit code.
fn tell(outcome: &Outcome) -> ExitCode {
    let (code, line) = match outcome {
        Outcome::Finished { step, checkpoint } => (0, format!("finished after {step} steps: {}", checkpoint.display())),
        Outcome::Paused { step, checkpoint } => (
            0,
            format!(
                "paused after {step} steps: {}; without --max-steps the same command goes on",
                checkpoint.display()
            ),
        ),
        Outcome::Stopped { signal, step, checkpoint } => (
            3,
            format!(
                "stopped by {signal} after {step} steps, everything is saved: {}; the same command goes on",
                checkpoint.display()
            ),
        ),
    };
    tracing::info!("{line}");
    ExitCode::from(code)
}
