//! Peak memory of one GPU during a step.

use serde::Serialize;

/// Assumed memory of the CUDA context, the kernels and the rounding of memory pools.
pub(super) const WORKSPACE: u64 = 2 << 30;

/// Size of an f32 in bytes.
pub(super) const F32: u64 = 4;

/// MemoryPlan of one GPU in bytes.
///
/// Weights, optimiser state, window and workspace are permanent. `encoding`, `unet_pass` and `hypernetwork_backward` are
/// phases of a pass, of which only the largest counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The UNet's weights, in `base.dtype`.
    pub unet: u64,
    /// Autoencoder, text encoders and image encoder, in f32.
    pub encoders: u64,
    /// All weights of the hypernetwork, trained or frozen, in f32.
    pub hypernetwork: u64,
    /// Both AdamW moments of the trained parameters, in f32.
    pub moments: u64,
    /// The same moments, if each GPU keeps only its share (ZeRO stage 1).
    pub moments_sharded: u64,
    /// Gradients summed over the accumulation window, in f32: the buckets of the all-reduce. 0 on one GPU with a single
    /// pass per step.
    pub window: u64,
    /// Encoding phase: the autoencoder's feature maps.
    pub encoding: u64,
    /// UNet phase: its activations, the LoRA with its gradients, and the hypernetwork's graph.
    pub unet_pass: u64,
    /// Activations of the UNet, a part of `unet_pass`.
    pub unet_activations: u64,
    /// Backward phase of the hypernetwork: its graph, the LoRA's gradients, and the pass's gradients.
    pub hypernetwork_backward: u64,
    /// Assumed memory of context, kernels and rounding.
    pub workspace: u64,
}

impl MemoryPlan {
    /// Returns the memory of the largest of the three phases.
    pub fn largest_moment(&self) -> u64 {
        self.encoding.max(self.unet_pass).max(self.hypernetwork_backward)
    }

    /// Peak with the whole optimiser state on every GPU.
    pub fn peak(&self) -> u64 {
        self.without_moments() + self.moments
    }

    /// Peak with a share of the optimiser state on each GPU.
    pub fn peak_sharded(&self) -> u64 {
        self.without_moments() + self.moments_sharded
    }

    fn without_moments(&self) -> u64 {
        self.unet + self.encoders + self.hypernetwork + self.window + self.largest_moment() + self.workspace
    }
}

/// Formats bytes in GiB.
pub(super) fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / (1_u64 << 30) as f64)
}
