//! LoRA: per-sample weights for the UNet, LoRA files of all tools, and their sums, reductions and merges.

pub mod file;
pub mod ops;
mod set;
mod weights;

pub use set::{LoraModule, LoraSet, Matrix};
pub use weights::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
