//! Attention with per-sample LoRA, and a custom backward pass for its core.

use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{FloatDType, Tensor};

use crate::lora::{AttentionLora, LoraPair};
use crate::weights::WeightsAt;

/// Chunk size of queries. Longer attention runs in chunks, and only one chunk's scores are in memory at a time.
///
/// SDXL reaches it at 1024^2 pixels, whose 4096 tokens then take 160 MiB of scores per sample instead of 640.
pub const QUERY_CHUNK: usize = 1024;

/// Multi-head attention without masks (diffusers `Attention`).
#[derive(Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    /// Loads `to_q`, `to_k`, `to_v` (no bias) and `to_out.0`. Keys and values come from tokens of width `d_context`.
    pub fn load(weights: &WeightsAt<'_>, width: usize, d_context: usize, heads: usize) -> Self {
        Self {
            to_q: weights.at("to_q").linear(width, width, false),
            to_k: weights.at("to_k").linear(d_context, width, false),
            to_v: weights.at("to_v").linear(d_context, width, false),
            to_out: weights.at("to_out.0").linear(width, width, true),
            heads,
        }
    }

    /// Maps `x` `[B, N, width]` and `context` `[B, M, d_context]` to `[B, N, width]`.
    pub fn forward(&self, x: Tensor<3>, context: Tensor<3>, lora: Option<&AttentionLora>) -> Tensor<3> {
        let [q, k, v] = self.project(x, context, lora);
        self.output(attend(q, k, v), lora)
    }

    /// Projects to queries, keys and values, `[B, heads, N or M, head_width]`.
    pub(super) fn project(&self, x: Tensor<3>, context: Tensor<3>, lora: Option<&AttentionLora>) -> [Tensor<4>; 3] {
        let split = |x: Tensor<3>| {
            let [batch, tokens, width] = x.dims();
            x.reshape([batch, tokens, self.heads, width / self.heads]).swap_dims(1, 2)
        };
        [
            split(updated(&self.to_q, lora.map(|lora| &lora.q), x)),
            split(updated(&self.to_k, lora.map(|lora| &lora.k), context.clone())),
            split(updated(&self.to_v, lora.map(|lora| &lora.v), context)),
        ]
    }

    /// Joins the heads' outputs, `[B, heads, N, head_width]`, and projects them to `[B, N, width]`.
    pub(super) fn output(&self, found: Tensor<4>, lora: Option<&AttentionLora>) -> Tensor<3> {
        let [batch, heads, tokens, head_width] = found.dims();
        let joined = found.swap_dims(1, 2).reshape([batch, tokens, heads * head_width]);
        updated(&self.to_out, lora.map(|lora| &lora.out), joined)
    }
}

/// Computes `W x + b` plus each sample's low-rank update.
fn updated(linear: &Linear, lora: Option<&LoraPair>, x: Tensor<3>) -> Tensor<3> {
    match lora {
        Some(lora) => linear.forward(x.clone()) + lora.apply(x),
        None => linear.forward(x),
    }
}

/// Computes `softmax(q k^T / sqrt(head_width)) v` for `[B, heads, N or M, head_width]`, in the type of `q`.
///
/// Scores are always f32. An autodiff device keeps all of them; a plain device runs the backend's own attention chunk
/// by chunk.
pub(super) fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    if q.is_autodiff() {
        let dtype = q.dtype();
        let [q, k, v] = [q, k, v].map(|x| x.cast(FloatDType::F32));
        let scores = softmax(scaled(q).matmul(k.swap_dims(2, 3)), 3); // [B, heads, N, M]
        return scores.matmul(v).cast(dtype);
    }
    let chunk = |q| attention(q, k.clone(), v.clone(), None, None, AttentionModuleOptions::default());
    joined(chunks(&q).map(|[start, len]| chunk(q.clone().narrow(2, start, len))))
}

