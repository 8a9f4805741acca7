//! One safetensors file: the header in memory, tensors read from the disk when asked for.

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

/// Bytes of the length that opens the file.
const LENGTH_BYTES: u64 = 8;

/// The format's own limit on the header, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

/// The key of the header beside those of tensors.
const METADATA: &str = "__metadata__";

/// The most axes of a tensor, PyTorch's own limit.
const AXES_LIMIT: usize = 64;

/// How other kinds of file that people take for safetensors begin.
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

/// What the last part of a key is called that holds the scale of an 8-bit tensor, or tells that there are such: ComfyUI's,
/// and those of compressed-tensors and DeepSeek.
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

/// Keys of the metadata that tell a hash of the tensors: kohya's tools and Stability's.
pub const HASHES: [&str; 3] = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];

/// How many of a shape's axes an error spells out where there are too many.
const SHOWN_AXES: usize = 8;

/// A safetensors file whose header has been read and found consistent; for reading what a file holds as it is.
/// [`Weights`](crate::weights::Weights) is for building models.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: BTreeMap<String, String>,
    /// Names by the place of their tensors in the file.
    order: Vec<String>,
    tensors: HashMap<String, TensorInfo>,
}

impl SafetensorsFile {
    /// Reads the header.
    ///
    /// # Errors
    /// Input for a missing file, a file that is no safetensors file (a pickle, a web page, a Git LFS pointer), and a
    /// header that does not agree with itself or the file's length; and for 8-bit floats with scales of their own.
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
        // A header may be as long as the number is that another kind of file begins with.
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
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|problem| damaged(format!("has a header that does not hold: {problem}")))?;
        if let Some((name, info)) = header.tensors().into_iter().find(|(_, info)| !can_be(&info.shape)) {
            let axes = &info.shape[..info.shape.len().min(SHOWN_AXES)];
            let count = info.shape.len();
            return Err(damaged(format!("has a header that does not hold: {name} of {count} axes, {axes:?}...")));
        }
        let data_start = LENGTH_BYTES + header_length;
        let expected = data_start.checked_add(header.data_len() as u64);
        if expected != Some(length) {
            return Err(damaged(format!(
                "has {} bytes of tensors, its header tells of {}",
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
                format!("holds 8-bit floats (fp8) with scales of their own ({scale}), which are not read"),
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

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's own `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Every tensor, in the order in which they lie in the file.
    pub fn entries(&self) -> impl Iterator<Item = TensorEntry> {
        self.infos().map(|(name, info)| TensorEntry { name: name.into(), dtype: info.dtype, shape: info.shape.clone() })
    }

    /// The bytes of a tensor, little-endian, rows first.
    ///
    /// # Errors
    /// Disk when reading fails, Fault for a name that [`entries`](Self::entries) does not tell.
    pub fn read_raw(&self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        self.read_raw_range(name, 0..end - start)
    }

    /// The bytes `range` of a tensor.
    ///
    /// # Errors
    /// As [`read_raw`](Self::read_raw); Fault for a range that the tensor does not have.
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
        self.tensors.get(name).ok_or_else(|| {
            Error::Fault(format!("{} was asked for a tensor that it does not hold: {name}", self.path.display()))
        })
    }

    /// Everything before the tensors, for a file of other values: the length of the header, and the header without hashes
    /// of the tensors.
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

    /// Fills `bytes` from `start`, counted from where the tensors begin.
    pub(super) fn read_at(&self, bytes: &mut [u8], start: usize) -> Result<()> {
        let start = self.data_start + start as u64;
        self.file.read_exact_at(bytes, start).map_err(|source| Error::read(&self.path, source))
    }
}

/// Whether a tensor can have this shape: parts of one without elements are counted as well, and must not overflow.
fn can_be(shape: &[usize]) -> bool {
    let elements = shape.iter().filter(|&&axis| axis > 0).try_fold(1_usize, |count, &axis| count.checked_mul(axis));
    shape.len() <= AXES_LIMIT && elements.is_some_and(|count| count <= isize::MAX as usize / size_of::<f64>())
}
