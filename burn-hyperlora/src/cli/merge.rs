//! `hyperlora merge`: LoRAs merged into the weights of a base.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn_hyperlora::conditioning::BaseConfig;
use clap::Args;
use hyperlora_core::config::ConfigPath;
use hyperlora_core::files::apart;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::ops::merge;
use hyperlora_sdxl::weights::check_name;

use crate::cli::loras::LoraArgs;
use crate::cli::options::Common;

/// Merge LoRAs into a base, in the base's own layout and types
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hyperlora merge --base sdxl/ --lora anna.safetensors --lora-weight 0.8 -o sdxl-anna/\n  hyperlora merge --base sdxl.safetensors --lora a.safetensors --lora b.safetensors -o merged.safetensors"
)]
pub(super) struct MergeArgs {
    /// Base model: an SDXL pipeline folder in diffusers layout, or a single file in Stability naming
    #[arg(long, value_name = "DIR|FILE")]
    base: PathBuf,
    /// Variant of the weights in a pipeline folder to change and keep, such as fp16
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Pipeline folder whose configs describe the single file [default: SDXL-Base-1.0's]
    #[arg(long, value_name = "DIR")]
    base_config: Option<PathBuf>,
    #[command(flatten)]
    loras: LoraArgs,
    /// Folder or file to write
    #[arg(short, long, value_name = "DIR|FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &MergeArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    let config = BaseConfig {
        variant: args.variant.clone(),
        config: args.base_config.clone().map(ConfigPath::new),
        ..BaseConfig::new(ConfigPath::new(&args.base))
    };
    apart(&args.output, args.loras.paths())?;
    let source = config.source(Path::new(""))?;
    if source.single_file().is_some() {
        check_name(&args.output)?;
    }
    let updates = args.loras.updates(&source)?;
    if updates.is_empty() {
        return Err(Error::input("--lora", "there is no LoRA to merge", "give at least one"));
    }
    merge(&source, &updates, &args.output)?;
    tracing::info!("{}", args.output.display());
    Ok(ExitCode::SUCCESS)
}
