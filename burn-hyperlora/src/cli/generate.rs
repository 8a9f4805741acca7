//! `hyperlora generate`: photos of a person to a LoRA file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;
use burn_hyperlora::export;
use burn_hyperlora::generate::photos::{PhotoReader, Portrait};
use burn_hyperlora::generate::{Generator, features};
use burn_hyperlora::run::saved::Source;
use clap::{ArgGroup, Args};
use hyperlora_core::Result;
use hyperlora_core::files::OutputFile;
use hyperlora_sdxl::weights::check_name;

use crate::cli::formats::{FileDType, LoraFormat, finite};
use crate::cli::options::{Common, HyperLoraArgs};

/// Write the LoRA of a person from photos
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("person").required(true).args(["images", "features"])),
    after_help = "Examples:\n  From photos, with your own hypernetwork:\n    hyperlora generate --checkpoint runs/quickstart --image a.png --image b.png -o lora.safetensors\n  With a released one:\n    hyperlora generate --checkpoint sdxl_hyper_id_lora_v1_fidelity/ --image-encoder clip_vit_large_14/ --faces antelopev2/ --image a.png -o lora.safetensors\n  From features that another program made:\n    hyperlora generate --checkpoint sdxl_hyper_id_lora_v1_fidelity/ --features anna.safetensors -o lora.safetensors\n\nThe file is in kohya's layout, which ComfyUI, diffusers and the WebUIs load; --format diffusers is for diffusers with PEFT.\nPut the trigger words of the run before the prompt: `fcsks fxhks fhyks, a photo of a person`."
)]
pub(super) struct GenerateArgs {
    /// Run folder (its latest checkpoint), checkpoint, or HyperLoRA folder in the released layout
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Photo of the person; may be repeated, and the photos are averaged
    #[arg(long = "image", value_name = "FILE")]
    images: Vec<PathBuf>,
    /// Precomputed features instead of photos: `clip_hidden_states` [N, 257, 1024], `id_embedding` [N, 512] and, for
    /// --base, `base_clip_hidden_states`; N images are averaged
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image_encoder", "feature_extractor", "faces"])]
    features: Option<PathBuf>,
    #[command(flatten)]
    models: HyperLoraArgs,
    /// Add the Base-LoRA: hair, clothes and background of the photos
    #[arg(long)]
    base: bool,
    /// Weight of the ID-LoRA, folded into the file
    #[arg(long, default_value_t = 1.0, value_parser = finite::<f32>, allow_negative_numbers = true)]
    id_weight: f32,
    /// Weight of the Base-LoRA that --base adds
    #[arg(long, default_value_t = 0.4, requires = "base", value_parser = finite::<f32>, allow_negative_numbers = true)]
    base_weight: f32,
    /// Number format of the file
    #[arg(long, value_enum, default_value_t = FileDType::F16)]
    dtype: FileDType,
    /// Layout of the file
    #[arg(long, value_enum, default_value_t = LoraFormat::Kohya)]
    format: LoraFormat,
    /// LoRA file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &GenerateArgs, common: &Common, device: &Device) -> Result<ExitCode> {
    common.start_log(None)?;
    check_name(&args.output)?;
    let inputs = [&args.images[..], &args.models.folders(), args.features.as_slice()].concat();
    let output = OutputFile::claim(&args.output, inputs.into_iter().chain(Source::inputs(&args.checkpoint)))?;
    let start = Instant::now();
    let generator = Generator::open(&args.checkpoint, args.models.head_dim, device)?;
    let opened = start.elapsed();
    let person = match &args.features {
        Some(path) => features::read(path, generator.config(), device)?,
        None => {
            let mut reader = PhotoReader::open(&generator, &args.models.photo_models())?;
            let portraits = args.images.iter().map(|path| reader.portrait(path)).collect::<Result<Vec<Portrait>>>()?;
            reader.person(&portraits, args.base)
        }
    };
    let seen = start.elapsed();
    let lora = generator.lora(&person, args.id_weight, if args.base { args.base_weight } else { 0.0 })?;
    let trigger = generator.trigger().trim_end_matches([',', ' ']);
    let notes = BTreeMap::from([("ss_training_comment".to_owned(), format!("HyperLoRA; trigger words: {trigger}"))]);
    export::save_lora(output.path(), generator.sites(), &lora, args.dtype.into(), args.format.into(), &notes)?;
    tracing::info!(
        "{} from {} image(s): hypernetwork {:.2} s, person {:.2} s, LoRA {:.2} s",
        args.output.display(),
        person.clip_states.dims()[0],
        opened.as_secs_f64(),
        (seen - opened).as_secs_f64(),
        (start.elapsed() - seen).as_secs_f64(),
    );
    Ok(ExitCode::SUCCESS)
}
