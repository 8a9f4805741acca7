//! Writing safetensors: the same tensors give the same bytes.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::ops::Deref;
use std::path::Path;

use burn::tensor::{Bytes, DType, Tensor, TensorData};
use hyperlora_core::files::write_whole_with;
use hyperlora_core::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Serialize;

/// The alignment of the first tensor, in bytes.
pub(super) const ALIGNMENT: usize = 8;

/// Bits of a byte, the unit of a tensor's place in a file.
const BYTE: usize = 8;

/// What a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its key.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its axes, the last one dense.
    pub shape: Vec<usize>,
}

#[derive(Serialize)]
struct Header<'a> {
    __metadata__: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
}

impl TensorEntry {
    /// The entry of a tensor in memory.
    ///
    /// # Errors
    /// Fault for an element type that safetensors files do not hold.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Ok(Self { name: name.into(), dtype: file_dtype(dtype)?, shape: shape.into() })
    }

    /// Bytes of its data; `None` for more than there can be, or where they do not end on a whole byte.
    fn bytes(&self) -> Option<usize> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |size, &axis| size.checked_mul(axis))?;
        bits.is_multiple_of(BYTE).then_some(bits / BYTE)
    }
}

/// Writes `tensors` to `path` in one piece, sorted by element size (widest first, which keeps all aligned) and name.
///
/// # Errors
/// Input for a place that cannot be written to, Disk for a full or failing disk, Fault for two tensors of one name or
/// an element type that safetensors files do not hold.
pub fn save(path: &Path, tensors: impl IntoIterator<Item = (String, TensorData)>) -> Result<()> {
    save_with_metadata(path, BTreeMap::new(), tensors)
}

/// [`save`] with entries for the file's metadata.
///
/// # Errors
/// As [`save`].
pub fn save_with_metadata(
    path: &Path,
    metadata: BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = (String, TensorData)>,
) -> Result<()> {
    let mut entries = Vec::new();
    let mut by_name = BTreeMap::new();
    for (name, data) in tensors {
        entries.push(TensorEntry::new(&name, data.dtype(), data.shape().to_vec())?);
        by_name.insert(name, data);
    }
    save_lazily(path, metadata, entries, |entry| {
        by_name.remove(&entry.name).map(TensorData::into_bytes).ok_or_else(|| two_of(path, &entry.name))
    })
}

/// [`save_with_metadata`] for tensors that are made while they are written: `produce` is asked once for the bytes of
/// each entry, in the order of the file, and only one tensor's bytes are in memory at a time.
///
/// # Errors
/// As [`save`]; those of `produce`; Fault where it gives another number of bytes than the entry tells. Whatever fails,
/// the file that stood at `path` is intact.
pub fn save_lazily<B: Deref<Target = [u8]>>(
    path: &Path,
    metadata: BTreeMap<String, String>,
    mut entries: Vec<TensorEntry>,
    mut produce: impl FnMut(&TensorEntry) -> Result<B>,
) -> Result<()> {
    entries.sort_by(|a, b| (Reverse(a.dtype.bitsize()), &a.name).cmp(&(Reverse(b.dtype.bitsize()), &b.name)));
    let header = header(path, metadata, &entries)?;

    // What the disk reports is told apart from what `produce` reports: only the first is an error of writing.
    let mut failure = None;
    let written = write_whole_with(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for entry in &entries {
            let bytes = produce(entry).map_err(|error| stop(&mut failure, error))?;
            if Some(bytes.len()) != entry.bytes() {
                let counts = format!("{} is given as {} bytes, {:?} expected", entry.name, bytes.len(), entry.bytes());
                return Err(stop(&mut failure, Error::Fault(format!("{}: {counts}", path.display()))));
            }
            out.write_all(&bytes)?;
        }
        out.flush()
    });
    failure.map_or(written, Err)
}

/// The bytes of a tensor, fetched from its device; `name` is for the message.
///
/// # Errors
/// Fault when the device fails.
pub fn bytes_of<const D: usize>(tensor: Tensor<D>, name: &str) -> Result<Bytes> {
    data_of(tensor, name).map(TensorData::into_bytes)
}

/// A tensor copied to host memory; `name` is for the message.
///
/// # Errors
/// Fault when the device fails.
pub fn data_of<const D: usize>(tensor: Tensor<D>, name: &str) -> Result<TensorData> {
    let fault = |error| Error::Fault(format!("{name} cannot be read from its device: {error}"));
    tensor.try_into_data().map_err(fault)
}

/// Notes why the writing ends, and ends it.
pub(super) fn stop(failure: &mut Option<Error>, error: Error) -> io::Error {
    *failure = Some(error);
    io::Error::other("a tensor could not be made")
}

/// The header of a file with `entries` in this order, padded.
fn header(path: &Path, mut metadata: BTreeMap<String, String>, entries: &[TensorEntry]) -> Result<Vec<u8>> {
    let mut end: usize = 0;
    let mut tensors = BTreeMap::new();
    for entry in entries {
        let start = end;
        end = entry.bytes().and_then(|bytes| start.checked_add(bytes)).ok_or_else(|| {
            Error::Fault(format!("{}: {} of {:?} fits no file", path.display(), entry.name, entry.shape))
        })?;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) };
        if tensors.insert(entry.name.as_str(), info).is_some() {
            return Err(two_of(path, &entry.name));
        }
    }
    // PyTorch's readers look for this entry.
    metadata.insert("format".into(), "pt".into());
    let header = Header { __metadata__: metadata, tensors };
    let mut header =
        serde_json::to_vec(&header).map_err(|problem| Error::Fault(format!("safetensors header: {problem}")))?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    Ok(header)
}

fn two_of(path: &Path, name: &str) -> Error {
    Error::Fault(format!("two tensors named {name} for {}", path.display()))
}

fn file_dtype(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
        other => return Err(Error::Fault(format!("safetensors files do not hold {other:?}"))),
    })
}
