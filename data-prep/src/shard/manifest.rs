//! `manifest.json`: what a shard folder holds, where it came from, and the checksums that prove it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::write_whole;
use crate::shard::schema::SCHEMA_VERSION;

/// Name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The content of `manifest.json`. It holds no times and no machine's paths: equal input gives equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Photos that were looked at.
    pub photos: usize,
    /// Photos whose face was kept: the rows of all shards.
    pub kept: usize,
    /// Kept faces by split; those without one are not counted here.
    pub splits: BTreeMap<String, usize>,
    /// Photos that were left out, by reason.
    pub rejected: BTreeMap<String, usize>,
    /// The models that looked at the photos: role to file name and checksum.
    pub models: BTreeMap<String, String>,
    /// The shards, in the order of their rows.
    pub shards: Vec<ShardFile>,
    /// The resolved configuration.
    pub config: serde_json::Value,
}

/// One shard of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// File name in the folder.
    pub file: String,
    /// Number of faces in it.
    pub rows: usize,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads the manifest of the shard folder `dir`.
    ///
    /// # Errors
    /// Input: no manifest, a damaged one, or one of another schema version.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            let problem = format!("holds no {MANIFEST_FILE}: this is not a shard folder");
            return Err(Error::file(dir, problem, "make one with `data-prep build CONFIG --out DIR`"));
        }
        let text = std::fs::read(&path).map_err(|source| Error::read(&path, source))?;
        let damaged = |error: serde_json::Error| {
            Error::file(&path, format!("is damaged: {error}"), "prepare the data again with `data-prep build`")
        };
        // The version is read first: another version may have other fields.
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        let version = json.get("schema_version").and_then(serde_json::Value::as_u64);
        if version != Some(SCHEMA_VERSION.into()) {
            let found = version.map_or("none".into(), |version| version.to_string());
            return Err(Error::file(
                &path,
                format!("has schema version {found}, this program reads version {SCHEMA_VERSION}"),
                "prepare the data again with the `data-prep` of this release",
            ));
        }
        serde_json::from_value(json).map_err(damaged)
    }

    /// Compares the models that made the shards of `dir` with others, given by role as in [`models`](Self::models); tells
    /// the roles with another model. Files are compared by checksum: their names do not matter.
    ///
    /// # Errors
    /// Input: another embedder. What was learnt of the embeddings in the shards says nothing of its embeddings.
    pub fn compare_models(&self, dir: &Path, others: &BTreeMap<String, String>) -> Result<Vec<String>> {
        let checksum = |model: &str| model.rsplit(' ').next().map(str::to_owned);
        let mut differing = Vec::new();
        for (role, made_with) in &self.models {
            let Some(other) = others.get(role).filter(|other| checksum(other) != checksum(made_with)) else { continue };
            if role == "embedder" {
                let problem = format!("its ID embeddings were made with {made_with}, and `faces` finds {other}");
                let remedy = "give `faces` the models that made the shards, or prepare the data again with these";
                return Err(Error::file(dir, problem, remedy));
            }
            differing.push(format!("{role}: {made_with} made the shards, and `faces` finds {other}"));
        }
        Ok(differing)
    }

    /// Writes the manifest into the shard folder `dir`.
    ///
    /// # Errors
    /// As [`write_whole`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Fault(format!("the manifest cannot be written as JSON: {error}")))?;
        text.push(b'\n');
        write_whole(&dir.join(MANIFEST_FILE), &text)
    }
}

/// SHA-256 of the file at `path`, in lower-case hexadecimal, read in pieces.
///
/// # Errors
/// As [`Error::read`].
pub fn sha256_of_file(path: &Path) -> Result<String> {
    let failed = |source| Error::read(path, source);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 16];
    loop {
        match file.read(&mut piece).map_err(failed)? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&piece[..read]),
        }
    }
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
