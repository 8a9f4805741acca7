//! `hyperlora eval`: evaluation of a run.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Device;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::metrics::GapStatistics;
use clap::{Args, Subcommand};
use hyperlora_core::{Result, output};

use crate::cli::options::Common;

/// Evaluate a trained run
#[derive(Debug, Subcommand)]
#[command(after_help = "Example:\n  hyperlora eval identity-gap runs/quickstart")]
pub(super) enum EvalCommand {
    IdentityGap(IdentityGapArgs),
}

/// Measure whether the LoRA of the right person denoises a photo better than another person's
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora eval identity-gap runs/quickstart")]
pub(super) struct IdentityGapArgs {
    /// Run folder
    run: PathBuf,
}

pub(super) fn run(command: &EvalCommand, common: &Common, device: &Device) -> Result<ExitCode> {
    let EvalCommand::IdentityGap(args) = command;
    common.start_log(None)?;
    let gap = Experiment::identity_gap(&args.run, device)?;
    let (known, unseen) = (line("held-out photos of known people", &gap.known), line("people never seen", &gap.unseen));
    let title = "identity gap: denoising loss with another person's LoRA minus that with the person's own";
    output::line(format_args!("{title}\n{known}\n{unseen}"))?;
    Ok(ExitCode::SUCCESS)
}

fn line(name: &str, gap: &GapStatistics) -> String {
    let loss = |key: &str| gap.other.get(key).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
    format!(
        "  {name:<32} gap {:+.6}  t {:.2}  n {}  (loss: own {:.5}, other {:.5}, none {:.5})",
        gap.mean,
        gap.t.unwrap_or(f64::NAN),
        gap.n,
        loss("loss_same"),
        loss("loss_different"),
        loss("loss_none"),
    )
}
