//! The configs of SDXL-Base-1.0 and of CLIP ViT-L/14, as their published folders have them.
//!
//! For where there is no `config.json`: a single-file checkpoint holds none, and `plan` counts before anything is
//! downloaded. Keys at the default of diffusers or transformers that the published files spell as `null` are left out.

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
