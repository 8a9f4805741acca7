//! What tells one base model from another, wherever it lies.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use burn::tensor::Device;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::conditioning::BaseConfig;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Bytes that are read at either end of a weights file: the header with names, types and shapes, and some of the values.
/// Reading gigabytes at every start would take longer than it is worth: other weights differ in nearly every value.
const END: u64 = 1 << 20;

/// A checksum of every model of the base by its part, over its configuration and over the length and both ends of its
/// weights.
///
/// # Errors
/// As [`Error::read`] for a file that is missing or cannot be read.
pub(super) fn of_base(config: &BaseConfig, yaml_folder: &Path) -> Result<Value> {
    let folder = config.folder(yaml_folder)?;
    let mut parts = Map::new();
    for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
        parts.insert(part.into(), of_model(&folder.join(part))?.into());
    }
    parts.insert("image_encoder".into(), of_model(&config.image_encoder_folder(yaml_folder)?)?.into());
    Ok(parts.into())
}

fn of_model(folder: &Path) -> Result<String> {
    let config = folder.join("config.json");
    let weights = Weights::open(folder, &Device::flex())?;
    let path = weights.path();
    let ends = || {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut bytes = vec![0; END.min(length) as usize];
        let mut hasher = Sha256::new();
        hasher.update(length.to_le_bytes());
        for start in [0, length - bytes.len() as u64] {
            file.read_exact_at(&mut bytes, start)?;
            hasher.update(&bytes);
        }
        Ok(hasher)
    };
    let mut hasher = ends().map_err(|source| Error::read(path, source))?;
    hasher.update(fs::read(&config).map_err(|source| Error::read(&config, source))?);
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
