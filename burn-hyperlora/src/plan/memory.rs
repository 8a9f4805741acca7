//! Memory of one GPU at the fullest moment of a step.

use serde::Serialize;

/// What the CUDA context, the kernels and the rounding of the memory pools take besides tensors: an assumption.
pub(super) const WORKSPACE: u64 = 2 << 30;

/// Bytes of an f32.
pub(super) const F32: u64 = 4;

/// Bytes on one GPU.
///
/// What lies in memory all the time comes first; then what a pass holds at three moments of which the largest counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The UNet's weights, in `base.dtype`.
    pub unet: u64,
    /// Autoencoder, text encoders and image encoder, in f32.
    pub encoders: u64,
    /// All of the hypernetwork's weights, training or not, in f32.
    pub hypernetwork: u64,
    /// Both moments of AdamW for what trains, in f32.
    pub moments: u64,
    /// The same where each GPU keeps its share alone (ZeRO stage 1).
    pub moments_sharded: u64,
    /// The sum of the gradients over the accumulation window, in f32: the buckets that travel. 0 on one GPU with a single pass
    /// per step.
    pub window: u64,
    /// While encoding: the autoencoder's feature maps.
    pub encoding: u64,
    /// While the UNet runs: its activations, the LoRA with its gradients, and the hypernetwork's graph.
    pub unet_pass: u64,
    /// Of these, the UNet's activations.
    pub unet_activations: u64,
    /// While the hypernetwork is differentiated: its graph, the LoRA's gradients, and the gradients of the pass.
    pub hypernetwork_backward: u64,
    /// Context, kernels and rounding.
    pub workspace: u64,
}

impl Memory {
    /// The fullest of the three moments.
    pub fn largest_moment(&self) -> u64 {
        self.encoding.max(self.unet_pass).max(self.hypernetwork_backward)
    }

    /// The peak with the whole optimiser state on every GPU, as training does it.
    pub fn peak(&self) -> u64 {
        self.without_moments() + self.moments
    }

    /// The peak with a share of the optimiser state on each GPU.
    pub fn peak_sharded(&self) -> u64 {
        self.without_moments() + self.moments_sharded
    }

    fn without_moments(&self) -> u64 {
        self.unet + self.encoders + self.hypernetwork + self.window + self.largest_moment() + self.workspace
    }
}
