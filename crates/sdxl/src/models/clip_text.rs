//! The two CLIP text encoders (transformers `CLIPTextModel` and `CLIPTextModelWithProjection`).

use std::path::Path;

use burn::nn::{Embedding, LayerNorm, Linear};
use burn::tensor::{Device, Int, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use serde::Deserialize;

use crate::models::clip_encoder::{ClipEncoder, ClipEncoderConfig, ClipLayer};
use crate::weights::{ConfigText, Weights};

/// Architecture with a projection of the pooled output.
const WITH_PROJECTION: &str = "CLIPTextModelWithProjection";
/// End-of-text id of old configs, which is wrong. Transformers then takes the highest id of a prompt as its end.
const LEGACY_EOS_TOKEN_ID: i32 = 2;

/// The keys of a CLIP text encoder's `config.json` that affect the computation. Other keys are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct ClipTextConfig {
    /// Sizes of the transformer.
    #[serde(flatten)]
    pub encoder: ClipEncoderConfig,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Maximum prompt length, 77.
    pub max_position_embeddings: usize,
    /// Width of the projected pooled output; unused without a projection.
    #[serde(default)]
    pub projection_dim: usize,
    #[serde(default = "legacy_eos_token_id")]
    eos_token_id: i32,
    architectures: Vec<String>,
}

fn legacy_eos_token_id() -> i32 {
    LEGACY_EOS_TOKEN_ID
}

/// Upper limit of counts in a config; larger ones are typing errors.
const LARGEST: usize = 1 << 20;

impl ClipTextConfig {
    /// Parses and checks a config.
    ///
    /// # Errors
    /// Input: the JSON is broken, or sizes are impossible.
    pub fn parse(text: &ConfigText) -> Result<Self> {
        let config: Self = text.parse()?;
        match config.problem() {
            None => Ok(config),
            Some((key, problem)) => Err(Error::input(
                format!("{}: {key}", text.origin().display()),
                problem,
                "use the config.json of a CLIP text encoder",
            )),
        }
    }

    fn problem(&self) -> Option<(&'static str, String)> {
        let least = usize::from(self.projects());
        let sizes = [
            ("vocab_size", self.vocab_size, 1),
            ("max_position_embeddings", self.max_position_embeddings, 1),
            ("projection_dim", self.projection_dim, least),
        ];
        let misfit = sizes.into_iter().find(|(_, size, least)| !(*least..=LARGEST).contains(size));
        misfit
            .map(|(key, size, least)| (key, format!("{size} is not within {least} and {LARGEST}")))
            .or_else(|| self.encoder.problem())
    }

    /// Returns true if the pooled output is projected.
    fn projects(&self) -> bool {
        self.architectures.iter().any(|name| name == WITH_PROJECTION)
    }
}

/// Output of a text encoder for SDXL.
#[derive(Debug, Clone)]
pub struct TextStates {
    /// Hidden states before the last layer, `[B, T, C]` (`hidden_states[-2]`, "clip skip 2").
    pub penultimate: Tensor<3>,
    /// Pooled output, `[B, P]`: the last layer's state at the end of each prompt, normalised and projected; `None`
    /// without a projection.
    pub pooled: Option<Tensor<2>>,
}

/// A CLIP text encoder, frozen.
#[derive(Debug)]
pub struct ClipTextModel {
    config: ClipTextConfig,
    token_embedding: Embedding,
    /// `[positions, C]`
    position_embedding: Tensor<2>,
    /// All layers except the last.
    encoder: ClipEncoder,
    head: Option<PooledHead>,
}

/// Modules between the penultimate states and the pooled output.
#[derive(Debug)]
struct PooledHead {
    last_layer: ClipLayer,
    final_layer_norm: LayerNorm,
    text_projection: Linear,
}

