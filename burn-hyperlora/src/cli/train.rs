//! `hyperlora train`: from a YAML to a trained hypernetwork.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Device;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::plan::hardware::Gpu;
use burn_hyperlora::train::config::{COLLECTIVE_TIMEOUT, long};
use burn_hyperlora::train::{Outcome, TrainOptions};
use burn_hyperlora::{plan, run as run_folder};
use clap::Args;
use hyperlora_core::files::{apart, follow};
use hyperlora_core::signals::StopFlag;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{JoinConfig, Placement, Ranks};

use crate::cli::options::Common;

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
    /// Begin anew; the old run folder is kept aside. Where Slurm starts the run again, it goes on; not with torchrun
    #[arg(long)]
    restart: bool,
    /// The GPU of each rank, for the model FLOP utilisation in the curves: a name as `hyperlora plan` knows
    #[arg(long, value_name = "NAME")]
    gpu: Option<Gpu>,
}

pub(super) fn run(args: &TrainArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    let stop = StopFlag::install()?;
    let placement = Placement::of_process()?;
    // What fails here may fail on this rank alone: the others wait for it to say so.
    let prepared = prepare(args, common, placement.as_ref().map_or(0, |placement| placement.rank));
    let timeout = prepared.as_ref().map_or(COLLECTIVE_TIMEOUT, |(experiment, _)| experiment.train.collective_timeout());
    let timeouts = JoinConfig { timeout, start_timeout: long(timeout) };
    let ranks = match hyperlora_ranks::join(placement.as_ref(), device, &timeouts) {
        Ok(ranks) => ranks,
        Err(lonely) => return Err(prepared.err().unwrap_or(lonely)),
    };
    let ranks = Ranks::new(ranks.into(), long(timeout));
    let (experiment, run) = ranks.try_on_all("all ranks to read the configuration", || prepared)?;
    let options = TrainOptions {
        max_steps: args.max_steps,
        stop,
        display: common.display(),
        work: plan::work(&experiment, args.gpu),
    };
    let outcome = experiment.train_together(&ranks, &run, device, options)?;
    ranks.barrier("all ranks to end", ranks.deadline())?;
    ranks.leave();
    Ok(tell(&outcome))
}

/// What a rank does by itself before it meets the others: reads the experiment, finds the run folder, and starts the log.
fn prepare(args: &TrainArgs, common: &Common, rank: usize) -> Result<(Experiment, PathBuf)> {
    let found = read(args, rank == 0);
    match &found {
        Ok(found) if rank == 0 => common.start_log(Some(&found.run))?,
        Err(_) if rank == 0 => common.start_log(None)?,
        _ => common.start_follower_log(rank)?,
    }
    let Found { experiment, run, earlier, aside } = found?;
    if let Some(told) = earlier.filter(|_| rank == 0) {
        tracing::warn!("--restart is passed over: the launcher has started this run before ({told})");
    }
    if let Some(aside) = aside {
        tracing::info!("the old run is kept in {}", aside.display());
    }
    Ok((experiment, run))
}

/// What the command line names.
struct Found {
    experiment: Experiment,
    run: PathBuf,
    /// What tells that the launcher repeats the command.
    earlier: Option<String>,
    /// Where the old run folder is kept.
    aside: Option<PathBuf>,
}

/// Reads the experiment and finds the run folder, which the rank that leads moves aside where it is to begin anew.
fn read(args: &TrainArgs, leads: bool) -> Result<Found> {
    let experiment = Experiment::load(&args.config)?;
    let run = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&experiment.name));
    // A link to another disk stays one, also where the folder behind it is set aside.
    let run = match run.file_name() {
        Some(_) => follow(&run)?,
        None => run.canonicalize().map_err(|source| Error::read(&run, source))?,
    };
    apart(&run, experiment.inputs()?)?;
    // Launchers repeat the whole command: only their first start begins anew.
    let earlier = if args.restart { hyperlora_ranks::earlier_life(|name| std::env::var(name).ok())? } else { None };
    let anew = leads && args.restart && earlier.is_none();
    let aside = if anew { run_folder::move_aside(&run)? } else { None };
    Ok(Found { experiment, run, earlier, aside })
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
