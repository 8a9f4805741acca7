//! `hyperlora export`: a hypernetwork for the released nodes, or a LoRA file in another layout.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_hyperlora::export::comfyui;
use burn_hyperlora::generate::HypernetSettings;
use burn_hyperlora::run::saved::Source;
use clap::{ArgGroup, Args, ValueEnum};
use hyperlora_core::files::{OutputFile, apart};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::LoraSet;
use hyperlora_sdxl::lora::file::Layout;
use hyperlora_sdxl::weights::check_name;

use crate::cli::formats::FileDType;
use crate::cli::options::Common;

/// Write a hypernetwork or a LoRA in the format of other tools
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("what").required(true).args(["checkpoint", "lora"])),
    after_help = "Examples:\n  A folder for the released ComfyUI nodes:\n    hyperlora export --format comfyui --checkpoint runs/mine -o hyper_lora/ --dtype f16\n  A LoRA file for diffusers and PEFT:\n    hyperlora export --format diffusers --lora anna.safetensors -o pytorch_lora_weights.safetensors"
)]
pub(super) struct ExportArgs {
    /// Format to write
    #[arg(long, value_enum)]
    format: Format,
    /// Hypernetwork: a run folder (its latest checkpoint), a checkpoint, or a HyperLoRA folder
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Number format of the hypernetwork
    #[arg(long, value_enum, default_value_t = FileDType::F16, conflicts_with = "lora")]
    dtype: FileDType,
    /// Omit the Base-LoRA
    #[arg(long, conflicts_with = "lora")]
    no_base: bool,
    /// Width of an attention head of a released hypernetwork [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "lora")]
    head_dim: Option<usize>,
    /// LoRA file, in any layout
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// Folder (comfyui) or file to write; replaces a folder only if this program wrote it
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// HyperLoRA folder for the released ComfyUI nodes
    Comfyui,
    /// LoRA file in the layout of kohya's sd-scripts
    Kohya,
    /// LoRA file in the layout of diffusers and PEFT
    Diffusers,
}

pub(super) fn run(args: &ExportArgs, common: &Common) -> Result<ExitCode> {
    common.start_log(None)?;
    match (args.format, &args.checkpoint, &args.lora) {
        (Format::Comfyui, Some(checkpoint), _) => {
            apart(&args.output, Source::inputs(checkpoint))?;
            let source = Source::find(checkpoint)?;
            let config = HypernetSettings::of(&source, args.head_dim)?.config;
            let base = !args.no_base;
            comfyui::export(&source.weights(), &config, &args.output, args.dtype.into(), base)?;
            tracing::info!("{}\n{}", args.output.display(), comfyui::node_settings(&config, base));
            Ok(ExitCode::SUCCESS)
        }
        (Format::Comfyui, None, _) => {
            Err(Error::input("--format comfyui", "is a hypernetwork's, not a LoRA's", "give --checkpoint"))
        }
        (Format::Kohya | Format::Diffusers, _, Some(path)) => {
            check_name(&args.output)?;
            let output = OutputFile::claim(&args.output, [path])?;
            let lora = LoraSet::open(path)?;
            let layout = if args.format == Format::Kohya { Layout::Kohya } else { Layout::Diffusers };
            lora.save(output.path(), layout)?;
            tracing::info!("{}: {} modules", args.output.display(), lora.modules.len());
            Ok(ExitCode::SUCCESS)
        }
        (Format::Kohya | Format::Diffusers, _, None) => {
            Err(Error::input("--format", "is a LoRA's, not a hypernetwork's", "give --lora, or --format comfyui"))
        }
    }
}
