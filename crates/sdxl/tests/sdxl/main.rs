//! Tests of frozen models, their files and LoRA files, against fixtures made with diffusers and transformers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod encoders;
mod key_lists;
mod lora_files;
mod lora_sets;
mod sample;
mod samplers;
mod unet;
mod weights;
