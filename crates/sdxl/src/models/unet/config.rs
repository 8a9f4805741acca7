//! UNet `config.json`, with the keys of diffusers.

use std::path::Path;

use hyperlora_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::weights::ConfigText;

/// Sizes of an SDXL UNet (diffusers `UNet2DConditionModel`).
///
/// # Examples
/// ```
/// use hyperlora_sdxl::models::unet::UNet2DConditionConfig;
/// use hyperlora_sdxl::source::configs::UNET;
/// use hyperlora_sdxl::weights::ConfigText;
///
/// // `UNet2DConditionConfig::load` reads the config of a base instead.
/// let config = UNet2DConditionConfig::parse(&ConfigText::built_in("unet/config.json", UNET))?;
/// assert_eq!(config.block_out_channels, [320, 640, 1280]);
/// assert_eq!((config.pooled_dim(), config.cross_attention_dim.get(0)), (1280, 2048));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct UNet2DConditionConfig {
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Side of the latents in training.
    pub sample_size: usize,
    /// Channels at each resolution, from the finest.
    pub block_out_channels: Vec<usize>,
    /// Kind of each block on the down path.
    pub down_block_types: Vec<DownBlock>,
    /// Kind of each block on the up path.
    pub up_block_types: Vec<UpBlock>,
    /// Resnets per block; blocks on the up path have one more.
    #[serde(default = "two")]
    pub layers_per_block: PerBlock,
    /// Transformer layers after each resnet of a cross-attention block.
    #[serde(default = "one")]
    pub transformer_layers_per_block: PerBlock,
    /// Number of heads, despite the name: diffusers keeps an early misnomer in this key.
    pub attention_head_dim: PerBlock,
    /// Width of the prompt embeddings.
    pub cross_attention_dim: PerBlock,
    /// Groups of every group norm.
    #[serde(default = "default_groups")]
    pub norm_num_groups: usize,
    /// Epsilon of the group norms in resnets and the output layer.
    #[serde(default = "default_epsilon")]
    pub norm_eps: f64,
    /// Sinusoid width of each of the six time ids.
    pub addition_time_embed_dim: usize,
    /// Width of the pooled prompt embedding plus the embeddings of the six time ids.
    pub projection_class_embeddings_input_dim: usize,
}

/// A block on the down path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlock {
    /// Resnets only.
    DownBlock2D,
    /// Resnets, each followed by transformer layers.
    CrossAttnDownBlock2D,
}

/// A block on the up path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlock {
    /// Resnets only.
    UpBlock2D,
    /// Resnets, each followed by transformer layers.
    CrossAttnUpBlock2D,
}

/// One number for all blocks, or one for each block.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum PerBlock {
    /// Same number for all blocks.
    All(usize),
    /// One number per block, in down-path order.
    Each(Vec<usize>),
}

impl PerBlock {
    /// Returns the number of block `block`.
    pub fn get(&self, block: usize) -> usize {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values[block],
        }
    }

    fn fits(&self, blocks: usize, holds: impl Fn(usize) -> bool) -> bool {
        match self {
            Self::All(value) => holds(*value),
            Self::Each(values) => values.len() == blocks && values.iter().all(|&value| holds(value)),
        }
    }
}

fn one() -> PerBlock {
    PerBlock::All(1)
}

fn two() -> PerBlock {
    PerBlock::All(2)
}

fn default_groups() -> usize {
    32
}

fn default_epsilon() -> f64 {
    1e-5
}

/// Number of time ids: original size, crop corner, target size.
pub const TIME_IDS: usize = 6;

/// Layer width limit of a config; larger widths are typing errors, and products of two widths still fit memory sizes.
const WIDTH_LIMIT: usize = 1 << 16;

/// Block count limit of a config; each block halves the resolution.
const BLOCKS_LIMIT: usize = 16;

/// Limit of resnets per block, and of transformer layers per resnet.
const DEPTH_LIMIT: usize = 64;

/// Limit of transformer layers in all; SDXL has 70.
const TRANSFORMERS_LIMIT: usize = 4096;

/// Side limit of the latents; SDXL has 128.
const SIDE_LIMIT: usize = 4096;

