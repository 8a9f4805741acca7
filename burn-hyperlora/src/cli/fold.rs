//! `hyperlora fold`: a Base-LoRA into an ID-LoRA.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use hyperlora_core::{Result, output};
use hyperlora_sdxl::lora::LoraSet;
use hyperlora_sdxl::lora::ops::{Reduction, concat, reduce};

use crate::cli::formats::finite;
use crate::cli::loras::CombinedArgs;
use crate::cli::options::Common;

/// Fold a weighted Base-LoRA into an ID-LoRA: one file instead of two
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hyperlora fold --id anna.safetensors --base studio.safetensors --base-weight 0.25 -o anna-studio.safetensors\n  At the ID-LoRA's own rank, with the relative error of that:\n    hyperlora fold --id anna.safetensors --base studio.safetensors --base-weight 0.25 --rank 8 -o anna-studio.safetensors"
)]
pub(super) struct FoldArgs {
    /// ID-LoRA file, in any layout
    #[arg(long, value_name = "FILE")]
    id: PathBuf,
    /// Base-LoRA file
    #[arg(long, value_name = "FILE")]
    base: PathBuf,
    /// Weight of the ID-LoRA
    #[arg(long, default_value_t = 1.0, value_parser = finite::<f32>, allow_negative_numbers = true)]
    id_weight: f32,
    /// Weight of the Base-LoRA
    #[arg(long, value_parser = finite::<f32>, allow_negative_numbers = true)]
    base_weight: f32,
    /// Approximate by a LoRA of this rank, by singular values [default: exact, ranks add up]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    #[command(flatten)]
    combined: CombinedArgs,
}

pub(super) fn run(args: &FoldArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let output = args.combined.claim([&args.id, &args.base])?;
    let (id, base) = (LoraSet::open(&args.id)?, LoraSet::open(&args.base)?);
    let dtype = args.combined.dtype(&id, &base);
    let mut folded = concat(&[(&id, args.id_weight), (&base, args.base_weight)], dtype)?;
    let lost = args.rank.map(|rank| Ok((rank, reduce(&mut folded, rank)?))).transpose()?;
    args.combined.save(&folded, &output)?;
    // The result is saved before printing, because the reader of the output may be gone.
    if let Some((rank, Reduction { mean, worst, worst_module })) = lost {
        output::line(format_args!(
            "relative error of rank {rank}: mean {mean:.3e}, worst {worst:.3e} ({worst_module})"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
