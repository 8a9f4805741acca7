//! Image autoencoder (diffusers `AutoencoderKL`; Rombach et al., arXiv 2112.10752): images to latents and back.
//!
//! It always computes in f32: SDXL's weights overflow in f16 and give black images.

use std::path::Path;

use burn::nn::conv::Conv2d;
use burn::nn::{GroupNorm, Linear, PaddingConfig2d};
use burn::tensor::activation::silu;
use burn::tensor::module::attention;
use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use serde::Deserialize;

use crate::models::resnet::{ResnetBlock2D, ResnetConfig, Upsample2D};
use crate::weights::{ConfigText, Weights, WeightsAt};

/// Epsilon of all group norms; fixed in diffusers' blocks.
const NORM_EPSILON: f64 = 1e-6;
/// Clamp range of log-variances in diffusers.
const LOGVAR_RANGE: (f32, f32) = (-30.0, 20.0);

/// The keys of an `AutoencoderKL`'s `config.json` that affect the computation. Other keys are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct AutoencoderKlConfig {
    /// Channels of the images, 3.
    pub in_channels: usize,
    /// Channels of the decoded images, 3.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Width of each level, from the image inward; every level except the last halves the size.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Factor that scales latents to a variance of about one.
    pub scaling_factor: f64,
    act_fn: String,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    /// Encoder and decoder have self-attention over the pixels at their coarsest level.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
    /// A 1x1 convolution ends the encoder.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// A 1x1 convolution begins the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    #[serde(default)]
    shift_factor: Option<f64>,
    #[serde(default)]
    latents_mean: Option<Vec<f64>>,
    #[serde(default)]
    latents_std: Option<Vec<f64>>,
}

fn yes() -> bool {
    true
}

/// Limits of layer width, and of levels and layers, in a config; larger values are typing errors.
const WIDTH_LIMIT: usize = 1 << 16;
const DEPTH_LIMIT: usize = 16;

/// Colour channels of a picture.
const RGB: usize = 3;

impl AutoencoderKlConfig {
    /// Image pixels per latent, along each side.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Parses and checks a config.
    ///
    /// # Errors
    /// Input: the JSON is broken, or a setting is not supported.
    pub fn parse(text: &ConfigText) -> Result<Self> {
        let config: Self = text.parse()?;
        config.validate(text.origin())?;
        Ok(config)
    }

    fn validate(&self, place: &Path) -> Result<()> {
        let refuse = |key: &str, problem: String| {
            Err(Error::input(
                format!("{}: {key}", place.display()),
                problem,
                "use an AutoencoderKL of the Stable Diffusion XL family",
            ))
        };
        let levels = self.block_out_channels.len();
        if self.act_fn != "silu" {
            return refuse("act_fn", format!("\"{}\" is not supported, only \"silu\"", self.act_fn));
        }
        for (key, types, supported) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            if let Some(other) = types.iter().find(|kind| *kind != supported) {
                return refuse(key, format!("\"{other}\" is not supported, only \"{supported}\""));
            }
            if types.len() != levels {
                return refuse(key, format!("{} blocks, but block_out_channels has {levels}", types.len()));
            }
        }
        let groups = self.norm_num_groups;
        if levels == 0 || groups == 0 || self.block_out_channels.iter().any(|&c| c == 0 || !c.is_multiple_of(groups)) {
            let widths = &self.block_out_channels;
            return refuse("block_out_channels", format!("{widths:?} must be multiples of norm_num_groups {groups}"));
        }
        for (key, channels) in [("in_channels", self.in_channels), ("out_channels", self.out_channels)] {
            if channels != RGB {
                return refuse(key, format!("{channels} is not supported, only {RGB}"));
            }
        }
        let mut widths = self.block_out_channels.iter().copied().chain([self.latent_channels]);
        if levels > DEPTH_LIMIT
            || self.layers_per_block > DEPTH_LIMIT
            || !widths.all(|width| (1..=WIDTH_LIMIT).contains(&width))
        {
            return refuse("block_out_channels, layers_per_block, latent_channels", "are out of range".into());
        }
        if !self.scaling_factor.is_finite() || self.scaling_factor <= 0.0 {
            return refuse("scaling_factor", format!("{} is not a positive number", self.scaling_factor));
        }
        if self.shift_factor.is_some() || self.latents_mean.is_some() || self.latents_std.is_some() {
            return refuse("shift_factor, latents_mean, latents_std", "are not supported, only null".into());
        }
        Ok(())
    }
}

