//! Parameter groups and the stages in which they train.

use std::collections::BTreeSet;
use std::str::FromStr;

use burn::module::Param;
use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::hyper_lora::HyperLora;
use crate::parameters::ParameterMapper;

/// Training stages, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// 1: the Base-LoRA, on crops with blurred faces.
    Base,
    /// 2: the ID-LoRA from CLIP states only.
    IdClip,
    /// 3: the ID-LoRA from CLIP states and the ID embedding.
    // Name in the checkpoints of earlier versions.
    #[serde(alias = "id_embed")]
    IdEmbedding,
}

/// Parameters that train or stay frozen together. Every parameter belongs to exactly one group.
///
/// # Examples
/// ```
/// use burn_hyperlora::hypernet::{ParameterGroup, Stage};
///
/// let group = ParameterGroup::of("id_projector.norm.weight");
/// assert_eq!(group, Some(ParameterGroup::IdProjector));
/// assert!(ParameterGroup::defaults(Stage::IdEmbedding).contains(&ParameterGroup::IdProjector));
/// assert!(!ParameterGroup::IdProjector.is_used(Stage::Base, true));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(!try_from, !into, rename_all = "snake_case")]
pub enum ParameterGroup {
    /// Queries of the ID resampler.
    Latents,
    /// Self-attention of the latents.
    Attn1,
    /// Attention to the ID tokens, with its norms.
    Attn2,
    /// Attention to the CLIP states, with its norms.
    Attn3,
    /// Projection of ID tokens to the resampler's width.
    ProjIn,
    /// Projection of CLIP states to the resampler's width.
    #[schemars(rename = "proj_in_2")]
    ProjIn2,
    /// Projection of latents to coefficients.
    ProjOut,
    /// Feed-forward layers.
    Ff,
    /// Norms before self-attention and feed-forward.
    Norms,
    /// Projection of the ID embedding to tokens.
    IdProjector,
    /// Bases of the ID-LoRA.
    IdBases,
    /// Resampler of the Base-LoRA.
    BaseResampler,
    /// Bases of the Base-LoRA.
    BaseBases,
}

impl ParameterGroup {
    /// All groups.
    pub const ALL: [Self; 13] = [
        Self::Latents,
        Self::Attn1,
        Self::Attn2,
        Self::Attn3,
        Self::ProjIn,
        Self::ProjIn2,
        Self::ProjOut,
        Self::Ff,
        Self::Norms,
        Self::IdProjector,
        Self::IdBases,
        Self::BaseResampler,
        Self::BaseBases,
    ];

    /// Name of the group in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latents => "latents",
            Self::Attn1 => "attn1",
            Self::Attn2 => "attn2",
            Self::Attn3 => "attn3",
            Self::ProjIn => "proj_in",
            Self::ProjIn2 => "proj_in_2",
            Self::ProjOut => "proj_out",
            Self::Ff => "ff",
            Self::Norms => "norms",
            Self::IdProjector => "id_projector",
            Self::IdBases => "id_bases",
            Self::BaseResampler => "base_resampler",
            Self::BaseBases => "base_bases",
        }
    }

    /// Groups that train in a stage by default.
    ///
    /// The authors describe each stage's purpose but do not list its parameters: stage 3 trains the modules that read
    /// the ID embedding and freezes the rest, above all the CLIP attention.
    pub fn defaults(stage: Stage) -> &'static [Self] {
        match stage {
            Stage::Base => &[Self::BaseResampler, Self::BaseBases],
            Stage::IdClip => &[
                Self::Latents,
                Self::Attn1,
                Self::Attn3,
                Self::ProjIn2,
                Self::ProjOut,
                Self::Ff,
                Self::Norms,
                Self::IdBases,
            ],
            Stage::IdEmbedding => &[Self::IdProjector, Self::ProjIn, Self::Attn2],
        }
    }

    /// Returns true if the group's parameters affect the loss of `stage`; `base_lora` is true if the Base-LoRA is ever
    /// on there.
    pub fn is_used(self, stage: Stage, base_lora: bool) -> bool {
        match self {
            Self::BaseResampler | Self::BaseBases => base_lora,
            Self::IdProjector | Self::ProjIn | Self::Attn2 => stage == Stage::IdEmbedding,
            _ => stage != Stage::Base,
        }
    }

    /// Returns the group of a parameter by its name in [`HyperLora::parameter_names`], or `None` for any other name.
    pub fn of(parameter: &str) -> Option<Self> {
        let (file, key) = parameter.split_once('.')?;
        let parts: Vec<&str> = key.split('.').collect();
        match (file, parts.as_slice()) {
            ("hyper_lora_modules", [_, _, basis]) if basis.starts_with("id_") => Some(Self::IdBases),
            ("hyper_lora_modules", [_, _, basis]) if basis.starts_with("base_") => Some(Self::BaseBases),
            ("base_resampler", _) => Some(Self::BaseResampler),
            ("id_projector", _) => Some(Self::IdProjector),
            ("resampler", ["latents"]) => Some(Self::Latents),
            ("resampler", ["proj_in", _]) => Some(Self::ProjIn),
            ("resampler", ["proj_in_2", _]) => Some(Self::ProjIn2),
            ("resampler", ["proj_out", _]) => Some(Self::ProjOut),
            ("resampler", ["layers", _, module, ..]) => match *module {
                "attn1" => Some(Self::Attn1),
                "attn2" | "norm_attn2_l" | "norm_attn2_x" => Some(Self::Attn2),
                "attn3" | "norm_attn3_l" | "norm_attn3_y" => Some(Self::Attn3),
                "ff" => Some(Self::Ff),
                "norm_attn1" | "norm_ff" => Some(Self::Norms),
                _ => None,
            },
            _ => None,
        }
    }
}

impl FromStr for ParameterGroup {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|group| group.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.into_iter().map(Self::name).collect();
            Error::input(
                format!("parameter group `{name}`"),
                "there is no such group",
                format!("use some of: {}", known.join(", ")),
            )
        })
    }
}

impl TryFrom<String> for ParameterGroup {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<ParameterGroup> for String {
    fn from(group: ParameterGroup) -> Self {
        group.name().into()
    }
}

impl HyperLora {
    /// Lists the names of the parameters in `groups`, in the order of [`parameter_names`](Self::parameter_names).
    pub fn names_in(&self, groups: &[ParameterGroup]) -> Vec<String> {
        let mut names = self.parameter_names();
        names.retain(|name| ParameterGroup::of(name).is_some_and(|group| groups.contains(&group)));
        names
    }

    /// Enables gradients for the parameters in `groups` only.
    #[must_use]
    pub fn trainable(self, groups: &[ParameterGroup]) -> Self {
        struct Mark(BTreeSet<String>);
        impl ParameterMapper for Mark {
            fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
                parameter.set_require_grad(self.0.contains(name))
            }
        }
        let names = self.names_in(groups).into_iter().collect();
        self.map_parameters(&mut Mark(names))
    }
}

#[cfg(test)]
mod tests {
    use super::ParameterGroup;

    #[test]
    fn the_schema_names_every_group_as_the_yaml_does() {
        let schema = schemars::schema_for!(ParameterGroup).to_value();
        let named: Vec<&str> =
            schema["oneOf"].as_array().unwrap().iter().filter_map(|it| it["const"].as_str()).collect();
        assert_eq!(named, ParameterGroup::ALL.map(ParameterGroup::name));
    }
}
