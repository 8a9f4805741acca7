//! Scenario of a sample: the combination of trigger words, ID-LoRA and Base-LoRA.

use hyperlora_core::random::{Purpose, for_sample, weighted};
use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Combination of trigger words and LoRAs that a sample is trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// Trigger words, ID-LoRA and Base-LoRA.
    Full,
    /// Trigger words and ID-LoRA.
    IdOnly,
    /// Base-LoRA only, without trigger words.
    BaseOnly,
}

impl Scenario {
    /// All scenarios, in the order of [`Scenarios::weights`].
    pub const ALL: [Self; 3] = [Self::Full, Self::IdOnly, Self::BaseOnly];

    /// Returns true if the trigger words precede the caption, that is, if the ID-LoRA is on.
    pub fn trigger(self) -> bool {
        self.id_lora()
    }

    /// Returns true if the ID-LoRA is on.
    pub fn id_lora(self) -> bool {
        self != Self::BaseOnly
    }

    /// Returns true if the Base-LoRA is on.
    pub fn base_lora(self) -> bool {
        self != Self::IdOnly
    }

    /// Name of the scenario in YAML and curves.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::IdOnly => "id_only",
            Self::BaseOnly => "base_only",
        }
    }
}

/// Weights of the scenarios, which need not sum to one; at least one is above 0. The paper gives 0.9 / 0.05 / 0.05
/// without naming the scenarios; the defaults are this project's interpretation.
///
/// # Examples
/// ```
/// use burn_hyperlora::data::scenario::{Scenario, Scenarios};
///
/// let scenarios = Scenarios { full: 0.9, id_only: 0.1, base_only: 0.0 };
/// scenarios.validate("train.yaml: scenarios")?;
/// let (seed, stage) = (7, 1);
/// let drawn: Vec<Scenario> = (0..1000).map(|draw| scenarios.draw(seed, stage, draw)).collect();
/// assert!(drawn.iter().filter(|scenario| **scenario == Scenario::Full).count() > 800);
/// assert!(!drawn.contains(&Scenario::BaseOnly));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenarios {
    /// Weight of samples with trigger words, ID-LoRA and Base-LoRA.
    #[serde(default)]
    pub full: f64,
    /// Weight of samples with trigger words and ID-LoRA.
    #[serde(default)]
    pub id_only: f64,
    /// Weight of samples with the Base-LoRA only, without trigger words.
    #[serde(default)]
    pub base_only: f64,
}

impl Scenarios {
    /// Defaults of the ID stages.
    pub const ID: Self = Self { full: 0.9, id_only: 0.05, base_only: 0.05 };
    /// Defaults of the Base stage, which has no ID-LoRA yet.
    pub const BASE: Self = Self { full: 0.0, id_only: 0.0, base_only: 1.0 };

    /// Weights in the order of [`Scenario::ALL`].
    pub fn weights(self) -> [f64; 3] {
        [self.full, self.id_only, self.base_only]
    }

    /// Draws the scenario of one draw.
    pub fn draw(self, seed: u64, stage: u64, draw: u64) -> Scenario {
        Scenario::ALL[weighted(&mut for_sample(seed, stage, draw, Purpose::Scenario), &self.weights())]
    }

    /// Returns true if the scenario can be drawn.
    pub fn has(self, scenario: Scenario) -> bool {
        self.weights()[scenario as usize] > 0.0
    }

    /// Checks the weights; `place` names the block.
    ///
    /// # Errors
    /// Input: a weight is negative or infinite, or none is above zero.
    pub fn validate(self, place: &str) -> Result<()> {
        let weights = self.weights();
        let sane = weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
        if sane && weights.iter().any(|weight| *weight > 0.0) {
            return Ok(());
        }
        Err(Error::input(
            place,
            format!("the weights are {weights:?}"),
            "give finite weights of 0 or above, at least one above 0",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_come_in_their_proportion() {
        let drawn: Vec<Scenario> = (0..4000).map(|draw| Scenarios::ID.draw(3, 1, draw)).collect();
        let share = |wanted| drawn.iter().filter(|scenario| **scenario == wanted).count();
        assert!(share(Scenario::Full).abs_diff(3600) < 80, "{}", share(Scenario::Full));
        assert!(share(Scenario::IdOnly).abs_diff(200) < 60, "{}", share(Scenario::IdOnly));
        assert!((0..100).all(|draw| Scenarios::BASE.draw(3, 0, draw) == Scenario::BaseOnly));
    }

    #[test]
    fn the_trigger_stands_with_the_id_lora() {
        for scenario in Scenario::ALL {
            assert_eq!(scenario.trigger(), scenario.id_lora());
            assert!(scenario.id_lora() || scenario.base_lora());
        }
    }

    #[test]
    fn weights_that_cannot_be_drawn_from_are_refused() {
        let none = Scenarios { full: 0.0, id_only: 0.0, base_only: 0.0 };
        let negative = Scenarios { full: -1.0, ..Scenarios::ID };
        assert!(none.validate("train.yaml: scenarios").is_err());
        assert!(negative.validate("train.yaml: scenarios").is_err());
        assert!(Scenarios::ID.validate("train.yaml: scenarios").is_ok());
    }
}