/// Frozen `AutoencoderKL`.
#[derive(Debug)]
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
}

impl AutoencoderKl {
    /// Loads a folder with `config.json` and weights (`.../vae`).
    ///
    /// # Errors
    /// Input: the config requires something unsupported, or the weights do not fit it.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let config = AutoencoderKlConfig::parse(&ConfigText::read(&folder.join("config.json"))?)?;
        Self::new(config, Weights::open(folder, device)?)
    }

    /// Builds the autoencoder from `weights`.
    ///
    /// # Errors
    /// Input: the weights do not fit the config.
    pub fn new(config: AutoencoderKlConfig, weights: Weights) -> Result<Self> {
        let root = weights.at("");
        let latent = config.latent_channels;
        let vae = Self {
            encoder: Encoder::new(&root.at("encoder"), &config),
            decoder: Decoder::new(&root.at("decoder"), &config),
            quant_conv: config.use_quant_conv.then(|| root.at("quant_conv").conv2d([2 * latent; 2], 1, 1, 0)),
            post_quant_conv: config
                .use_post_quant_conv
                .then(|| root.at("post_quant_conv").conv2d([latent; 2], 1, 1, 0)),
            config,
        };
        weights.finish()?;
        Ok(vae)
    }

    /// Config of the autoencoder.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// Computes mean and clamped log-variance of the unscaled latents, each `[B, latent, H / factor, W / factor]`
    /// (rounded down), from `images` `[B, 3, H, W]` in -1..1.
    pub fn encode_mean_logvar(&self, images: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let moments = self.encoder.forward(images);
        let moments = match &self.quant_conv {
            Some(conv) => conv.forward(moments),
            None => moments,
        };
        let latent = self.config.latent_channels;
        let mean = moments.clone().narrow(1, 0, latent);
        let logvar = moments.narrow(1, latent, latent).clamp(LOGVAR_RANGE.0, LOGVAR_RANGE.1);
        (mean, logvar)
    }

    /// Encodes to latents scaled for the UNet, sampled with standard normal `noise` of their shape.
    pub fn encode(&self, images: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        let (mean, logvar) = self.encode_mean_logvar(images);
        (mean + (logvar * 0.5).exp() * noise) * self.config.scaling_factor
    }

    /// Decodes scaled latents `[B, latent, h, w]` to images `[B, 3, h * factor, w * factor]`, about -1..1 (not
    /// clamped).
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let latents = latents / self.config.scaling_factor;
        let latents = match &self.post_quant_conv {
            Some(conv) => conv.forward(latents),
            None => latents,
        };
        self.decoder.forward(latents)
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<ResnetBlock2D>, Option<Conv2d>)>,
    mid: MidBlock,
    out: OutputBlock,
}

