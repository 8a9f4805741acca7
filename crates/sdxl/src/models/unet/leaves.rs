//! Leaves and gradients of small autodiff graphs.

use burn::tensor::{Gradients, Tensor};

use crate::lora::{AttentionLora, LoraPair};

/// Turns a tensor of the plain device into a leaf of a new graph.
pub(in crate::models) fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor).require_grad()
}

/// Removes the gradient of a [`leaf`]; zero if nothing depends on it.
pub(in crate::models) fn gradient_of<const D: usize>(leaf: &Tensor<D>, gradients: &mut Gradients) -> Tensor<D> {
    leaf.grad_remove(gradients).unwrap_or_else(|| leaf.clone().inner().zeros_like())
}

/// Returns a scalar whose gradient with respect to `output` is `gradient`, a tensor of the plain device.
pub(in crate::models) fn seeded<const D: usize>(output: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    (output * Tensor::from_inner(gradient)).sum()
}

/// Turns all eight tensors into leaves with [`leaf`].
pub(in crate::models) fn on_leaves(module: &AttentionLora) -> AttentionLora {
    let pair = |pair: &LoraPair| LoraPair { down: leaf(pair.down.clone()), up: leaf(pair.up.clone()) };
    AttentionLora { q: pair(&module.q), k: pair(&module.k), v: pair(&module.v), out: pair(&module.out) }
}

/// Removes the gradients of a pair of leaves with [`gradient_of`].
pub(in crate::models) fn gradients_of(pair: &LoraPair, gradients: &mut Gradients) -> LoraPair {
    LoraPair { down: gradient_of(&pair.down, gradients), up: gradient_of(&pair.up, gradients) }
}
