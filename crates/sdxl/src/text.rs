//! Both SDXL text encoders with their tokenizers: prompts to UNet conditions.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};

use crate::models::clip_text::{ClipTextConfig, ClipTextModel};
use crate::source::{BaseSource, Component};
use crate::tokenizer::{ClipTokenizer, PROMPT_TOKENS, TEXT_TOKENS};

/// Encoded prompts.
#[derive(Debug, Clone)]
pub struct PromptStates {
    /// Prompt embeddings, `[B, 77, C1 + C2]`: penultimate states of both encoders, concatenated.
    pub prompt_embeds: Tensor<3>,
    /// Pooled output of the second encoder, `[B, P]`.
    pub pooled: Tensor<2>,
}

/// Tokenizers and text encoders of an SDXL base.
///
/// # Examples
/// ```
/// use burn::tensor::Device;
/// use hyperlora_sdxl::source::BaseSource;
/// use hyperlora_sdxl::text::TextEncoders;
///
/// # let base = hyperlora_testing::fixture("encoders");
/// let base = BaseSource::open(&base, None, None)?;
/// let encoders = TextEncoders::open(&base, &Device::flex())?;
/// let prompts = encoders.encode(&["a photo of a person", "a portrait"])?;
/// assert_eq!(prompts.prompt_embeds.dims()[..2], [2, 77]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct TextEncoders {
    tokenizers: [ClipTokenizer; 2],
    encoders: [ClipTextModel; 2],
    /// Zeros, not the empty prompt's states, replace an empty negative prompt.
    zeros_for_empty: bool,
}

impl TextEncoders {
    /// Loads `tokenizer`, `tokenizer_2`, `text_encoder` and `text_encoder_2` of a base in diffusers layout.
    ///
    /// # Errors
    /// Input: one of them is missing, broken or not supported, or they do not fit each other.
    pub fn load(base: &Path, device: &Device) -> Result<Self> {
        Self::open(&BaseSource::folder(base, None), device)
    }

    /// Loads the text encoders of a base in either layout.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn open(base: &BaseSource, device: &Device) -> Result<Self> {
        const PARTS: [Component; 2] = [Component::TextEncoder, Component::TextEncoder2];
        let configs = [base.config(PARTS[0])?, base.config(PARTS[1])?];
        let encoder = |index: usize| {
            ClipTextModel::new(ClipTextConfig::parse(&configs[index])?, base.weights(PARTS[index], device)?)
        };
        let this = Self {
            tokenizers: base.tokenizers()?,
            encoders: [encoder(0)?, encoder(1)?],
            zeros_for_empty: base.zeros_for_empty_prompt()?,
        };
        for ((encoder, tokenizer), text) in this.encoders.iter().zip(&this.tokenizers).zip(&configs) {
            let config = encoder.config();
            let place = text.origin();
            if config.max_position_embeddings < PROMPT_TOKENS {
                let problem = format!("max_position_embeddings {} is below 77", config.max_position_embeddings);
                return Err(Error::file(place, problem, "use the text encoders of an SDXL base"));
            }
            if tokenizer.vocabulary_size() > config.vocab_size {
                let problem = format!(
                    "vocab_size {} is below the tokenizer's {}",
                    config.vocab_size,
                    tokenizer.vocabulary_size()
                );
                return Err(Error::file(place, problem, "use the tokenizer that belongs to this encoder"));
            }
        }
        if !this.encoders[1].has_projection() {
            return Err(Error::file(
                configs[1].origin(),
                "architectures does not name CLIPTextModelWithProjection",
                "use the second text encoder of an SDXL base",
            ));
        }
        Ok(this)
    }

    /// Widths of the prompt embeddings and of the pooled output.
    pub fn widths(&self) -> (usize, usize) {
        let context = self.encoders.iter().map(|encoder| encoder.config().encoder.hidden_size).sum();
        (context, self.encoders[1].config().projection_dim)
    }

    /// Negative prompt when the user gives none. It is what the base was trained with for a missing prompt: zeros or
    /// the states of the empty prompt (`force_zeros_for_empty_prompt` of its `model_index.json`).
    ///
    /// # Errors
    /// Same as [`encode`](Self::encode).
    pub fn negative(&self, prompt: &PromptStates) -> Result<PromptStates> {
        let PromptStates { prompt_embeds, pooled } = prompt;
        if self.zeros_for_empty {
            return Ok(PromptStates { prompt_embeds: prompt_embeds.zeros_like(), pooled: pooled.zeros_like() });
        }
        let [count, _] = pooled.dims();
        let empty = self.encode(&[""])?;
        Ok(PromptStates {
            prompt_embeds: empty.prompt_embeds.repeat_dim(0, count),
            pooled: empty.pooled.repeat_dim(0, count),
        })
    }

    /// Counts the tokens at the end of `prompt` that the encoders cut off.
    ///
    /// # Errors
    /// Same as [`encode`](Self::encode).
    pub fn surplus(&self, prompt: &str) -> Result<usize> {
        surplus(&self.tokenizers, prompt)
    }

    /// Encodes one prompt of the user like [`encode`](Self::encode), with a warning that names it if it is cut off.
    ///
    /// # Errors
    /// Same as [`encode`](Self::encode).
    pub fn encode_and_warn(&self, name: &str, prompt: &str) -> Result<PromptStates> {
        let surplus = self.surplus(prompt)?;
        if surplus > 0 {
            tracing::warn!("{name}: its last {surplus} tokens are left out: the text encoders take {TEXT_TOKENS}");
        }
        self.encode(&[prompt])
    }

    /// Encodes prompts as the SDXL pipeline of diffusers does (clip skip 2).
    ///
    /// # Errors
    /// Fault: a prompt cannot be tokenised, or there is none.
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

/// Counts the tokens of `prompt` beyond the encoders' limit.
///
/// # Errors
/// Fault: the prompt cannot be tokenised.
pub fn surplus(tokenizers: &[ClipTokenizer; 2], prompt: &str) -> Result<usize> {
    let counts = [tokenizers[0].count(prompt)?, tokenizers[1].count(prompt)?];
    Ok(counts.into_iter().max().unwrap_or(0).saturating_sub(TEXT_TOKENS))
}
