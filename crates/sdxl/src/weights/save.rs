//! Writes safetensors deterministically: the same tensors give the same bytes.

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

/// Alignment of the first tensor, in bytes.
pub(super) const ALIGNMENT: usize = 8;

/// Bits per byte; tensor offsets in a file are in bytes.
const BYTE: usize = 8;

/// Header entry of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Key of the tensor.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Axis lengths; the last axis is contiguous.
    pub shape: Vec<usize>,
}

#[derive(Serialize)]
struct Header<'a> {
    __metadata__: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
}

impl TensorEntry {
    /// Creates the entry of a tensor in memory.
    ///
    /// # Errors
    /// Fault: safetensors files do not support the element type.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Ok(Self { name: name.into(), dtype: file_dtype(dtype)?, shape: shape.into() })
    }

    /// Size of the data in bytes; `None` on overflow or if the last byte would be incomplete.
    fn bytes(&self) -> Option<usize> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |size, &axis| size.checked_mul(axis))?;
        bits.is_multiple_of(BYTE).then_some(bits / BYTE)
    }
}

/// Writes `tensors` to `path` atomically, sorted by element size (widest first, which keeps all aligned) and name.
///
/// # Errors
/// Input: the path is not writable; Disk: the disk is full or failing; Fault: two tensors share a name, or safetensors
/// files do not support an element type.
///
/// # Examples
/// ```
/// use burn::tensor::TensorData;
/// use hyperlora_sdxl::weights::{SafetensorsFile, save};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let path = folder.join("model.safetensors");
/// save(&path, [("proj.weight".into(), TensorData::from([[1.0_f32, 2.0], [3.0, 4.0]]))])?;
/// let file = SafetensorsFile::open(&path)?;
/// let shapes: Vec<_> = file.entries().map(|entry| (entry.name, entry.shape)).collect();
/// assert_eq!(shapes, [("proj.weight".to_string(), vec![2, 2])]);
/// assert_eq!(file.read_raw("proj.weight")?.len(), 16);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn save(path: &Path, tensors: impl IntoIterator<Item = (String, TensorData)>) -> Result<()> {
    save_with_metadata(path, BTreeMap::new(), tensors)
}

/// Writes tensors like [`save`], with entries for the file's metadata.
///
/// # Errors
/// Same as [`save`].
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

/// Writes tensors like [`save_with_metadata`], producing them during the write: `produce` is called once for each
/// entry, in file order, and only one tensor's bytes are in memory at a time.
///
/// # Errors
/// Same as [`save`]; errors of `produce`; Fault: it returns another number of bytes than the entry specifies. On any
/// error, the previous file at `path` stays intact.
pub fn save_lazily<B: Deref<Target = [u8]>>(
    path: &Path,
    metadata: BTreeMap<String, String>,
    mut entries: Vec<TensorEntry>,
    mut produce: impl FnMut(&TensorEntry) -> Result<B>,
) -> Result<()> {
    entries.sort_by(|a, b| (Reverse(a.dtype.bitsize()), &a.name).cmp(&(Reverse(b.dtype.bitsize()), &b.name)));
    let header = header(path, metadata, &entries)?;

    // Errors of the disk and of `produce` are kept apart, because only the former are write errors.
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

/// Copies a tensor's bytes from its device; `name` is for the message.
///
/// # Errors
/// Fault: the device fails.
pub fn bytes_of<const D: usize>(tensor: Tensor<D>, name: &str) -> Result<Bytes> {
    data_of(tensor, name).map(TensorData::into_bytes)
}

/// Copies a tensor to host memory; `name` is for the message.
///
/// # Errors
/// Fault: the device fails.
pub fn data_of<const D: usize>(tensor: Tensor<D>, name: &str) -> Result<TensorData> {
    let fault = |error| Error::Fault(format!("{name} cannot be read from its device: {error}"));
    tensor.try_into_data().map_err(fault)
}

/// Records the error and returns one that aborts the write.
pub(super) fn stop(failure: &mut Option<Error>, error: Error) -> io::Error {
    *failure = Some(error);
    io::Error::other("a tensor could not be made")
}

/// Builds the padded header of a file with `entries` in this order.
fn header(path: &Path, mut metadata: BTreeMap<String, String>, entries: &[TensorEntry]) -> Result<Vec<u8>> {
    let mut end: usize = 0;
    let mut tensors = BTreeMap::new();
    for entry in entries {
        let start = end;
        end = entry.bytes().and_then(|bytes| start.checked_add(bytes)).ok_or_else(|| {
            Error::Fault(format!("{}: {} of {:?} does not fit into a file", path.display(), entry.name, entry.shape))
        })?;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) };
        if tensors.insert(entry.name.as_str(), info).is_some() {
            return Err(two_of(path, &entry.name));
        }
    }
    // PyTorch's readers require this entry.
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
