//! Fingerprint of a base model, independent of its location.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use hyperlora_core::hash::hex;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::source::Component;
use hyperlora_sdxl::weights::{ConfigText, Weights};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::conditioning::BaseConfig;

/// Number of bytes read at each end of a weights file: the header with names, types and shapes, and some of the values.
/// Different weights differ in nearly every value, so reading gigabytes at every start is not worth the time.
const END: u64 = 1 << 20;

/// Computes a checksum of each component of the base, over its configuration and the length and both ends of its
/// weights.
///
/// # Errors
/// Same as [`Error::read`]: a file that is missing or cannot be read.
pub(super) fn of_base(config: &BaseConfig, yaml_folder: &Path) -> Result<Value> {
    let source = config.source(yaml_folder)?;
    let mut parts = Map::new();
    // The same weights in another dtype are a different model.
    parts.insert("dtype".into(), format!("{:?}", config.dtype).to_lowercase().into());
    for part in Component::ALL {
        let checksum = of_model(&source.config(part)?, &source.weights(part, &Device::flex())?)?;
        parts.insert(part.folder().into(), checksum.into());
    }
    let image_encoder = config.image_encoder_folder(yaml_folder)?;
    let text = ConfigText::read(&image_encoder.join("config.json"))?;
    let checksum = of_model(&text, &Weights::open(&image_encoder, &Device::flex())?)?;
    parts.insert("image_encoder".into(), checksum.into());
    Ok(parts.into())
}

/// Computes a checksum of a hypernetwork in the released layout, over the names, lengths and both ends of its files.
///
/// # Errors
/// Same as [`Error::read`].
pub(super) fn of_released(folder: &Path) -> Result<String> {
    let failed = |source| Error::read(folder, source);
    let entries = fs::read_dir(folder).map_err(failed)?.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors" || extension == "json"));
    paths.sort();
    let mut hasher = Sha256::new();
    for path in paths {
        hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        add_ends(&mut hasher, &path).map_err(|source| Error::read(&path, source))?;
    }
    Ok(hex(&hasher.finalize()))
}

fn of_model(config: &ConfigText, weights: &Weights) -> Result<String> {
    let mut hasher = Sha256::new();
    for path in weights.files() {
        add_ends(&mut hasher, path).map_err(|source| Error::read(path, source))?;
    }
    hasher.update(config.text());
    Ok(hex(&hasher.finalize()))
}

/// Hashes a file's length and both ends.
fn add_ends(hasher: &mut Sha256, path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = vec![0; END.min(length) as usize];
    hasher.update(length.to_le_bytes());
    for start in [0, length - bytes.len() as u64] {
        file.read_exact_at(&mut bytes, start)?;
        hasher.update(&bytes);
    }
    Ok(())
}
