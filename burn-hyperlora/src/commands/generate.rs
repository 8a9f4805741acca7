//! `hyperlora generate`: photos of a person to a LoRA file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::{Device, FloatDType};
use clap::{Args, ValueEnum};

use crate::commands::{Common, finite};
use crate::error::Result;
use crate::export;
use crate::generate::{Generator, Portrait};

/// Write the LoRA of a person from photos
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  hyperlora generate --checkpoint runs/quickstart --image a.png --image b.png -o lora.safetensors\n\nThe file is in kohya's format, which ComfyUI, diffusers and the WebUIs load.\nPut the trigger words of the run before the prompt: `fcsks fxhks fhyks, a photo of a person`."
)]
pub(super) struct GenerateArgs {
    /// A checkpoint folder, or a run folder for its latest
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// A photo of the person; several are averaged
    #[arg(long = "image", value_name = "FILE", required = true)]
    images: Vec<PathBuf>,
    /// Add the Base-LoRA: hair, clothes and background of the photos
    #[arg(long)]
    base: bool,
    /// Weight of the ID-LoRA, folded into the file
    #[arg(long, default_value_t = 1.0, value_parser = finite::<f32>, allow_negative_numbers = true)]
    id_weight: f32,
    /// Weight of the Base-LoRA where --base is given
    #[arg(long, default_value_t = 0.4, value_parser = finite::<f32>, allow_negative_numbers = true)]
    base_weight: f32,
    /// Number format of the file
    #[arg(long, value_enum, default_value_t = FileDType::F16)]
    dtype: FileDType,
    /// The LoRA file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FileDType {
    F16,
    F32,
}

pub(super) fn run(args: &GenerateArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    common.start_log(None)?;
    let start = Instant::now();
    let mut generator = Generator::open(&args.checkpoint, device)?;
    let opened = start.elapsed();
    let portraits = args.images.iter().map(|path| generator.portrait(path)).collect::<Result<Vec<Portrait>>>()?;
    let seen = start.elapsed();
    let lora = generator.lora(&portraits, args.id_weight, if args.base { args.base_weight } else { 0.0 })?;
    let dtype = match args.dtype {
        FileDType::F16 => FloatDType::F16,
        FileDType::F32 => FloatDType::F32,
    };
    let trigger = generator.experiment.train.trigger.trim_end_matches([',', ' ']).to_owned();
    let notes = BTreeMap::from([("ss_training_comment".to_owned(), format!("HyperLoRA; trigger words: {trigger}"))]);
    export::save_kohya(&args.output, generator.sites(), &lora, dtype, &notes)?;
    tracing::info!(
        "{} from {} photo(s): models {:.2} s, photos {:.2} s, LoRA {:.2} s",
        args.output.display(),
        portraits.len(),
        opened.as_secs_f64(),
        (seen - opened).as_secs_f64(),
        (start.elapsed() - seen).as_secs_f64(),
    );
    Ok(ExitCode::SUCCESS)
}
