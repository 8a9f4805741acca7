//! Writes a LoRA file in the layout of kohya's sd-scripts or of diffusers and PEFT.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::lora::file::{ADAPTER_METADATA, names};
use crate::lora::{LoraModule, LoraSet};
use crate::source::Component;
use crate::weights::{self, TensorEntry};

/// Layouts of written LoRA files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `lora_unet_{path}.{lora_down.weight, lora_up.weight, alpha}`: sd-scripts, ComfyUI, the WebUIs, diffusers.
    Kohya,
    /// `unet.{path}.{lora_A.weight, lora_B.weight}`, alphas in the metadata: diffusers with PEFT.
    Diffusers,
}

impl LoraSet {
    /// Writes the file `path` atomically. Matrices keep their bits, and the same LoRA gives the same bytes.
    ///
    /// # Errors
    /// Input: the path is not writable; Disk: the disk is full or failing.
    pub fn save(&self, path: &Path, layout: Layout) -> Result<()> {
        let mut metadata = self.notes.clone();
        let mut tensors: BTreeMap<String, Stored<'_>> = BTreeMap::new();
        for ((part, name), module) in &self.modules {
            let (key, sides) = match layout {
                Layout::Kohya => (names::kohya(*part, name), ["lora_down", "lora_up"]),
                Layout::Diffusers => (format!("{}.{name}", part.folder()), ["lora_A", "lora_B"]),
            };
            for (side, matrix) in sides.into_iter().zip([&module.down, &module.up]) {
                let stored =
                    Stored { dtype: matrix.dtype, shape: &matrix.shape, bytes: matrix.bytes.as_slice().into() };
                tensors.insert(format!("{key}.{side}.weight"), stored);
            }
            if layout == Layout::Kohya {
                let bytes = module.alpha.to_le_bytes().to_vec().into();
                tensors.insert(format!("{key}.alpha"), Stored { dtype: Dtype::F32, shape: &[], bytes });
            }
        }
        match layout {
            Layout::Kohya => metadata.extend(self.kohya_notes()),
            Layout::Diffusers => _ = metadata.insert(ADAPTER_METADATA.into(), self.adapter_metadata()?),
        }
        let entries = tensors
            .iter()
            .map(|(name, stored)| TensorEntry { name: name.clone(), dtype: stored.dtype, shape: stored.shape.to_vec() })
            .collect();
        weights::save_lazily(path, metadata, entries, |entry| {
            let stored = tensors.get(&entry.name);
            stored.map(|stored| stored.bytes.clone()).ok_or_else(|| Error::Fault(format!("no {}", entry.name)))
        })
    }

    /// sd-scripts metadata that tools display. Rank and alpha appear only if all modules share them.
    fn kohya_notes(&self) -> BTreeMap<String, String> {
        let fixed = [("ss_network_module", "networks.lora"), ("ss_base_model_version", "sdxl_base_v1-0")];
        let mut notes: BTreeMap<String, String> = fixed.map(|(key, value)| (key.into(), value.into())).into();
        let shared = |value: fn(&LoraModule) -> f32| {
            let mut values = self.modules.values().map(value);
            let first = values.next()?;
            values.all(|value| value == first).then(|| first.to_string())
        };
        let told = [("ss_network_dim", shared(|m| m.rank() as f32)), ("ss_network_alpha", shared(|m| m.alpha))];
        notes.extend(told.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
        notes
    }

    /// PEFT's `LoraConfig` of each component, keys joined by dots. Diffusers reads ranks and alphas from it.
    fn adapter_metadata(&self) -> Result<String> {
        let mut adapter = Map::new();
        for part in [Component::Unet, Component::TextEncoder, Component::TextEncoder2] {
            let modules = || self.modules.iter().filter(|((of, _), _)| *of == part).map(|((_, name), m)| (name, m));
            let Some((_, first)) = modules().next() else { continue };
            let (rank, alpha) = (first.rank(), first.alpha);
            let pattern = |differs: &dyn Fn(&LoraModule) -> Option<Value>| {
                Value::Object(modules().filter_map(|(name, module)| Some((name.clone(), differs(module)?))).collect())
            };
            let ranks = pattern(&|module| (module.rank() != rank).then(|| module.rank().into()));
            let alphas = pattern(&|module| (module.alpha != alpha).then(|| number(module.alpha)));
            let targets: Vec<Value> = modules().map(|(name, _)| name.as_str().into()).collect();
            let fields = [
                ("r", rank.into()),
                ("lora_alpha", number(alpha)),
                ("rank_pattern", ranks),
                ("alpha_pattern", alphas),
                ("target_modules", targets.into()),
            ];
            let name = part.folder();
            adapter.extend(fields.map(|(key, value)| (format!("{name}.{key}"), value)));
        }
        serde_json::to_string(&adapter).map_err(|problem| Error::Fault(format!("{ADAPTER_METADATA}: {problem}")))
    }
}

/// A tensor of the file.
struct Stored<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    bytes: std::borrow::Cow<'a, [u8]>,
}

/// Writes whole numbers as integers, as PEFT does for alphas.
fn number(alpha: f32) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e9 { Value::from(alpha as i64) } else { Value::from(alpha) }
}
