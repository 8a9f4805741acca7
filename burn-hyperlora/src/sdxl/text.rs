//! Both text encoders and their tokenizers as one: prompts to embeddings.
