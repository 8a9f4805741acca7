//! Hypernetwork: maps conditions to LoRA weights (arXiv 2503.16944).
//!
//! ```text
//! ID embedding -> id_projector --x--> +-----------+
//!                                     | resampler | -> coefficients -> mixed ID bases   -> ID-LoRA
//! CLIP states of the face ------y---> +-----------+
//! CLIP states of the rest ------x---> base_resampler -> coefficients -> mixed Base bases -> Base-LoRA
//! ```

mod basis;
mod config;
mod folder;
mod groups;
mod hyper_lora;
mod id_projector;
mod init;
mod names;
mod resampler;
mod statistics;

pub use config::{HyperLoraConfig, ResamplerConfig};
pub use folder::{FolderFile, WholeFile, convert, is_released, read_sites, whole_files};
pub use groups::{ParameterGroup, Stage};
pub use hyper_lora::{HyperLora, LORA_SCALE, TOKENS_PER_SITE};
pub use statistics::CoefficientStatistics;
