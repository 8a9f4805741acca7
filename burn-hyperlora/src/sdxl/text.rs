//! Both text encoders and their tokenizers as one: prompts to what the UNet is conditioned on.

use std::path::Path;

use burn::tensor::{Device, Tensor};

use crate::error::{Error, Result};
use crate::sdxl::clip_text::ClipTextModel;
use crate::sdxl::tokenizer::{ClipTokenizer, PROMPT_TOKENS};

/// Encoded prompts.
#[derive(Debug, Clone)]
pub struct PromptStates {
    /// `[B, 77, C1 + C2]`: the penultimate states of both encoders side by side.
    pub prompt_embeds: Tensor<3>,
    /// `[B, P]`: the pooled output of the second encoder.
    pub pooled: Tensor<2>,
}

impl PromptStates {
    /// What stands for the empty negative prompt in SDXL (`force_zeros_for_empty_prompt`).
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        Self { prompt_embeds: self.prompt_embeds.zeros_like(), pooled: self.pooled.zeros_like() }
    }
}

/// The text side of an SDXL base.
#[derive(Debug)]
pub struct TextEncoders {
    tokenizers: [ClipTokenizer; 2],
    encoders: [ClipTextModel; 2],
}

impl TextEncoders {
    /// Loads `tokenizer`, `tokenizer_2`, `text_encoder` and `text_encoder_2` of a base in diffusers layout.
    ///
    /// # Errors
    /// Input when one of them is missing, broken or not supported, or when they do not fit each other.
    pub fn load(base: &Path, device: &Device) -> Result<Self> {
        let this = Self {
            tokenizers: [
                ClipTokenizer::load(&base.join("tokenizer"))?,
                ClipTokenizer::load(&base.join("tokenizer_2"))?,
            ],
            encoders: [
                ClipTextModel::load(&base.join("text_encoder"), device)?,
                ClipTextModel::load(&base.join("text_encoder_2"), device)?,
            ],
        };
        for ((encoder, tokenizer), name) in
            this.encoders.iter().zip(&this.tokenizers).zip(["text_encoder", "text_encoder_2"])
        {
            let config = encoder.config();
            let place = base.join(name).join("config.json");
            if config.max_position_embeddings < PROMPT_TOKENS {
                let problem = format!("max_position_embeddings {} is below 77", config.max_position_embeddings);
                return Err(Error::file(&place, problem, "use the text encoders of an SDXL base"));
            }
            if tokenizer.vocabulary_size() > config.vocab_size {
                let problem = format!(
                    "vocab_size {} is below the tokenizer's {}",
                    config.vocab_size,
                    tokenizer.vocabulary_size()
                );
                return Err(Error::file(&place, problem, "use the tokenizer that belongs to this encoder"));
            }
        }
        if !this.encoders[1].has_projection() {
            return Err(Error::file(
                &base.join("text_encoder_2/config.json"),
                "architectures does not name CLIPTextModelWithProjection",
                "use the second text encoder of an SDXL base",
            ));
        }
        Ok(this)
    }

    /// Encodes prompts as the SDXL pipeline of diffusers does (clip skip 2).
    ///
    /// # Errors
    /// Fault when a prompt cannot be tokenised, or when there is none.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<PromptStates> {
        let mut states = Vec::with_capacity(2);
        let mut pooled = None;
        for (tokenizer, encoder) in self.tokenizers.iter().zip(&self.encoders) {
            let ids: Vec<_> = prompts.iter().map(|prompt| tokenizer.encode(prompt.as_ref())).collect::<Result<_>>()?;
            let output = encoder.forward(&ids);
            states.push(output.penultimate);
            pooled = output.pooled;
        }
        let pooled = pooled.ok_or_else(|| Error::Fault("the second text encoder gave no pooled output".into()))?;
        Ok(PromptStates { prompt_embeds: Tensor::cat(states, 2), pooled })
    }
}
