//! The released folder: one JSON of attention modules and a safetensors file per part.
//!
//! ```text
//! hyper_lora_modules.json          LoRA prefix -> {"hidden_size", "cross_attention_dim"}, in module order
//! hyper_lora_modules.safetensors   {i}.{to_q|to_k|to_v|to_out}.{id|base}_{down|up}_basis
//! resampler.safetensors            id_projector.safetensors
//! base_resampler.safetensors       where there is a Base-LoRA
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Bytes, Device, FloatDType, Tensor};
use data_prep::files::{StagedFolder, write_whole};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::{HyperLoraConfig, ResamplerConfig};
use super::hyper_lora::HyperLora;
use super::parameters::{ParameterMapper, ParameterVisitor};
use crate::error::{Error, Result};
use crate::lora::AttentionSite;
use crate::weights::{self, TensorEntry, Weights};

const MODULES_JSON: &str = "hyper_lora_modules.json";
const BASES: &str = "hyper_lora_modules";
const RESAMPLER: &str = "resampler";
const ID_PROJECTOR: &str = "id_projector";
const BASE_RESAMPLER: &str = "base_resampler";

/// What the JSON says of one attention module.
#[derive(Debug, Serialize, Deserialize)]
struct SiteEntry {
    hidden_size: usize,
    cross_attention_dim: Option<usize>,
}

impl HyperLora {
    /// Writes the folder `target`, whole or not at all, in the place of one that stood there.
    ///
    /// # Errors
    /// Input for a place that cannot be written to, Disk for a full or failing disk, Fault when the device fails.
    pub fn save(&self, target: &Path, dtype: FloatDType) -> Result<()> {
        let staged = StagedFolder::new(target)?;
        self.save_files(staged.path(), dtype)?;
        staged.commit()
    }

    /// Writes the files of [`save`](Self::save) into a folder that exists.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_files(&self, folder: &Path, dtype: FloatDType) -> Result<()> {
        let mut sites = Map::new();
        for site in &self.sites {
            let entry = SiteEntry { hidden_size: site.hidden_size, cross_attention_dim: site.cross_attention_dim };
            let entry = serde_json::to_value(entry).map_err(|problem| Error::Fault(problem.to_string()))?;
            sites.insert(site.lora_prefix(), entry);
        }
        let json =
            serde_json::to_vec_pretty(&Value::Object(sites)).map_err(|problem| Error::Fault(problem.to_string()))?;
        write_whole(&folder.join(MODULES_JSON), &json)?;

        let mut files = FileTensors { dtype, tensors: BTreeMap::new() };
        self.visit_parameters(&mut files);
        files.tensors.iter().try_for_each(|(stem, tensors)| save_file(&file(folder, stem), tensors, dtype))
    }

    /// Reads a released folder for a UNet with the attention modules `sites`. Modules may be named in diffusers or in
    /// Stability naming, and stand in any order; tensors become f32.
    ///
    /// # Errors
    /// Input, naming the file and what does not fit, for missing or broken files, modules of another UNet, and tensors
    /// that do not fit `config`; Disk when reading fails.
    pub fn load(folder: &Path, config: &HyperLoraConfig, sites: &[AttentionSite], device: &Device) -> Result<Self> {
        let own_sites = read_sites(folder)?;
        let unet_order = unet_order(folder, &own_sites, sites)?;
        // No value of this seed is ever drawn: every parameter is replaced before it is read.
        let blank = Self { unet_order, ..Self::new(config, &own_sites, 0, device) };

        let mut files = BTreeMap::new();
        for stem in [BASES, RESAMPLER, ID_PROJECTOR, BASE_RESAMPLER] {
            if stem != BASE_RESAMPLER || blank.has_base() {
                files.insert(stem, Weights::open(&file(folder, stem), device)?);
            }
        }
        let loaded = blank.map_parameters(&mut FromFiles(&files));
        files.into_values().try_for_each(Weights::finish)?;
        Ok(loaded)
    }
}

