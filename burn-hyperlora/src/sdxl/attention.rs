//! Attention with per-sample LoRA, and the transformer layer made of it.
