//! `hyperlora train`: trains a hypernetwork from a YAML.

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

/// Train a hypernetwork, or resume its run
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora train experiments/quickstart/train.yaml --out runs/quickstart")]
pub(super) struct TrainArgs {
    /// YAML of the experiment
    config: PathBuf,
    /// Run folder [default: runs/NAME]
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Stop, with a checkpoint, once this many optimiser steps are done in total
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Start a new run and move the old run folder aside; if Slurm requeues the job, the new run resumes. Refused under
    /// launchers that repeat the command without a count, such as torchrun
    #[arg(long)]
    restart: bool,
    /// GPU of each rank, for the model FLOP utilisation in the curves: a name that `hyperlora plan` accepts
    #[arg(long, value_name = "NAME")]
    gpu: Option<Gpu>,
}

pub(super) fn run(args: &TrainArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    let stop = StopFlag::install()?;
    let placement = Placement::of_process()?;
    // An error here may affect this rank only. It is kept until the ranks have joined, because the others wait for it.
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
        display: common.training_display(),
        work: plan::work(&experiment, args.gpu),
    };
    let outcome = experiment.train_together(&ranks, &run, device, options)?;
    ranks.barrier("all ranks to end", ranks.deadline())?;
    ranks.leave();
    Ok(tell(&outcome))
}

/// Prepares a rank before it joins the others: reads the experiment, finds the run folder, and starts the log.
fn prepare(args: &TrainArgs, common: &Common, rank: usize) -> Result<(Experiment, PathBuf)> {
    let found = read(args, rank == 0);
    match &found {
        Ok(found) if rank == 0 => common.start_log(Some(&found.run))?,
        Err(_) if rank == 0 => common.start_log(None)?,
        _ => common.start_follower_log(rank)?,
    }
    let Found { experiment, run, earlier, aside } = found?;
    if let Some(told) = earlier.filter(|_| rank == 0) {
        tracing::warn!("--restart is ignored: the launcher has started this run before ({told})");
    }
    if let Some(aside) = aside {
        tracing::info!("the old run is kept in {}", aside.display());
    }
    Ok((experiment, run))
}

/// Run named by the command line.
struct Found {
    experiment: Experiment,
    run: PathBuf,
    /// Evidence that the launcher repeats the command.
    earlier: Option<String>,
    /// New place of the old run folder.
    aside: Option<PathBuf>,
}

/// Reads the experiment and finds the run folder. On a restart, the main rank (`leads`) moves the old folder aside.
fn read(args: &TrainArgs, leads: bool) -> Result<Found> {
    let experiment = Experiment::load(&args.config)?;
    let run = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&experiment.name));
    // A link to another disk is kept, even if the folder behind it is moved aside.
    let run = match run.file_name() {
        Some(_) => follow(&run)?,
        None => run.canonicalize().map_err(|source| Error::read(&run, source))?,
    };
    apart(&run, experiment.inputs()?)?;
    // Launchers repeat the whole command, so only their first start may begin a new run.
    let earlier = if args.restart { hyperlora_ranks::earlier_life(|name| std::env::var(name).ok())? } else { None };
    let anew = leads && args.restart && earlier.is_none();
    let aside = if anew { run_folder::move_aside(&run)? } else { None };
    Ok(Found { experiment, run, earlier, aside })
}

/// Prints how the run ended and returns the exit code.
fn tell(outcome: &Outcome) -> ExitCode {
    let (code, line) = match outcome {
        Outcome::Finished { step, checkpoint } => (0, format!("finished after {step} steps: {}", checkpoint.display())),
        Outcome::Paused { step, checkpoint } => (
            0,
            format!(
                "paused after {step} steps: {}; the same command without --max-steps resumes the run",
                checkpoint.display()
            ),
        ),
        Outcome::Stopped { signal, step, checkpoint } => (
            3,
            format!(
                "stopped by {signal} after {step} steps, everything is saved: {}; the same command resumes the run",
                checkpoint.display()
            ),
        ),
    };
    tracing::info!("{line}");
    ExitCode::from(code)
}
