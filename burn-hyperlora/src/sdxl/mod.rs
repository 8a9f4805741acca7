//! The frozen base: SDXL, part by part, in the names of diffusers.
