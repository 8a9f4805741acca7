//! Coefficient statistics: early signs of a hypernetwork that learns nothing.

use burn::tensor::{Tensor, TensorData};
use hyperlora_core::{Error, Result};

/// Statistics of one batch's coefficients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CoefficientStatistics {
    /// Mean of `|a|`.
    pub mean_abs: f32,
    /// Effective number of bases per LoRA matrix: `exp` of the entropy of `a^2` over the bases, averaged over all
    /// tokens. 1: a single basis; K: all equally.
    pub effective_bases: f32,
    /// Share of the coefficients that differs between samples, at most 1. It is 0 if all samples get the same LoRA, and
    /// for a batch of one.
    pub spread: f32,
}

impl CoefficientStatistics {
    /// Computes the statistics of coefficients `[B, Q, K]` with length 1 over K.
    ///
    /// # Errors
    /// Fault: the device fails to return its data.
    pub fn of(coefficients: &Tensor<3>) -> Result<Self> {
        let a = coefficients.clone().detach();
        let share = a.clone().square(); // [B, Q, K], sums to 1 over K
        // The floor keeps 0 log 0 at 0.
        let entropy = (share.clone() * share.clamp_min(1e-20).log()).sum_dim(2).neg(); // [B, Q, 1]
        let common = a.clone().mean_dim(0).square().sum_dim(2); // [1, Q, 1]
        Ok(Self {
            mean_abs: number(a.abs().mean())?,
            effective_bases: number(entropy.exp().mean())?,
            spread: (1.0 - number(common.mean())?).max(0.0),
        })
    }
}

fn number(scalar: Tensor<1>) -> Result<f32> {
    let fault = |problem: String| Error::Fault(format!("coefficient statistics: {problem}"));
    let data: TensorData = scalar.try_into_data().map_err(|error| fault(error.to_string()))?;
    data.iter::<f32>().next().ok_or_else(|| fault("no value".into()))
}
