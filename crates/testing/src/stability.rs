//! The quickstart's base model as a single file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor, TensorData};
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::weights::{Form, SafetensorsFile, TensorEntry, weights_in};
use safetensors::Dtype;

use crate::repository;

/// Returns the folder of the quickstart's base model.
pub fn quickstart_base() -> PathBuf {
    repository().join("experiments/quickstart/base")
}

/// Reads all tensors of a component's safetensors file.
fn tensors_of(part: Component) -> BTreeMap<String, TensorData> {
    let folder = quickstart_base().join(part.folder());
    let path = weights_in(&folder, None).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    let read = |entry: TensorEntry| {
        let dtype = if entry.dtype == Dtype::F16 { DType::F16 } else { DType::F32 };
        let bytes = file.read_raw(&entry.name).unwrap();
        (entry.name, TensorData::from_bytes_vec(bytes, entry.shape, dtype).convert_dtype(DType::F32))
    };
    file.entries().map(read).collect()
}

/// Returns the quickstart's base model in Stability naming, converted from diffusers by the tables.
pub fn stability() -> BTreeMap<String, TensorData> {
    let source = BaseSource::open(&quickstart_base(), None, None).unwrap();
    let mut made = BTreeMap::new();
    let mut fused: BTreeMap<String, [Vec<f32>; 3]> = BTreeMap::new();
    for part in Component::ALL {
        let table = source.table(part).unwrap();
        for (name, data) in tensors_of(part) {
            // Recent transformers save the first encoder without the prefix of published files.
            let name = if part == Component::TextEncoder && !name.starts_with("text_model.") {
                format!("text_model.{name}")
            } else {
                name
            };
            let (stability, form) = table.to_stability(&name).unwrap();
            let name = format!("{}{stability}", part.prefix());
            let shape = data.shape().to_vec();
            let data = match form {
                Form::Linear if shape.len() == 2 => {
                    TensorData::new(data.try_into_vec::<f32>().unwrap(), [shape[0], shape[1], 1, 1])
                }
                Form::Same | Form::Linear => data,
                Form::Transposed => Tensor::<2>::from_data(data, &Device::flex()).swap_dims(0, 1).into_data(),
                Form::Third(third) => {
                    fused.entry(name).or_default()[third] = data.try_into_vec::<f32>().unwrap();
                    continue;
                }
            };
            made.insert(name, data);
        }
    }
    for (name, thirds) in fused {
        let (rows, all) = (3 * 64, thirds.concat());
        let columns = all.len() / rows;
        made.insert(
            name,
            if columns == 1 { TensorData::new(all, [rows]) } else { TensorData::new(all, [rows, columns]) },
        );
    }
    // Real files also contain these tensors.
    for unused in ["conditioner.embedders.1.model.logit_scale", "denoiser.sigmas", "alphas_cumprod", "model_ema.decay"]
    {
        made.insert(unused.into(), TensorData::from([1.0f32]));
    }
    let positions = TensorData::new((0..77).collect::<Vec<i64>>(), [1, 77]);
    made.insert("conditioner.embedders.0.transformer.text_model.embeddings.position_ids".into(), positions);
    made
}
