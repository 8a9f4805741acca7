//! Recognition of prepared data: the manifest names the shards, and the names of the report's files are known.

use std::path::Path;

use hyperlora_core::files::{Listing, Ownership};
use hyperlora_core::paths::Root;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::report::{CONTACT_SHEET_FILE, REJECTED_FILE};
use crate::shard::{INDEX_FILE, MANIFEST_FILE};

/// Folders that `build` may replace. The manifest serves as the marker, because an extra file would not belong to the
/// data.
pub(crate) const PREPARED: Ownership = Ownership::Listed(listing);

/// Size limit of a manifest in bytes, enough for a million row groups.
const LONGEST: u64 = 1 << 28;

/// Fields that the manifests of all versions have, and those of no other tool.
#[derive(Deserialize)]
struct AnyManifest {
    #[serde(rename = "schema_version")]
    _version: u64,
    #[serde(rename = "photos")]
    _photos: u64,
    #[serde(rename = "kept")]
    _kept: u64,
    #[serde(rename = "rejected")]
    _rejected: Map<String, Value>,
    #[serde(rename = "models")]
    _models: Map<String, Value>,
    #[serde(rename = "config")]
    _config: Map<String, Value>,
    shards: Vec<AnyShard>,
}

#[derive(Deserialize)]
struct AnyShard {
    file: String,
    bytes: u64,
}

fn listing(folder: &Path) -> Option<Listing> {
    let text = Root::open(folder).ok()?.read(Path::new(MANIFEST_FILE), LONGEST).ok()?;
    let manifest: AnyManifest = serde_json::from_slice(&text).ok()?;
    if manifest.shards.is_empty() {
        return None;
    }
    let shards = manifest.shards.into_iter().map(|shard| (shard.file, Some(shard.bytes)));
    let others = [MANIFEST_FILE, INDEX_FILE, REJECTED_FILE, CONTACT_SHEET_FILE].map(|name| (name.to_owned(), None));
    Some(shards.chain(others).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_foreign_manifest_does_not_make_a_folder_prepared_data() {
        let folder = tempfile::tempdir().unwrap();
        let listed = |text: &str| {
            fs::write(folder.path().join(MANIFEST_FILE), text).unwrap();
            listing(folder.path())
        };
        for foreign in [
            "",
            "{}",
            r#"{"schema_version": 1}"#,
            r#"{"schema_version": 2, "shards": [{"file": "thesis.txt", "bytes": 3}]}"#,
            r#"{"schema_version": 2, "photos": 0, "kept": 0, "rejected": {}, "models": {}, "config": {}, "shards": []}"#,
        ] {
            assert_eq!(listed(foreign), None, "{foreign}");
        }
        let first_version = r#"{"schema_version": 1, "photos": 1, "kept": 1, "splits": {}, "rejected": {}, "models": {},
            "shards": [{"file": "shard-00000.parquet", "rows": 1, "bytes": 9, "sha256": ""}], "config": {}}"#;
        assert_eq!(listed(first_version).unwrap().get("shard-00000.parquet"), Some(&Some(9)));
    }
}
