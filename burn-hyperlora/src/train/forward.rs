//! Forward pass from conditions to LoRAs and the denoising loss, shared by training and evaluation.

use burn::tensor::Tensor;
use hyperlora_core::Result;
use hyperlora_sdxl::lora::LoraWeights;
use hyperlora_sdxl::models::unet::UnetInput;

use crate::conditioning::{FrozenModels, Portraits};
use crate::hypernet::{HyperLora, Stage};
use crate::objective;

/// LoRAs of a batch, with the coefficients that they were mixed from.
pub struct Made {
    /// ID-LoRA and Base-LoRA together, weighted by each sample's scenario.
    pub lora: LoraWeights,
    /// Coefficients `[B, Q, K]` of the LoRA that the stage trains.
    pub coefficients: Tensor<3>,
}

/// Makes the LoRA of every sample for the stage. Portraits and hypernetwork are on the same device.
///
/// # Errors
/// Input: a Base-LoRA is requested from a hypernetwork without one.
pub fn make_lora(hyper_lora: &HyperLora, kind: Stage, portraits: Portraits) -> Result<Made> {
    let Portraits { id, base_states, id_weight, base_weight } = portraits;
    let Some(id) = id else {
        let coefficients = hyper_lora.base_coefficients(base_states, 1)?;
        let lora = hyper_lora.base_lora_of(coefficients.clone())?.weighted(&base_weight);
        return Ok(Made { lora, coefficients });
    };
    let embedding = (kind == Stage::IdEmbedding).then_some(id.embedding);
    let coefficients = hyper_lora.id_coefficients(id.states, embedding, 1);
    let id_lora = hyper_lora.id_lora_of(coefficients.clone()).weighted(&id_weight);
    let lora = if hyper_lora.has_base() {
        // The Base-LoRA's parameters take no gradient in the ID stages, so this records no graph.
        id_lora.concat(hyper_lora.base_lora(base_states)?.weighted(&base_weight))
    } else {
        id_lora
    };
    Ok(Made { lora, coefficients })
}

/// Computes the denoising loss of every sample of a batch given its LoRA, without any graph.
///
/// # Errors
/// Fault: the device cannot return its data.
pub fn denoising_loss(
    base: &FrozenModels,
    input: &UnetInput,
    target: Tensor<4>,
    lora: Option<&LoraWeights>,
) -> Result<Vec<f32>> {
    objective::per_sample(base.unet.forward(input, lora), target)
}
