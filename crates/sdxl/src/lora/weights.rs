//! LoRA weights of a batch: made by the hypernetwork, applied by the UNet.

use burn::tensor::Tensor;

/// One low-rank update per sample: `y = W x + (x @ down) @ up`.
///
/// `up` already includes the scale (alpha / rank) and the user's weight.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_sdxl::lora::LoraPair;
///
/// let device = Device::flex();
/// let (batch, input, output, rank) = (2, 8, 6, 4);
/// let pair = LoraPair {
///     down: Tensor::ones([batch, input, rank], &device),
///     up: Tensor::ones([batch, rank, output], &device),
/// };
/// let tokens = Tensor::ones([batch, 5, input], &device);
/// assert_eq!(pair.apply(tokens).dims(), [batch, 5, output]);
/// ```
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// Down matrices, `[B, in, r]`.
    pub down: Tensor<3>,
    /// Up matrices, `[B, r, out]`.
    pub up: Tensor<3>,
}

/// LoRA of one attention module: its four linears.
#[derive(Debug, Clone)]
pub struct AttentionLora {
    /// LoRA of the query projection, `to_q`.
    pub q: LoraPair,
    /// LoRA of the key projection, `to_k`.
    pub k: LoraPair,
    /// LoRA of the value projection, `to_v`.
    pub v: LoraPair,
    /// LoRA of the output projection, `to_out.0`.
    pub out: LoraPair,
}

/// LoRA of every attention module of a UNet, in the UNet's module order.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_sdxl::lora::{AttentionLora, LoraPair, LoraWeights};
///
/// let device = Device::flex();
/// let pair = |rank| LoraPair { down: Tensor::ones([1, 8, rank], &device), up: Tensor::ones([1, rank, 8], &device) };
/// let lora = |rank| LoraWeights {
///     modules: vec![AttentionLora { q: pair(rank), k: pair(rank), v: pair(rank), out: pair(rank) }],
/// };
/// // An ID-LoRA of rank 8 at weight 0.7, plus a Base-LoRA of rank 4: the ranks add up.
/// let id = lora(8).weighted(&Tensor::from_floats([0.7], &device));
/// let both = id.concat(lora(4));
/// assert_eq!(both.modules[0].q.down.dims(), [1, 8, 12]);
/// assert_eq!(both.tensors().count(), 8);
/// ```
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// LoRA of each attention module.
    pub modules: Vec<AttentionLora>,
}

/// Attention module of the UNet that a LoRA updates, as described by the released `hyper_lora_modules.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionSite {
    /// Path in the UNet, diffusers naming: `down_blocks.1.attentions.0.transformer_blocks.0.attn1`.
    pub path: String,
    /// Width of the queries and of the output.
    pub hidden_size: usize,
    /// Width of keys and values from the prompt; `None` for self-attention.
    pub cross_attention_dim: Option<usize>,
}

impl AttentionSite {
    /// Key prefix in LoRA files: `lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1`.
    pub fn lora_prefix(&self) -> String {
        format!("lora_unet_{}", self.path.replace('.', "_"))
    }
}

impl LoraPair {
    fn map(self, f: &mut impl FnMut(Tensor<3>) -> Tensor<3>) -> Self {
        Self { down: f(self.down), up: f(self.up) }
    }

    /// Computes `x W_down W_up` for `x` of shape `[B, N, in]`. The result is `[B, N, out]`, in the type of `x`.
    pub fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let dtype = x.dtype();
        x.matmul(self.down.clone().cast(dtype)).matmul(self.up.clone().cast(dtype))
    }

    /// Sums both updates exactly by concatenating their ranks.
    fn concat(self, other: Self) -> Self {
        Self { down: Tensor::cat(vec![self.down, other.down], 2), up: Tensor::cat(vec![self.up, other.up], 1) }
    }
}

impl AttentionLora {
    /// The four pairs, in the order q, k, v, out.
    pub fn pairs(&self) -> [&LoraPair; 4] {
        [&self.q, &self.k, &self.v, &self.out]
    }

    fn map(self, f: &mut impl FnMut(Tensor<3>) -> Tensor<3>) -> Self {
        Self { q: self.q.map(f), k: self.k.map(f), v: self.v.map(f), out: self.out.map(f) }
    }
}

impl LoraWeights {
    /// Applies `f` to every tensor, in the order q.down q.up k.down k.up v.down v.up out.down out.up of each module.
    #[must_use]
    pub fn map(self, mut f: impl FnMut(Tensor<3>) -> Tensor<3>) -> Self {
        Self { modules: self.modules.into_iter().map(|module| module.map(&mut f)).collect() }
    }

    /// Iterates over every tensor, in the order of [`map`](Self::map).
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor<3>> {
        self.modules.iter().flat_map(AttentionLora::pairs).flat_map(|pair| [&pair.down, &pair.up])
    }

    /// Sums both LoRAs (ID and Base) by concatenating their ranks.
    ///
    /// # Panics
    /// If the two were made for different module lists, which only a programming error can cause.
    #[must_use]
    pub fn concat(self, other: Self) -> Self {
        assert_eq!(self.modules.len(), other.modules.len(), "LoRAs of different UNets");
        let modules = self
            .modules
            .into_iter()
            .zip(other.modules)
            .map(|(a, b)| AttentionLora {
                q: a.q.concat(b.q),
                k: a.k.concat(b.k),
                v: a.v.concat(b.v),
                out: a.out.concat(b.out),
            })
            .collect();
        Self { modules }
    }

    /// Scales each sample's update: `weights` is `[B]`, 0 switches a sample's LoRA off.
    #[must_use]
    pub fn weighted(self, weights: &Tensor<1>) -> Self {
        let factor = weights.clone().reshape([-1, 1, 1]);
        let mut is_up = true;
        self.map(|tensor| {
            is_up = !is_up;
            if is_up { tensor * factor.clone() } else { tensor }
        })
    }
}
