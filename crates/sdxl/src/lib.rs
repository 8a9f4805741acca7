//! Stable Diffusion XL on Burn, with diffusers names: models, schedulers, weights on disk, and LoRAs.
//!
//! Start with [`source::BaseSource`], which opens a base model from a diffusers folder or a single file, and
//! [`models::unet::UNet2DConditionModel`], which takes a LoRA per sample. [`lora::LoraSet`] reads and writes LoRA
//! files, [`lora::ops`] sums, reduces and merges them, [`scheduler::NoiseSampler`] steps from noise to a picture, and
//! [`weights`] reads and writes safetensors.

pub mod lora;
pub mod memory;
pub mod models;
pub mod planes;
pub mod sample;
pub mod scheduler;
pub mod source;
pub mod text;
pub mod tokenizer;
pub mod weights;
