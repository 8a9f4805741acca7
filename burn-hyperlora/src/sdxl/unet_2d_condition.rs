//! The denoiser: configuration, loading, forward pass and gradients of LoRA weights.
