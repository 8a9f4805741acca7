//! The transformer layer backwards, in four graphs: each attention's projections and output, and the feed-forward.
//!
//! What lies between the projections and the output, scores above all, is in none of them: see `attend_backward`.

use burn::tensor::Tensor;

use crate::lora::AttentionLora;
use crate::models::attention::{Attention, attend, attend_backward};
use crate::models::norms::LayerNorm;
use crate::models::unet::leaves::{gradient_of, gradients_of, leaf, on_leaves, seeded};
use crate::models::unet::transformer::BasicTransformerBlock;

impl BasicTransformerBlock {
    /// The gradients with respect to the input and to `lora`, given that of the output; that of the input only where
    /// it is `wanted`. All on the plain device, shapes as in [`forward`](Self::forward).
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

        // 1. Both attentions forward, each leaving graphs on both sides of its scores.
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

/// `x + attention(norm(x))`, run forward and waiting for its gradient.
struct Residual {
    x: Tensor<3>,
    lora: AttentionLora,
    /// Queries, keys and values, with the graph that made them.
    projected: [Tensor<4>; 3],
    /// What the heads found: a leaf.
    found: Tensor<4>,
    /// The attention's output, with the graph from `found` on.
    output: Tensor<3>,
}

impl Residual {
    /// Without a `context`, the tokens look at themselves. `x` is on the autodiff device, the result on the plain one.
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

    /// The gradient with respect to `x`, zero where it is no leaf, and those with respect to the LoRA.
    fn backward(self, gradient: Tensor<3>) -> (Tensor<3>, AttentionLora) {
        let Self { x, lora, projected, found, output } = self;
        // 1. From the output to what the heads found.
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
