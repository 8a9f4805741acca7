//! Unsharded files of a folder, whether one rank or several wrote it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Device, TensorData};
use hyperlora_core::files::copy;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::weights::{self, SafetensorsFile, TensorEntry, Weights};
use safetensors::Dtype;

use super::{BASE_RESAMPLER, MODULES_JSON, file, stems, weights_of};

/// A file of a released folder, to be written unsharded.
#[derive(Debug)]
pub struct WholeFile {
    /// Name of the file in the folder.
    pub name: String,
    folder: PathBuf,
    /// Stem, if the file is sharded.
    divided: Option<&'static str>,
}

/// Lists the files of the released folder `folder`, as a single process would write them.
pub fn whole_files(folder: &Path) -> impl Iterator<Item = WholeFile> {
    let of = |name: String, divided| WholeFile { name, folder: folder.into(), divided };
    let modules = of(MODULES_JSON.into(), None);
    let has_base = file(folder, BASE_RESAMPLER).is_file();
    let tensors = stems(has_base).map(move |stem| {
        let divided = weights_of(folder, stem) != file(folder, stem);
        of(format!("{stem}.safetensors"), divided.then_some(stem))
    });
    [modules].into_iter().chain(tensors)
}

impl WholeFile {
    /// Writes the file to `path` with its tensors unchanged. One tensor is in memory at a time.
    ///
    /// # Errors
    /// Input: files are missing or broken, or the path is not writable; Disk: the disk is full or failing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let Some(stem) = self.divided else {
            return copy(&self.folder.join(&self.name), path);
        };
        let stored = Stored::open(&self.folder, stem)?;
        weights::save_lazily(path, BTreeMap::new(), stored.entries().cloned().collect(), |entry| {
            stored.read_raw(&entry.name)
        })
    }
}

/// Tensors of a file, or of its shards, as stored.
pub(super) struct Stored(BTreeMap<String, (Arc<SafetensorsFile>, TensorEntry)>);

impl Stored {
    /// Opens the file by reading headers only.
    pub(super) fn open(folder: &Path, stem: &str) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for path in Weights::open(&weights_of(folder, stem), &Device::flex())?.files() {
            let file = Arc::new(SafetensorsFile::open(path)?);
            tensors.extend(file.entries().map(|entry| (entry.name.clone(), (file.clone(), entry))));
        }
        Ok(Self(tensors))
    }

    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| wanted(name));
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &TensorEntry> {
        self.0.values().map(|(_, entry)| entry)
    }

    fn read_raw(&self, name: &str) -> Result<Vec<u8>> {
        self.of(name)?.0.read_raw(name)
    }

    /// Path of the file that holds a tensor.
    pub(super) fn path_of(&self, name: &str) -> Result<&Path> {
        Ok(self.of(name)?.0.path())
    }

    /// Reads a tensor in its stored float type.
    pub(super) fn floats(&self, name: &str) -> Result<TensorData> {
        let (file, entry) = self.of(name)?;
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let place = format!("{}: {name}", file.path().display());
                return Err(Error::input(place, format!("has the type {other}"), "give a file of F32, F16 or BF16"));
            }
        };
        Ok(TensorData::from_bytes_vec(file.read_raw(name)?, entry.shape.clone(), dtype))
    }

    fn of(&self, name: &str) -> Result<&(Arc<SafetensorsFile>, TensorEntry)> {
        self.0.get(name).ok_or_else(|| Error::Fault(format!("no tensor is named {name}")))
    }
}
