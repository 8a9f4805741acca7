//! The frozen models, their files and LoRA files, against fixtures that diffusers and transformers made.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod encoders;
mod key_lists;
mod lora_files;
mod lora_sets;
mod sample;
mod samplers;
mod unet;
mod weights;
