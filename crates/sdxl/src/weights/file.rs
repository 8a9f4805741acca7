//! Safetensors file reader: the header is kept in memory, tensors are read from disk on demand.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hyperlora_core::paths::open_regular;
use hyperlora_core::{Error, Result};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};

use crate::weights::save::{ALIGNMENT, TensorEntry};
use crate::weights::values::is_fp8;

/// Size in bytes of the header length at the start of the file.
const LENGTH_BYTES: u64 = 8;

/// Header size limit of the format, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

/// Header key of the metadata.
const METADATA: &str = "__metadata__";

/// Maximum number of tensor axes, PyTorch's own limit.
const AXES_LIMIT: usize = 64;

/// Leading bytes of other file types that are mistaken for safetensors.
const IMPOSTORS: [(&[u8], &str); 10] = [
    (b"PK\x03\x04", "a PyTorch pickle (.bin, .ckpt, .pt)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"<!", "a web page"),
    (b"<h", "a web page"),
    (b"version ", "a Git LFS pointer, not the file it points to"),
    (b"GGUF", "a quantised GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
];

/// Last segments of keys that hold the scale of an 8-bit tensor, or mark a file that has such tensors: ComfyUI,
/// compressed-tensors and DeepSeek.
const FP8_SCALES: [&str; 8] = [
    "scaled_fp8",
    "comfy_quant",
    "scale_weight",
    "scale_input",
    "weight_scale",
    "input_scale",
    "weight_scale_inv",
    "weight_scale_2",
];

/// Metadata keys that hold a hash of the tensors: kohya's tools and Stability AI's.
pub const HASHES: [&str; 3] = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];

/// Number of axes that an error lists for a shape with too many.
const SHOWN_AXES: usize = 8;

/// A safetensors file with a consistent header, for reading tensors as stored. Models are built from
/// [`Weights`](crate::weights::Weights).
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: BTreeMap<String, String>,
    /// Tensor names in file order.
    order: Vec<String>,
    tensors: HashMap<String, TensorInfo>,
}