impl HyperLoraConfig {
    /// The sizes of the hypernetwork in a released folder. The files do not tell the width of a head: it is given, 64 in
    /// the released weights.
    ///
    /// # Errors
    /// Input for missing or broken files, and for tensors whose shapes are not those of a hypernetwork.
    pub fn of_folder(folder: &Path, head_dim: usize) -> Result<Self> {
        // Only headers are read: where tensors would go does not matter.
        let device = Device::flex();
        let bases = Weights::open(&file(folder, BASES), &device)?;
        let resampler = Weights::open(&file(folder, RESAMPLER), &device)?;
        let projector = Weights::open(&file(folder, ID_PROJECTOR), &device)?;

        let dim = size(&resampler, "latents", 2)?;
        let inner = size(&resampler, "layers.0.attn1.to_q.weight", 0)?;
        let layers = resampler.shapes().into_keys().filter(|key| key.ends_with(".norm_ff.weight")).count();
        let width = size(&projector, "2.weight", 0)?;
        let has_base = bases.shapes().contains_key("0.to_q.base_down_basis");
        let config = Self {
            id_rank: size(&bases, "0.to_q.id_down_basis", 2)?,
            base_rank: if has_base { size(&bases, "0.to_q.base_down_basis", 2)? } else { 0 },
            basis: size(&resampler, "proj_out.weight", 0)?,
            id_tokens: size(&projector, "0.weight", 0)? / width.max(1),
            id_embedding_dim: size(&projector, "0.weight", 1)?,
            clip_dim: width,
            resampler: ResamplerConfig {
                dim,
                depth: layers,
                heads: inner / head_dim.max(1),
                head_dim,
                ff_mult: size(&resampler, "layers.0.ff.net.0.proj.weight", 0)? / dim.max(1),
            },
        };
        config.validate(&folder.display().to_string())?;
        Ok(config)
    }
}

fn file(folder: &Path, stem: &str) -> std::path::PathBuf {
    folder.join(format!("{stem}.safetensors"))
}

fn size(weights: &Weights, key: &str, axis: usize) -> Result<usize> {
    weights.shapes().get(key).and_then(|shape| shape.get(axis)).copied().ok_or_else(|| {
        Error::file(weights.path(), format!("holds no {key} with {} axes", axis + 1), "give a HyperLoRA folder")
    })
}

/// Gathers the tensors of every file, by the file's stem and the key in it. They stay on their device until written.
struct FileTensors {
    dtype: FloatDType,
    tensors: BTreeMap<String, BTreeMap<String, FileTensor>>,
}

/// One tensor of a file.
struct FileTensor {
    /// As the file lays it out.
    shape: Vec<usize>,
    /// Fetches it from its device, laid out so.
    bytes: Box<dyn Fn() -> Result<Bytes>>,
}

impl ParameterVisitor for FileTensors {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let Some((stem, key)) = name.split_once('.') else { return };
        let mut shape = parameter.dims().to_vec();
        // Linear weights are the only matrices; the bases have three axes.
        if D == 2 {
            shape.reverse();
        }
        let (tensor, dtype, name) = (parameter.val().inner(), self.dtype, name.to_owned());
        let bytes = move || {
            let tensor = tensor.clone().cast(dtype);
            weights::bytes_of(if D == 2 { tensor.swap_dims(0, 1) } else { tensor }, &name)
        };
        let tensor = FileTensor { shape, bytes: Box::new(bytes) };
        self.tensors.entry(stem.into()).or_default().insert(key.into(), tensor);
    }
}

fn save_file(path: &Path, tensors: &BTreeMap<String, FileTensor>, dtype: FloatDType) -> Result<()> {
    let entries = tensors.iter().map(|(key, tensor)| TensorEntry::new(key, dtype.into(), tensor.shape.clone()));
    weights::save_lazily(path, BTreeMap::new(), entries.collect::<Result<_>>()?, |entry| {
        let tensor = tensors.get(&entry.name);
        (tensor.ok_or_else(|| Error::Fault(format!("no parameter is named {}", entry.name)))?.bytes)()
    })
}

