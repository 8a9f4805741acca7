//! Networks of SDXL, each in the names and layouts of its original in diffusers or transformers.

pub mod attention;
pub mod clip_encoder;
pub mod clip_text;
pub mod clip_vision;
pub mod embeddings;
pub mod norms;
pub mod resnet;
pub mod unet;
pub mod vae;
