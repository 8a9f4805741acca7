//! Loads a hypernetwork from a folder in the released layout.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::weights::Weights;

use super::modules::{read_sites, unet_order};
use super::{BASES, ID_PROJECTOR, RESAMPLER, stems, weights_of};
use crate::hypernet::config::{HyperLoraConfig, ResamplerConfig};
use crate::hypernet::hyper_lora::HyperLora;
use crate::parameters::ParameterMapper;

impl HyperLora {
    /// Loads a released folder for a UNet with the attention modules `sites`. Module names may be in diffusers or
    /// Stability naming and in any order; tensors become f32.
    ///
    /// # Errors
    /// Input, naming the file and the mismatch: files are missing or broken, modules belong to another UNet, or tensors
    /// do not fit `config`; Disk: a read fails.
    pub fn load(folder: &Path, config: &HyperLoraConfig, sites: &[AttentionSite], device: &Device) -> Result<Self> {
        let own_sites = read_sites(folder)?;
        let unet_order = unet_order(folder, &own_sites, sites)?;
        // The seed is irrelevant, because every parameter is replaced before its values are drawn.
        let blank = Self { unet_order, ..Self::new(config, &own_sites, 0, device) };

        let files = open_all(folder, blank.has_base(), device)?;
        let loaded = blank.map_parameters(&mut FromFiles(&files));
        finish_all(files)?;
        Ok(loaded)
    }

    /// Reorders the LoRAs for a UNet with the attention modules `sites`. If the modules differ, the error names
    /// `folder`.
    ///
    /// # Errors
    /// Input: the hypernetwork is for other attention modules.
    pub fn order_for(&mut self, folder: &Path, sites: &[AttentionSite]) -> Result<()> {
        self.unet_order = unet_order(folder, &self.sites, sites)?;
        Ok(())
    }
}

impl HyperLoraConfig {
    /// Reads the sizes of the hypernetwork in a released folder. The files do not contain the head width, so it is
    /// given: 64 in the released weights.
    ///
    /// # Errors
    /// Input: files are missing or broken, or tensor shapes are not those of a hypernetwork.
    pub fn of_folder(folder: &Path, head_dim: usize) -> Result<Self> {
        // Only headers are read, so the device does not matter.
        let device = Device::flex();
        let bases = Weights::open(&weights_of(folder, BASES), &device)?;
        let resampler = Weights::open(&weights_of(folder, RESAMPLER), &device)?;
        let projector = Weights::open(&weights_of(folder, ID_PROJECTOR), &device)?;

        let dim = size(&resampler, "latents", 2)?;
        let inner = size(&resampler, "layers.0.attn1.to_q.weight", 0)?;
        if head_dim == 0 || !inner.is_multiple_of(head_dim) {
            return Err(Error::file(
                resampler.path(),
                format!("has attentions of width {inner}, which is not a multiple of the head width {head_dim}"),
                "give the head width that these weights were trained with (--head-dim; 64 in the released ones)",
            ));
        }
        let shapes = resampler.shapes();
        let layers =
            (0..).take_while(|layer| shapes.contains_key(format!("layers.{layer}.norm_ff.weight").as_str())).count();
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
                heads: inner / head_dim,
                head_dim,
                ff_mult: size(&resampler, "layers.0.ff.net.0.proj.weight", 0)? / dim.max(1),
            },
        };
        config.validate(&folder.display().to_string())?;
        Ok(config)
    }
}

/// Files of a folder, by stem.
pub(super) type OpenFiles = BTreeMap<&'static str, Weights>;

pub(super) fn open_all(folder: &Path, base: bool, device: &Device) -> Result<OpenFiles> {
    stems(base).map(|stem| Ok((stem, Weights::open(&weights_of(folder, stem), device)?))).collect()
}

/// Finishes loading all files and reports problems.
pub(super) fn finish_all(files: OpenFiles) -> Result<()> {
    let remedy = "give `hyper_lora` the sizes of these weights, or weights of its sizes";
    files.into_values().try_for_each(Weights::finish).map_err(|error| error.with_remedy(remedy))
}

fn size(weights: &Weights, key: &str, axis: usize) -> Result<usize> {
    weights.shapes().get(key).and_then(|shape| shape.get(axis)).copied().ok_or_else(|| {
        Error::file(weights.path(), format!("holds no {key} with {} axes", axis + 1), "give a HyperLoRA folder")
    })
}

/// Replaces every parameter with the tensor in the files.
struct FromFiles<'a>(&'a OpenFiles);

impl ParameterMapper for FromFiles<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((weights, key)) = name.split_once('.').and_then(|(stem, key)| Some((self.0.get(stem)?, key))) else {
            return parameter;
        };
        let shape: [usize; D] = parameter.lazy_shape().dims();
        let tensor = match key.strip_suffix(".weight") {
            // Transposing once here fixes the layout. With a view, the layout, and with it the rounding, could vary.
            Some(layer) if D == 2 => weights.at(layer).linear(shape[0], shape[1], false).weight.val().reshape(shape),
            _ => weights.at("").tensor(key, shape),
        };
        let id = parameter.id;
        parameter.transform_for_load(tensor, id)
    }
}
