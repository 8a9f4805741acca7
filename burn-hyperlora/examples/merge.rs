//! Merges a LoRA file into a base model, in the base's own layout and types.
//!
//!     cargo run --release --example merge -- experiments/quickstart/base anna.safetensors runs/base-with-anna

use std::path::PathBuf;

use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::lora::ops::merge;
use hyperlora_sdxl::source::BaseSource;

fn main() -> Result<()> {
    let [base, lora, output] =
        std::env::args().skip(1).map(PathBuf::from).collect::<Vec<_>>().try_into().map_err(|_| {
            Error::input("merge", "takes a base, a LoRA and an output", "give base/ anna.safetensors merged/")
        })?;
    let base = BaseSource::open(&base, None, None)?;
    // Several LoRAs add up, each at its weight.
    let loras = [(LoraFile::open(&lora)?, 1.0)];
    let updates = sum(&loras, &BaseNames::of(&base)?)?;
    merge(&base, &updates, &output)
}
