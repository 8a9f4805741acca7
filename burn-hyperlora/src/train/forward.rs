//! From conditions to LoRAs, and the denoising loss given them: what training and evaluation share.

use burn::tensor::Tensor;
use hyperlora_core::Result;
use hyperlora_sdxl::lora::LoraWeights;
use hyperlora_sdxl::models::unet::UnetInput;

use crate::conditioning::{Base, Portraits};
use crate::hypernet::{HyperLora, Stage};
use crate::objective;

/// LoRAs of a batch, and the coefficients that they were mixed from.
pub struct Made {
    /// ID- and Base-LoRA together, weighted by each sample's scenario.
    pub lora: LoraWeights,
    /// `[B, Q, K]` of the LoRA that the stage teaches.
    pub coefficients: Tensor<3>,
}

/// The LoRA of every sample, as the stage makes it; portraits and hypernetwork are on the same device.
///
/// # Errors
/// Input when a Base-LoRA is asked of a hypernetwork without one.
pub fn make_lora(hyper_lora: &HyperLora, kind: Stage, portraits: Portraits) -> Result<Made> {
    let Portraits { id, base_states, id_weight, base_weight } = portraits;
    let Some(id) = id else {
        let coefficients = hyper_lora.base_coefficients(base_states, 1)?;
        let lora = hyper_lora.base_lora_of(coefficients.clone())?.weighted(&base_weight);
        return Ok(Made { lora, coefficients });
    };
    let embedding = (kind == Stage::IdEmbed).then_some(id.embedding);
    let coefficients = hyper_lora.id_coefficients(id.states, embedding, 1);
    let id_lora = hyper_lora.id_lora_of(coefficients.clone()).weighted(&id_weight);
    let lora = if hyper_lora.has_base() {
        // In the ID stages its parameters take no gradient: no graph grows here.
        id_lora.concat(hyper_lora.base_lora(base_states)?.weighted(&base_weight))
    } else {
        id_lora
    };
    Ok(Made { lora, coefficients })
}

/// The denoising loss of every sample of a batch given its LoRA, without any graph.
///
/// # Errors
/// Fault when the device cannot give its data back.
pub fn denoising_loss(
    base: &Base,
    input: &UnetInput,
    target: Tensor<4>,
    lora: Option<&LoraWeights>,
) -> Result<Vec<f32>> {
    objective::per_sample(base.unet.forward(input, lora), target)
}
