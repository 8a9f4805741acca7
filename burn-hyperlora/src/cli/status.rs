//! `hyperlora status`: status of a run.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_hyperlora::status::Status;
use clap::Args;
use hyperlora_core::{Error, Result, output};

use crate::cli::options::Common;

/// Show the status of a run, read from its files only: running, finished or stopped
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora status runs/quickstart")]
pub(super) struct StatusArgs {
    /// Run folder
    run: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let status = Status::read(&args.run)?;
    if args.json {
        let json = serde_json::to_string_pretty(&status)
            .map_err(|error| Error::Fault(format!("the status cannot be written as JSON: {error}")))?;
        output::line(format_args!("{json}"))?;
    } else {
        output::text(format_args!("{status}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
