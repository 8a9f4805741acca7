//! Named tensors in safetensors files, read lazily and checked as a whole.
