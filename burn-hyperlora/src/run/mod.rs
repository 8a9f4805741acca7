//! The run folder: who writes into it, where the run stands, and its checkpoints, from inside and from outside.

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
/// The skipped steps in a run folder, one JSON object a line.
pub const SKIPPED: &str = "skipped.jsonl";
/// Folder of the pictures in a run folder.
pub const SAMPLES: &str = "samples";

/// A configuration as files of a run folder, in YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// [`CONFIG_FILE`]: everything, with defaults written out. It tells nothing of the machine, and goes along when a run
    /// is shared.
    pub config: String,
    /// [`PATHS_FILE`]: where on this machine lies what it names.
    pub paths: String,
}
