//! `hyperlora slider`: the difference of two LoRAs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::commands::{Common, FileDType, LoraFormat};
use crate::error::Result;
use crate::export::lora::{LoraSet, concat};

/// Write the difference of two LoRAs: a slider for what tells them apart
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  hyperlora slider --positive smiling.safetensors --negative serious.safetensors -o smile.safetensors\n\nThe difference is exact: ranks add up. Its weight is the slider, below 0 the other way round. Made of two photos of one\nperson, it changes what tells the photos apart."
)]
pub(super) struct SliderArgs {
    /// What a positive weight leads to: a LoRA file in any layout
    #[arg(long, value_name = "FILE")]
    positive: PathBuf,
    /// What a negative weight leads to
    #[arg(long, value_name = "FILE")]
    negative: PathBuf,
    /// Number format of the file [default: the wider one of the two]
    #[arg(long, value_enum)]
    dtype: Option<FileDType>,
    /// Layout of the file
    #[arg(long, value_enum, default_value_t = LoraFormat::Kohya)]
    format: LoraFormat,
    /// The LoRA file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &SliderArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let (positive, negative) = (LoraSet::open(&args.positive)?, LoraSet::open(&args.negative)?);
    let dtype = args.dtype.map_or_else(|| positive.wider(&negative), Into::into);
    let slider = concat(&[(&positive, 1.0), (&negative, -1.0)], dtype)?;
    slider.save(&args.output, args.format.into())?;
    tracing::info!("{}: {} modules", args.output.display(), slider.modules.len());
    Ok(ExitCode::SUCCESS)
}
