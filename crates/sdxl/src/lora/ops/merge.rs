//! Merges LoRAs into a base, keeping its layout and types.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use hyperlora_core::files::{OutputFile, Ownership, StagedFolder, apart, copy};
use hyperlora_core::{Error, Result};

use crate::lora::ops::merge_file::{FileChanges, merge_file};
use crate::source::{BaseSource, ComponentUpdates};
use crate::weights::{Form, SafetensorsFile};

/// Extensions of weight files.
const WEIGHTS: [&str; 8] = ["safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx"];

/// Writes the base `source` to `target` with `updates` added to its weights: a folder for a pipeline folder, a file for
/// a single file. One tensor is in memory at a time, and the target appears atomically. Everything that no update
/// touches stays bit-identical: unchanged weight files are hard-linked if the disk allows it, all else is copied. For a
/// changed component, weight files of other types and formats than the ones read are omitted, because they would hold
/// the old weights.
///
/// # Errors
/// Input: the target is, contains or lies in the base, the target folder exists, or an update exceeds a tensor's type;
/// Disk: the disk is full or failing.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
/// use hyperlora_sdxl::lora::ops::merge;
/// use hyperlora_sdxl::source::BaseSource;
///
/// let base = BaseSource::open(Path::new("models/sdxl-base"), None, None)?;
/// let loras = [(LoraFile::open(Path::new("anna.safetensors"))?, 1.0)];
/// let updates = sum(&loras, &BaseNames::of(&base)?)?;
/// merge(&base, &updates, Path::new("models/sdxl-anna"))?;
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn merge(source: &BaseSource, updates: &ComponentUpdates, target: &Path) -> Result<()> {
    match source.single_file() {
        Some(file) => {
            let output = OutputFile::claim(target, [source.path()])?;
            merge_file(file, output.path(), &single_file_changes(source, file, updates)?)
        }
        None => merge_folder(source, updates, target),
    }
}

fn single_file_changes(source: &BaseSource, file: &SafetensorsFile, updates: &ComponentUpdates) -> Result<FileChanges> {
    let mut changes = FileChanges::new();
    for (&part, updates) in updates {
        let table = source.table(part)?;
        for entry in file.entries() {
            let Some(name) = entry.name.strip_prefix(part.prefix()) else { continue };
            let found: Vec<_> = table
                .to_diffusers(name)
                .into_iter()
                .filter_map(|(name, form)| updates.get(&name).map(|changes| (form, changes.clone())))
                .collect();
            if !found.is_empty() {
                changes.insert(entry.name, found);
            }
        }
    }
    Ok(changes)
}

fn merge_folder(source: &BaseSource, updates: &ComponentUpdates, target: &Path) -> Result<()> {
    apart(target, [source.path()])?;
    let staged = StagedFolder::new(target, Ownership::Never)?;

    // 1. Find the files that hold weights of changed components, and their updates.
    let mut in_use = BTreeSet::new();
    let mut changed: BTreeMap<PathBuf, FileChanges> = BTreeMap::new();
    for (&part, updates) in updates {
        let weights = source.weights(part, &Device::flex())?;
        in_use.insert(weights.path().to_path_buf());
        for path in weights.files() {
            in_use.insert(path.to_path_buf());
            let file = SafetensorsFile::open(path)?;
            let changes = file.entries().filter_map(|entry| {
                let changes = updates.get(&entry.name)?;
                Some((entry.name, vec![(Form::Same, changes.clone())]))
            });
            changed.insert(path.to_path_buf(), changes.collect());
        }
    }
    let parts: BTreeSet<_> = updates.keys().map(|part| source.path().join(part.folder())).collect();

    // 2. Write the folder, file by file.
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let (from, to) = (source.path().join(&folder), staged.path().join(&folder));
        fs::create_dir_all(&to).map_err(|error| Error::write(&to, error))?;
        for entry in fs::read_dir(&from).map_err(|error| Error::read(&from, error))? {
            let name = entry.map_err(|error| Error::read(&from, error))?.file_name();
            let (path, merged) = (from.join(&name), to.join(&name));
            if path.is_dir() {
                folders.push(folder.join(&name));
            } else if let Some(changes) = changed.get(&path).filter(|changes| !changes.is_empty()) {
                merge_file(&SafetensorsFile::open(&path)?, &merged, changes)?;
            } else if parts.contains(&from) && holds_weights(&name) && !in_use.contains(&path) {
                tracing::info!("{} is not copied: the LoRAs are not merged into it", path.display());
            } else {
                take_over(&path, &merged)?;
            }
        }
    }
    staged.commit()
}

/// Returns true for a weight file or an index of weight files, including a variant's (`.index.fp16.json`).
fn holds_weights(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let parts: Vec<&str> = name.split('.').collect();
    match parts.as_slice() {
        [_, between @ .., "json"] => between.contains(&"index"),
        [_, .., ending] => WEIGHTS.contains(ending),
        _ => false,
    }
}

/// Places the file `from` at `to`: a hard link for large files if the disk allows it, otherwise a copy.
fn take_over(from: &Path, to: &Path) -> Result<()> {
    // Model caches contain symbolic links; hard-linking one would create another symbolic link.
    let from = from.canonicalize().map_err(|error| Error::read(from, error))?;
    if from.extension().is_some_and(|ending| ending == "safetensors") && fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    copy(&from, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_told_by_the_parts_of_a_name() {
        for (name, weights) in [
            ("diffusion_pytorch_model.fp16.safetensors", true),
            ("diffusion_pytorch_model.bin", true),
            ("diffusion_pytorch_model.safetensors.index.json", true),
            ("diffusion_pytorch_model.safetensors.index.fp16.json", true),
            ("config.json", false),
            ("index.json", false),
            ("cabin", false),
            ("prompt", false),
            ("notes.txt", false),
        ] {
            assert_eq!(holds_weights(OsStr::new(name)), weights, "{name}");
        }
    }
}
