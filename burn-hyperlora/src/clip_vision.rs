//! CLIP image encoder (transformers `CLIPVisionModelWithProjection`).
