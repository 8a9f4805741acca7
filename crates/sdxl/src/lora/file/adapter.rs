//! LoRA alphas from diffusers metadata (PEFT's `LoraConfig` of each component, keys joined by dots), or from the config
//! that PEFT saves beside the file.

use std::path::Path;

use hyperlora_core::Error;
use serde_json::{Map, Value};

use crate::source::Component;
use crate::weights::{SafetensorsFile, parse_json, read_text};

/// Metadata key of the adapter config.
pub const ADAPTER_METADATA: &str = "lora_adapter_metadata";

/// File names of an adapter and its `LoraConfig` as saved by PEFT.
const PEFT_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_config.json"];

/// Characters that mark a regular expression rather than a path. A dot counts as literal.
const OF_EXPRESSIONS: &str = "\\^$*+?()[]{}|";

/// Adapter config; empty if the file has none.
#[derive(Debug, Default)]
pub(super) struct Adapter(Map<String, Value>);

impl Adapter {
    /// Reads the adapter config from the file's metadata, or from PEFT's config beside it.
    ///
    /// # Errors
    /// Input: the metadata or PEFT config is not JSON, or the adapter is a DoRA.
    pub(super) fn of(file: &SafetensorsFile) -> hyperlora_core::Result<Self> {
        let Some(text) = file.metadata().get(ADAPTER_METADATA) else { return Self::beside(file.path()) };
        let values: Map<String, Value> = parse_json(text).map_err(|problem| {
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

    /// Reads PEFT's config beside the file, for the UNet only: a text encoder's file does not say which encoder it is
    /// for.
    fn beside(path: &Path) -> hyperlora_core::Result<Self> {
        let config = path.with_file_name(PEFT_FILES[1]);
        if path.file_name().is_none_or(|name| name != PEFT_FILES[0]) || !config.exists() {
            return Ok(Self::default());
        }
        let values: Map<String, Value> = parse_json(&read_text(&config)?)
            .map_err(|problem| Error::file(&config, problem, "save the adapter again with PEFT"))?;
        if values.get("use_dora") == Some(&Value::Bool(true)) {
            return Err(Error::file(&config, "describes a DoRA, which is not supported", "give a plain LoRA"));
        }
        let part = Component::Unet.folder();
        Ok(Self(values.into_iter().map(|(key, value)| (format!("{part}.{key}"), value)).collect()))
    }

    /// Alpha of a module, times the square root of the rank for `use_rslora`. Defaults to the rank, which makes the
    /// scale 1. The error reports a value that is not a number.
    pub(super) fn alpha(&self, part: Component, path: &str, rank: usize) -> Result<f32, String> {
        let part = part.folder();
        let get = |key: &str| self.0.get(&format!("{part}.{key}"));
        // A pattern matches the end of a module's path.
        let patterns = get("alpha_pattern").and_then(Value::as_object);
        let expression = patterns.into_iter().flatten().find(|(end, _)| end.contains(|c| OF_EXPRESSIONS.contains(c)));
        if let Some((expression, _)) = expression {
            return Err(format!("{path}: alpha_pattern holds the regular expression {expression}, which is not read"));
        }
        let own = patterns.and_then(|patterns| {
            patterns
                .iter()
                .find(|(end, _)| path.strip_suffix(end.as_str()).is_some_and(is_whole))
                .map(|(_, alpha)| alpha)
        });
        let rank = rank as f32;
        let Some(told) = own.or_else(|| get("lora_alpha")).filter(|told| !told.is_null()) else { return Ok(rank) };
        let alpha = told.as_f64().map(|alpha| alpha as f32).filter(|alpha| alpha.is_finite());
        let alpha =
            alpha.ok_or_else(|| format!("{path}: its alpha in {ADAPTER_METADATA} is {told}, not a finite number"))?;
        let rooted = get("use_rslora") == Some(&Value::Bool(true));
        Ok(alpha * if rooted { rank.sqrt() } else { 1.0 })
    }
}

/// Returns true if a path prefix ends at a name boundary.
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
        assert_eq!(told.alpha(Component::Unet, "a.attn1.to_q", 4), Ok(2.0));
        assert_eq!(told.alpha(Component::Unet, "attn1.to_q", 4), Ok(2.0));
        assert_eq!(told.alpha(Component::Unet, "a.xattn1.to_q", 4), Ok(8.0));
        assert_eq!(told.alpha(Component::Unet, "a.attn1.to_k", 4), Ok(8.0));
        assert_eq!(told.alpha(Component::TextEncoder, "a.attn1.to_q", 4), Ok(4.0));
        let unheard = adapter(json!({"unet.lora_alpha": "NaN", "unet.alpha_pattern": {"a": null}}));
        assert_eq!(unheard.alpha(Component::Unet, "a", 4), Ok(4.0));
        assert!(unheard.alpha(Component::Unet, "b", 4).is_err_and(|told| told.contains("NaN")));
        let expression = adapter(json!({"unet.lora_alpha": 8, "unet.alpha_pattern": {".*attn1.*": 2}}));
        assert!(expression.alpha(Component::Unet, "b", 4).is_err_and(|told| told.contains(".*attn1.*")));
        let rooted = adapter(json!({"unet.lora_alpha": 8, "unet.use_rslora": true}));
        assert_eq!(rooted.alpha(Component::Unet, "a", 4), Ok(16.0));
    }
}
