//! Optimiser moments in a checkpoint: one file per rank that wrote it, readable at any world size.
//!
//! The file is `optimizer.safetensors`, or `optimizer-00001-of-00004.safetensors` and so on, which is the name that
//! diffusers gives to sharded weights. Each file holds pieces of flat f32 tensors; the pieces of one name, in file
//! order, are the whole tensor.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::weights::{self, SafetensorsFile, TensorEntry, shard_name};
use safetensors::Dtype;

use crate::checkpoint::Checkpoint;

/// Size of an f32, in bytes.
const NUMBER: usize = 4;

/// Moments in a checkpoint. Only the headers are in memory.
pub struct MomentFiles {
    files: Vec<SafetensorsFile>,
    /// Pieces by tensor: file index and number of elements of each.
    pieces: BTreeMap<String, Vec<(usize, usize)>>,
}

/// Returns the file name of rank `part` of `parts`.
pub fn file_name(part: usize, parts: usize) -> String {
    shard_name("optimizer", part, parts)
}

/// Returns whether a checkpoint's file of this name holds moments.
pub(super) fn is_moments(name: &str) -> bool {
    name.starts_with("optimizer") && name.ends_with(".safetensors")
}

/// Lists the moment files in a checkpoint, in the order of the ranks that wrote them.
///
/// # Errors
/// Input: a folder that cannot be read; Disk: a failing disk.
pub fn files(checkpoint: &Checkpoint) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::read(checkpoint.path(), source);
    let mut names = Vec::new();
    for entry in fs::read_dir(checkpoint.path()).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string().ok().filter(|name| is_moments(name)));
    }
    names.sort();
    Ok(names.into_iter().map(|name| checkpoint.path().join(name)).collect())
}

impl MomentFiles {
    /// Opens the moments of a verified checkpoint.
    ///
    /// # Errors
    /// Input: files that are missing or hold something else; Disk: a failing disk.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let files: Vec<SafetensorsFile> =
            files(checkpoint)?.iter().map(|path| SafetensorsFile::open(path)).collect::<Result<_>>()?;
        let mut pieces: BTreeMap<String, Vec<(usize, usize)>> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for TensorEntry { name, dtype, shape } in file.entries() {
                let (&[length], Dtype::F32) = (&shape[..], dtype) else {
                    let place = format!("{}: {name}", file.path().display());
                    let problem = format!("is {dtype:?} {shape:?}, moments are flat and F32");
                    return Err(Error::input(place, problem, "resume from another checkpoint"));
                };
                pieces.entry(name).or_default().push((index, length));
            }
        }
        Ok(Self { files, pieces })
    }

    /// Returns the number of elements of each tensor.
    pub fn lengths(&self) -> BTreeMap<&str, usize> {
        let whole = |pieces: &[(usize, usize)]| pieces.iter().map(|(_, length)| length).sum();
        self.pieces.iter().map(|(name, pieces)| (name.as_str(), whole(pieces))).collect()
    }

    /// Reads the elements `range` of a tensor, little-endian.
    ///
    /// # Errors
    /// Disk: reading fails.
    pub fn read_raw(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(range.len() * NUMBER);
        let mut start = 0;
        for &(file, length) in self.pieces.get(name).into_iter().flatten() {
            let (from, to) = (range.start.max(start), range.end.min(start + length));
            if from < to {
                let within = (from - start) * NUMBER..(to - start) * NUMBER;
                bytes.extend(self.files[file].read_raw_range(name, within)?);
            }
            start += length;
        }
        Ok(bytes)
    }

    /// Reads the elements `range` of a tensor as f32 data.
    ///
    /// # Errors
    /// Same as [`read_raw`](Self::read_raw).
    pub fn read(&self, name: &str, range: Range<usize>) -> Result<TensorData> {
        let length = range.len();
        Ok(TensorData::from_bytes_vec(self.read_raw(name, range)?, [length], DType::F32))
    }

    /// Writes all moments as one file.
    ///
    /// # Errors
    /// Same as [`read_raw`](Self::read_raw); Input or Disk: a place or disk that cannot be written to.
    pub fn write_whole(&self, path: &Path) -> Result<()> {
        let lengths = self.lengths();
        let entries = lengths.iter().map(|(name, length)| TensorEntry::new(*name, DType::F32, [*length]));
        weights::save_lazily(path, BTreeMap::new(), entries.collect::<Result<_>>()?, |entry| {
            self.read_raw(&entry.name, 0..entry.shape.iter().product())
        })
    }
}
