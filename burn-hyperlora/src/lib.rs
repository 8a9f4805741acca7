//! Training and generation of HyperLoRA (arXiv 2503.16944) on Burn.
//!
//! photos -> [`data`] -> [`conditioning`] -> [`hypernet`] -> [`lora`] -> [`sdxl`] (frozen) -> [`loss`] -> gradients ->
//! [`optim`] -> [`checkpoint`] -> [`export`] / [`sample`] / [`eval`]. Imports run one way, in the order below; a test
//! holds them to it.

pub mod error;

pub mod random;

pub mod data;
pub mod weights;

pub mod lora;

pub mod sdxl;

pub mod lora_file;

pub mod clip_vision;

pub mod conditioning;

pub mod hypernet;

pub mod loss;

pub mod collective;

pub mod optim;

pub mod sample;

pub mod checkpoint;

pub use data_prep::signals;

pub mod metrics;

pub mod train;

pub mod experiment;

pub mod plan;

pub mod status;

pub mod export;

pub mod eval;

pub mod generate;

pub mod commands;

pub use error::{Error, Result};
