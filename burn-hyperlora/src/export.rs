//! LoRA files in the formats that other tools read.
