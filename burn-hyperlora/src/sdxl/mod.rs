//! The frozen base: SDXL, part by part, in the names of diffusers.

pub mod attention;
pub mod autoencoder_kl;
pub mod base_source;
pub mod clip_encoder;
pub mod clip_text;
pub mod configs;
pub mod embeddings;
mod leaves;
pub mod memory;
pub mod norms;
pub mod resnet;
pub mod scheduler;
pub mod stability;
pub mod text;
pub mod tokenizer;
pub mod transformer;
mod transformer_gradients;
pub mod unet_2d_blocks;
pub mod unet_2d_condition;
pub mod unet_config;
mod unet_gradients;
pub mod unet_layout;

pub use unet_2d_condition as unet;
