//! `hyperlora completions` and `hyperlora man`: shell completions and man pages.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::Shell;
use hyperlora_core::{Error, Result, output};

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(
    after_help = "Example, for bash:\n  hyperlora completions bash > ~/.local/share/bash-completion/completions/hyperlora"
)]
pub(super) struct CompletionsArgs {
    /// Shell to complete for
    shell: Shell,
}

/// Write a man page of every command into a folder
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hyperlora man -o ~/.local/share/man/man1")]
pub(super) struct ManArgs {
    /// Output folder, which must exist
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

pub(super) fn run(args: &CompletionsArgs, mut program: Command) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut program, "hyperlora", &mut text);
    output::text(format_args!("{}", String::from_utf8_lossy(&text)))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn write_man_pages(args: &ManArgs, program: Command) -> Result<ExitCode> {
    clap_mangen::generate_to(program, &args.output).map_err(|source| Error::write(&args.output, source))?;
    Ok(ExitCode::SUCCESS)
}
