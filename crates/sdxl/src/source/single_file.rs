//! Single-file checkpoint in Stability naming, as sd-scripts and ComfyUI write it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use hyperlora_core::{Error, Result};
use serde_json::{Map, Value, json};

use crate::source::component::Component;
use crate::source::key_names::KeyTable;
use crate::weights::{ConfigText, Form, SafetensorsFile, Weights};

/// Keys that mark a noise schedule other than SDXL's in a checkpoint that may otherwise be complete.
const OTHER_NOISE: [(&str, &str); 2] = [
    ("edm_mean", "a checkpoint of Playground 2.5, whose noise is not SDXL's"),
    ("edm_vpred.sigma_max", "a checkpoint with the noise of EDM, which is not SDXL's"),
];

/// Key prefixes that identify other kinds of single files when SDXL components are missing.
const OTHER_KINDS: [(&str, &str); 8] = [
    ("cond_stage_model.", "a checkpoint of Stable Diffusion 1 or 2"),
    ("conditioner.embedders.0.model.transformer.", "a checkpoint of the SDXL refiner"),
    ("model.diffusion_model.joint_blocks.", "a checkpoint of Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.", "a checkpoint of Flux"),
    ("double_blocks.", "a checkpoint of Flux"),
    ("bundle_emb.", "a LoRA with embeddings, not a base"),
    ("lora_", "a LoRA, not a base"),
    ("unet.", "a LoRA in diffusers naming, not a base"),
];

/// Unused keys within a component of a single file; an entry that ends in a dot is a prefix. They are training state
/// (losses, averages), buffers, and OpenCLIP's image half.
const UNNEEDED: [&str; 7] = [
    "conditioner.embedders.0.transformer.text_projection.",
    "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.logit_bias",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.visual.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
];

/// Buffer that text encoders compute themselves; its module differs between files.
const POSITION_IDS: &str = ".position_ids";

/// Number of ignored keys that the log names.
const PASSED_SHOWN: usize = 10;

/// Single file with all components, and the folder that describes it.
#[derive(Debug)]
pub(super) struct SingleFile {
    pub(super) file: Arc<SafetensorsFile>,
    /// Pipeline folder that provides configs and tokenizers.
    pub(super) config: Option<PathBuf>,
}

impl SingleFile {
    /// Opens a checkpoint, and logs the keys that are not read.
    ///
    /// # Errors
    /// Input: the file is missing, not safetensors, or of another kind, or a variant is given.
    pub(super) fn open(path: &Path, variant: Option<&str>, config: Option<&Path>) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        if variant.is_some() {
            return Err(Error::file(
                path,
                "is a single file, but a variant is given",
                "leave the variant out: it chooses among the files of a pipeline folder",
            ));
        }
        check_kind(&file)?;
        tell_passed_over(&file);
        Ok(Self { file: Arc::new(file), config: config.map(Path::to_path_buf) })
    }

    /// Tensors of a component under the names of `table`.
    pub(super) fn weights(&self, part: Component, table: &KeyTable, device: &Device) -> Weights {
        let rename = |key: &str| {
            let Some(name) = key.strip_prefix(part.prefix()).filter(|_| unneeded(key).is_none()) else {
                return Vec::new();
            };
            let names = table.to_diffusers(name);
            // An unknown key keeps its name, so that the model reports it as unknown.
            if names.is_empty() { vec![(key.to_owned(), Form::Same)] } else { names }
        };
        Weights::renamed(&self.file, rename, device)
    }

    /// Adds the file's marks to the config of the noise schedule: that it predicts velocity (key `v_pred`), and that it
    /// ends in pure noise (key `ztsnr`). ComfyUI reads the same marks.
    ///
    /// # Errors
    /// Input: the config is broken.
    pub(super) fn mark_schedule(&self, config: &ConfigText) -> Result<ConfigText> {
        let mut keys: Map<String, Value> = config.parse()?;
        for (mark, key, value) in
            [("v_pred", "prediction_type", json!("v_prediction")), ("ztsnr", "rescale_betas_zero_snr", json!(true))]
        {
            if self.file.entries().any(|entry| entry.name == mark) {
                keys.insert(key.into(), value);
            }
        }
        Ok(config.with_text(Value::Object(keys).to_string()))
    }
}

/// Rejects files that are not an SDXL base.
fn check_kind(file: &SafetensorsFile) -> Result<()> {
    let remedy =
        "give a single-file checkpoint of an SDXL base, such as sd_xl_base_1.0.safetensors, or a pipeline folder";
    let has = |beginning: &str| file.entries().any(|entry| entry.name.starts_with(beginning));
    let is = |kind: &str| Err(Error::file(file.path(), format!("is {kind}"), remedy));
    if let Some((_, kind)) = OTHER_NOISE.iter().find(|(key, _)| file.entries().any(|entry| entry.name == *key)) {
        return is(kind);
    }
    // A file with all components is an SDXL checkpoint, whatever other keys a tool has added.
    let Some(part) = Component::ALL.iter().find(|part| !has(part.prefix())) else { return Ok(()) };
    match OTHER_KINDS.iter().find(|(beginning, _)| has(beginning)) {
        Some((_, kind)) => is(kind),
        None => is(&format!("not a complete SDXL checkpoint: it has no keys {}* ({})", part.prefix(), part.folder())),
    }
}

/// Returns the entry of [`UNNEEDED`] that matches a key.
fn unneeded(key: &str) -> Option<&str> {
    let known = |name: &&str| key == *name || (name.ends_with('.') && key.starts_with(*name));
    let of_text = || key.starts_with("conditioner.embedders.") && key.ends_with(POSITION_IDS);
    UNNEEDED.into_iter().find(known).map(|name| name.trim_end_matches('.')).or_else(|| of_text().then_some(key))
}

/// Logs how many keys of a complete file are not read.
fn tell_passed_over(file: &SafetensorsFile) {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for entry in file.entries() {
        let of_a_part = Component::ALL.iter().any(|part| entry.name.starts_with(part.prefix()));
        let beside = || (!of_a_part).then(|| entry.name.split('.').next().unwrap_or_default());
        if let Some(name) = unneeded(&entry.name).or_else(beside) {
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return;
    }
    let mut shown: Vec<_> = counts
        .iter()
        .take(PASSED_SHOWN)
        .map(|(name, count)| if *count == 1 { name.clone() } else { format!("{name}.* ({count})") })
        .collect();
    if counts.len() > PASSED_SHOWN {
        shown.push(format!("and {} more", counts.len() - PASSED_SHOWN));
    }
    let (path, total) = (file.path().display(), counts.values().sum::<usize>());
    tracing::info!("{path}: {total} unused tensors are skipped: {}", shown.join(", "));
}