impl SafetensorsFile {
    /// Reads the header.
    ///
    /// # Errors
    /// Input: the file is missing, not a safetensors file (a pickle, a web page, a Git LFS pointer), has a header that
    /// contradicts itself or the file's length, or holds 8-bit floats with separate scales.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::read(path, source);
        let damaged =
            |problem: String| Error::file(path, problem, "fetch the file again: it is not a whole safetensors file");
        let file = open_regular(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();

        let mut start = vec![0; length.min(LENGTH_BYTES + 1) as usize];
        file.read_exact_at(&mut start, 0).map_err(read)?;
        let header_length = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let fits = header_length.is_some_and(|header| header <= HEADER_LIMIT.min(length - LENGTH_BYTES));
        // A header length may coincide with the leading bytes of another file type.
        let begins = fits && start.get(LENGTH_BYTES as usize) == Some(&b'{');
        if let Some((_, kind)) = IMPOSTORS.iter().find(|(magic, _)| !begins && start.starts_with(magic)) {
            return Err(Error::file(path, format!("is {kind}"), "give a .safetensors file"));
        }
        let Some(header_length) = header_length else {
            return Err(damaged(format!("ends after {length} bytes")));
        };
        if !fits {
            return Err(damaged(format!("claims a header of {header_length} bytes, the file has {length}")));
        }

        let mut header = vec![0; header_length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES).map_err(read)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|problem| damaged(format!("has an invalid header: {problem}")))?;
        if let Some((name, info)) = header.tensors().into_iter().find(|(_, info)| !can_be(&info.shape)) {
            let axes = &info.shape[..info.shape.len().min(SHOWN_AXES)];
            let count = info.shape.len();
            return Err(damaged(format!("has an invalid header: {name} of {count} axes, {axes:?}...")));
        }
        let data_start = LENGTH_BYTES + header_length;
        let expected = data_start.checked_add(header.data_len() as u64);
        if expected != Some(length) {
            return Err(damaged(format!(
                "has {} bytes of tensors, its header describes {}",
                length - data_start,
                header.data_len()
            )));
        }
        let names = header.tensors();
        let is_scale = |name: &&String| name.rsplit('.').next().is_some_and(|last| FP8_SCALES.contains(&last));
        if let Some(scale) = names.keys().find(is_scale)
            && names.values().any(|info| is_fp8(info.dtype))
        {
            return Err(Error::file(
                path,
                format!("holds 8-bit floats (fp8) with separate scales ({scale}), which are not supported"),
                "give the same model in bf16, f16 or f32, or in fp8 without scales",
            ));
        }
        Ok(Self {
            path: path.into(),
            file,
            data_start,
            metadata: header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
            order: header.offset_keys(),
            tensors: header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect(),
        })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata of the file (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Iterates over all tensors in file order.
    pub fn entries(&self) -> impl Iterator<Item = TensorEntry> {
        self.infos().map(|(name, info)| TensorEntry { name: name.into(), dtype: info.dtype, shape: info.shape.clone() })
    }

    /// Reads the bytes of a tensor, little-endian, row-major.
    ///
    /// # Errors
    /// Disk: a read fails; Fault: the name is not in [`entries`](Self::entries).
    pub fn read_raw(&self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        self.read_raw_range(name, 0..end - start)
    }

    /// Reads the bytes `range` of a tensor.
    ///
    /// # Errors
    /// Same as [`read_raw`](Self::read_raw); Fault: the range exceeds the tensor.
    pub fn read_raw_range(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        if range.start > range.end || range.end > end - start {
            let bytes = end - start;
            return Err(Error::Fault(format!("{}: {name} has {bytes} bytes, not {range:?}", self.path.display())));
        }
        let mut bytes = vec![0; range.len()];
        self.read_at(&mut bytes, start + range.start)?;
        Ok(bytes)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::Fault(format!("{} does not hold the requested tensor: {name}", self.path.display())))
    }

    /// Returns all bytes before the tensors, for a file with other values: the header length and the header without
    /// tensor hashes.
    pub(super) fn head(&self) -> Result<Vec<u8>> {
        let mut head = vec![0; self.data_start as usize];
        self.file.read_exact_at(&mut head, 0).map_err(|source| Error::read(&self.path, source))?;
        if !HASHES.iter().any(|key| self.metadata.contains_key(*key)) {
            return Ok(head);
        }
        let fault = |problem| Error::Fault(format!("{}: {problem}", self.path.display()));
        let mut header: Map<String, Value> = serde_json::from_slice(&head[LENGTH_BYTES as usize..]).map_err(fault)?;
        if let Some(metadata) = header.get_mut(METADATA).and_then(Value::as_object_mut) {
            metadata.retain(|key, _| !HASHES.contains(&key.as_str()));
        }
        let mut text = serde_json::to_vec(&header).map_err(fault)?;
        text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
        Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
    }

    pub(super) fn infos(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.order.iter().filter_map(|name| Some((name.as_str(), self.tensors.get(name)?)))
    }

    /// Fills `bytes` from `start`, relative to the first tensor.
    pub(super) fn read_at(&self, bytes: &mut [u8], start: usize) -> Result<()> {
        let start = self.data_start + start as u64;
        self.file.read_exact_at(bytes, start).map_err(|source| Error::read(&self.path, source))
    }
}

/// Returns true for a possible tensor shape. Axes of a tensor without elements are multiplied too, because slices of it
/// must not overflow.
fn can_be(shape: &[usize]) -> bool {
    let elements = shape.iter().filter(|&&axis| axis > 0).try_fold(1_usize, |count, &axis| count.checked_mul(axis));
    shape.len() <= AXES_LIMIT && elements.is_some_and(|count| count <= isize::MAX as usize / size_of::<f64>())
}
