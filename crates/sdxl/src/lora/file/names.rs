//! Module names of a base in LoRA files and in diffusers.

use hyperlora_core::Result;

use crate::source::Component;
use crate::source::key_names::KeyTable;

/// Names that contain an underscore. In paths with underscores for dots they must be kept in one piece.
const COMPOUNDS: [&str; 26] = [
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "linear_1",
    "linear_2",
    "text_model",
    "text_projection",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "token_embedding",
];

/// Names without an underscore in the paths of linears and convolutions.
const SIMPLE: [&str; 18] = [
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "attn1",
    "attn2",
    "ff",
    "net",
    "proj",
    "conv",
    "conv1",
    "conv2",
    "encoder",
    "layers",
    "mlp",
    "fc1",
    "fc2",
    "embeddings",
];

/// Path prefix of text modules in published files. Recent transformers omit it.
pub(super) const TEXT_MODEL: &str = "text_model.";

/// Maps a module path of a LoRA file, with dots or underscores, in diffusers or Stability naming, to its diffusers
/// path. `None` if SDXL has no such module.
///
/// # Errors
/// Fault: the built-in config does not parse.
pub fn diffusers_path(part: Component, path: &str) -> Result<Option<String>> {
    let flat = path.replace('.', "_");
    let flat = match part {
        Component::Unet => KeyTable::of_sdxl()?.to_diffusers(&flat).into_iter().next().map_or(flat, |(name, _)| name),
        Component::TextEncoder | Component::TextEncoder2 => flat,
        Component::Vae => return Ok(None),
    };
    let Some(dotted) = dotted(&flat) else { return Ok(None) };
    let bare = part != Component::Unet && dotted.starts_with("encoder.");
    Ok(Some(if bare { format!("{TEXT_MODEL}{dotted}") } else { dotted }))
}

/// Module name in a file of kohya's sd-scripts.
pub fn kohya(part: Component, path: &str) -> String {
    let prefix = match part {
        Component::Unet => "lora_unet",
        Component::TextEncoder => "lora_te1",
        Component::TextEncoder2 => "lora_te2",
        Component::Vae => "lora_vae",
    };
    format!("{prefix}_{}", path.replace('.', "_"))
}

/// Restores the dots of a diffusers path.
fn dotted(path: &str) -> Option<String> {
    let mut names = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        let starts =
            |name: &&&str| rest.strip_prefix(**name).is_some_and(|after| after.is_empty() || after.starts_with('_'));
        // No compound is a prefix of another at an underscore, so the first match is the right one.
        let name = match COMPOUNDS.iter().find(starts) {
            Some(name) => name,
            None => rest.split('_').next().filter(|name| {
                SIMPLE.contains(name) || (!name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()))
            })?,
        };
        names.push(name);
        rest = rest[name.len()..].strip_prefix('_').unwrap_or("");
    }
    Some(names.join("."))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use flate2::read::GzDecoder;

    use super::*;

    type Shapes = BTreeMap<String, Vec<usize>>;

    #[derive(serde::Deserialize)]
    struct Lists {
        diffusers: BTreeMap<String, Shapes>,
        stability: BTreeMap<String, Single>,
    }

    /// A tensor of a single file and its diffusers names.
    #[derive(serde::Deserialize)]
    struct Single {
        shape: Vec<usize>,
        from: Vec<String>,
    }

    #[test]
    fn every_module_of_sdxl_is_found_in_every_naming() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../testing/fixtures/key_lists.json.gz");
        let lists: Lists = serde_json::from_reader(GzDecoder::new(std::fs::File::open(path).unwrap())).unwrap();
        let parts = [
            ("unet", Component::Unet),
            ("text_encoder", Component::TextEncoder),
            ("text_encoder_2", Component::TextEncoder2),
        ];
        let modules = |shapes: &Shapes| -> Vec<String> {
            let weighty = shapes.iter().filter(|(_, shape)| matches!(shape.len(), 2 | 4));
            let modules = weighty.filter_map(|(name, _)| Some(name.strip_suffix(".weight")?.to_owned()));
            modules.filter(|name| !name.contains("position_embedding")).collect()
        };
        let found = |part, path: &str| diffusers_path(part, path).unwrap();
        for (name, part) in parts {
            let modules = modules(&lists.diffusers[name]);
            assert!(modules.len() > 70, "{name}: {}", modules.len());
            for module in modules {
                let module = module.strip_prefix(TEXT_MODEL).unwrap_or(&module);
                let full = if part != Component::Unet && module.starts_with("encoder.") {
                    format!("{TEXT_MODEL}{module}")
                } else {
                    module.to_owned()
                };
                for spelled in [&full, &full.replace('.', "_"), module] {
                    assert_eq!(found(part, spelled).as_deref(), Some(full.as_str()), "{spelled}");
                }
            }
        }
        let in_unet = lists.stability.iter().filter(|(_, single)| matches!(single.shape.len(), 2 | 4));
        let mut count = 0;
        for (name, Single { from, .. }) in in_unet {
            let module = name.strip_prefix("model.diffusion_model.").and_then(|name| name.strip_suffix(".weight"));
            let Some(module) = module else { continue };
            let path = found(Component::Unet, module).unwrap();
            assert_eq!(*from, [format!("{path}.weight")], "{module}");
            assert_eq!(found(Component::Unet, &module.replace('.', "_")), Some(path));
            count += 1;
        }
        assert_eq!(count, modules(&lists.diffusers["unet"]).len());
        for wrong in ["", "core_to_q", "down_blocks__to_q", "down_blocks_1_foo"] {
            assert_eq!(found(Component::Unet, wrong).filter(|path| !path.is_empty()), None, "{wrong}");
        }
    }
}
