//! `manifest.json`: content and origin of a shard folder, and the checksums that prove them.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use hyperlora_core::files::write_whole;
use hyperlora_core::paths::{Root, below};
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::notes::Notes;
use crate::shard::access::unreadable;
use crate::shard::limits::{
    FOOTER_BYTES, GROUP_BYTES, INDEX_BYTES, INDEX_ROWS_PER_BYTE, MANIFEST_BYTES, ROWS, ROWS_PER_GROUP,
};
use crate::shard::schema::SCHEMA_VERSION;

/// Name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Content of `manifest.json`. Contains no times and no paths of a machine: equal input gives equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Photos that were processed.
    pub photos: usize,
    /// Photos whose face was kept: the rows of all shards.
    pub kept: usize,
    /// Kept faces by split, without those that have none.
    pub splits: BTreeMap<String, usize>,
    /// Rejected photos, by reason.
    pub rejected: BTreeMap<String, usize>,
    /// Notes on what was skipped or changed without rejecting a photo.
    #[serde(default, skip_serializing_if = "Notes::is_empty")]
    pub notes: Notes,
    /// Models that processed the photos: role to file name and checksum.
    pub models: BTreeMap<String, String>,
    /// Shards, in the order of their rows.
    pub shards: Vec<ShardFile>,
    /// Index with key, identity and split of all rows.
    pub index: IndexFile,
    /// Resolved configuration.
    pub config: serde_json::Value,
}

/// The only field that every version has.
#[derive(Deserialize)]
struct Version {
    schema_version: Option<u64>,
}

/// One shard of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// File name in the folder.
    pub file: String,
    /// Number of faces in it.
    pub rows: usize,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// Row groups, in order and without overlap.
    pub row_groups: Vec<RowGroupPiece>,
    /// SHA-256 of the bytes after the last row group: Parquet's footer.
    pub footer_sha256: String,
}

/// One row group of a shard, which is read at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowGroupPiece {
    /// Number of faces in it.
    pub rows: usize,
    /// Offset of its first byte in the file.
    pub offset: u64,
    /// Number of its bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in lower-case hexadecimal.
    pub sha256: String,
}

/// Index of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexFile {
    /// File name in the folder.
    pub file: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
}

/// Part of a file, with the checksum of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl ShardFile {
    /// Returns the place of the row group with this number.
    pub(super) fn row_group(&self, index: usize) -> Option<Piece> {
        let RowGroupPiece { offset, bytes, sha256, .. } = self.row_groups.get(index)?.clone();
        Some(Piece { offset, bytes, sha256 })
    }

    /// Returns the place of the footer.
    pub(super) fn footer(&self) -> Piece {
        let offset = self.row_groups.last().map_or(0, |group| group.offset + group.bytes);
        Piece { offset, bytes: self.bytes - offset, sha256: self.footer_sha256.clone() }
    }

    /// Describes a contradiction between the numbers, or a number beyond the reader's limits.
    fn contradiction(&self) -> Option<String> {
        let rows = sum(self.row_groups.iter().map(|group| group.rows));
        if rows != Some(self.rows) {
            let rows = rows.map_or("too many".into(), |rows| rows.to_string());
            return Some(format!("counts {} rows, its row groups {rows}", self.rows));
        }
        let mut end = 0;
        for (index, group) in self.row_groups.iter().enumerate() {
            let behind = group.offset.checked_add(group.bytes).filter(|behind| *behind <= self.bytes);
            let Some(behind) = behind.filter(|_| group.offset >= end) else {
                return Some(format!("has row group {index} outside of its place"));
            };
            // Every row takes at least one byte.
            if group.bytes > GROUP_BYTES || group.rows > ROWS_PER_GROUP || group.rows as u64 > group.bytes {
                let RowGroupPiece { rows, bytes, .. } = group;
                return Some(format!("has {rows} rows in the {bytes} bytes of row group {index}, which are not read"));
            }
            end = behind;
        }
        if self.bytes - end > FOOTER_BYTES {
            return Some(format!("has a footer of {} bytes, more than {FOOTER_BYTES}", self.bytes - end));
        }
        let checksums = self.row_groups.iter().map(|group| &group.sha256).chain([&self.sha256, &self.footer_sha256]);
        unknown_checksum(checksums)
    }
}

