//! Named tensors in safetensors files: read one at a time, checked as a whole, written in a fixed order.
//!
//! A model is built by requesting layers from [`WeightsAt`] with the shapes of its config. Missing or misshaped tensors
//! become zeros that take no memory and are recorded; [`Weights::finish`] then reports all of them in one error.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use serde::de::DeserializeOwned;

use crate::weights::place::Place;

mod file;
mod files;
mod json;
mod layers;
mod output_name;
mod place;
mod rewrite;
mod save;
mod update;
pub(crate) mod values;

pub use file::{HASHES, SafetensorsFile};
pub use files::{ShardIndex, has_variant, index_name, shard_name, weights_in};
pub use json::{parse_json, read_text};
pub use layers::WeightsAt;
pub use output_name::check_name;
pub use place::Form;
pub(crate) use place::ReadError;
pub use rewrite::rewrite;
pub use save::{TensorEntry, bytes_of, data_of, save, save_lazily, save_with_metadata};
pub(crate) use update::transposed;
pub use update::{LowRank, Updates};

/// Number of problems that one error lists.
const PROBLEMS_SHOWN: usize = 10;

/// Reads `config.json` of a model folder.
///
/// # Errors
/// Input, with line and column: the file is missing, its JSON is broken, or `T` rejects a value.
pub fn config<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    ConfigText::read(&folder.join("config.json"))?.parse()
}

/// A JSON config and its origin.
#[derive(Debug, Clone)]
pub struct ConfigText {
    place: PathBuf,
    text: String,
}

impl ConfigText {
    /// Reads a config file.
    ///
    /// # Errors
    /// Same as [`read_text`].
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self { place: path.into(), text: read_text(path)? })
    }

    /// Wraps a built-in config; messages call it `place`.
    pub fn built_in(place: &str, text: impl Into<String>) -> Self {
        Self { place: format!("{place} (built in)").into(), text: text.into() }
    }

    /// Returns another text with the same origin.
    #[must_use]
    pub fn with_text(&self, text: impl Into<String>) -> Self {
        Self { place: self.place.clone(), text: text.into() }
    }

    /// Origin for messages.
    pub fn origin(&self) -> &Path {
        &self.place
    }

    /// JSON text of the config.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Parses the config with [`parse_json`].
    ///
    /// # Errors
    /// Input, with line and column: the JSON is broken, or `T` rejects a value.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        parse_json(&self.text).map_err(|problem| {
            Error::file(self.origin(), problem, "use the config that belongs to these weights, in diffusers layout")
        })
    }
}

/// Tensors of one model on disk, with a record of what the model requested.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, TensorData};
/// use hyperlora_sdxl::weights::{Weights, save};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let path = folder.join("model.safetensors");
/// save(&path, [("proj.weight".into(), TensorData::from([[1.0_f32, 2.0, 3.0]]))])?;
/// let weights = Weights::open(&path, &Device::flex())?;
/// let proj = weights.at("proj").linear(3, 1, false);
/// assert_eq!(proj.weight.dims(), [3, 1]);
/// // Reports every tensor that is missing, misshaped or left over.
/// weights.finish()?;
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    places: BTreeMap<String, Place>,
    device: Device,
    dtype: FloatDType,
    updates: Updates,
    record: RefCell<Record>,
}

/// Record of a model's requests.
#[derive(Debug, Default)]
struct Record {
    asked: BTreeSet<String>,
    problems: Vec<String>,
    /// At least one requested tensor has an unsupported type.
    mistyped: bool,
    failure: Option<Error>,
}

