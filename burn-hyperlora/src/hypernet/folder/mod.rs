//! Released layout: one JSON of attention modules and a safetensors file per part of the hypernetwork.
//!
//! ```text
//! hyper_lora_modules.json          LoRA prefix -> {"hidden_size", "cross_attention_dim"}, in module order
//! hyper_lora_modules.safetensors   {i}.{to_q|to_k|to_v|to_out}.{id|base}_{down|up}_basis
//! resampler.safetensors            id_projector.safetensors
//! base_resampler.safetensors       with a Base-LoRA only
//! ```
//!
//! Ranks that write a folder together split `hyper_lora_modules.safetensors`, by far the largest file, into shards with
//! an index, as diffusers does with weights. Such a folder is read like any other, and [`whole_files`] are the files
//! that the released nodes read.

mod copy;
mod modules;
mod read;
mod whole;
mod write;

use std::path::{Path, PathBuf};

use hyperlora_sdxl::weights::index_name;

pub use copy::FolderFile;
pub use modules::read_sites;
pub use whole::{WholeFile, whole_files};
pub use write::convert;

const MODULES_JSON: &str = "hyper_lora_modules.json";
const BASES: &str = "hyper_lora_modules";
const RESAMPLER: &str = "resampler";
const ID_PROJECTOR: &str = "id_projector";
const BASE_RESAMPLER: &str = "base_resampler";

/// Returns true if a folder is in the released layout, judged by its JSON.
pub fn is_released(folder: &Path) -> bool {
    folder.join(MODULES_JSON).is_file()
}

/// Stems of the safetensors files, with or without a Base-LoRA.
fn stems(base: bool) -> impl Iterator<Item = &'static str> {
    [BASES, RESAMPLER, ID_PROJECTOR].into_iter().chain(base.then_some(BASE_RESAMPLER))
}

fn file(folder: &Path, stem: &str) -> PathBuf {
    folder.join(format!("{stem}.safetensors"))
}

/// Path to read a file's tensors from: the file, or the index of its shards.
fn weights_of(folder: &Path, stem: &str) -> PathBuf {
    let index = folder.join(index_name(stem));
    if index.is_file() { index } else { file(folder, stem) }
}
