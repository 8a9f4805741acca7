//! Weight files of one model: a single file, or shards with an index, under diffusers and transformers names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyperlora_core::files::write_whole;
use hyperlora_core::paths::is_plain;
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::weights::file::SafetensorsFile;
use crate::weights::json::{parse_json, read_text};
use crate::weights::place::Place;

/// File stems of model weights in diffusers and transformers.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// Fallback variant.
const HALF: &str = "fp16";

/// Number of names that one error lists.
const NAMES_SHOWN: usize = 10;

/// Locates the weight file or shard index of a model folder: that of `variant` if present, else the plain one, else
/// that of the variant fp16.
///
/// # Errors
/// Input: the folder holds none of them.
pub fn weights_in(folder: &Path, variant: Option<&str>) -> Result<PathBuf> {
    let wanted = variant.into_iter().flat_map(|variant| names(Some(variant)));
    let mut candidates = wanted.chain(names(None)).chain(names(Some(HALF))).map(|name| folder.join(name));
    candidates.find(|path| path.is_file()).ok_or_else(|| {
        Error::file(
            folder,
            "holds no diffusion_pytorch_model or model .safetensors, neither whole nor in shards, of any variant",
            "give a model folder in diffusers layout; pickles (.bin, .ckpt) are never read: convert them to safetensors",
        )
    })
}

/// Returns true if a model folder has weights of this variant.
pub fn has_variant(folder: &Path, variant: &str) -> bool {
    names(Some(variant)).iter().any(|name| folder.join(name).is_file())
}

/// File and index names of a variant. Two spellings of an index are in use: diffusers' current `_add_variant` and its
/// former one.
fn names(variant: Option<&str>) -> Vec<String> {
    let of = |stem: &str| match variant {
        None => vec![format!("{stem}.safetensors.index.json"), format!("{stem}.safetensors")],
        Some(variant) => vec![
            format!("{stem}.safetensors.index.{variant}.json"),
            format!("{stem}.{variant}.safetensors.index.json"),
            format!("{stem}.{variant}.safetensors"),
        ],
    };
    STEMS.into_iter().flat_map(of).collect()
}

/// Locates every tensor of a safetensors file, or of the shards that an index (`.json`) lists.
pub(super) fn places(path: &Path) -> Result<BTreeMap<String, Place>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return of_shards(path);
    }
    Ok(places_of(&Arc::new(SafetensorsFile::open(path)?)))
}

/// File name of shard `part` of `parts`, counted from 0, for weights whose single file would be `{stem}.safetensors`.
pub fn shard_name(stem: &str, part: usize, parts: usize) -> String {
    match parts {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{parts:05}.safetensors", part + 1),
    }
}

/// File name of the shard index.
pub fn index_name(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

/// Contents of the `*.safetensors.index.json` of sharded weights.
#[derive(Debug, Serialize)]
pub struct ShardIndex {
    metadata: ShardMetadata,
    /// Maps each tensor to its file beside the index.
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct ShardMetadata {
    /// Total size of all tensors in bytes.
    total_size: u64,
}

/// Keys read from an index. Its metadata is ignored: `total_size` is a float in some files.
#[derive(Debug, Deserialize)]
struct ReadIndex {
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Creates an index of shards with `total_size` bytes in all.
    pub fn new(total_size: u64, weight_map: BTreeMap<String, String>) -> Self {
        Self { metadata: ShardMetadata { total_size }, weight_map }
    }

    /// Writes the index atomically.
    ///
    /// # Errors
    /// Input: the path is not writable; Disk: the disk is full or failing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|problem| Error::Fault(format!("{}: cannot be written as JSON: {problem}", path.display())))?;
        write_whole(path, text.as_bytes())
    }
}

fn of_shards(path: &Path) -> Result<BTreeMap<String, Place>> {
    let index: ReadIndex = parse_json(&read_text(path)?).map_err(|problem| {
        Error::file(
            path,
            format!("is not an index of shards: {problem}"),
            "fetch the file again from the model's source",
        )
    })?;
    let mut shards = BTreeMap::new();
    for name in index.weight_map.values() {
        if shards.contains_key(name) {
            continue;
        }
        if !is_plain(name) || name.contains('/') {
            let problem = format!("names the shard `{name}`, which is not a plain file name");
            return Err(Error::file(path, problem, "use an index whose shards lie beside it"));
        }
        let shard = path.with_file_name(name);
        let file = SafetensorsFile::open(&shard).map_err(|error| match shard.exists() {
            true => error,
            false => Error::file(
                path,
                format!("names the shard {name}, which is not beside it"),
                "fetch all shards that the index names into this folder",
            ),
        })?;
        shards.insert(name, places_of(&Arc::new(file)));
    }
    let mut found = BTreeMap::new();
    let mut missing = Vec::new();
    for (name, shard) in &index.weight_map {
        match shards.get_mut(shard).and_then(|places| places.remove(name)) {
            Some(place) => _ = found.insert(name.clone(), place),
            None => missing.push(format!("{name} in {shard}")),
        }
    }
    let unnamed = shards.iter().flat_map(|(shard, places)| places.keys().map(move |name| format!("{name} in {shard}")));
    let unnamed: Vec<_> = unnamed.collect();
    for (names, problem) in [(missing, "names tensors that the shards lack"), (unnamed, "lacks tensors of its shards")]
    {
        if !names.is_empty() {
            let shown = names.iter().take(NAMES_SHOWN).map(String::as_str).collect::<Vec<_>>().join("\n    ");
            return Err(Error::file(
                path,
                format!("{problem}, {} in all:\n    {shown}", names.len()),
                "fetch index and shards again: they are of different models",
            ));
        }
    }
    Ok(found)
}

fn places_of(file: &Arc<SafetensorsFile>) -> BTreeMap<String, Place> {
    file.infos().map(|(name, info)| (name.to_owned(), Place::new(file, info))).collect()
}
