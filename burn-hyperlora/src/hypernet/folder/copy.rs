//! Files of a released folder in host memory, so that they can be written later.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use hyperlora_core::Result;
use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::weights::{self, ShardIndex, index_name, shard_name};

use super::modules::write_sites;
use super::write::in_file_layout;
use super::{BASES, MODULES_JSON, stems};
use crate::hypernet::hyper_lora::HyperLora;
use crate::parameters::ParameterVisitor;

/// A file of the released folder, copied to host memory.
pub struct FolderFile {
    /// Name of the file in the folder.
    pub name: String,
    content: Content,
}

enum Content {
    Sites(Vec<AttentionSite>),
    Index(ShardIndex),
    Tensors(Vec<(String, TensorData)>),
}

impl FolderFile {
    /// Writes the file to `path` atomically.
    ///
    /// # Errors
    /// Input: the path is not writable; Disk: the disk is full or failing.
    pub fn write(self, path: &Path) -> Result<()> {
        match self.content {
            Content::Sites(sites) => write_sites(path, &sites),
            Content::Index(index) => index.write(path),
            Content::Tensors(tensors) => weights::save(path, tensors),
        }
    }
}

impl HyperLora {
    /// Copies the share of part `part` of `parts`, counted from 0, of the released folder. A single part equals the
    /// files of [`save`](Self::save), byte for byte. Of several parts, each holds a shard of the bases, of about equal
    /// size, and the other files are assigned in turn.
    ///
    /// # Errors
    /// Fault: the device fails.
    pub fn copy_part(&self, dtype: FloatDType, part: usize, parts: usize) -> Result<Vec<FolderFile>> {
        let mut files = Vec::new();
        if part == 0 {
            files.push(FolderFile { name: MODULES_JSON.into(), content: Content::Sites(self.sites.clone()) });
        }
        for (place, stem) in stems(self.has_base()).enumerate() {
            if stem == BASES && parts > 1 {
                files.extend(self.copy_shard(dtype, part, parts)?);
            } else if place % parts == part {
                files.push(self.copy_file(dtype, stem, &shard_name(stem, 0, 1), &|_| true)?);
            }
        }
        Ok(files)
    }

    /// Copies one shard of the bases; part 0 includes the index.
    fn copy_shard(&self, dtype: FloatDType, part: usize, parts: usize) -> Result<Vec<FolderFile>> {
        let mut sizes = ShardSizes(Vec::new());
        self.visit_parameters(&mut sizes);
        let total: usize = sizes.0.iter().map(|(_, size)| size).sum();
        let mut before = 0;
        let shards = sizes.0.into_iter().map(|(key, size)| {
            let shard = before * parts / total;
            before += size;
            (key, shard)
        });
        let shards: BTreeMap<String, usize> = shards.collect();
        let name = |shard: usize| shard_name(BASES, shard, parts);
        let mut files = vec![self.copy_file(dtype, BASES, &name(part), &|key| shards.get(key) == Some(&part))?];
        if part == 0 {
            let map = shards.iter().map(|(key, shard)| (key.clone(), name(*shard))).collect();
            let index = ShardIndex::new((total * DType::from(dtype).size()) as u64, map);
            files.push(FolderFile { name: index_name(BASES), content: Content::Index(index) });
        }
        Ok(files)
    }

    fn copy_file(
        &self,
        dtype: FloatDType,
        stem: &'static str,
        name: &str,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<FolderFile> {
        let mut copier = Copier { stem, dtype, wanted, tensors: Ok(Vec::new()) };
        self.visit_parameters(&mut copier);
        Ok(FolderFile { name: name.into(), content: Content::Tensors(copier.tensors?) })
    }
}

/// Number of elements of each basis tensor.
struct ShardSizes(Vec<(String, usize)>);

impl ParameterVisitor for ShardSizes {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        if let Some((BASES, key)) = name.split_once('.') {
            self.0.push((key.into(), parameter.lazy_shape().num_elements()));
        }
    }
}

/// Copies the parameters of one file.
struct Copier<'a> {
    stem: &'static str,
    dtype: FloatDType,
    wanted: &'a dyn Fn(&str) -> bool,
    tensors: Result<Vec<(String, TensorData)>>,
}

impl ParameterVisitor for Copier<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let wanted = |&(stem, key): &(&str, &str)| stem == self.stem && (self.wanted)(key);
        let Some((_, key)) = name.split_once('.').filter(wanted) else { return };
        let Ok(tensors) = &mut self.tensors else { return };
        match weights::data_of(in_file_layout(parameter.val().inner(), self.dtype), name) {
            Ok(data) => tensors.push((key.into(), data)),
            Err(error) => self.tensors = Err(error),
        }
    }
}
