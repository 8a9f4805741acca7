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
    /// Key, identity and split of all rows.
    pub index: IndexFile,
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
    /// Its row groups, in order and one behind the other.
    pub row_groups: Vec<RowGroupPiece>,
    /// SHA-256 of what follows the last row group: Parquet's footer.
    pub footer_sha256: String,
}

/// One row group of a shard: the unit that is read at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowGroupPiece {
    /// Number of faces in it.
    pub rows: usize,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Number of its bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
}

/// The index of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexFile {
    /// File name in the folder.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
}

/// A part of a file and the checksum of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl ShardFile {
    /// Where the row group with this number lies.
    pub(super) fn row_group(&self, index: usize) -> Option<Piece> {
        let RowGroupPiece { offset, bytes, sha256, .. } = self.row_groups.get(index)?.clone();
        Some(Piece { offset, bytes, sha256 })
    }

    /// Where the footer lies.
    pub(super) fn footer(&self) -> Piece {
        let offset = self.row_groups.last().map_or(0, |group| group.offset + group.bytes);
        Piece { offset, bytes: self.bytes - offset, sha256: self.footer_sha256.clone() }
    }

    /// What does not fit together, in words.
    fn contradiction(&self) -> Option<String> {
        let rows: usize = self.row_groups.iter().map(|group| group.rows).sum();
        if rows != self.rows {
            return Some(format!("counts {} rows, its row groups {rows}", self.rows));
        }
        let mut end = 0;
        for (index, group) in self.row_groups.iter().enumerate() {
            if group.offset < end || group.bytes > self.bytes || group.offset > self.bytes - group.bytes {
                return Some(format!("has row group {index} outside of its place"));
            }
            end = group.offset + group.bytes;
        }
        None
    }
}

impl Manifest {
    /// Reads the manifest of the shard folder `dir`.
    ///
    /// # Errors
    /// Input: no manifest, a damaged one, or one of another schema version.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            return Err(no_manifest(dir));
        }
        Self::parse(&std::fs::read(&path).map_err(|source| Error::read(&path, source))?, &path)
    }

    /// The manifest with the given content; errors name `path`.
    pub(super) fn parse(text: &[u8], path: &Path) -> Result<Self> {
        let damaged = |error: serde_json::Error| bad(path, error);
        // The version is read first: another version may have other fields.
        let json: serde_json::Value = serde_json::from_slice(text).map_err(damaged)?;
        let version = json.get("schema_version").and_then(serde_json::Value::as_u64);
        if version != Some(SCHEMA_VERSION.into()) {
            let found = version.map_or("none".into(), |version| version.to_string());
            return Err(Error::file(
                path,
                format!("has schema version {found}, this program reads version {SCHEMA_VERSION}"),
                "prepare the data again with the `data-prep` of this release",
            ));
        }
        let manifest: Self = serde_json::from_value(json).map_err(damaged)?;
        for shard in &manifest.shards {
            if let Some(contradiction) = shard.contradiction() {
                return Err(bad(path, format_args!("{} {contradiction}", shard.file)));
            }
        }
        let rows: usize = manifest.shards.iter().map(|shard| shard.rows).sum();
        if rows != manifest.kept {
            return Err(bad(path, format_args!("it counts {} faces, its shards hold {rows}", manifest.kept)));
        }
        Ok(manifest)
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

pub(super) fn no_manifest(place: &Path) -> Error {
    let problem = format!("holds no {MANIFEST_FILE}: this is not a shard folder");
    Error::file(place, problem, "make one with `data-prep build CONFIG --out DIR`")
}

fn bad(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is damaged: {problem}"), "prepare the data again with `data-prep build`")
}

/// SHA-256 of bytes in memory, in lower-case hexadecimal.
pub fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
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
