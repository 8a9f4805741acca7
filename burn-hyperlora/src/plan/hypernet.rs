//! Cost of the hypernetwork, from its config and the attention modules that it generates LoRAs for.

use hyperlora_sdxl::lora::AttentionSite;

use crate::hypernet::{HyperLoraConfig, ParameterGroup, Stage, TOKENS_PER_SITE};

fn wide(size: usize) -> u128 {
    size as u128
}

/// HypernetSizes that all counts need.
#[derive(Debug, Clone, Copy)]
pub(super) struct HypernetSizes<'a> {
    pub(super) config: &'a HyperLoraConfig,
    pub(super) sites: &'a [AttentionSite],
    /// Number of tokens of the image encoder's states.
    pub(super) image_tokens: usize,
}

impl HypernetSizes<'_> {
    fn queries(&self) -> u128 {
        wide(self.sites.len() * TOKENS_PER_SITE)
    }

    fn dim(&self) -> u128 {
        wide(self.config.resampler.dim)
    }

    /// Total width of all heads.
    fn inner(&self) -> u128 {
        wide(self.config.resampler.heads) * wide(self.config.resampler.head_dim)
    }

    /// Number of elements of one LoRA of rank 1: inputs and outputs of all linears.
    fn per_rank(&self) -> u128 {
        let of_site = |site: &AttentionSite| {
            let hidden = wide(site.hidden_size);
            let context = site.cross_attention_dim.map_or(hidden, wide);
            2 * (hidden + hidden) + 2 * (context + hidden)
        };
        self.sites.iter().map(of_site).sum()
    }

    /// Number of elements of one sample's LoRA, with ID-LoRA and Base-LoRA if the stage makes both.
    pub(super) fn lora_elements(&self, stage: Stage) -> u128 {
        wide(self.rank(stage)) * self.per_rank()
    }

    /// LoRA rank in the UNet. ID-LoRA and Base-LoRA act together by concatenated ranks.
    pub(super) fn rank(&self, stage: Stage) -> usize {
        match stage {
            Stage::Base => self.config.base_rank,
            Stage::IdClip | Stage::IdEmbedding => self.config.id_rank + self.config.base_rank,
        }
    }

    /// Number of parameters of a group; 0 for the Base-LoRA's groups without a Base-LoRA.
    pub(super) fn parameters(&self, group: ParameterGroup) -> u64 {
        let HyperLoraConfig { id_rank, base_rank, basis, id_tokens, id_embedding_dim, clip_dim, ref resampler } =
            *self.config;
        let (dim, inner, basis, clip) = (self.dim(), self.inner(), wide(basis), wide(clip_dim));
        let (depth, middle) = (wide(resampler.depth), self.dim() * wide(resampler.ff_mult));
        let norm = 2 * dim;
        let attention = 4 * dim * inner;
        let linear = |input: u128, output: u128| input * output + output;
        let latents = self.queries() * dim;
        let feed_forward = linear(dim, middle) + linear(middle, dim);
        let count = match group {
            ParameterGroup::Latents => latents,
            ParameterGroup::Attn1 => depth * attention,
            ParameterGroup::Attn2 | ParameterGroup::Attn3 => depth * (attention + 2 * norm),
            ParameterGroup::ProjIn | ParameterGroup::ProjIn2 => linear(clip, dim),
            ParameterGroup::ProjOut => linear(dim, basis),
            ParameterGroup::Ff => depth * feed_forward,
            ParameterGroup::Norms => depth * 2 * norm,
            ParameterGroup::IdProjector => linear(wide(id_embedding_dim), wide(id_tokens) * clip) + 2 * clip,
            ParameterGroup::IdBases => basis * wide(id_rank) * self.per_rank(),
            ParameterGroup::BaseBases => basis * wide(base_rank) * self.per_rank(),
            ParameterGroup::BaseResampler if base_rank == 0 => 0,
            // One condition: no attention to a second condition, no second projection.
            ParameterGroup::BaseResampler => {
                let layer = 2 * attention + 4 * norm + feed_forward;
                latents + linear(clip, dim) + depth * layer + linear(dim, basis)
            }
        };
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    /// Number of parameters of the whole hypernetwork.
    pub(super) fn all_parameters(&self) -> u64 {
        self.parameters_in(&ParameterGroup::ALL)
    }

    /// Number of parameters of some groups, each counted once.
    pub(super) fn parameters_in(&self, groups: &[ParameterGroup]) -> u64 {
        ParameterGroup::ALL.iter().filter(|group| groups.contains(group)).map(|group| self.parameters(*group)).sum()
    }

    /// Operations of one sample: forward pass of the trained part, and of the frozen Base-LoRA in the ID stages.
    pub(super) fn flops(&self, stage: Stage) -> HypernetFlops {
        let mix = |rank: usize| 2 * wide(self.config.basis) * wide(rank) * self.per_rank();
        let states = wide(self.image_tokens);
        let base = || self.resampler_flops(&[states]) + mix(self.config.base_rank);
        match stage {
            Stage::Base => HypernetFlops { trained: base(), resting: 0 },
            Stage::IdClip | Stage::IdEmbedding => {
                let ids = wide(self.config.id_tokens);
                let (contexts, projector) = match stage {
                    Stage::IdEmbedding => {
                        let output = ids * wide(self.config.clip_dim);
                        (vec![ids, states], 2 * wide(self.config.id_embedding_dim) * output)
                    }
                    _ => (vec![states], 0),
                };
                let resting = if self.config.base_rank > 0 { base() } else { 0 };
                HypernetFlops {
                    trained: projector + self.resampler_flops(&contexts) + mix(self.config.id_rank),
                    resting,
                }
            }
        }
    }

    /// Forward operations of a resampler; `contexts` are the token counts of its conditions.
    fn resampler_flops(&self, contexts: &[u128]) -> u128 {
        let (queries, dim, inner) = (self.queries(), self.dim(), self.inner());
        let attend = |tokens: u128| {
            let projections = 2 * (2 * queries + 2 * tokens) * dim * inner;
            projections + 4 * queries * tokens * inner
        };
        let feed_forward = 4 * queries * dim * dim * wide(self.config.resampler.ff_mult);
        let layer = attend(queries) + contexts.iter().map(|&tokens| attend(tokens)).sum::<u128>() + feed_forward;
        let inward: u128 = contexts.iter().map(|tokens| 2 * tokens * wide(self.config.clip_dim) * dim).sum();
        inward + wide(self.config.resampler.depth) * layer + 2 * queries * dim * wide(self.config.basis)
    }

    /// Number of elements that the graph of one sample's hypernetwork keeps for its backward pass.
    pub(super) fn graph_elements(&self, stage: Stage) -> u128 {
        let (queries, dim, inner) = (self.queries(), self.dim(), self.inner());
        let heads = wide(self.config.resampler.heads);
        let contexts = match stage {
            Stage::Base | Stage::IdClip => vec![wide(self.image_tokens)],
            Stage::IdEmbedding => vec![wide(self.config.id_tokens), wide(self.image_tokens)],
        };
        // Input and output of the norm, queries, keys, values, scores before and after the softmax, output of the
        // heads, sum.
        let attend = |tokens: u128| {
            2 * queries * dim
                + queries * inner
                + 2 * tokens * inner
                + 2 * heads * queries * tokens
                + queries * inner
                + queries * dim
        };
        let feed_forward = 3 * queries * dim + 2 * queries * dim * wide(self.config.resampler.ff_mult);
        let layer = attend(queries) + contexts.iter().map(|&tokens| attend(tokens)).sum::<u128>() + feed_forward;
        wide(self.config.resampler.depth) * layer + 3 * queries * wide(self.config.basis)
    }
}

/// Forward operations of the hypernetwork for one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HypernetFlops {
    /// Operations of the trained part; its backward pass costs twice as much again.
    pub(super) trained: u128,
    /// Operations of the frozen Base-LoRA in the ID stages.
    pub(super) resting: u128,
}

impl HypernetFlops {
    /// Operations of forward and backward pass.
    pub(super) fn total(&self) -> u128 {
        3 * self.trained + self.resting
    }
}
