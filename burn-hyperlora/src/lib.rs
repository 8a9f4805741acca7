//! Training and generation of HyperLoRA (arXiv 2503.16944) on Burn.
//!
//! photos -> [`data`] -> [`conditioning`] -> [`hypernet`] -> LoRA weights -> frozen SDXL (`hyperlora_sdxl`) ->
//! [`objective`] -> gradients -> [`optim`] -> [`checkpoint`] -> [`export`] / [`generate`] / [`eval`]. Modules import
//! only modules above them in the list below; a test enforces this.

pub mod data;

pub mod conditioning;

pub mod parameters;

pub mod hypernet;

pub mod objective;

pub mod optim;

pub mod checkpoint;

pub mod metrics;

pub mod run;

pub mod train;

pub mod eval;

pub mod experiment;

pub mod plan;

pub mod status;

pub mod export;

pub mod generate;
