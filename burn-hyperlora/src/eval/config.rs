//! Settings of the evaluations.

use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Evaluation settings of a trained hypernetwork.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Identity gap: whether a LoRA of the right person helps more than one of another person.
    pub identity_gap: IdentityGapConfig,
}

/// Settings of `hyperlora eval identity-gap`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityGapConfig {
    /// Noises and timesteps per photo, averaged before any statistics; at least 1. 8 or more make a photo's figure
    /// steady.
    pub draws: usize,
    /// Held-out photos of people in the training set.
    pub known: GapSet,
    /// Photos of people that training never saw.
    pub unseen: GapSet,
    /// Samples that pass through the UNet at once, at least 1.
    pub batch: usize,
}

/// Photos of one evaluation, with the split of their reference photos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GapSet {
    /// Split of the photos; must not be the training split, because evaluating on training data would hide overfitting.
    pub photos: String,
    /// Split of the photos that the LoRAs are made from; the evaluated photo itself is never used.
    pub references: String,
}

impl Default for IdentityGapConfig {
    fn default() -> Self {
        let set = |photos: &str, references: &str| GapSet { photos: photos.into(), references: references.into() };
        Self { draws: 8, known: set("held_out", "train"), unseen: set("unseen", "unseen"), batch: 32 }
    }
}

impl IdentityGapConfig {
    /// Checks the counts.
    ///
    /// # Errors
    /// Input, at `place`: a count is 0.
    pub fn validate(&self, place: &str) -> Result<()> {
        let Self { draws, batch, .. } = *self;
        if draws == 0 || batch == 0 {
            return Err(Error::input(
                place,
                format!("draws {draws}, batch {batch}"),
                "give at least 1 of each; 8 draws or more make a photo's figure steady",
            ));
        }
        Ok(())
    }
}
