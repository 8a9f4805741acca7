//! `hyperlora slider`: difference of two LoRAs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use hyperlora_core::Result;
use hyperlora_sdxl::lora::LoraSet;
use hyperlora_sdxl::lora::ops::concat;

use crate::cli::loras::CombinedArgs;
use crate::cli::options::Common;

/// Write the difference of two LoRAs: a slider for what distinguishes them
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  hyperlora slider --positive smiling.safetensors --negative serious.safetensors -o smile.safetensors\n\nThe difference is exact: ranks add up. Its weight is the slider; negative weights reverse it. Made from two\nphotos of one person, it changes what distinguishes the photos."
)]
pub(super) struct SliderArgs {
    /// LoRA for positive weights, a file in any layout
    #[arg(long, value_name = "FILE")]
    positive: PathBuf,
    /// LoRA for negative weights
    #[arg(long, value_name = "FILE")]
    negative: PathBuf,
    #[command(flatten)]
    combined: CombinedArgs,
}

pub(super) fn run(args: &SliderArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let output = args.combined.claim([&args.positive, &args.negative])?;
    let (positive, negative) = (LoraSet::open(&args.positive)?, LoraSet::open(&args.negative)?);
    let dtype = args.combined.dtype(&positive, &negative);
    args.combined.save(&concat(&[(&positive, 1.0), (&negative, -1.0)], dtype)?, &output)?;
    Ok(ExitCode::SUCCESS)
}
