//! Writes a hypernetwork, or converts a folder, to the released layout.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Bytes, Device, FloatDType, Tensor};
use hyperlora_core::files::{Ownership, StagedFolder, apart};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::weights::{self, TensorEntry, Weights};

use super::modules::{read_sites, write_sites};
use super::read::{finish_all, open_all};
use super::whole::Stored;
use super::{MODULES_JSON, file, stems};
use crate::hypernet::config::HyperLoraConfig;
use crate::hypernet::groups::ParameterGroup;
use crate::hypernet::hyper_lora::HyperLora;
use crate::parameters::ParameterVisitor;

impl HyperLora {
    /// Writes the folder `target` atomically. It may replace a folder that this program wrote.
    ///
    /// # Errors
    /// Input: the path is not writable; Disk: the disk is full or failing; Fault: the device fails.
    pub fn save(&self, target: &Path, dtype: FloatDType) -> Result<()> {
        let staged = StagedFolder::new(target, Ownership::Marked)?;
        self.save_files(staged.path(), dtype)?;
        staged.commit()
    }

    /// Writes the files of [`save`](Self::save) into an existing folder. Besides the hypernetwork itself, one tensor is
    /// in memory at a time.
    ///
    /// # Errors
    /// Same as [`save`](Self::save).
    pub fn save_files(&self, folder: &Path, dtype: FloatDType) -> Result<()> {
        write_sites(&folder.join(MODULES_JSON), &self.sites)?;
        let mut parameters = Parameters { dtype, files: Files::new() };
        self.visit_parameters(&mut parameters);
        parameters.files.iter().try_for_each(|(stem, tensors)| save_file(&file(folder, stem), tensors, dtype))
    }
}

/// Converts the released folder `source`, with the sizes `config`, to the folder `target` in `dtype`, with or without
/// its Base-LoRA; atomically. One tensor is in memory at a time. Values that `dtype` can represent keep their bits, and
/// the modules keep their order; their names become those of diffusers.
///
/// # Errors
/// Input, naming the file and the mismatch: files are missing or broken, tensors do not fit `config`, or values are not
/// finite, in the file or in `dtype`. Input: this program did not write the existing folder. Input or Disk: the path is
/// not writable, or the disk is full or failing.
pub fn convert(source: &Path, config: &HyperLoraConfig, target: &Path, dtype: FloatDType, base: bool) -> Result<()> {
    // 1. Check the target and the headers, so that nothing is read or written for unsuitable files.
    apart(target, [source])?;
    let staged = StagedFolder::new(target, Ownership::Marked)?;
    let sites = read_sites(source)?;
    let blank = HyperLora::new(config, &sites, 0, &Device::flex());
    let opened = open_all(source, blank.has_base(), &Device::flex())?;
    let files = opened.iter().map(|(&stem, weights)| (stem, (weights, weights.shapes()))).collect();
    blank.visit_parameters(&mut Shapes(files));
    finish_all(opened)?;

    // 2. Convert tensor by tensor.
    write_sites(&staged.path().join(MODULES_JSON), &sites)?;
    for stem in stems(base && blank.has_base()) {
        convert_file(Stored::open(source, stem)?, &file(staged.path(), stem), dtype, |key| {
            base || ParameterGroup::of(&format!("{stem}.{key}")) != Some(ParameterGroup::BaseBases)
        })?;
    }
    staged.commit()
}

/// Writes the tensors of `source` whose keys `wanted` accepts to `target`, in `dtype`.
fn convert_file(mut source: Stored, target: &Path, dtype: FloatDType, wanted: impl Fn(&str) -> bool) -> Result<()> {
    source.retain(wanted);
    let entries = source.entries().map(|entry| TensorEntry::new(&entry.name, dtype.into(), entry.shape.clone()));
    weights::save_lazily(target, BTreeMap::new(), entries.collect::<Result<_>>()?, |entry| {
        let data = source.floats(&entry.name)?.convert_dtype(dtype.into());
        if data.iter::<f32>().all(f32::is_finite) {
            return Ok(data.into_bytes());
        }
        Err(Error::input(
            format!("{}: {}", source.path_of(&entry.name)?.display(), entry.name),
            format!("holds values that are not finite in {dtype:?}"),
            "write it as f32 or bf16, unless the file itself holds such values",
        ))
    })
}

/// Tensors to write, by file stem and key.
type Files = BTreeMap<String, BTreeMap<String, FileTensor>>;

/// One tensor of a file.
struct FileTensor {
    /// Shape in the file's layout.
    shape: Vec<usize>,
    /// Copies the bytes from the device, in the file's layout.
    bytes: Box<dyn Fn() -> Result<Bytes>>,
}

/// Collects a hypernetwork's parameters. They stay on their device until they are written.
struct Parameters {
    dtype: FloatDType,
    files: Files,
}

impl ParameterVisitor for Parameters {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let Some((stem, key)) = name.split_once('.') else { return };
        let (tensor, dtype, name) = (parameter.val().inner(), self.dtype, name.to_owned());
        let bytes = move || weights::bytes_of(in_file_layout(tensor.clone(), dtype), &name);
        let tensor = FileTensor { shape: file_shape(parameter).to_vec(), bytes: Box::new(bytes) };
        self.files.entry(stem.into()).or_default().insert(key.into(), tensor);
    }
}

/// Converts a tensor to the layout of the files, see [`file_shape`].
pub(super) fn in_file_layout<const D: usize>(tensor: Tensor<D>, dtype: FloatDType) -> Tensor<D> {
    let tensor = tensor.cast(dtype);
    if D == 2 { tensor.swap_dims(0, 1) } else { tensor }
}

fn save_file(path: &Path, tensors: &BTreeMap<String, FileTensor>, dtype: FloatDType) -> Result<()> {
    let entries = tensors.iter().map(|(key, tensor)| TensorEntry::new(key, dtype.into(), tensor.shape.clone()));
    weights::save_lazily(path, BTreeMap::new(), entries.collect::<Result<_>>()?, |entry| {
        let tensor = tensors.get(&entry.name);
        (tensor.ok_or_else(|| Error::Fault(format!("no parameter is named {}", entry.name)))?.bytes)()
    })
}

/// Requests every tensor whose shape does not fit the hypernetwork, so that loading reports it.
struct Shapes<'a>(BTreeMap<&'static str, (&'a Weights, BTreeMap<&'a str, &'a [usize]>)>);

impl ParameterVisitor for Shapes<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let Some((stem, key)) = name.split_once('.') else { return };
        let Some((weights, shapes)) = self.0.get(stem) else { return };
        let shape = file_shape(parameter);
        match shapes.get(key) {
            Some(&found) if found == shape => weights.at("").ignore(key),
            _ => drop(weights.at("").tensor(key, shape)),
        }
    }
}

/// Shape of a parameter in the files, which store linear weights (the only matrices) as `[out, in]`.
fn file_shape<const D: usize>(parameter: &Param<Tensor<D>>) -> [usize; D] {
    let mut shape = parameter.lazy_shape().dims();
    if D == 2 {
        shape.reverse();
    }
    shape
}
