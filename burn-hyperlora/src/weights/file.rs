//! One safetensors file: the header in memory, tensors read from the disk when asked for.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};
use crate::weights::save::TensorEntry;

/// Bytes of the length that opens the file.
const LENGTH_BYTES: u64 = 8;

/// The format's own limit on the header, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

/// The most axes of a tensor, PyTorch's own limit.
const AXES_LIMIT: usize = 64;

/// How other kinds of file that people take for safetensors begin.
const IMPOSTORS: [(&[u8], &str); 8] = [
    (b"PK\x03\x04", "a PyTorch pickle (.bin, .ckpt, .pt)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"<!", "a web page"),
    (b"<h", "a web page"),
    (b"version ", "a Git LFS pointer, not the file it points to"),
];

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
    /// header that does not agree with itself or the file's length.
    pub fn open(path: &Path) -> Result<Self> {
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

    /// Everything before the tensors: the header and its length.
    pub(super) fn head(&self) -> Result<Vec<u8>> {
        let mut head = vec![0; self.data_start as usize];
        self.file.read_exact_at(&mut head, 0).map_err(|source| Error::read(&self.path, source))?;
        Ok(head)
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
