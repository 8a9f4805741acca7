//! Residual convolution block and upsampling.

use burn::nn::Linear;
use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::models::norms::GroupNorm;
use crate::weights::WeightsAt;

/// Residual block: two convolutions with a time shift between them, and a shortcut (diffusers `ResnetBlock2D`).
#[derive(Debug)]
pub struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

/// Sizes of a [`ResnetBlock2D`].
#[derive(Debug, Clone, Copy)]
pub struct ResnetConfig {
    /// Input channels.
    pub d_input: usize,
    /// Output channels. If they differ from the input channels, the shortcut is a 1x1 convolution.
    pub d_output: usize,
    /// Width of the time embedding; `None` in the autoencoder.
    pub d_time: Option<usize>,
    /// Groups of both norms.
    pub groups: usize,
    /// Epsilon of both norms.
    pub epsilon: f64,
}

impl ResnetBlock2D {
    /// Loads `norm1`, `conv1`, `norm2`, `conv2` and, if `config` requires them, `time_emb_proj` and `conv_shortcut`.
    pub fn load(weights: &WeightsAt<'_>, config: ResnetConfig) -> Self {
        let ResnetConfig { d_input, d_output, d_time, groups, epsilon } = config;
        Self {
            norm1: GroupNorm::new(weights.at("norm1").group_norm(groups, d_input, epsilon)),
            conv1: weights.at("conv1").conv2d([d_input, d_output], 3, 1, 1),
            time_emb_proj: d_time.map(|d_time| weights.at("time_emb_proj").linear(d_time, d_output, true)),
            norm2: GroupNorm::new(weights.at("norm2").group_norm(groups, d_output, epsilon)),
            conv2: weights.at("conv2").conv2d([d_output, d_output], 3, 1, 1),
            conv_shortcut: (d_input != d_output)
                .then(|| weights.at("conv_shortcut").conv2d([d_input, d_output], 1, 1, 0)),
        }
    }

    /// Maps `x` `[B, d_input, H, W]` and the activated time embedding `time` `[B, d_time]` to `[B, d_output, H, W]`.
    pub fn forward(&self, x: Tensor<4>, time: Option<&Tensor<2>>) -> Tensor<4> {
        let mut h = self.conv1.forward(silu(self.norm1.forward(x.clone())));
        if let (Some(proj), Some(time)) = (&self.time_emb_proj, time) {
            h = h + proj.forward(time.clone()).unsqueeze_dims::<4>(&[2, 3]);
        }
        let h = self.conv2.forward(silu(self.norm2.forward(h)));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

/// Nearest-neighbour upsampling by two, then a convolution (diffusers `Upsample2D`).
#[derive(Debug)]
pub struct Upsample2D {
    conv: Conv2d,
}

impl Upsample2D {
    /// Loads `conv`.
    pub fn load(weights: &WeightsAt<'_>, channels: usize) -> Self {
        Self { conv: weights.at("conv").conv2d([channels, channels], 3, 1, 1) }
    }

    /// Maps `[B, C, H, W]` to `[B, C, size[0], size[1]]`. Each side is `2 n` or, to match an odd size of the down path,
    /// `2 n - 1`.
    pub fn forward(&self, x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let mut doubled = x
            .reshape([batch, channels, height, 1, width, 1])
            .expand([batch, channels, height, 2, width, 2])
            .reshape([batch, channels, 2 * height, 2 * width]);
        if size != [2 * height, 2 * width] {
            doubled = doubled.slice([0..batch, 0..channels, 0..size[0], 0..size[1]]);
        }
        self.conv.forward(doubled)
    }
}
