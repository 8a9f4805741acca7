//! Hypernetwork of `crates/testing/fixtures/hypernet`, made by `ci/parity/hyper_fixtures.py`.

use std::path::PathBuf;

use burn_hyperlora::hypernet::{HyperLoraConfig, ResamplerConfig};
use hyperlora_sdxl::lora::AttentionSite;

pub(crate) fn fixtures() -> PathBuf {
    hyperlora_testing::fixture("hypernet")
}

pub(crate) fn config() -> HyperLoraConfig {
    HyperLoraConfig {
        id_rank: 4,
        base_rank: 2,
        basis: 9,
        id_tokens: 3,
        id_embedding_dim: 11,
        clip_dim: 10,
        resampler: ResamplerConfig { dim: 14, depth: 2, heads: 3, head_dim: 5, ff_mult: 2 },
    }
}

pub(crate) fn sites() -> Vec<AttentionSite> {
    let site = |path: &str, hidden_size, cross_attention_dim| AttentionSite {
        path: path.into(),
        hidden_size,
        cross_attention_dim,
    };
    vec![
        site("down_blocks.1.attentions.0.transformer_blocks.0.attn1", 6, None),
        site("down_blocks.1.attentions.0.transformer_blocks.0.attn2", 6, Some(7)),
        site("mid_block.attentions.0.transformer_blocks.0.attn2", 8, Some(7)),
    ]
}
