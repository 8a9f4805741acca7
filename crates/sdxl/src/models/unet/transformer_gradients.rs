//! Backward pass of the transformer layer in four graphs: each attention's projections and output, and the
//! feed-forward.
//!
//! The steps between projections and output, above all the scores, are in none of them: see `attend_backward`.

use burn::tensor::Tensor;

use crate::lora::AttentionLora;
use crate::models::attention::{Attention, attend, attend_backward};
use crate::models::norms::LayerNorm;
use crate::models::unet::leaves::{gradient_of, gradients_of, leaf, on_leaves, seeded};
use crate::models::unet::transformer::BasicTransformerBlock;

impl BasicTransformerBlock {
    /// Computes the gradients with respect to `lora` and, if `wanted`, the input, from the output's gradient. All
    /// tensors are on the plain device, with shapes as in [`forward`](Self::forward).
    pub(super) fn backward(
        &self,
        x: Tensor<4>,
        context: Tensor<3>,
        lora: &[AttentionLora; 2],
        gradient: Tensor<4>,
        wanted: bool,
    ) -> (Option<Tensor<4>>, [AttentionLora; 2]) {
        let shape = x.shape();
        let [batch, height, width, channels] = x.dims();
        let tokens = |x: Tensor<4>| x.reshape([batch, height * width, channels]);

        // 1. Both attentions forward, each keeping graphs on both sides of its scores.
        let input = if wanted { leaf(tokens(x)) } else { Tensor::from_inner(tokens(x)) };
        let (first, x) = Residual::forward(&self.norm1, &self.attn1, input, None, &lora[0]);
        let (second, x) = Residual::forward(&self.norm2, &self.attn2, leaf(x), Some(context), &lora[1]);
        // 2. The feed-forward, forward and backward.
        let x = leaf(x);
        let y = x.clone() + self.ff.forward(self.norm3.forward(x.clone()));
        let gradient = gradient_of(&x, &mut seeded(y, tokens(gradient)).backward());
        // 3. Both attentions backward.
        let (gradient, second) = second.backward(gradient);
        let (gradient, first) = first.backward(gradient);
        (wanted.then(|| gradient.reshape(shape)), [first, second])
    }
}

/// `x + attention(norm(x))` after its forward pass, awaiting its gradient.
struct Residual {
    x: Tensor<3>,
    lora: AttentionLora,
    /// Queries, keys and values with their graph.
    projected: [Tensor<4>; 3],
    /// Output of the heads, a leaf.
    found: Tensor<4>,
    /// Output of the attention, with the graph from `found` on.
    output: Tensor<3>,
}

impl Residual {
    /// Runs forward; without `context`, as self-attention. `x` is on the autodiff device, the result on the plain one.
    fn forward(
        norm: &LayerNorm,
        attention: &Attention,
        x: Tensor<3>,
        context: Option<Tensor<3>>,
        lora: &AttentionLora,
    ) -> (Self, Tensor<3>) {
        let lora = on_leaves(lora);
        let normed = norm.forward(x.clone());
        let context = context.map_or_else(|| normed.clone(), Tensor::from_inner);
        let projected = attention.project(normed, context, Some(&lora));
        let [q, k, v] = projected.clone().map(Tensor::inner);
        let found = leaf(attend(q, k, v));
        let output = attention.output(found.clone(), Some(&lora));
        let y = x.clone().inner() + output.clone().inner();
        (Self { x, lora, projected, found, output }, y)
    }

    /// Computes the gradients with respect to `x` (zero unless it is a leaf) and the LoRA.
    fn backward(self, gradient: Tensor<3>) -> (Tensor<3>, AttentionLora) {
        let Self { x, lora, projected, found, output } = self;
        // 1. From the output to the heads' output.
        let mut gradients = seeded(output, gradient.clone()).backward();
        let out = gradients_of(&lora.out, &mut gradients);
        let d_found = gradient_of(&found, &mut gradients);
        // 2. Through the scores.
        let d_projected = attend_backward(projected.clone().map(Tensor::inner), found.inner(), d_found);
        // 3. From queries, keys and values to the input.
        let [q, k, v] = projected;
        let [d_q, d_k, d_v] = d_projected;
        let mut gradients = (seeded(q, d_q) + seeded(k, d_k) + seeded(v, d_v)).backward();
        let [q, k, v] = [&lora.q, &lora.k, &lora.v].map(|pair| gradients_of(pair, &mut gradients));
        (gradient + gradient_of(&x, &mut gradients), AttentionLora { q, k, v, out })
    }
}
