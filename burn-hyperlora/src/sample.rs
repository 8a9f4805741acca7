//! Drawing pictures with the base and a LoRA.