impl ClipTextModel {
    /// Loads a folder with `config.json` and weights (`.../text_encoder`, `.../text_encoder_2`).
    ///
    /// # Errors
    /// Input: the config requires something unsupported, or the weights do not fit it.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let config = ClipTextConfig::parse(&ConfigText::read(&folder.join("config.json"))?)?;
        Self::new(config, Weights::open(folder, device)?)
    }

    /// Builds the encoder from `weights`. Tensors of unused layers are not read.
    ///
    /// # Errors
    /// Input: the weights do not fit the config.
    pub fn new(config: ClipTextConfig, weights: Weights) -> Result<Self> {
        let root = weights.at("");
        // Recent transformers save CLIPTextModel without the prefix that all published files have.
        let bare = root.has("embeddings.token_embedding.weight");
        let text = if bare { root.clone() } else { root.at("text_model") };
        let ClipEncoderConfig { hidden_size, num_hidden_layers, layer_norm_eps, .. } = config.encoder;
        let embeddings = text.at("embeddings");
        embeddings.ignore("position_ids");

        let last = text.at("encoder.layers").at(num_hidden_layers - 1);
        let head = if config.projects() {
            Some(PooledHead {
                last_layer: ClipLayer::new(&last, &config.encoder),
                final_layer_norm: text.at("final_layer_norm").layer_norm(hidden_size, layer_norm_eps),
                text_projection: root.at("text_projection").linear(hidden_size, config.projection_dim, false),
            })
        } else {
            // Without a projection, layers after the penultimate one are unused.
            last.ignore_all();
            text.at("final_layer_norm").ignore_all();
            None
        };
        let positions = [config.max_position_embeddings, hidden_size];
        let model = Self {
            token_embedding: embeddings.at("token_embedding").embedding(config.vocab_size, hidden_size),
            position_embedding: embeddings.at("position_embedding").tensor("weight", positions),
            encoder: ClipEncoder::new(&text.at("encoder"), &config.encoder, num_hidden_layers - 1),
            head,
            config,
        };
        weights.finish()?;
        Ok(model)
    }

    /// Config of the encoder.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Returns true if [`forward`](Self::forward) computes a pooled output.
    pub fn has_projection(&self) -> bool {
        self.head.is_some()
    }

    /// Encodes prompts of equal length `T <= max_position_embeddings`, with ids in `0..vocab_size`.
    pub fn forward(&self, prompts: &[Vec<i32>]) -> TextStates {
        // 1. Token and position embeddings: [B, T, C].
        let length = prompts.first().map_or(0, Vec::len);
        let device = self.position_embedding.device();
        let ids = TensorData::new(prompts.concat(), [prompts.len(), length]);
        let tokens = self.token_embedding.forward(Tensor::<2, Int>::from_data(ids, &device));
        let x = tokens + self.position_embedding.clone().narrow(0, 0, length).unsqueeze();
        // 2. All layers except the last.
        let penultimate = self.encoder.forward(x, true);
        // 3. The last layer's state at the end of each prompt.
        let pooled = self.head.as_ref().map(|head| {
            let last = head.final_layer_norm.forward(head.last_layer.forward(penultimate.clone(), true));
            let ends = prompts.iter().enumerate().map(|(row, ids)| {
                let end = end_position(ids, self.config.eos_token_id);
                last.clone().slice([row..row + 1, end..end + 1]).squeeze_dim(1)
            });
            head.text_projection.forward(Tensor::cat(ends.collect(), 0))
        });
        TextStates { penultimate, pooled }
    }
}

/// Locates the end of a prompt as transformers does: the first `eos`, or 0 if there is none.
fn end_position(ids: &[i32], eos: i32) -> usize {
    let eos = if eos == LEGACY_EOS_TOKEN_ID { ids.iter().copied().max().unwrap_or(eos) } else { eos };
    ids.iter().position(|&id| id == eos).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::end_position;

    #[test]
    fn a_prompt_ends_at_its_first_end_token() {
        assert_eq!(end_position(&[90, 5, 91, 91], 91), 2);
        assert_eq!(end_position(&[90, 5, 91, 0, 0], 91), 2);
    }

    #[test]
    fn the_legacy_id_means_the_highest_token() {
        assert_eq!(end_position(&[90, 2, 5, 91, 91], 2), 3);
    }
}
