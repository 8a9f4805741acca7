//! Writes LoRA files in the formats of other tools.

pub mod comfyui;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{FloatDType, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::file::Layout;
use hyperlora_sdxl::lora::{AttentionSite, LoraModule, LoraPair, LoraSet, LoraWeights, Matrix};
use hyperlora_sdxl::source::Component;
use safetensors::Dtype;

/// Paths of an attention module's linears, in the order of [`AttentionLora::pairs`].
///
/// [`AttentionLora::pairs`]: hyperlora_sdxl::lora::AttentionLora::pairs
const LINEARS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

/// Writes the LoRA of one sample in `layout`.
///
/// Loaders apply `alpha / rank * up @ down`. `up` already includes scale and weights, so alpha is the rank, also for ID
/// and Base together, whose ranks add up. `dtype` is f16, bf16 or f32; `notes` go into the file's metadata. The same
/// input gives the same bytes, and the file appears atomically.
///
/// # Errors
/// Input: the path is not writable; Disk: the disk is full or failing; Fault: the LoRA has several samples, other
/// modules than `sites`, or values that are not finite in `dtype`.
///
/// # Examples
/// ```
/// use std::collections::BTreeMap;
/// use burn::tensor::{Device, FloatDType, Tensor};
/// use burn_hyperlora::export::save_lora;
/// # use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ResamplerConfig};
/// use hyperlora_sdxl::lora::file::Layout;
/// # use hyperlora_sdxl::lora::{AttentionSite, LoraSet};
///
/// # fn example() -> HyperLora {
/// #     let config = HyperLoraConfig {
/// #         basis: 4,
/// #         id_tokens: 2,
/// #         clip_dim: 16,
/// #         resampler: ResamplerConfig { dim: 16, depth: 1, heads: 2, head_dim: 8, ff_mult: 2 },
/// #         ..HyperLoraConfig::default()
/// #     };
/// #     let path = "mid_block.attentions.0.transformer_blocks.0.attn1".to_string();
/// #     let sites = [AttentionSite { path, hidden_size: 8, cross_attention_dim: None }];
/// #     HyperLora::new(&config, &sites, 7, &Device::flex())
/// # }
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// # let hyper_lora = example();
/// # let states = Tensor::ones([1, 5, 16], &Device::flex());
/// // `Generator::lora` makes the LoRA of a person from photos.
/// let lora = hyper_lora.id_lora(states, None);
/// let path = folder.join("anna.safetensors");
/// let notes = BTreeMap::from([("ss_training_comment".to_string(), "trigger words: fcsks".to_string())]);
/// save_lora(&path, &hyper_lora.sites(), &lora, FloatDType::F16, Layout::Kohya, &notes)?;
/// assert_eq!(LoraSet::open(&path)?.modules.len(), 4);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn save_lora(
    path: &Path,
    sites: &[AttentionSite],
    lora: &LoraWeights,
    dtype: FloatDType,
    layout: Layout,
    notes: &BTreeMap<String, String>,
) -> Result<()> {
    if lora.modules.len() != sites.len() {
        let counts = format!("{} LoRA modules for {} attention modules", lora.modules.len(), sites.len());
        return Err(Error::Fault(format!("{}: {counts}", path.display())));
    }
    let mut set = LoraSet { notes: notes.clone(), ..LoraSet::default() };
    for (site, module) in sites.iter().zip(&lora.modules) {
        for (linear, pair) in LINEARS.into_iter().zip(module.pairs()) {
            let name = format!("{}.{linear}", site.path);
            let LoraPair { down, up } = pair.clone();
            let rank = down.dims()[2];
            let matrix =
                |tensor| transposed(tensor, dtype).map_err(|problem| Error::Fault(format!("{name}: {problem}")));
            let module = LoraModule { down: matrix(down)?, up: matrix(up)?, alpha: rank as f32 };
            set.modules.insert((Component::Unet, name), module);
        }
    }
    set.save(path, layout)
}

/// Transposes `[1, m, n]` to a matrix `[n, m]` of `dtype`.
fn transposed(tensor: Tensor<3>, dtype: FloatDType) -> std::result::Result<Matrix, String> {
    let [batch, rows, columns] = tensor.dims();
    if batch != 1 {
        return Err(format!("holds {batch} samples, a file holds one"));
    }
    let tensor = tensor.inner().reshape([rows, columns]).swap_dims(0, 1).cast(dtype);
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    if data.iter::<f32>().any(|value| !value.is_finite()) {
        return Err(format!("has values that are not finite in {dtype:?}"));
    }
    let dtype = match dtype {
        FloatDType::F16 => Dtype::F16,
        FloatDType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    };
    Ok(Matrix { dtype, shape: vec![columns, rows], bytes: data.as_bytes().to_vec() })
}
