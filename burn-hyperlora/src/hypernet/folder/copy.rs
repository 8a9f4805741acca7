//! Files of a released folder in host memory, to be written later and elsewhere.

use std::path::Path;

use burn::module::Param;
use burn::tensor::{FloatDType, Tensor, TensorData};

use super::modules::write_sites;
use super::write::in_file_layout;
use super::{MODULES_JSON, stems};
use crate::error::Result;
use crate::hypernet::hyper_lora::HyperLora;
use crate::hypernet::parameters::ParameterVisitor;
use crate::lora::AttentionSite;
use crate::weights;

/// A file of the released folder, copied to host memory.
pub struct FolderFile {
    /// Its name in the folder.
    pub name: String,
    content: Content,
}

enum Content {
    Sites(Vec<AttentionSite>),
    Tensors(Vec<(String, TensorData)>),
}

impl FolderFile {
    /// Writes it as `path`, whole or not at all, byte for byte as [`HyperLora::save`] does.
    ///
    /// # Errors
    /// Input for a place that cannot be written to, Disk for a full or failing disk.
    pub fn write(self, path: &Path) -> Result<()> {
        match self.content {
            Content::Sites(sites) => write_sites(path, &sites),
            Content::Tensors(tensors) => weights::save(path, tensors),
        }
    }
}

impl HyperLora {
    /// Copies the files of the released folder whose place among them `wanted` names: 0 is the JSON, the bases are 1.
    ///
    /// # Errors
    /// Fault when the device fails.
    pub fn copy_files(&self, dtype: FloatDType, wanted: impl Fn(usize) -> bool) -> Result<Vec<FolderFile>> {
        let mut files = Vec::new();
        if wanted(0) {
            files.push(FolderFile { name: MODULES_JSON.into(), content: Content::Sites(self.sites.clone()) });
        }
        for (_, stem) in (1..).zip(stems(self.has_base())).filter(|(place, _)| wanted(*place)) {
            let mut copier = Copier { stem, dtype, tensors: Ok(Vec::new()) };
            self.visit_parameters(&mut copier);
            files.push(FolderFile { name: format!("{stem}.safetensors"), content: Content::Tensors(copier.tensors?) });
        }
        Ok(files)
    }
}

/// Copies the parameters of one file.
struct Copier {
    stem: &'static str,
    dtype: FloatDType,
    tensors: Result<Vec<(String, TensorData)>>,
}

impl ParameterVisitor for Copier {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let Some((_, key)) = name.split_once('.').filter(|(stem, _)| *stem == self.stem) else { return };
        let Ok(tensors) = &mut self.tensors else { return };
        match weights::data_of(in_file_layout(parameter.val().inner(), self.dtype), name) {
            Ok(data) => tensors.push((key.into(), data)),
            Err(error) => self.tensors = Err(error),
        }
    }
}
