//! The commands of `hyperlora`: parse, call the library, print.

mod checkpoint;
mod eval;
mod export;
mod fold;
mod generate;
mod loras;
mod merge;
mod plan;
mod sample;
mod settings;
mod slider;
mod status;
mod train;

use std::fmt::{self, Display, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use burn::tensor::{Device, FloatDType};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use data_prep::files::restrict_modes;
use data_prep::output;
use safetensors::Dtype;

use crate::collective::{PEER_LOST, end_process};
use crate::error::{Error, Result};
use crate::export::lora::Layout;
use crate::generate::photos::PhotoModels;
use crate::metrics::{self, log};

/// HyperLoRA on Burn: a hypernetwork that turns portraits into SDXL LoRAs.
#[derive(Debug, Parser)]
#[command(
    name = "hyperlora",
    version,
    propagate_version = true,
    after_help = "Examples:\n  hyperlora train experiments/quickstart/train.yaml --out runs/quickstart\n  hyperlora generate --checkpoint runs/quickstart --image a.png -o lora.safetensors\n\nExit codes: 0 done, 2 the input needs mending, 3 stopped by a signal with everything saved, 1 the disk or the program failed.\n75 another rank of the run was lost or fell silent: start again."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Generate(generate::GenerateArgs),
    Export(export::ExportArgs),
    Slider(slider::SliderArgs),
    Fold(fold::FoldArgs),
    Sample(Box<sample::SampleArgs>),
    Merge(merge::MergeArgs),
    Plan(plan::PlanArgs),
    Status(status::StatusArgs),
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    #[command(subcommand)]
    Eval(eval::EvalCommand),
}

impl Command {
    /// Whether it runs models, which a GPU can do.
    fn uses_device(&self) -> bool {
        matches!(self, Self::Train(_) | Self::Generate(_) | Self::Sample(_) | Self::Eval(_))
    }
}

/// Options of every command.
#[derive(Debug, Args)]
struct Common {
    /// Where to compute: `cpu`, `cuda:N`, or `cuda` for the GPU of this rank (the first where there is one rank, the only one
    /// where no other is visible). Commands that run no model take `cpu` alone.
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    device: DeviceChoice,
    /// Say more (-vv: everything).
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Say only what went wrong.
    #[arg(short, long, global = true)]
    quiet: bool,
}

/// A device by name, checked while the command line is read.
#[derive(Debug, Clone, Copy)]
enum DeviceChoice {
    Cpu,
    /// The GPU of this rank where the number is left out.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.strip_prefix("cuda:").map(str::parse::<usize>) {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(None)),
            Some(Ok(index)) => Ok(Self::Cuda(Some(index))),
            _ => Err("expected `cpu`, `cuda` or `cuda:N`, for example cuda:0".into()),
        }
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => out.write_str("cpu"),
            Self::Cuda(None) => out.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(out, "cuda:{index}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device for `command`.
    fn open_for(self, command: &Command) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            Self::Cuda(_) if !command.uses_device() => Err(Error::input(
                format!("--device {self}"),
                "this command has no use for a GPU: it works on the CPU alone",
                "leave --device out",
            )),
            #[cfg(feature = "cuda")]
            Self::Cuda(asked) => {
                let local_rank = crate::collective::Placement::of_process()?.map(|placement| placement.local_rank);
                settings::keep_kernels(local_rank.unwrap_or(0))?;
                let visible = Device::enumerate(burn::tensor::DeviceType::Cuda).len();
                Ok(Device::cuda(choose_gpu(asked, local_rank, visible)?))
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(Error::input(
                format!("--device {self}"),
                "this binary was built without CUDA",
                "cargo build --release --features burn-hyperlora/cuda",
            )),
        }
    }
}

/// The number of the GPU to use, of the `visible` ones: `asked`, or that of the rank. A launcher may show each rank its own GPU
/// alone (`srun --gpus-per-task=1`, a container per GPU), which is number 0 then.
#[cfg(any(feature = "cuda", test))]
fn choose_gpu(asked: Option<usize>, local_rank: Option<usize>, visible: usize) -> Result<usize> {
    let index = asked.unwrap_or(if visible == 1 { 0 } else { local_rank.unwrap_or(0) });
    if index < visible {
        return Ok(index);
    }
    let place = asked.map_or_else(|| "--device cuda".into(), |index| format!("--device cuda:{index}"));
    if visible == 0 {
        let remedy =
            "check that nvidia-smi lists a GPU here, and CUDA_VISIBLE_DEVICES; or leave --device out for the CPU";
        return Err(Error::input(place, "no NVIDIA GPU is visible to this process", remedy));
    }
    let range = if visible == 1 { "number 0 alone is".into() } else { format!("numbers 0 to {} are", visible - 1) };
    let problem = match (asked, local_rank) {
        (None, Some(rank)) => format!("local rank {rank} has no GPU: {range} visible"),
        _ => format!("there is no such GPU: {range} visible"),
    };
    Err(Error::input(
        place,
        problem,
        "start as many ranks per machine as it has GPUs; see nvidia-smi and CUDA_VISIBLE_DEVICES",
    ))
}

impl Common {
    /// Starts the log; with a run folder, `run.log` in it too.
    fn start_log(&self, run: Option<&Path>) -> Result<()> {
        log::init(if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) }, run)
    }

    /// Starts the log of a rank that does not lead: warnings on stderr, each with the rank.
    fn start_follower_log(&self, rank: usize) -> Result<()> {
        log::init_follower(i8::try_from(self.verbose).unwrap_or(i8::MAX), rank)
    }

    fn display(&self) -> metrics::Display {
        metrics::Display::detect(self.quiet)
    }
}