impl IndexFile {
    /// Describes a number beyond the reader's limits, for `rows` rows.
    fn contradiction(&self, rows: usize) -> Option<String> {
        let most = usize::try_from(self.bytes).unwrap_or(usize::MAX).saturating_mul(INDEX_ROWS_PER_BYTE);
        if self.bytes > INDEX_BYTES || rows > most {
            return Some(format!("has {rows} rows in {} bytes, which are not read", self.bytes));
        }
        unknown_checksum([&self.sha256])
    }
}

/// Describes an invalid checksum, which would otherwise become a file name in a cache.
fn unknown_checksum<'a>(checksums: impl IntoIterator<Item = &'a String>) -> Option<String> {
    let bad = checksums.into_iter().find(|text| !is_sha256(text))?;
    Some(format!("has the checksum `{bad}`, which is not a SHA-256"))
}

/// Tells whether `text` is a SHA-256 in lower-case hexadecimal.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|letter| matches!(letter, b'0'..=b'9' | b'a'..=b'f'))
}

/// Adds numbers. Returns `None` on overflow.
fn sum(mut numbers: impl Iterator<Item = usize>) -> Option<usize> {
    numbers.try_fold(0_usize, usize::checked_add)
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
        Self::parse(&read_manifest(&Root::open(dir)?)?, &path)
    }

    /// Parses the content of a manifest; errors name `path`.
    pub(super) fn parse(text: &[u8], path: &Path) -> Result<Self> {
        let damaged = |error: serde_json::Error| bad(path, error);
        // The version is read first, because another version may have other fields.
        let Version { schema_version: version } = serde_json::from_slice(text).map_err(damaged)?;
        if version != Some(SCHEMA_VERSION.into()) {
            let found = version.map_or("none".into(), |version| version.to_string());
            return Err(Error::file(
                path,
                format!("has schema version {found}, this program reads version {SCHEMA_VERSION}"),
                "prepare the data again with the `data-prep` of this release",
            ));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(damaged)?;
        let mut files = HashSet::new();
        for file in manifest.shards.iter().map(|shard| &shard.file).chain([&manifest.index.file]) {
            below(Path::new(""), file, path)?;
            if !files.insert(file) {
                return Err(bad(path, format_args!("it lists {file} twice")));
            }
        }
        for shard in &manifest.shards {
            if let Some(contradiction) = shard.contradiction() {
                return Err(bad(path, format_args!("{} {contradiction}", shard.file)));
            }
        }
        let rows = sum(manifest.shards.iter().map(|shard| shard.rows)).filter(|rows| *rows <= ROWS);
        let Some(rows) = rows else {
            return Err(bad(path, format_args!("its shards hold more than {ROWS} faces")));
        };
        if rows != manifest.kept {
            return Err(bad(path, format_args!("it counts {} faces, its shards hold {rows}", manifest.kept)));
        }
        if let Some(contradiction) = manifest.index.contradiction(rows) {
            return Err(bad(path, format_args!("{} {contradiction}", manifest.index.file)));
        }
        Ok(manifest)
    }

    /// Compares the models that made the shards of `dir` with others, given by role as in [`models`](Self::models), and
    /// returns the roles whose model differs. Compares the checksums of the files, not their names.
    ///
    /// # Errors
    /// Input: another embedder. Weights trained on the embeddings in the shards do not apply to its embeddings.
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

/// Reads the manifest of a folder.
pub(super) fn read_manifest(root: &Root) -> Result<Vec<u8>> {
    root.read(Path::new(MANIFEST_FILE), MANIFEST_BYTES)
        .map_err(|source| unreadable(&root.path().join(MANIFEST_FILE), source))
}

pub(super) fn no_manifest(place: &Path) -> Error {
    let problem = format!("holds no {MANIFEST_FILE}: this is not a shard folder");
    Error::file(place, problem, "make one with `data-prep build CONFIG --out DIR`")
}

fn bad(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is damaged: {problem}"), "prepare the data again with `data-prep build`")
}
