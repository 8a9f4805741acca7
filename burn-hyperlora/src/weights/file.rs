//! One safetensors file: the header in memory, tensors read from the disk when asked for.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};

/// Bytes of the length that opens the file.
const LENGTH_BYTES: u64 = 8;

/// The format's own limit on the header, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

/// How other kinds of file that people take for safetensors begin.
const IMPOSTORS: [(&[u8], &str); 5] = [
    (b"PK\x03\x04", "a PyTorch pickle (.bin, .ckpt, .pt)"),
    (b"\x80\x02", "a Python pickle"),
    (b"<!", "a web page"),
    (b"<h", "a web page"),
    (b"version ", "a Git LFS pointer, not the file it points to"),
];

/// A file whose header has been read and found consistent.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    tensors: HashMap<String, TensorInfo>,
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::read(path, source);
        let damaged =
            |problem: String| Error::file(path, problem, "fetch the file again: it is not a whole safetensors file");
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();

        let mut start = vec![0; length.min(LENGTH_BYTES) as usize];
        file.read_exact_at(&mut start, 0).map_err(read)?;
        if let Some((_, kind)) = IMPOSTORS.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(Error::file(path, format!("is {kind}"), "give a .safetensors file"));
        }
        let Ok(start) = <[u8; LENGTH_BYTES as usize]>::try_from(start) else {
            return Err(damaged(format!("ends after {length} bytes")));
        };
        let header_length = u64::from_le_bytes(start);
        if header_length > HEADER_LIMIT.min(length - LENGTH_BYTES) {
            return Err(damaged(format!("claims a header of {header_length} bytes, the file has {length}")));
        }

        let mut header = vec![0; header_length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES).map_err(read)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|problem| damaged(format!("has a header that does not hold: {problem}")))?;
        let data_start = LENGTH_BYTES + header_length;
        let expected = data_start.checked_add(metadata.data_len() as u64);
        if expected != Some(length) {
            return Err(damaged(format!(
                "has {} bytes of tensors, its header tells of {}",
                length - data_start,
                metadata.data_len()
            )));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { path: path.into(), file, data_start, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info.shape.as_slice())).collect()
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
    }

    /// The values of a tensor; the inner error says why they are none that a model takes.
    pub(super) fn read(&self, name: &str) -> Result<std::result::Result<Vec<f32>, String>> {
        let Some(info) = self.tensors.get(name) else {
            return Ok(Err("missing".into()));
        };
        let elements = info.shape.iter().product();
        Ok(match info.dtype {
            Dtype::F32 => Ok(self.bytes_of::<f32>(info, elements)?),
            Dtype::F16 => Ok(self.bytes_of::<f16>(info, elements)?.to_f32_vec()),
            Dtype::BF16 => Ok(self.bytes_of::<bf16>(info, elements)?.to_f32_vec()),
            other => Err(format!("type {other}, expected F32, F16 or BF16")),
        })
    }

    fn bytes_of<T: bytemuck::Pod>(&self, info: &TensorInfo, elements: usize) -> Result<Vec<T>> {
        let mut values = bytemuck::zeroed_vec::<T>(elements);
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(&mut values), self.data_start + info.data_offsets.0 as u64)
            .map_err(|source| Error::read(&self.path, source))?;
        Ok(values)
    }
}
