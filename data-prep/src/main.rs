//! `data-prep`: photos to Parquet shards.

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{ArgAction, Parser, Subcommand};
use data_prep::pipeline::{PrepConfig, Progress, build};
use data_prep::report::{CONTACT_SHEET_FILE, describe_counts};
use hyperlora_core::files::restrict_modes;
use hyperlora_core::signals::StopFlag;
use hyperlora_core::text::name;
use hyperlora_core::{Result, output};
use indicatif::{ProgressBar, ProgressStyle};

/// Turn photos into Parquet shards of filtered, embedded faces.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Example:\n  data-prep build experiments/quickstart/data.yaml --out runs/quickstart-data"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find, filter, embed, crop and caption the faces of a folder of photos.
    #[command(
        after_help = "Example:\n  data-prep build experiments/quickstart/data.yaml --out runs/quickstart-data\n\n\
        Exit codes: 0 done, 2 the input needs fixing, 3 stopped by a signal with nothing changed, 1 the disk or the \
        program failed."
    )]
    Build {
        /// YAML file that names the source of the photos and selects the faces to keep.
        config: PathBuf,
        /// Output folder. One that data-prep made before is replaced once the new one is complete, unless it contains
        /// other files too.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Photos processed in parallel [default: one per core]. The result does not depend on it.
        #[arg(long, value_name = "N")]
        workers: Option<NonZeroUsize>,
        /// Device of the face models: only `cpu` for now.
        #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = only_cpu)]
        device: String,
        /// Log more: each rejected photo; twice for the libraries' messages.
        #[arg(short, long, action = ArgAction::Count)]
        verbose: u8,
        /// Log nothing but warnings and errors.
        #[arg(short, long, conflicts_with = "verbose")]
        quiet: bool,
    },
}

fn main() -> ExitCode {
    let Command::Build { config, out, workers, device: _, verbose, quiet } = Cli::parse().command;
    let level = match (quiet, verbose) {
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "info,data_prep=debug,hyperlora_core=debug",
        (false, _) => "debug",
    };
    tracing_subscriber::fmt()
        .fmt_fields(hyperlora_core::text::log_fields())
        .with_env_filter(level)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    match catch_unwind(AssertUnwindSafe(|| run(&config, &out, workers, quiet))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            output::note(format_args!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
        Err(_) => {
            let remedy = "run it again with RUST_BACKTRACE=1 and report what it prints";
            output::note(format_args!("error: a fault in the program (above)\n  remedy: {remedy}"));
            ExitCode::from(1)
        }
    }
}

/// Accepts only `cpu`. The option exists because `hyperlora` takes `--device` everywhere; ONNX Runtime is loaded for
/// the CPU.
fn only_cpu(name: &str) -> std::result::Result<String, String> {
    match name {
        "cpu" => Ok(name.to_owned()),
        _ => Err("the face models run on the CPU only: give `cpu`, or leave --device out".into()),
    }
}

/// Exit code of a build that a signal stopped.
const STOPPED: u8 = 3;

fn run(config_path: &Path, out: &Path, workers: Option<NonZeroUsize>, quiet: bool) -> Result<ExitCode> {
    restrict_modes()?;
    let started = Instant::now();
    let stop = StopFlag::install()?;
    let config = PrepConfig::load(config_path)?;
    let base_dir = config_path.parent().unwrap_or(Path::new("."));
    let workers = workers.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);

    let mut display = Display::new(quiet);
    let manifest = build(&config, base_dir, out, workers, &stop, &mut |progress| display.show(progress))?;
    display.finish();
    let Some(manifest) = manifest else {
        let signal = stop.raised_by().unwrap_or("a signal");
        output::note(format_args!("stopped by {signal}: nothing is written, {} is as it was", out.display()));
        return Ok(ExitCode::from(STOPPED));
    };
    if !quiet {
        let splits = describe_counts(&manifest.splits);
        output::line(format_args!("kept {} of {} photos ({})", manifest.kept, manifest.photos, name(&splits)))?;
        output::line(format_args!("left out: {}", describe_counts(&manifest.rejected)))?;
        if !manifest.notes.is_empty() {
            output::line(format_args!("noted: {}", manifest.notes))?;
        }
        let (shards, seconds) = (manifest.shards.len(), started.elapsed().as_secs_f32());
        output::line(format_args!("{shards} shards in {}, {seconds:.1} s", out.display()))?;
        output::line(format_args!("look at {}", out.join(CONTACT_SHEET_FILE).display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Progress display: a bar on a terminal, an occasional line elsewhere, nothing when quiet.
enum Display {
    Bar(ProgressBar),
    Lines { last: Instant },
    Nothing,
}

impl Display {
    fn new(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Nothing,
            (false, true) => {
                let style =
                    ProgressStyle::with_template("{bar:40} {pos}/{len} photos, {msg} kept, {per_sec}, {eta} left");
                Self::Bar(ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
            }
            (false, false) => Self::Lines { last: Instant::now() },
        }
    }

    fn show(&mut self, Progress { done, total, kept }: Progress) {
        match self {
            Self::Bar(bar) => {
                bar.set_length(total as u64);
                bar.set_message(kept.to_string());
                bar.set_position(done as u64);
            }
            Self::Lines { last } => {
                const EVERY: Duration = Duration::from_secs(5);
                if done == total || last.elapsed() >= EVERY {
                    output::note(format_args!("{done}/{total} photos, {kept} kept"));
                    *last = Instant::now();
                }
            }
            Self::Nothing => {}
        }
    }

    fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use hyperlora_testing::reference::{check, command_line};

    use super::Cli;

    #[test]
    fn the_reference_of_the_command_line_is_up_to_date() {
        check("command-line.md", "data-prep", &command_line(Cli::command()));
    }
}
