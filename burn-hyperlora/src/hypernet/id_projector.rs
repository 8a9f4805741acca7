//! ID projector: maps a face embedding to a few tokens.

use burn::module::Module;
use burn::nn::{LayerNorm, Linear};
use burn::tensor::Tensor;

use super::init::Init;

/// `Linear -> reshape to tokens -> LayerNorm`: turns the ID embedding into a short sequence for the resampler.
#[derive(Module, Debug)]
pub(super) struct IdProjector {
    linear: Linear,
    norm: LayerNorm,
    tokens: usize,
}

impl IdProjector {
    pub(super) fn new(init: &Init, embedding: usize, tokens: usize, width: usize) -> Self {
        Self { linear: init.linear("0", embedding, tokens * width, true), norm: init.layer_norm(width), tokens }
    }

    /// Maps `[B, embedding]` to `[B, tokens, width]`.
    pub(super) fn forward(&self, id_embedding: Tensor<2>) -> Tensor<3> {
        let [batch, _] = id_embedding.dims();
        let tokens = self.linear.forward(id_embedding); // [B, tokens * width]
        let width = tokens.dims()[1] / self.tokens;
        self.norm.forward(tokens.reshape([batch, self.tokens, width]))
    }
}
