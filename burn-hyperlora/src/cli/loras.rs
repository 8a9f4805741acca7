//! Options shared by commands that read LoRA files or combine two into one.

use std::path::{Path, PathBuf};

use clap::Args;
use hyperlora_core::files::OutputFile;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::LoraSet;
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::source::{BaseSource, ComponentUpdates};
use hyperlora_sdxl::weights::check_name;
use safetensors::Dtype;

use crate::cli::formats::{FileDType, LoraFormat, finite};

/// LoRA files and their weights.
#[derive(Debug, Args)]
pub(super) struct LoraArgs {
    /// LoRA file of sd-scripts, diffusers or PEFT; may be repeated, and the LoRAs add up
    #[arg(long = "lora", value_name = "FILE")]
    loras: Vec<PathBuf>,
    /// Weight of each --lora, in the same order [default: 1]
    #[arg(long = "lora-weight", value_name = "W", value_parser = finite::<f32>, allow_negative_numbers = true)]
    lora_weights: Vec<f32>,
}

impl LoraArgs {
    /// Returns the LoRA files.
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.loras
    }

    /// Computes the changes that the LoRAs make to this base.
    ///
    /// # Errors
    /// Input: more weights than LoRAs, or LoRAs that cannot be read or do not fit.
    pub(super) fn updates(&self, base: &BaseSource) -> Result<ComponentUpdates> {
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
            return Ok(ComponentUpdates::new());
        }
        sum(&loras, &BaseNames::of(base)?)
    }
}

/// Output options of a LoRA file made from two others.
#[derive(Debug, Args)]
pub(super) struct CombinedArgs {
    /// Number format of the file [default: the wider of the two]
    #[arg(long, value_enum)]
    dtype: Option<FileDType>,
    /// Layout of the file
    #[arg(long, value_enum, default_value_t = LoraFormat::Kohya)]
    format: LoraFormat,
    /// LoRA file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl CombinedArgs {
    /// Returns the number format of the combination of `one` and `other`.
    pub(super) fn dtype(&self, one: &LoraSet, other: &LoraSet) -> Dtype {
        self.dtype.map_or_else(|| one.wider(other), Into::into)
    }

    /// Claims the output of a command that reads `inputs`.
    ///
    /// # Errors
    /// Same as [`check_name`] and [`OutputFile::claim`].
    pub(super) fn claim(&self, inputs: [&Path; 2]) -> Result<OutputFile> {
        check_name(&self.output)?;
        OutputFile::claim(&self.output, inputs)
    }

    /// Writes the combined LoRA to the claimed output.
    ///
    /// # Errors
    /// Same as [`LoraSet::save`].
    pub(super) fn save(&self, made: &LoraSet, output: &OutputFile) -> Result<()> {
        made.save(output.path(), self.format.into())?;
        tracing::info!("{}: {} modules", self.output.display(), made.modules.len());
        Ok(())
    }
}
