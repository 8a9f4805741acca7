//! The alphas that diffusers writes into a file's metadata: PEFT's `LoraConfig` of each part, keys joined by dots.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::sdxl::base_source::Part;
use crate::weights::SafetensorsFile;

/// The key of the metadata.
pub const ADAPTER_METADATA: &str = "lora_adapter_metadata";

/// What the metadata says; empty where there is none.
#[derive(Debug, Default)]
pub(super) struct Adapter(Map<String, Value>);

impl Adapter {
    /// # Errors
    /// Input for metadata that is no JSON, and for a DoRA.
    pub(super) fn of(file: &SafetensorsFile) -> Result<Self> {
        let Some(text) = file.metadata().get(ADAPTER_METADATA) else { return Ok(Self::default()) };
        let values: Map<String, Value> = serde_json::from_str(text).map_err(|problem| {
            Error::file(
                file.path(),
                format!("{ADAPTER_METADATA} in its metadata: {problem}"),
                "save the LoRA again with diffusers",
            )
        })?;
        if values.iter().any(|(key, value)| key.ends_with(".use_dora") && *value == Value::Bool(true)) {
            return Err(Error::file(
                file.path(),
                format!("is a DoRA ({ADAPTER_METADATA}), which is not supported"),
                "give a plain LoRA",
            ));
        }
        Ok(Self(values))
    }

    /// A module's alpha, times the root of the rank for `use_rslora`; the rank, which makes a scale of 1, where none is
    /// told.
    pub(super) fn alpha(&self, part: Part, path: &str, rank: usize) -> f32 {
        let part = part.folder();
        let get = |key: &str| self.0.get(&format!("{part}.{key}"));
        // A pattern names a module by the end of its path.
        let own = get("alpha_pattern").and_then(Value::as_object).and_then(|patterns| {
            patterns
                .iter()
                .find(|(end, _)| path.strip_suffix(end.as_str()).is_some_and(is_whole))
                .map(|(_, alpha)| alpha)
        });
        let rank = rank as f32;
        let Some(alpha) = own.or_else(|| get("lora_alpha")).and_then(Value::as_f64) else { return rank };
        let rooted = get("use_rslora") == Some(&Value::Bool(true));
        alpha as f32 * if rooted { rank.sqrt() } else { 1.0 }
    }
}

/// Whether a path's beginning ends where a name does.
fn is_whole(beginning: &str) -> bool {
    beginning.is_empty() || beginning.ends_with('.')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_alpha_of_its_own_comes_first_and_silence_means_the_rank() {
        let adapter = |value: Value| Adapter(value.as_object().cloned().unwrap_or_default());
        let told = adapter(json!({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}));
        assert_eq!(told.alpha(Part::Unet, "a.attn1.to_q", 4), 2.0);
        assert_eq!(told.alpha(Part::Unet, "attn1.to_q", 4), 2.0);
        assert_eq!(told.alpha(Part::Unet, "a.xattn1.to_q", 4), 8.0);
        assert_eq!(told.alpha(Part::Unet, "a.attn1.to_k", 4), 8.0);
        assert_eq!(told.alpha(Part::TextEncoder, "a.attn1.to_q", 4), 4.0);
        let rooted = adapter(json!({"unet.lora_alpha": 8, "unet.use_rslora": true}));
        assert_eq!(rooted.alpha(Part::Unet, "a", 4), 16.0);
    }
}
