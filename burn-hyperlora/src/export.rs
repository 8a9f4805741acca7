//! LoRA files in the formats that other tools read.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{FloatDType, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::lora::{AttentionSite, LoraPair, LoraWeights};
use crate::weights;

/// The names of an attention module's linears in a kohya-style file, in the order of [`AttentionLora::pairs`].
///
/// [`AttentionLora::pairs`]: crate::lora::AttentionLora::pairs
const LINEARS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out_0"];

/// Writes the LoRA of one sample as kohya's sd-scripts lay it out, which diffusers, ComfyUI and the WebUIs load:
/// `{prefix}_{to_q|to_k|to_v|to_out_0}.{lora_down.weight [r, in], lora_up.weight [out, r], alpha}`.
///
/// Loaders apply `alpha / rank * up @ down`. Scale and weights are in `up` already, so alpha is the rank: that holds for
/// ID and Base together too, whose ranks add up. `dtype` is f16 or f32; `notes` goes into the file's metadata. The same
/// input gives the same bytes, and the file appears whole or not at all.
///
/// # Errors
/// Input for a place that cannot be written to, Disk for a full or failing disk, Fault for a LoRA of several samples, of
/// other modules than `sites`, or with values that are not finite in `dtype`.
pub fn save_kohya(
    path: &Path,
    sites: &[AttentionSite],
    lora: &LoraWeights,
    dtype: FloatDType,
    notes: &BTreeMap<String, String>,
) -> Result<()> {
    if lora.modules.len() != sites.len() {
        let counts = format!("{} LoRA modules for {} attention modules", lora.modules.len(), sites.len());
        return Err(Error::Fault(format!("{}: {counts}", path.display())));
    }
    let mut tensors = Vec::with_capacity(sites.len() * LINEARS.len() * 3);
    let mut rank = 0;
    for (site, module) in sites.iter().zip(&lora.modules) {
        for (linear, pair) in LINEARS.into_iter().zip(module.pairs()) {
            let name = format!("{}_{linear}", site.lora_prefix());
            rank = pair.down.dims()[2];
            let alpha = TensorData::new(vec![rank as f32], Vec::<usize>::new());
            let LoraPair { down, up } = pair.clone();
            tensors.push((format!("{name}.alpha"), alpha));
            for (side, tensor) in [("lora_down", down), ("lora_up", up)] {
                let name = format!("{name}.{side}.weight");
                let data = transposed(tensor, dtype).map_err(|problem| Error::Fault(format!("{name}: {problem}")))?;
                tensors.push((name, data));
            }
        }
    }

    let fixed = [
        ("ss_network_module", "networks.lora".into()),
        ("ss_network_dim", rank.to_string()),
        ("ss_network_alpha", rank.to_string()),
        ("ss_base_model_version", "sdxl_base_v1-0".into()),
    ];
    let mut metadata = notes.clone();
    metadata.extend(fixed.map(|(key, value)| (key.into(), value)));
    weights::save_with_metadata(path, metadata, tensors)
}

/// `[1, m, n]` to `[n, m]` data of `dtype`.
fn transposed(tensor: Tensor<3>, dtype: FloatDType) -> std::result::Result<TensorData, String> {
    let [batch, rows, columns] = tensor.dims();
    if batch != 1 {
        return Err(format!("holds {batch} samples, a file holds one"));
    }
    let tensor = tensor.inner().reshape([rows, columns]).swap_dims(0, 1).cast(dtype);
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    if data.iter::<f32>().any(|value| !value.is_finite()) {
        return Err(format!("has values that are not finite in {dtype:?}"));
    }
    Ok(data)
}