/// Number format of a file.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FileDType {
    F16,
    Bf16,
    F32,
}

impl From<FileDType> for Dtype {
    fn from(dtype: FileDType) -> Self {
        match dtype {
            FileDType::F16 => Self::F16,
            FileDType::Bf16 => Self::BF16,
            FileDType::F32 => Self::F32,
        }
    }
}

impl From<FileDType> for FloatDType {
    fn from(dtype: FileDType) -> Self {
        match dtype {
            FileDType::F16 => Self::F16,
            FileDType::Bf16 => Self::BF16,
            FileDType::F32 => Self::F32,
        }
    }
}

/// Layout of a LoRA file.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LoraFormat {
    /// kohya's sd-scripts: ComfyUI, the WebUIs and diffusers load it
    Kohya,
    /// diffusers with PEFT
    Diffusers,
}

impl From<LoraFormat> for Layout {
    fn from(format: LoraFormat) -> Self {
        match format {
            LoraFormat::Kohya => Self::Kohya,
            LoraFormat::Diffusers => Self::Diffusers,
        }
    }
}

/// What a hypernetwork of the released layout does not tell by itself, and what looks at photos for it.
#[derive(Debug, Args)]
struct HyperLoraArgs {
    /// Width of an attention head of a released hypernetwork [default: 64]
    #[arg(long, value_name = "N", requires = "checkpoint")]
    head_dim: Option<usize>,
    /// Folder of the CLIP image encoder, instead of the run's own
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    image_encoder: Option<PathBuf>,
    /// Folder of its preprocessing [default: that of --image-encoder, or `feature_extractor` beside it]
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    feature_extractor: Option<PathBuf>,
    /// Folder of the face models' ONNX files, instead of the run's own
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    faces: Option<PathBuf>,
}

impl HyperLoraArgs {
    /// The folders that it names.
    fn folders(&self) -> Vec<PathBuf> {
        [&self.image_encoder, &self.feature_extractor, &self.faces].into_iter().flatten().cloned().collect()
    }

    fn photo_models(&self) -> PhotoModels {
        PhotoModels {
            image_encoder: self.image_encoder.clone(),
            feature_extractor: self.feature_extractor.clone(),
            faces: self.faces.clone(),
        }
    }
}

/// Reads a number that one can compute with.
fn finite<T: FromStr + Into<f64> + Copy>(text: &str) -> std::result::Result<T, String> {
    match text.parse::<T>() {
        Ok(number) if number.into().is_finite() => Ok(number),
        _ => Err("expected a finite number".into()),
    }
}

/// Parses the command line and runs it. The exit code: 0 done, 2 the user's input, 3 stopped by a signal with everything
/// saved, 1 a fault, 75 another rank of the run was lost or fell silent.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    settings::pass_over_current_folder();
    // The tensor library panics where memory runs out or shapes disagree: one clear end for whatever got past the checks.
    catch_unwind(AssertUnwindSafe(|| dispatch(&cli))).unwrap_or_else(|_| {
        complain(&"a fault in the program (above)\n  remedy: run it again with RUST_BACKTRACE=1 and report what it prints; checkpoints are intact");
        ExitCode::from(1)
    })
}

fn dispatch(cli: &Cli) -> ExitCode {
    let done = restrict_modes().and_then(|()| cli.common.device.open_for(&cli.command)).and_then(|device| {
        match &cli.command {
            Command::Train(args) => train::run(args, &cli.common, &device),
            Command::Generate(args) => generate::run(args, &cli.common, &device),
            Command::Export(args) => export::run(args, &cli.common),
            Command::Slider(args) => slider::run(args, &cli.common),
            Command::Fold(args) => fold::run(args, &cli.common),
            Command::Sample(args) => sample::run(args, &cli.common, &device),
            Command::Merge(args) => merge::run(args, &cli.common),
            Command::Plan(args) => plan::run(args, &cli.common),
            Command::Checkpoint(command) => checkpoint::run(command, &cli.common),
            Command::Status(args) => status::run(args, &cli.common),
            Command::Eval(command) => eval::run(command, &cli.common, &device),
        }
    });
    done.unwrap_or_else(|error| {
        complain(&error);
        if error.exit_code() == PEER_LOST {
            end_process(PEER_LOST);
        }
        ExitCode::from(error.exit_code())
    })
}

/// Says on stderr, and in `run.log` where there is one, what ended the command.
fn complain(problem: &dyn Display) {
    output::note(format_args!("error: {problem}"));
    log::note_failure(problem);
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn each_rank_gets_its_gpu_or_the_only_one_it_sees() {
        for (asked, local_rank, visible, chosen) in [
            (None, None, 8, 0),
            (None, Some(5), 8, 5),
            // `--gpus-per-task=1`: every rank sees one GPU, whatever its own number.
            (None, Some(5), 1, 0),
            (Some(3), Some(5), 8, 3),
        ] {
            assert_eq!(choose_gpu(asked, local_rank, visible).unwrap(), chosen);
        }
        for (asked, local_rank, visible, words) in [
            (None, None, 0, "no NVIDIA GPU is visible"),
            (None, Some(2), 2, "local rank 2 has no GPU: numbers 0 to 1 are visible"),
            (Some(1), None, 1, "--device cuda:1: there is no such GPU: number 0 alone is visible"),
        ] {
            let error = choose_gpu(asked, local_rank, visible).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
        }
    }
}
