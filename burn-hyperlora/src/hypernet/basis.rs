//! LoRA bases: every down and up matrix is a linear combination of K learned matrices.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraPair};

use super::config::HyperLoraConfig;
use super::init::Init;

/// Kind of LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoraKind {
    /// ID-LoRA: the person.
    Id,
    /// Base-LoRA: everything else in the picture.
    Base,
}

/// Bases of one attention module's four linears.
#[derive(Module, Debug)]
pub(super) struct AttentionBases {
    to_q: LinearBases,
    to_k: LinearBases,
    to_v: LinearBases,
    to_out: LinearBases,
}

impl AttentionBases {
    pub(super) fn new(init: &Init, config: &HyperLoraConfig, site: &AttentionSite) -> Self {
        let hidden = site.hidden_size;
        let context = site.cross_attention_dim.unwrap_or(hidden);
        let linear = |name, input| LinearBases::new(&init.at(name), config, input, hidden);
        Self {
            to_q: linear("to_q", hidden),
            to_k: linear("to_k", context),
            to_v: linear("to_v", context),
            to_out: linear("to_out", hidden),
        }
    }

    /// Returns true if an up basis of the ID-LoRA is no longer zero.
    pub(super) fn has_learnt_id(&self) -> bool {
        let linears = [&self.to_q, &self.to_k, &self.to_v, &self.to_out];
        linears.iter().any(|linear| linear.id_up_basis.val().into_data().iter::<f32>().any(|value| value != 0.0))
    }

    /// Combines the bases by coefficients `[B, 8, K]`, in the order q.down q.up k.down k.up v.down v.up out.down
    /// out.up.
    pub(super) fn mix(&self, part: LoraKind, coefficients: Tensor<3>, scale: f64) -> Option<AttentionLora> {
        let [batch, _, basis] = coefficients.dims();
        let token = |index| coefficients.clone().narrow(1, index, 1).reshape([batch, basis]); // [B, K]
        let pair = |linear: &LinearBases, first| linear.mix(part, token(first), token(first + 1), scale);
        Some(AttentionLora {
            q: pair(&self.to_q, 0)?,
            k: pair(&self.to_k, 2)?,
            v: pair(&self.to_v, 4)?,
            out: pair(&self.to_out, 6)?,
        })
    }
}

/// Bases of one linear: down `[K, in, r]`, up `[K, r, out]`.
#[derive(Module, Debug)]
struct LinearBases {
    id_down_basis: Param<Tensor<3>>,
    id_up_basis: Param<Tensor<3>>,
    base_down_basis: Option<Param<Tensor<3>>>,
    base_up_basis: Option<Param<Tensor<3>>>,
}

impl LinearBases {
    fn new(init: &Init, config: &HyperLoraConfig, input: usize, output: usize) -> Self {
        let (basis, base_rank) = (config.basis, config.base_rank);
        // Usual LoRA initialisation: down keeps the variance of its input (the coefficients have length 1); up is zero,
        // so that the UNet starts unchanged. If both were zero, there would be no gradient.
        let std = (input as f64).sqrt().recip();
        let down = |name, rank| init.normal(name, [basis, input, rank], std);
        let up = |rank| init.zeros([basis, rank, output]);
        Self {
            id_down_basis: down("id_down_basis", config.id_rank),
            id_up_basis: up(config.id_rank),
            base_down_basis: (base_rank > 0).then(|| down("base_down_basis", base_rank)),
            base_up_basis: (base_rank > 0).then(|| up(base_rank)),
        }
    }

    /// Combines the bases of `part`; `None` if this linear has none.
    fn mix(&self, part: LoraKind, down: Tensor<2>, up: Tensor<2>, scale: f64) -> Option<LoraPair> {
        let (down_basis, up_basis) = match part {
            LoraKind::Id => (&self.id_down_basis, &self.id_up_basis),
            LoraKind::Base => (self.base_down_basis.as_ref()?, self.base_up_basis.as_ref()?),
        };
        // Scaling the coefficients costs K numbers, scaling the matrix r * out.
        Some(LoraPair { down: mix(down, down_basis), up: mix(up * scale, up_basis) })
    }
}

/// Computes `sum_k a_k M_k` for each sample: `[B, K] x [K, m, n]` to `[B, m, n]`.
fn mix(coefficients: Tensor<2>, basis: &Param<Tensor<3>>) -> Tensor<3> {
    let [batch, _] = coefficients.dims();
    let [count, rows, columns] = basis.dims();
    let flat = basis.val().reshape([count, rows * columns]);
    coefficients.matmul(flat).reshape([batch, rows, columns])
}