/// Computes the gradients of [`attend`] with respect to `q`, `k` and `v` from its output `found` and the output's
/// gradient.
///
/// Runs on the plain device in f32 with one chunk's scores in memory at a time. With `P` the softmax and `dO` the
/// gradient: `dV = P^T dO`, `dS = P * (dO V^T - rowsum(dO * O))`, `dQ = dS K`, `dK = dS^T Q` (FlashAttention, arXiv
/// 2205.14135, appendix B.2).
pub(super) fn attend_backward([q, k, v]: [Tensor<4>; 3], found: Tensor<4>, gradient: Tensor<4>) -> [Tensor<4>; 3] {
    let dtype = q.dtype();
    let [k, v] = [k, v].map(|x| x.cast(FloatDType::F32));
    let mut sums: Option<[Tensor<4>; 2]> = None;
    let d_q = joined(chunks(&q).map(|[start, len]| {
        let rows = |x: &Tensor<4>| x.clone().narrow(2, start, len).cast(FloatDType::F32);
        let (q, gradient) = (scaled(rows(&q)), rows(&gradient)); // [B, heads, n, head_width]
        let own = (rows(&found) * gradient.clone()).sum_dim(3); // [B, heads, n, 1]
        let p = softmax(q.clone().matmul(k.clone().swap_dims(2, 3)), 3); // [B, heads, n, M]
        let d_v = p.clone().swap_dims(2, 3).matmul(gradient.clone());
        let d_scores = p * (gradient.matmul(v.clone().swap_dims(2, 3)) - own); // [B, heads, n, M]
        let d_k = d_scores.clone().swap_dims(2, 3).matmul(q);
        sums = Some(match sums.take() {
            Some([k, v]) => [k + d_k, v + d_v],
            None => [d_k, d_v],
        });
        scaled(d_scores.matmul(k.clone())).cast(dtype)
    }));
    let [d_k, d_v] = sums.unwrap_or_else(|| [k.zeros_like(), v.zeros_like()]);
    [d_q, d_k.cast(dtype), d_v.cast(dtype)]
}

/// Divides by the square root of the head width.
fn scaled(q: Tensor<4>) -> Tensor<4> {
    let [.., head_width] = q.dims();
    q.mul_scalar((head_width as f64).powf(-0.5))
}

/// Start and length of every query chunk.
fn chunks(q: &Tensor<4>) -> impl Iterator<Item = [usize; 2]> + use<> {
    let [_, _, tokens, _] = q.dims();
    (0..tokens).step_by(QUERY_CHUNK).map(move |start| [start, QUERY_CHUNK.min(tokens - start)])
}

fn joined(chunks: impl Iterator<Item = Tensor<4>>) -> Tensor<4> {
    Tensor::cat(chunks.collect(), 2)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use hyperlora_core::random::{Purpose, for_sample, normal};

    use super::*;
    use crate::models::unet::leaves::{gradient_of, leaf, seeded};

    fn random(draw: u64, shape: [usize; 4]) -> Tensor<4> {
        let values = normal(&mut for_sample(0, 0, draw, Purpose::Noise), shape.iter().product());
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    /// Relative error `|a - b| / |b|` in the Euclidean norm.
    fn relative_error(a: Tensor<4>, b: Tensor<4>) -> f32 {
        let squares = |x: Tensor<4>| x.square().sum().into_scalar::<f32>();
        (squares(a - b.clone()) / squares(b)).sqrt()
    }

    /// Autodiff keeps all scores; the chunks, including a short last one, must give the same result.
    #[test]
    fn chunks_of_queries_agree_with_autodiff_over_all_of_them() {
        let tokens = 2 * QUERY_CHUNK + 7;
        for keys in [5, tokens] {
            let [q, k, v, gradient] =
                [(1, tokens), (2, keys), (3, keys), (4, tokens)].map(|(draw, n)| random(draw, [1, 2, n, 3]));
            let v = v * 2.0 + 1.0;
            let leaves = [q.clone(), k.clone(), v.clone()].map(leaf);
            let [lq, lk, lv] = leaves.clone();
            let whole = attend(lq, lk, lv);
            let found = attend(q.clone(), k.clone(), v.clone());
            assert!(relative_error(found.clone(), whole.clone().inner()) < 1e-5);

            let mut gradients = seeded(whole, gradient.clone()).backward();
            let chunked = attend_backward([q, k, v], found, gradient);
            for (name, (leaf, chunked)) in ["q", "k", "v"].into_iter().zip(leaves.iter().zip(chunked)) {
                let error = relative_error(chunked, gradient_of(leaf, &mut gradients));
                assert!(error < 1e-5, "{keys} keys, d{name}: {error:e}");
            }
        }
    }
}