impl UNet2DConditionConfig {
    /// Reads and checks `config.json` in `folder`.
    ///
    /// # Errors
    /// Input: the file is missing, broken, inconsistent, or of another architecture than SDXL's.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::parse(&ConfigText::read(&folder.join("config.json"))?)
    }

    /// Parses and checks a config.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn parse(text: &ConfigText) -> Result<Self> {
        let place = text.origin();
        let keys: Value = text.parse()?;
        if let Some((key, found, wanted)) = unsupported(&keys) {
            return Err(Error::file(
                place,
                format!("`{key}` is {found}, only {wanted} is supported"),
                "use an SDXL UNet in diffusers layout",
            ));
        }
        let config: Self = text.parse()?;
        config.check().map_err(|problem| Error::file(place, problem, "use the config.json of these weights"))?;
        Ok(config)
    }

    /// Width of the UNet's time embedding.
    pub fn time_embed_dim(&self) -> usize {
        4 * self.block_out_channels[0]
    }

    /// Width of the pooled prompt embedding.
    pub fn pooled_dim(&self) -> usize {
        self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim
    }

    fn check(&self) -> std::result::Result<(), String> {
        let blocks = self.block_out_channels.len();
        let width = |value: usize| (1..=WIDTH_LIMIT).contains(&value);
        let depth = |value: usize| (1..=DEPTH_LIMIT).contains(&value);
        let require = |holds: bool, problem: &str| if holds { Ok(()) } else { Err(problem.to_string()) };

        require((1..=BLOCKS_LIMIT).contains(&blocks), "`block_out_channels` names no block or too many")?;
        require(
            self.down_block_types.len() == blocks && self.up_block_types.len() == blocks,
            "`down_block_types`, `up_block_types` and `block_out_channels` differ in length",
        )?;
        require(
            width(self.in_channels) && width(self.out_channels),
            "`in_channels` or `out_channels` is out of range",
        )?;
        require(self.layers_per_block.fits(blocks, depth), "`layers_per_block` does not fit the blocks")?;
        require(
            self.transformer_layers_per_block.fits(blocks, |value| value <= DEPTH_LIMIT),
            "`transformer_layers_per_block` does not fit the blocks",
        )?;
        require(self.attention_head_dim.fits(blocks, width), "`attention_head_dim` does not fit the blocks")?;
        require(self.cross_attention_dim.fits(blocks, width), "`cross_attention_dim` does not fit the blocks")?;
        let transformers =
            |block| (2 * self.layers_per_block.get(block) + 1) * self.transformer_layers_per_block.get(block);
        require(
            (0..blocks).map(transformers).sum::<usize>() <= TRANSFORMERS_LIMIT,
            "`layers_per_block` and `transformer_layers_per_block` make too many layers",
        )?;
        require((1..=SIDE_LIMIT).contains(&self.sample_size), "`sample_size` is out of range")?;
        require(self.norm_num_groups > 0, "`norm_num_groups` is 0")?;
        require(self.norm_eps >= 0.0, "`norm_eps` is negative")?;
        for (block, &channels) in self.block_out_channels.iter().enumerate() {
            require(width(channels) && channels.is_multiple_of(2), "`block_out_channels` are odd or out of range")?;
            require(
                channels.is_multiple_of(self.norm_num_groups),
                "`norm_num_groups` does not divide `block_out_channels`",
            )?;
            let attends = self.down_block_types[block] == DownBlock::CrossAttnDownBlock2D
                || self.up_block_types[blocks - 1 - block] == UpBlock::CrossAttnUpBlock2D
                || block == blocks - 1;
            require(
                !attends || channels.is_multiple_of(self.attention_head_dim.get(block)),
                "`attention_head_dim` (the number of heads) does not divide `block_out_channels`",
            )?;
        }
        let time_ids = self.addition_time_embed_dim.checked_mul(TIME_IDS);
        require(
            width(self.projection_class_embeddings_input_dim)
                && self.addition_time_embed_dim.is_multiple_of(2)
                && time_ids.is_some_and(|ids| ids < self.projection_class_embeddings_input_dim),
            "`projection_class_embeddings_input_dim` leaves no room for a pooled prompt after six `addition_time_embed_dim`",
        )
    }
}

/// Returns the first key with an unsupported value, the value, and the supported value.
fn unsupported(keys: &Value) -> Option<(&'static str, Value, Value)> {
    // An absent or null key has diffusers' default, which is the supported value for all except the first two.
    let required = [("addition_embed_type", json!("text_time")), ("use_linear_projection", json!(true))];
    let optional = [
        ("act_fn", json!("silu")),
        ("attention_type", json!("default")),
        ("center_input_sample", json!(false)),
        ("class_embed_type", Value::Null),
        ("class_embeddings_concat", json!(false)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("cross_attention_norm", Value::Null),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("encoder_hid_dim", Value::Null),
        ("encoder_hid_dim_type", Value::Null),
        ("flip_sin_to_cos", json!(true)),
        ("freq_shift", json!(0)),
        ("mid_block_only_cross_attention", json!(false)),
        ("mid_block_scale_factor", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("num_attention_heads", Value::Null),
        ("num_class_embeds", Value::Null),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("reverse_transformer_layers_per_block", Value::Null),
        ("time_cond_proj_dim", Value::Null),
        ("time_embedding_act_fn", Value::Null),
        ("time_embedding_dim", Value::Null),
        ("time_embedding_type", json!("positional")),
        ("timestep_post_act", Value::Null),
    ];
    let found = |key: &str| keys.get(key).cloned().unwrap_or(Value::Null);
    // 1 and 1.0 are equal here.
    let same = |a: &Value, b: &Value| a == b || a.as_f64().is_some_and(|a| b.as_f64() == Some(a));
    let required = required.into_iter().find(|(key, wanted)| !same(&found(key), wanted));
    let optional = || optional.into_iter().find(|(key, wanted)| !found(key).is_null() && !same(&found(key), wanted));
    required.or_else(optional).map(|(key, wanted)| (key, found(key), wanted))
}
