//! LoRA: weights per sample for the UNet, LoRA files of every tool, and sums, reductions and merges of them.

pub mod file;
pub mod ops;
mod set;
mod weights;

pub use set::{LoraModule, LoraSet, Matrix};
pub use weights::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
