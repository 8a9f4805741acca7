//! Converts tensor bytes to f32 and back.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};
use safetensors::Dtype;

/// Decodes little-endian `bytes`. The error reports a type that is not a float.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    let size = float_size(dtype)?;
    let mut values = vec![0.0; bytes.len() / size];
    decode_into(dtype, bytes, &mut values)?;
    Ok(values)
}

/// Decodes like [`decode`] into `values`, which must have as many elements as `bytes`.
pub(super) fn decode_into(dtype: Dtype, bytes: &[u8], values: &mut [f32]) -> Result<(), String> {
    match dtype {
        Dtype::F64 => each(bytes, values, |bytes| f64::from_le_bytes(bytes) as f32),
        Dtype::F32 => each(bytes, values, f32::from_le_bytes),
        Dtype::F16 => each(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => each(bytes, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F8_E4M3 => each(bytes, values, |[bits]| F8E4M3::from_bits(bits).to_f32()),
        Dtype::F8_E5M2 => each(bytes, values, |[bits]| F8E5M2::from_bits(bits).to_f32()),
        other => return Err(no_float(other)),
    }
    Ok(())
}

fn each<const N: usize>(bytes: &[u8], values: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    values.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, &bytes)| *value = convert(bytes));
}

/// Element size in bytes of a supported float type. The error reports any other type.
pub(super) fn float_size(dtype: Dtype) -> Result<usize, String> {
    Ok(match dtype {
        Dtype::F64 => 8,
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => 1,
        other => return Err(no_float(other)),
    })
}

fn no_float(dtype: Dtype) -> String {
    format!("type {dtype}, which is not read: F64, F32, F16, BF16, F8_E4M3 and F8_E5M2 are")
}

/// Returns true for fp8, whose quantised values may need a separate scale.
pub(super) fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// Decodes a tensor of one element, float or integer. The error reports what it holds instead.
pub(crate) fn number(dtype: Dtype, bytes: &[u8]) -> Result<f32, String> {
    fn one<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
        bytes.try_into().ok()
    }
    let integer = match dtype {
        Dtype::I64 => one(bytes).map(|bytes| i64::from_le_bytes(bytes) as f32),
        Dtype::U64 => one(bytes).map(|bytes| u64::from_le_bytes(bytes) as f32),
        Dtype::I32 => one(bytes).map(|bytes| i32::from_le_bytes(bytes) as f32),
        Dtype::U32 => one(bytes).map(|bytes| u32::from_le_bytes(bytes) as f32),
        Dtype::I16 => one(bytes).map(|bytes| i16::from_le_bytes(bytes).into()),
        Dtype::U16 => one(bytes).map(|bytes| u16::from_le_bytes(bytes).into()),
        Dtype::I8 => one(bytes).map(|bytes| i8::from_le_bytes(bytes).into()),
        Dtype::U8 => one(bytes).map(|bytes| u8::from_le_bytes(bytes).into()),
        _ => None,
    };
    let values = match integer {
        Some(number) => vec![number],
        None => decode(dtype, bytes)?,
    };
    match values.as_slice() {
        [number] if number.is_finite() => Ok(*number),
        [number] => Err(format!("is {number}, not a finite number")),
        values => Err(format!("holds {} numbers, one is needed", values.len())),
    }
}

/// Encodes `values` as little-endian bytes. The error reports a type that is not a float, or values that `dtype` cannot
/// hold.
pub(crate) fn encode(dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, String> {
    let largest = match dtype {
        Dtype::F64 | Dtype::F32 => f32::MAX,
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::BF16 => bf16::MAX.to_f32(),
        Dtype::F8_E4M3 => 448.0,
        Dtype::F8_E5M2 => 57344.0,
        other => return Err(no_float(other)),
    };
    if !values.iter().all(|value| value.abs() <= largest) {
        return Err(format!("leads to values that {dtype} cannot hold"));
    }
    Ok(match dtype {
        Dtype::F64 => values.iter().flat_map(|&value| f64::from(value).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F8_E4M3 => values.iter().map(|&value| F8E4M3::from_f32(value).to_bits()).collect(),
        Dtype::F8_E5M2 => values.iter().map(|&value| F8E5M2::from_f32(value).to_bits()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_is_what_its_bits_say() {
        // Sign, exponent and mantissa by the formats' definitions: 1, -1.5, the largest, the smallest, 0.
        let four_three = decode(Dtype::F8_E4M3, &[0x38, 0xbc, 0x7e, 0x01, 0x80]);
        assert_eq!(four_three, Ok(vec![1.0, -1.5, 448.0, 1.0 / 512.0, -0.0]));
        let five_two = decode(Dtype::F8_E5M2, &[0x3c, 0xbe, 0x7b, 0x01, 0x00]);
        assert_eq!(five_two, Ok(vec![1.0, -1.5, 57344.0, 1.0 / 65536.0, 0.0]));
        for dtype in [Dtype::F8_E4M3, Dtype::F8_E5M2] {
            let finite: Vec<u8> = (0..=u8::MAX)
                .filter(|&bits| decode(dtype, &[bits]).is_ok_and(|values| values[0].is_finite()))
                .collect();
            assert!(finite.len() > 240, "{dtype}: {}", finite.len());
            let values = decode(dtype, &finite).unwrap_or_default();
            assert_eq!(encode(dtype, &values), Ok(finite), "{dtype}");
        }
        assert!(encode(Dtype::F8_E4M3, &[449.0]).is_err() && encode(Dtype::F8_E5M2, &[f32::NAN]).is_err());
    }

    #[test]
    fn a_number_may_be_of_any_type() {
        assert_eq!(number(Dtype::I64, &4_i64.to_le_bytes()), Ok(4.0));
        assert_eq!(number(Dtype::U64, &4_u64.to_le_bytes()), Ok(4.0));
        assert_eq!(number(Dtype::I32, &(-4_i32).to_le_bytes()), Ok(-4.0));
        assert_eq!(number(Dtype::U32, &4_u32.to_le_bytes()), Ok(4.0));
        assert_eq!(number(Dtype::I16, &(-4_i16).to_le_bytes()), Ok(-4.0));
        assert_eq!(number(Dtype::U16, &4_u16.to_le_bytes()), Ok(4.0));
        assert_eq!(number(Dtype::U8, &[200]), Ok(200.0));
        assert_eq!(number(Dtype::I8, &[200]), Ok(-56.0));
        assert_eq!(number(Dtype::F64, &0.5_f64.to_le_bytes()), Ok(0.5));
        assert_eq!(number(Dtype::F8_E4M3, &[0x38]), Ok(1.0));
        for (dtype, bytes, problem) in [
            (Dtype::F64, f64::MAX.to_le_bytes().to_vec(), "is inf"),
            (Dtype::F32, f32::NAN.to_le_bytes().to_vec(), "is NaN"),
            (Dtype::F32, vec![0; 8], "holds 2 numbers"),
            (Dtype::I64, vec![0; 16], "type I64"),
            (Dtype::F32, vec![], "holds 0 numbers"),
            (Dtype::BOOL, vec![1], "type BOOL"),
        ] {
            assert!(number(dtype, &bytes).is_err_and(|told| told.contains(problem)), "{dtype}: {problem}");
        }
    }
}
