//! Configs of SDXL-Base-1.0 and CLIP ViT-L/14, as published.
//!
//! They replace a missing `config.json`: a single-file checkpoint holds none, and `plan` runs before anything is
//! downloaded. Keys that the published files set to `null`, the default of diffusers or transformers, are omitted.

/// `unet/config.json`.
pub const UNET: &str = include_str!("configs/unet.json");
/// `vae/config.json`.
pub const VAE: &str = include_str!("configs/vae.json");
/// `text_encoder/config.json`: CLIP ViT-L/14's.
pub const TEXT_ENCODER: &str = include_str!("configs/text_encoder.json");
/// `text_encoder_2/config.json`: OpenCLIP ViT-bigG/14's.
pub const TEXT_ENCODER_2: &str = include_str!("configs/text_encoder_2.json");
/// `image_encoder/config.json`: CLIP ViT-L/14's.
pub const IMAGE_ENCODER: &str = include_str!("configs/image_encoder.json");
/// `scheduler/scheduler_config.json`.
pub const SCHEDULER: &str = include_str!("configs/scheduler.json");
