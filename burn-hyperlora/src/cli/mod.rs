//! Commands of `hyperlora`: parse, call the library, print.

mod checkpoint;
mod completions;
mod device;
mod eval;
mod export;
mod fold;
mod formats;
mod generate;
mod loras;
mod merge;
mod options;
mod plan;
mod sample;
mod settings;
mod slider;
mod status;
mod train;

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use burn_hyperlora::metrics::log;
use clap::{CommandFactory, Parser, Subcommand};
use hyperlora_core::files::restrict_modes;
use hyperlora_core::output;
use hyperlora_ranks::{PEER_LOST, end_process};

use crate::cli::options::Common;

/// HyperLoRA on Burn: a hypernetwork that turns portraits into SDXL LoRAs.
#[derive(Debug, Parser)]
#[command(
    name = "hyperlora",
    version,
    propagate_version = true,
    after_help = "Examples:\n  hyperlora train experiments/quickstart/train.yaml --out runs/quickstart\n  hyperlora generate --checkpoint runs/quickstart --image a.png -o lora.safetensors\n\nExit codes: 0 done, 2 the input needs fixing, 3 stopped by a signal with everything saved, 1 the disk or the program failed.\n75 another rank of the run was lost or fell silent: start again."
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
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

impl Command {
    /// Returns whether the command runs models, which a GPU can do.
    fn uses_device(&self) -> bool {
        matches!(self, Self::Train(_) | Self::Generate(_) | Self::Sample(_) | Self::Eval(_))
    }
}

/// Parses the command line and runs it. Exit codes: 0 done, 2 the user's input, 3 stopped by a signal with everything
/// saved, 1 a fault, 75 another rank of the run was lost or fell silent.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    settings::pass_over_current_folder();
    // The tensor library panics when memory runs out or shapes disagree. Catching that gives one clear message for
    // whatever passed the checks.
    catch_unwind(AssertUnwindSafe(|| dispatch(&cli))).unwrap_or_else(|_| {
        complain(&"a fault in the program (above)\n  remedy: run it again with RUST_BACKTRACE=1 and report what it prints; checkpoints are intact");
        ExitCode::from(1)
    })
}

fn dispatch(cli: &Cli) -> ExitCode {
    let done =
        restrict_modes().and_then(|()| cli.common.device.open(cli.command.uses_device())).and_then(|device| match &cli
            .command
        {
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
            Command::Completions(args) => completions::run(args, Cli::command()),
            Command::Man(args) => completions::write_man_pages(args, Cli::command()),
        });
    done.unwrap_or_else(|error| {
        complain(&error);
        if error.exit_code() == PEER_LOST {
            end_process(PEER_LOST);
        }
        ExitCode::from(error.exit_code())
    })
}

/// Prints the error that ended the command to stderr and, if there is one, to `run.log`.
fn complain(problem: &dyn Display) {
    output::note(format_args!("error: {problem}"));
    log::note_failure(problem);
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use hyperlora_testing::reference::{check, command_line};

    use super::Cli;

    #[test]
    fn the_reference_of_the_command_line_is_up_to_date() {
        check("command-line.md", "hyperlora", &command_line(Cli::command()));
    }
}
