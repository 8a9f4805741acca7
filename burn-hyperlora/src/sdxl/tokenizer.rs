//! CLIP's byte-pair tokenizer.
