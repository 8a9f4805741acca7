//! Attention modules of a folder and their order, in JSON.

use std::collections::HashSet;
use std::path::Path;

use hyperlora_core::files::write_whole;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::lora::file::names::diffusers_path;
use hyperlora_sdxl::source::Component;
use hyperlora_sdxl::weights::{parse_json, read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::MODULES_JSON;

/// Width limit of an attention module, so that a wrong JSON does not exhaust the memory.
const LARGEST: usize = 1 << 16;

/// JSON entry of one attention module.
#[derive(Debug, Serialize, Deserialize)]
struct SiteEntry {
    hidden_size: usize,
    cross_attention_dim: Option<usize>,
}

/// Reads the attention modules of a released folder, in its order.
///
/// # Errors
/// Input: `hyper_lora_modules.json` is missing or broken.
pub fn read_sites(folder: &Path) -> Result<Vec<AttentionSite>> {
    let path = folder.join(MODULES_JSON);
    let wrong = |problem: String| Error::file(&path, problem, "give the file that belongs to these weights");
    let entries: Map<String, Value> = parse_json(&read_text(&path)?).map_err(|problem| wrong(problem.to_string()))?;
    if entries.is_empty() {
        return Err(wrong("lists no attention modules".into()));
    }
    let mut seen = HashSet::new();
    let site = |(prefix, entry): (String, Value)| {
        let path = unet_path(&prefix)?.ok_or_else(|| {
            wrong(format!("{prefix}: not an attention module of a UNet in diffusers or Stability naming"))
        })?;
        let entry: SiteEntry =
            serde_json::from_value(entry).map_err(|problem| wrong(format!("{prefix}: {problem}")))?;
        let widths = [Some(entry.hidden_size), entry.cross_attention_dim];
        if let Some(width) = widths.into_iter().flatten().find(|width| !(1..=LARGEST).contains(width)) {
            return Err(wrong(format!("{prefix}: a width of {width}, 1 to {LARGEST} are possible")));
        }
        if !seen.insert(path.clone()) {
            return Err(wrong(format!("{prefix}: the module {path} is listed twice")));
        }
        Ok(AttentionSite { path, hidden_size: entry.hidden_size, cross_attention_dim: entry.cross_attention_dim })
    };
    entries.into_iter().map(site).collect()
}

/// Writes the JSON of `sites`, in diffusers naming.
pub(super) fn write_sites(path: &Path, sites: &[AttentionSite]) -> Result<()> {
    let fault = |problem: serde_json::Error| Error::Fault(format!("{MODULES_JSON}: {problem}"));
    let mut entries = Map::new();
    for site in sites {
        let entry = SiteEntry { hidden_size: site.hidden_size, cross_attention_dim: site.cross_attention_dim };
        entries.insert(site.lora_prefix(), serde_json::to_value(entry).map_err(fault)?);
    }
    write_whole(path, &serde_json::to_vec_pretty(&entries).map_err(fault)?)
}

/// Index among the folder's attention modules of each module of the UNet.
pub(super) fn unet_order(folder: &Path, own: &[AttentionSite], unet: &[AttentionSite]) -> Result<Vec<usize>> {
    let wrong = |problem: String| {
        let remedy = "use the base model (or one of its architecture) that this hypernetwork was trained on";
        Error::file(&folder.join(MODULES_JSON), problem, remedy)
    };
    if own.len() != unet.len() {
        return Err(wrong(format!("lists {} attention modules, the UNet has {}", own.len(), unet.len())));
    }
    let place = |site: &AttentionSite| {
        let found = own.iter().position(|candidate| candidate.path == site.path);
        match found.map(|i| (i, &own[i])) {
            Some((i, candidate)) if candidate == site => Ok(i),
            Some((_, candidate)) => Err(wrong(format!(
                "{}: hidden_size {}, cross_attention_dim {:?}; the UNet has {}, {:?}",
                site.path,
                candidate.hidden_size,
                candidate.cross_attention_dim,
                site.hidden_size,
                site.cross_attention_dim
            ))),
            None => Err(wrong(format!("lacks the UNet's {}", site.path))),
        }
    };
    unet.iter().map(place).collect()
}

/// Diffusers path of an attention module, from its LoRA prefix in diffusers or Stability naming.
fn unet_path(prefix: &str) -> Result<Option<String>> {
    let Some(name) = prefix.strip_prefix("lora_unet_") else { return Ok(None) };
    let path = diffusers_path(Component::Unet, name)?;
    Ok(path.filter(|path| path.ends_with(".attn1") || path.ends_with(".attn2")))
}

#[cfg(test)]
mod tests {
    use super::unet_path;

    #[test]
    fn both_namings_lead_to_the_same_path() {
        let pairs = [
            ("input_blocks_4_1", "down_blocks_1_attentions_0", "down_blocks.1.attentions.0"),
            ("input_blocks_8_1", "down_blocks_2_attentions_1", "down_blocks.2.attentions.1"),
            ("middle_block_1", "mid_block_attentions_0", "mid_block.attentions.0"),
            ("output_blocks_2_1", "up_blocks_0_attentions_2", "up_blocks.0.attentions.2"),
            ("output_blocks_5_1", "up_blocks_1_attentions_2", "up_blocks.1.attentions.2"),
        ];
        for (stability, diffusers, path) in pairs {
            for module in [stability, diffusers] {
                let prefix = format!("lora_unet_{module}_transformer_blocks_7_attn2");
                assert_eq!(unet_path(&prefix).unwrap(), Some(format!("{path}.transformer_blocks.7.attn2")));
            }
        }
        for wrong in [
            "down_blocks_1",
            "lora_te1_down_blocks_1_attentions_0_transformer_blocks_7_attn2",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_7_attn2_to_q",
            "lora_unet_input_blocks_0_1_transformer_blocks_0_attn1",
            "lora_unet_x",
            "",
        ] {
            assert_eq!(unet_path(wrong).unwrap(), None, "{wrong}");
        }
    }
}
