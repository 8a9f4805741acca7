//! Sinusoidal embeddings of timesteps and sizes, and the small network that follows.

use burn::nn::Linear;
use burn::tensor::activation::silu;
use burn::tensor::{Tensor, TensorData};

use crate::weights::WeightsAt;

/// Longest period of the sinusoids, in timesteps.
const MAX_PERIOD: f32 = 10_000.0;

/// Computes cosines, then sines, of `values` at `width / 2` frequencies: `[N]` -> `[N, width]`.
///
/// Matches diffusers' `get_timestep_embedding` with `flip_sin_to_cos=True, downscale_freq_shift=0`; `width` is even.
pub fn sinusoids(values: Tensor<1>, width: usize) -> Tensor<2> {
    let half = width / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| (-MAX_PERIOD.ln() * i as f32 / half as f32).exp()).collect();
    let frequencies = Tensor::<2>::from_data(TensorData::new(frequencies, [1, half]), &values.device());
    let angles = values.unsqueeze_dim::<2>(1) * frequencies;
    Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1)
}

/// Linear, SiLU, linear (diffusers `TimestepEmbedding`).
#[derive(Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    /// Loads `linear_1` and `linear_2`.
    pub fn load(weights: &WeightsAt<'_>, d_input: usize, d_output: usize) -> Self {
        Self {
            linear_1: weights.at("linear_1").linear(d_input, d_output, true),
            linear_2: weights.at("linear_2").linear(d_output, d_output, true),
        }
    }

    /// Maps `[B, d_input]` to `[B, d_output]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(silu(self.linear_1.forward(x)))
    }
}
