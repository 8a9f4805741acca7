//! Run folder: its lock, state and checkpoints, for training and for tools outside it.

pub mod archive;
pub mod claim;
pub mod moments;
pub mod saved;
pub mod skipped;
pub mod state;

pub use claim::{is_claimed, move_aside, verify_config};

/// Name of the resolved configuration in a run folder.
pub const CONFIG_FILE: &str = "config.yaml";
/// Name of the file in a run folder that maps the configuration's paths to places on this machine.
pub const PATHS_FILE: &str = "paths.yaml";
/// Folder of the checkpoints in a run folder.
pub const CHECKPOINTS: &str = "checkpoints";
/// Folder of the event files in a run folder.
pub const TENSORBOARD: &str = "tensorboard";
/// File of the skipped steps in a run folder, one JSON object per line.
pub const SKIPPED: &str = "skipped.jsonl";
/// Folder of the pictures in a run folder.
pub const SAMPLES: &str = "samples";

/// Resolved configuration as YAML files of a run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// [`CONFIG_FILE`]: all settings, with defaults written out. It holds no machine-specific paths and travels with a
    /// shared run.
    pub config: String,
    /// [`PATHS_FILE`]: local places of the paths that the configuration names.
    pub paths: String,
}
