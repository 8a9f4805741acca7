//! `hyperlora`: trains a HyperLoRA, writes LoRAs from photos, draws pictures with them, and evaluates a run.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