/// Puts what the files hold in the place of every parameter.
struct FromFiles<'a>(&'a BTreeMap<&'static str, Weights>);

impl ParameterMapper for FromFiles<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((weights, key)) = name.split_once('.').and_then(|(stem, key)| Some((self.0.get(stem)?, key))) else {
            return parameter;
        };
        let shape: [usize; D] = parameter.lazy_shape().dims();
        let tensor = match key.strip_suffix(".weight") {
            // The transpose is made once, here: a view would leave the layout, and with it the rounding, to chance.
            Some(layer) if D == 2 => weights.at(layer).linear(shape[0], shape[1], false).weight.val().reshape(shape),
            _ => weights.at("").tensor(key, shape),
        };
        let id = parameter.id;
        parameter.transform_for_load(tensor, id)
    }
}

/// The attention modules that a released folder is for, in its order.
///
/// # Errors
/// Input for a missing or broken `hyper_lora_modules.json`.
pub fn read_sites(folder: &Path) -> Result<Vec<AttentionSite>> {
    let path = folder.join(MODULES_JSON);
    let wrong = |problem: String| Error::file(&path, problem, "give the file that belongs to these weights");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::read(&path, source))?;
    let entries: Map<String, Value> = serde_json::from_str(&text).map_err(|problem| wrong(problem.to_string()))?;
    let site = |(prefix, entry): (String, Value)| {
        let path = unet_path(&prefix).ok_or_else(|| {
            wrong(format!("{prefix}: not an attention module of a UNet in diffusers or Stability naming"))
        })?;
        let entry: SiteEntry =
            serde_json::from_value(entry).map_err(|problem| wrong(format!("{prefix}: {problem}")))?;
        Ok(AttentionSite { path, hidden_size: entry.hidden_size, cross_attention_dim: entry.cross_attention_dim })
    };
    entries.into_iter().map(site).collect()
}

/// For each attention module of the UNet, its place among the folder's.
fn unet_order(folder: &Path, own: &[AttentionSite], unet: &[AttentionSite]) -> Result<Vec<usize>> {
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

/// The diffusers path of a LoRA prefix in diffusers or Stability naming.
///
/// Stability counts the modules of all blocks through; SDXL has three to a block (two of them with attention going
/// down, behind one input convolution).
fn unet_path(prefix: &str) -> Option<String> {
    let parts: Vec<&str> = prefix.strip_prefix("lora_unet_")?.split('_').collect();
    let (module, rest) = match parts.as_slice() {
        ["down", "blocks", block, "attentions", i, rest @ ..] => (format!("down_blocks.{block}.attentions.{i}"), rest),
        ["up", "blocks", block, "attentions", i, rest @ ..] => (format!("up_blocks.{block}.attentions.{i}"), rest),
        ["mid", "block", "attentions", i, rest @ ..] => (format!("mid_block.attentions.{i}"), rest),
        ["input", "blocks", i, "1", rest @ ..] => {
            let i = i.parse::<usize>().ok()?.checked_sub(1)?;
            (format!("down_blocks.{}.attentions.{}", i / 3, i % 3), rest)
        }
        ["output", "blocks", i, "1", rest @ ..] => {
            let i = i.parse::<usize>().ok()?;
            (format!("up_blocks.{}.attentions.{}", i / 3, i % 3), rest)
        }
        ["middle", "block", "1", rest @ ..] => ("mid_block.attentions.0".into(), rest),
        _ => return None,
    };
    match rest {
        ["transformer", "blocks", i, attention] => Some(format!("{module}.transformer_blocks.{i}.{attention}")),
        _ => None,
    }
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
                assert_eq!(unet_path(&prefix), Some(format!("{path}.transformer_blocks.7.attn2")));
            }
        }
        for wrong in ["down_blocks_1", "lora_unet_input_blocks_0_1_transformer_blocks_0_attn1", "lora_unet_x", ""] {
            assert_eq!(unet_path(wrong), None, "{wrong}");
        }
    }
}
