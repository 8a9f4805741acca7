//! The hypernetwork: conditions to LoRA weights.
