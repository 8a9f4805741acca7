//! Options shared by several commands.

use std::path::{Path, PathBuf};

use burn_hyperlora::generate::photos::PhotoModels;
use burn_hyperlora::metrics::{self, log};
use clap::{ArgAction, Args};
use hyperlora_core::Result;

use crate::cli::device::DeviceChoice;

/// Options of every command.
#[derive(Debug, Args)]
pub(super) struct Common {
    /// Device to compute on: `cpu`, `cuda:N`, or `cuda` for the GPU of this rank (the first for a single rank, the only
    /// one if no other is visible). Commands that run no model accept only `cpu`
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    pub(super) device: DeviceChoice,
    /// Log more (-vv: everything)
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(super) verbose: u8,
    /// Log only warnings and errors
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,
}

impl Common {
    /// Starts the log on stderr and, given a run folder, in its `run.log`.
    pub(super) fn start_log(&self, run: Option<&Path>) -> Result<()> {
        log::init(if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) }, run)
    }

    /// Starts the log of a rank other than the main rank: warnings on stderr, each with the rank.
    pub(super) fn start_follower_log(&self, rank: usize) -> Result<()> {
        log::init_follower(i8::try_from(self.verbose).unwrap_or(i8::MAX), rank)
    }

    pub(super) fn display(&self) -> metrics::Display {
        metrics::Display::detect(self.quiet)
    }

    /// Selects the display of a training.
    pub(super) fn training_display(&self) -> metrics::Display {
        metrics::Display::detect_for_training(self.quiet)
    }
}

/// Settings that a hypernetwork in the released layout does not contain, and the models that process photos for it.
#[derive(Debug, Args)]
pub(super) struct HyperLoraArgs {
    /// Width of an attention head of a released hypernetwork [default: 64]
    #[arg(long, value_name = "N", requires = "checkpoint")]
    pub(super) head_dim: Option<usize>,
    /// Folder of the CLIP image encoder, instead of the run's own
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    pub(super) image_encoder: Option<PathBuf>,
    /// Folder of its preprocessing [default: that of --image-encoder, or `feature_extractor` beside it]
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    pub(super) feature_extractor: Option<PathBuf>,
    /// Folder of the face models' ONNX files, instead of the run's own
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    pub(super) faces: Option<PathBuf>,
}

impl HyperLoraArgs {
    /// Lists the folders that the options name.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        [&self.image_encoder, &self.feature_extractor, &self.faces].into_iter().flatten().cloned().collect()
    }

    pub(super) fn photo_models(&self) -> PhotoModels {
        PhotoModels {
            image_encoder: self.image_encoder.clone(),
            feature_extractor: self.feature_extractor.clone(),
            faces: self.faces.clone(),
        }
    }
}
