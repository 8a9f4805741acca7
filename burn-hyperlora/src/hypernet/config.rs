//! Hypernetwork sizes.

use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sizes of the hypernetwork ([`HyperLora`](super::HyperLora)), each 1 to 65536. The defaults are those of the released
/// weights, plus a Base-LoRA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HyperLoraConfig {
    /// LoRA rank of the ID-LoRA.
    pub id_rank: usize,
    /// LoRA rank of the Base-LoRA; half the ID-LoRA's in the paper. 0: no Base-LoRA.
    pub base_rank: usize,
    /// K: number of matrices per basis, which spans the space of each LoRA matrix.
    pub basis: usize,
    /// Number of tokens made from the ID embedding.
    pub id_tokens: usize,
    /// Width of the embedder's ID embedding; 512, as in the shards.
    pub id_embedding_dim: usize,
    /// Width of the CLIP image encoder's hidden states.
    pub clip_dim: usize,
    /// Sizes of the resampler, also used by the Base-LoRA's own one.
    pub resampler: ResamplerConfig,
}

/// Sizes of a resampler, each 1 to 65536.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResamplerConfig {
    /// Width of the latents.
    pub dim: usize,
    /// Number of layers.
    pub depth: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Inner width of the feed-forward layers, in units of `dim`.
    pub ff_mult: usize,
}

impl Default for HyperLoraConfig {
    fn default() -> Self {
        Self {
            id_rank: 8,
            base_rank: 4,
            basis: 128,
            id_tokens: 16,
            id_embedding_dim: 512,
            clip_dim: 1024,
            resampler: ResamplerConfig::default(),
        }
    }
}

impl Default for ResamplerConfig {
    fn default() -> Self {
        Self { dim: 1024, depth: 4, heads: 12, head_dim: 64, ff_mult: 4 }
    }
}

/// Upper limit of sizes, so that a mistyped one does not exhaust the memory.
const LARGEST: usize = 1 << 16;

impl HyperLoraConfig {
    /// Checks that all sizes are possible; `place` names the config in the error.
    ///
    /// # Errors
    /// Input, naming the key: a size is 0 (only `base_rank` may be 0) or above 65536.
    pub fn validate(&self, place: &str) -> Result<()> {
        let ResamplerConfig { dim, depth, heads, head_dim, ff_mult } = self.resampler;
        let sizes = [
            ("id_rank", self.id_rank),
            ("base_rank", self.base_rank),
            ("basis", self.basis),
            ("id_tokens", self.id_tokens),
            ("id_embedding_dim", self.id_embedding_dim),
            ("clip_dim", self.clip_dim),
            ("resampler.dim", dim),
            ("resampler.depth", depth),
            ("resampler.heads", heads),
            ("resampler.head_dim", head_dim),
            ("resampler.ff_mult", ff_mult),
        ];
        let misfit = |(key, size): &(&str, usize)| *size > LARGEST || (*size == 0 && *key != "base_rank");
        match sizes.into_iter().find(misfit) {
            Some((key, size)) => {
                let remedy = format!("give a size of 1 to {LARGEST}");
                Err(Error::input(format!("{place}.{key}"), format!("is {size}"), remedy))
            }
            None => Ok(()),
        }
    }
}
