//! The options `--lora` and `--lora-weight` of several commands.

use std::path::PathBuf;

use clap::Args;

use crate::commands::finite;
use crate::error::{Error, Result};
use crate::lora_file::{BaseNames, LoraFile, sum};
use crate::sdxl::base_source::{BaseSource, PartUpdates};

/// LoRA files and their weights.
#[derive(Debug, Args)]
pub(super) struct LoraArgs {
    /// A LoRA file of sd-scripts, diffusers or PEFT; several add up
    #[arg(long = "lora", value_name = "FILE")]
    loras: Vec<PathBuf>,
    /// Weight of each --lora, in their order; 1 where left out
    #[arg(long = "lora-weight", value_name = "W", value_parser = finite::<f32>, allow_negative_numbers = true)]
    lora_weights: Vec<f32>,
}

impl LoraArgs {
    /// What the LoRAs change of this base.
    ///
    /// # Errors
    /// Input for more weights than LoRAs, and for LoRAs that cannot be read or do not fit.
    pub(super) fn updates(&self, base: &BaseSource) -> Result<PartUpdates> {
        if self.lora_weights.len() > self.loras.len() {
            return Err(Error::input(
                "--lora-weight",
                "there are more weights than LoRAs",
                "give each weight after its --lora",
            ));
        }
        let weights = self.lora_weights.iter().copied().chain(std::iter::repeat(1.0));
        let loras = self.loras.iter().zip(weights).map(|(path, weight)| Ok((LoraFile::open(path)?, weight)));
        let loras = loras.collect::<Result<Vec<_>>>()?;
        if loras.is_empty() {
            return Ok(PartUpdates::new());
        }
        sum(&loras, &BaseNames::of(base)?)
    }
}
