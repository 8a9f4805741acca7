//! `hyperlora checkpoint`: maintenance of the checkpoints of a run.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_hyperlora::run::{CHECKPOINTS, CONFIG_FILE, archive, verify_config};
use clap::{Args, Subcommand};
use hyperlora_core::text::name;
use hyperlora_core::{Error, Result, output};

use crate::cli::options::Common;

/// Number of bytes in a MB, the unit in which sizes are shown.
const MEGA: f64 = 1e6;

/// List, verify and consolidate the checkpoints of a run
#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  hyperlora checkpoint list runs/quickstart\n  hyperlora checkpoint verify runs/quickstart/checkpoints/step-00000300"
)]
pub(super) enum CheckpointCommand {
    List(ListArgs),
    Verify(VerifyArgs),
    Consolidate(ConsolidateArgs),
}

/// Show step, stage, size and ranks of every checkpoint, and whether its files are complete
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora checkpoint list runs/quickstart")]
pub(super) struct ListArgs {
    /// Run folder, or one of its checkpoints
    path: PathBuf,
}

/// Verify the checksum of every file of checkpoints, and of a run's configuration
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora checkpoint verify runs/quickstart")]
pub(super) struct VerifyArgs {
    /// Run folder, for all of its checkpoints, or one of them
    path: PathBuf,
}

/// Join the parts that several ranks wrote, as if one process had written them
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hyperlora checkpoint consolidate runs/quickstart\n  hyperlora checkpoint consolidate runs/quickstart -o hyperlora-released/"
)]
pub(super) struct ConsolidateArgs {
    /// Run folder, for its latest checkpoint, or one of them; rewritten in place
    path: PathBuf,
    /// Keep the checkpoint and write only its hypernetwork to this folder, in the released layout; replaces a folder
    /// only if this program wrote it
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(super) fn run(command: &CheckpointCommand, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    match command {
        CheckpointCommand::List(args) => list(args),
        CheckpointCommand::Verify(args) => verify(args),
        CheckpointCommand::Consolidate(args) => consolidate(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn list(args: &ListArgs) -> Result<()> {
    output::line(format_args!("{:>8}  {:<12}  {:>10}  {:>5}  whole", "step", "stage", "MB", "ranks"))?;
    for checkpoint in archive::checkpoints(&args.path)? {
        let found = archive::summary(&checkpoint);
        let stage = name(found.stage.as_deref().unwrap_or("-")).to_string();
        let (megabytes, whole) = (found.bytes as f64 / MEGA, if found.whole { "yes" } else { "no" });
        let (step, ranks) = (found.step, found.ranks);
        output::line(format_args!("{step:>8}  {stage:<12}  {megabytes:>10.1}  {ranks:>5}  {whole}"))?;
    }
    Ok(())
}

fn verify(args: &VerifyArgs) -> Result<()> {
    for checkpoint in archive::checkpoints(&args.path)? {
        checkpoint.verify()?;
        output::line(format_args!("{}: whole", checkpoint.path().display()))?;
    }
    // A checkpoint alone does not name the run that it may belong to.
    if args.path.join(CHECKPOINTS).is_dir() {
        verify_config(&args.path)?;
        output::line(format_args!("{}: whole", args.path.join(CONFIG_FILE).display()))?;
    }
    Ok(())
}

fn consolidate(args: &ConsolidateArgs) -> Result<()> {
    let Some(checkpoint) = archive::checkpoints(&args.path)?.pop() else {
        return Err(Error::file(&args.path, "holds no checkpoint", "give a run folder with checkpoints"));
    };
    let made = match &args.output {
        Some(output) => archive::copy_weights(&checkpoint, output).map(|()| output.as_path()),
        None => archive::consolidate(&checkpoint).map(|()| checkpoint.path()),
    }?;
    output::line(format_args!("{}", made.display()))
}
