//! Metadata of LoRA files that survives a change of layout.

use std::collections::BTreeMap;

use crate::lora::file::ADAPTER_METADATA;
use crate::weights::HASHES;

/// Metadata keys that are rewritten or dropped because names, bytes and title change. Hashes are dropped too: tools
/// recompute a missing hash but trust a present one.
const NOT_KEPT: [&str; 14] = [
    "format",
    ADAPTER_METADATA,
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_output_name",
    "modelspec.title",
    "modelspec.date",
    "modelspec.thumbnail",
    "modelspec.implementation",
    "modelspec.architecture",
    "modelspec.sai_model_spec",
];

/// Metadata key for the author's notes and our trigger words.
pub(crate) const COMMENT: &str = "ss_training_comment";

/// Filters metadata to the notes that remain valid in another layout.
pub(crate) fn notes_of(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let stale = |key: &str| NOT_KEPT.contains(&key) || HASHES.contains(&key);
    let kept = metadata.iter().filter(|(key, _)| !stale(key));
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}
