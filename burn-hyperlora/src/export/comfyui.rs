//! Exports a hypernetwork for ByteDance's released ComfyUI nodes.

use std::path::Path;

use burn::tensor::FloatDType;
use hyperlora_core::{Error, Result};

use crate::hypernet::{HyperLoraConfig, ResamplerConfig, convert};

/// Limits of the nodes' inputs: a key of `hyper_lora`, its minimum and maximum, and the step between values.
const LIMITS: [(&str, [usize; 3]); 8] = [
    ("resampler.dim", [64, 2048, 32]),
    ("resampler.head_dim", [32, usize::MAX, 32]),
    ("resampler.heads", [4, 32, 4]),
    ("resampler.depth", [4, 16, 2]),
    ("resampler.ff_mult", [2, 8, 2]),
    ("id_tokens", [4, 128, 4]),
    ("basis", [32, 1024, 32]),
    ("id_rank", [2, 32, 2]),
];

/// Width of CLIP ViT-L/14's states and of antelopev2's embedding, the two models that the nodes use.
const ENCODERS: [(&str, usize); 2] = [("clip_dim", 1024), ("id_embedding_dim", 512)];

/// Writes the released folder `source`, with the sizes `config`, as a folder `target` that the nodes load, with or
/// without its Base-LoRA.
///
/// # Errors
/// Input, naming key, value and limit: the nodes do not load these sizes; errors of [`convert`].
pub fn export(source: &Path, config: &HyperLoraConfig, target: &Path, dtype: FloatDType, base: bool) -> Result<()> {
    let config_place = source.display().to_string();
    check(config, &config_place, base)?;
    convert(source, config, target, dtype, base)
}

/// Settings for the nodes, as lines of text.
pub fn node_settings(config: &HyperLoraConfig, base: bool) -> String {
    let ResamplerConfig { dim, depth, heads, head_dim, ff_mult } = config.resampler;
    format!(
        "resampler: dim {dim}, dim_head {head_dim}, heads {heads}, depth {depth}, ff_mult {ff_mult}\n\
         encoder: clip + arcface, {} ID tokens\nHyperLoRA: rank {}, K {}, Base-LoRA {}",
        config.id_tokens,
        config.id_rank,
        config.basis,
        if base && config.base_rank > 0 { "yes (the Config node switches it on)" } else { "no" },
    )
}

/// Checks the sizes against the nodes' limits.
fn check(config: &HyperLoraConfig, place: &str, base: bool) -> Result<()> {
    let ResamplerConfig { dim, depth, heads, head_dim, ff_mult } = config.resampler;
    let values = [dim, head_dim, heads, depth, ff_mult, config.id_tokens, config.basis, config.id_rank];
    for ((key, [least, most, step]), value) in LIMITS.into_iter().zip(values) {
        if !(least..=most).contains(&value) || !value.is_multiple_of(step) {
            let range = if most == usize::MAX { format!("from {least}") } else { format!("{least} to {most}") };
            return Err(refusal(place, key, value, format!("{range} in steps of {step}")));
        }
    }
    for ((key, wanted), value) in ENCODERS.into_iter().zip([config.clip_dim, config.id_embedding_dim]) {
        if value != wanted {
            return Err(refusal(place, key, value, format!("only {wanted} (CLIP ViT-L/14 and antelopev2)")));
        }
    }
    if base && config.base_rank > 0 && config.base_rank != config.id_rank / 2 {
        let error = refusal(place, "base_rank", config.base_rank, format!("only half of id_rank {}", config.id_rank));
        return Err(error.with_remedy("leave the Base-LoRA out (--no-base), or train with half the ID-LoRA's rank"));
    }
    Ok(())
}

fn refusal(place: &str, key: &str, value: usize, limit: String) -> Error {
    let remedy = "train with sizes that the nodes load; this program takes any";
    Error::input(format!("{place}: {key}"), format!("is {value}, the released nodes load {limit}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut HyperLoraConfig);

    #[test]
    fn the_released_sizes_pass_and_each_limit_is_named() {
        let released = HyperLoraConfig::default();
        assert!(check(&released, "a", true).is_ok());
        let message = |change: Change, base| {
            let mut config = HyperLoraConfig::default();
            change(&mut config);
            check(&config, "a", base).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        let cases: [(Change, &str); 12] = [
            (
                |c| c.resampler.dim = 2080,
                "a: resampler.dim: is 2080, the released nodes load 64 to 2048 in steps of 32",
            ),
            (|c| c.resampler.dim = 1000, "resampler.dim: is 1000"),
            (|c| c.resampler.head_dim = 16, "resampler.head_dim: is 16, the released nodes load from 32"),
            (|c| c.resampler.heads = 2, "resampler.heads: is 2"),
            (|c| c.resampler.depth = 5, "resampler.depth: is 5"),
            (|c| c.resampler.ff_mult = 10, "resampler.ff_mult: is 10"),
            (|c| c.id_tokens = 2, "id_tokens: is 2"),
            (|c| c.basis = 16, "basis: is 16"),
            (|c| c.id_rank = 34, "id_rank: is 34"),
            (|c| c.clip_dim = 768, "clip_dim: is 768, the released nodes load only 1024"),
            (|c| c.id_embedding_dim = 128, "id_embedding_dim: is 128"),
            (|c| c.base_rank = 8, "base_rank: is 8, the released nodes load only half"),
        ];
        for (change, expected) in cases {
            assert!(message(change, true).contains(expected), "{expected}: {}", message(change, true));
        }
        assert_eq!(message(|c| c.base_rank = 8, false), "", "left out, the Base-LoRA may be of any rank");
        assert_eq!(message(|c| c.base_rank = 0, true), "");
    }
}
