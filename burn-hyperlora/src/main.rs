//! `hyperlora`: train a HyperLoRA, write LoRAs from photos, draw with them, measure what was learnt.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
