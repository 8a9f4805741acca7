//! The denoising loss.