impl Encoder {
    fn new(at: &WeightsAt<'_>, config: &AutoencoderKlConfig) -> Self {
        let (widths, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let mut channels = first;
        let levels = widths.iter().enumerate().map(|(level, &width)| {
            let block = at.at("down_blocks").at(level);
            let resnets = resnets(&block, [channels, width], config.layers_per_block, groups);
            channels = width;
            let down = (level + 1 < widths.len()).then(|| {
                let mut conv = block.at("downsamplers.0.conv").conv2d([width; 2], 3, 2, 0);
                // Pads one row below and one column to the right, nothing above and left.
                conv.padding = PaddingConfig2d::Explicit(0, 0, 1, 1);
                conv
            });
            (resnets, down)
        });
        Self {
            levels: levels.collect(),
            conv_in: at.at("conv_in").conv2d([config.in_channels, first], 3, 1, 1),
            mid: MidBlock::new(&at.at("mid_block"), last, config),
            out: OutputBlock::new(at, [last, 2 * config.latent_channels], groups),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        let mut x = self.conv_in.forward(images);
        for (resnets, down) in &self.levels {
            x = resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            if let Some(conv) = down {
                x = conv.forward(x);
            }
        }
        self.out.forward(self.mid.forward(x))
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    levels: Vec<(Vec<ResnetBlock2D>, Option<Upsample2D>)>,
    out: OutputBlock,
}

impl Decoder {
    fn new(at: &WeightsAt<'_>, config: &AutoencoderKlConfig) -> Self {
        let (widths, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let mut channels = last;
        let levels = widths.iter().rev().enumerate().map(|(level, &width)| {
            let block = at.at("up_blocks").at(level);
            let resnets = resnets(&block, [channels, width], config.layers_per_block + 1, groups);
            channels = width;
            let up = level + 1 < widths.len();
            (resnets, up.then(|| Upsample2D::load(&block.at("upsamplers.0"), width)))
        });
        Self {
            levels: levels.collect(),
            conv_in: at.at("conv_in").conv2d([config.latent_channels, last], 3, 1, 1),
            mid: MidBlock::new(&at.at("mid_block"), last, config),
            out: OutputBlock::new(at, [first, config.out_channels], groups),
        }
    }

    fn forward(&self, latents: Tensor<4>) -> Tensor<4> {
        let mut x = self.mid.forward(self.conv_in.forward(latents));
        for (resnets, up) in &self.levels {
            x = resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            if let Some(up) = up {
                let [_, _, height, width] = x.dims();
                x = up.forward(x, [2 * height, 2 * width]);
            }
        }
        self.out.forward(x)
    }
}

/// Loads `count` residual blocks; the first maps `channels[0]` to `channels[1]`.
fn resnets(block: &WeightsAt<'_>, channels: [usize; 2], count: usize, groups: usize) -> Vec<ResnetBlock2D> {
    let [input, output] = channels;
    let make = |i| {
        let channels = [if i == 0 { input } else { output }, output];
        resnet(&block.at("resnets").at(i), channels, groups)
    };
    (0..count).map(make).collect()
}

/// Loads a residual block without a time embedding.
fn resnet(at: &WeightsAt<'_>, channels: [usize; 2], groups: usize) -> ResnetBlock2D {
    let [d_input, d_output] = channels;
    ResnetBlock2D::load(at, ResnetConfig { d_input, d_output, d_time: None, groups, epsilon: NORM_EPSILON })
}

/// Middle block: a residual block, self-attention over all pixels with one head, a residual block (diffusers
/// `UNetMidBlock2D`).
#[derive(Debug)]
struct MidBlock {
    first: ResnetBlock2D,
    attention: Option<PixelAttention>,
    second: ResnetBlock2D,
}

impl MidBlock {
    fn new(at: &WeightsAt<'_>, channels: usize, config: &AutoencoderKlConfig) -> Self {
        let groups = config.norm_num_groups;
        Self {
            first: resnet(&at.at("resnets.0"), [channels; 2], groups),
            attention: config
                .mid_block_add_attention
                .then(|| PixelAttention::new(&at.at("attentions.0"), channels, groups)),
            second: resnet(&at.at("resnets.1"), [channels; 2], groups),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.first.forward(x, None);
        let x = match &self.attention {
            Some(attention) => attention.forward(x),
            None => x,
        };
        self.second.forward(x, None)
    }
}

#[derive(Debug)]
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn new(at: &WeightsAt<'_>, channels: usize, groups: usize) -> Self {
        let linear = |name| at.at(name).linear(channels, channels, true);
        Self {
            group_norm: at.at("group_norm").group_norm(groups, channels, NORM_EPSILON),
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            to_out: linear("to_out.0"),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = x.dims();
        // [B, C, H, W] -> [B, 1, H * W, C]: one head.
        let pixels = self.group_norm.forward(x.clone()).reshape([b, 1, c, h * w]).swap_dims(2, 3);
        let [q, k, v] = [&self.to_q, &self.to_k, &self.to_v].map(|linear| linear.forward(pixels.clone()));
        let mixed = self.to_out.forward(attention(q, k, v, None, None, Default::default()));
        x + mixed.swap_dims(2, 3).reshape([b, c, h, w])
    }
}

/// Norm, SiLU and last convolution of the encoder or decoder.
#[derive(Debug)]
struct OutputBlock {
    norm: GroupNorm,
    conv: Conv2d,
}

impl OutputBlock {
    fn new(at: &WeightsAt<'_>, channels: [usize; 2], groups: usize) -> Self {
        Self {
            norm: at.at("conv_norm_out").group_norm(groups, channels[0], NORM_EPSILON),
            conv: at.at("conv_out").conv2d(channels, 3, 1, 1),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv.forward(silu(self.norm.forward(x)))
    }
}
