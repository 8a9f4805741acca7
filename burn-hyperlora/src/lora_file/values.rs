//! The bytes of float tensors as f32, and back.

use half::{bf16, f16};
use safetensors::Dtype;

/// The values of little-endian `bytes`; an error tells a type that is no float.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    Ok(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        other => return Err(format!("type {other}, expected F32, F16 or BF16")),
    })
}

/// The little-endian bytes of `values`; an error tells a type that is no float, and values that `dtype` cannot hold.
pub(crate) fn encode(dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, String> {
    let largest = match dtype {
        Dtype::F32 => f32::MAX,
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::BF16 => bf16::MAX.to_f32(),
        other => return Err(format!("type {other}, expected F32, F16 or BF16")),
    };
    if !values.iter().all(|value| value.abs() <= largest) {
        return Err(format!("leads to values that {dtype} cannot hold"));
    }
    Ok(match dtype {
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}
