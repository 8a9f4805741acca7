//! The two CLIP text encoders.
