//! SDXL networks, with the names and layouts of their diffusers or transformers originals.

pub mod attention;
pub mod clip_encoder;
pub mod clip_text;
pub mod clip_vision;
pub mod embeddings;
pub mod norms;
pub mod resnet;
pub mod unet;
pub mod vae;
