//! `hyperlora`: train a HyperLoRA, write LoRAs from photos, draw with them, measure what was learnt.

use std::process::ExitCode;

use burn_hyperlora::commands;

fn main() -> ExitCode {
    commands::run()
}
