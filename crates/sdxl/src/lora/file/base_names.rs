//! What LoRA files call the modules of a base.

use std::collections::HashMap;

use burn::tensor::Device;
use hyperlora_core::Result;

use crate::lora::file::names::TEXT_MODEL;
use crate::source::{BaseSource, Part};

/// The weights of a base that a LoRA can change, under every name that LoRA files have for their modules.
#[derive(Debug, Default)]
pub struct BaseNames {
    /// Part and module to the weight's name and shape.
    weights: HashMap<(Part, String), (String, Vec<usize>)>,
}

impl BaseNames {
    /// The names of a base's modules. Only headers and configs are read.
    ///
    /// # Errors
    /// As [`BaseSource::weights`] and [`BaseSource::table`].
    pub fn of(base: &BaseSource) -> Result<Self> {
        let mut this = Self::default();
        let unet = base.table(Part::Unet)?;
        for part in [Part::Unet, Part::TextEncoder, Part::TextEncoder2] {
            // Nothing is read: where tensors would stand does not matter.
            let weights = base.weights(part, &Device::flex())?;
            for (name, shape) in weights.shapes() {
                let (Some(module), 2 | 4) = (name.strip_suffix(".weight"), shape.len()) else { continue };
                let mut names = vec![module.to_owned()];
                if part == Part::Unet {
                    names.extend(unet.to_stability(module).map(|(name, _)| name));
                } else {
                    let bare = module.strip_prefix(TEXT_MODEL).unwrap_or(module);
                    names.extend([bare.to_owned(), format!("{TEXT_MODEL}{bare}")]);
                }
                for alias in names {
                    let weight = (name.to_owned(), shape.to_vec());
                    this.weights.insert((part, alias.replace('.', "_")), weight.clone());
                    this.weights.insert((part, alias), weight);
                }
            }
        }
        Ok(this)
    }

    /// The name and shape of the weight of a module.
    pub(super) fn find(&self, part: Part, module: &str) -> Option<(&str, &[usize])> {
        self.weights.get(&(part, module.to_owned())).map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }
}