impl Weights {
    /// Opens a safetensors file, an index of shards (`.safetensors.index.json`), or the file that [`weights_in`] finds
    /// in a model folder. Tensors are loaded to `device` in f32, whatever float type the file holds. Only headers are
    /// read here.
    ///
    /// # Errors
    /// Input: a file is missing or not a safetensors file (a pickle, a web page, a Git LFS pointer), a header
    /// contradicts the file's length, a shard is missing, or the index does not fit its shards.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        Self::open_variant(path, None, device)
    }

    /// Opens weights like [`open`](Self::open), but prefers a variant's files, such as fp16, in a model folder.
    ///
    /// # Errors
    /// Same as [`open`](Self::open).
    pub fn open_variant(path: &Path, variant: Option<&str>, device: &Device) -> Result<Self> {
        let path = if path.is_dir() { weights_in(path, variant)? } else { path.to_path_buf() };
        Ok(Self::new(files::places(&path)?, path, device))
    }

    /// Opens the tensors of `file` under other names. `rename` maps each key to names and transforms.
    pub fn renamed(file: &Arc<SafetensorsFile>, rename: impl Fn(&str) -> Vec<(String, Form)>, device: &Device) -> Self {
        let places = file.infos().flat_map(|(key, info)| {
            let place = Place::new(file, info);
            rename(key).into_iter().map(move |(name, form)| (name, place.formed(form)))
        });
        Self::new(places.collect(), file.path().to_path_buf(), device)
    }

    /// Creates weights from names and shapes only, to check or count what a model requests. Their tensors are zeros
    /// that take no memory.
    pub fn without_data(shapes: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let places = shapes.into_iter().map(|(name, shape)| (name, Place::without_data(shape)));
        Self::new(places.collect(), PathBuf::new(), &Device::flex())
    }

    fn new(places: BTreeMap<String, Place>, path: PathBuf, device: &Device) -> Self {
        Self {
            path,
            places,
            device: device.clone(),
            dtype: FloatDType::F32,
            updates: Updates::new(),
            record: RefCell::default(),
        }
    }

    /// Loads tensors as `dtype` instead of f32.
    #[must_use]
    pub fn with_dtype(self, dtype: FloatDType) -> Self {
        Self { dtype, ..self }
    }

    /// Type that tensors are loaded as.
    pub fn dtype(&self) -> FloatDType {
        self.dtype
    }

    /// Adds updates that are applied to the tensors as they are read, in f32 and before rounding.
    #[must_use]
    pub fn with_updates(self, updates: Updates) -> Self {
        Self { updates, ..self }
    }

    /// Path of the file or shard index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Paths of all files that hold tensors.
    pub fn files(&self) -> BTreeSet<&Path> {
        self.places.values().filter_map(Place::file).collect()
    }

    /// Name and shape of every tensor, sorted by name.
    pub fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.places.iter().map(|(name, place)| (name.as_str(), place.shape())).collect()
    }

    /// Finishes loading and reports all problems.
    ///
    /// # Errors
    /// Input: keys are missing, misshaped, mistyped or unexpected (counts all, lists the first ten); Disk: a read
    /// failed.
    pub fn finish(self) -> Result<()> {
        let Record { asked, mut problems, mistyped, failure } = self.record.into_inner();
        if let Some(failure) = failure {
            return Err(failure);
        }
        let unexpected = self.places.keys().filter(|&name| !asked.contains(name));
        problems.extend(unexpected.map(|name| format!("{name}: not a part of this model")));
        if problems.is_empty() {
            return Ok(());
        }
        let count = problems.len();
        problems.truncate(PROBLEMS_SHOWN);
        if count > PROBLEMS_SHOWN {
            problems.push(format!("and {} more", count - PROBLEMS_SHOWN));
        }
        Err(Error::file(
            &self.path,
            format!("{count} tensors do not fit the model:\n    {}", problems.join("\n    ")),
            match mistyped {
                true => {
                    "give the weights in bf16, f16 or f32: other types are mostly quantised and need their own tool"
                }
                false => "use weights of the architecture that config.json describes",
            },
        ))
    }

    /// Locates `name`, and records the request and any mismatch.
    fn ask<const D: usize>(&self, name: String, shape: [usize; D]) -> Option<&Place> {
        let mut record = self.record.borrow_mut();
        record.asked.insert(name.clone());
        let problem = match self.places.get(&name) {
            None => format!("{name}: missing, expected {shape:?}"),
            Some(place) if place.shape() != shape => {
                format!("{name}: shape {:?}, expected {shape:?}", place.shape())
            }
            Some(place) => return place.has_data().then_some(place),
        };
        record.problems.push(problem);
        None
    }

    /// Reads the values at `place`, transposed if `transpose`, and records problems. Updates apply from `first_row` on,
    /// because the place may be a part of the tensor.
    fn read(&self, name: &str, place: &Place, first_row: usize, transpose: bool) -> Option<TensorData> {
        let mut record = self.record.borrow_mut();
        record.mistyped |= !place.is_readable();
        let values = match self.updates.get(name) {
            None => place.read(self.dtype, transpose),
            Some(changes) => place.read(FloatDType::F32, false).and_then(|values| {
                let changed = update::changed(values, changes, first_row, transpose).convert_dtype(self.dtype.into());
                let finite = changed.iter::<f32>().all(f32::is_finite);
                let problem = "its updates lead to values that are not finite";
                finite.then_some(changed).ok_or_else(|| ReadError::Values(problem.into()))
            }),
        };
        match values {
            Ok(values) => return Some(values),
            Err(ReadError::Values(problem)) => record.problems.push(format!("{name}: {problem}")),
            Err(ReadError::File(failure)) => _ = record.failure.get_or_insert(failure),
        }
        None
    }

    /// Creates a tensor from values; without values, zeros that take no memory.
    fn stand<const D: usize>(&self, values: Option<TensorData>, shape: [usize; D]) -> Tensor<D> {
        let options = (&self.device, DType::from(self.dtype));
        match values {
            Some(values) => Tensor::from_data(values, options),
            // An empty shape cannot be expanded from one element.
            None if shape.contains(&0) => Tensor::zeros(shape, options),
            None => Tensor::<D>::zeros([1; D], options).expand(shape),
        }
    }

    /// Loads a tensor by name.
    fn tensor<const D: usize>(&self, name: String, shape: [usize; D]) -> Tensor<D> {
        let values = self.ask(name.clone(), shape).and_then(|place| self.read(&name, place, 0, false));
        self.stand(values, shape)
    }

    /// Loads rows of a matrix, transposed.
    fn transposed_rows(&self, name: &str, place: Option<&Place>, rows: Range<usize>, columns: usize) -> Tensor<2> {
        let shape = [columns, rows.len()];
        let values = place.and_then(|place| self.read(name, &place.rows(rows.clone()), rows.start, true));
        self.stand(values, shape)
    }
}
