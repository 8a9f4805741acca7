//! Names that LoRA files use for the modules of a base.

use std::collections::HashMap;

use burn::tensor::Device;
use hyperlora_core::Result;

use crate::lora::file::names::TEXT_MODEL;
use crate::source::{BaseSource, Component};

/// Base weights that a LoRA can change, under every name that LoRA files use for their modules.
#[derive(Debug, Default)]
pub struct BaseNames {
    /// Maps component and module to the weight's name and shape.
    weights: HashMap<(Component, String), (String, Vec<usize>)>,
}

impl BaseNames {
    /// Collects the module names of a base. Reads only headers and configs.
    ///
    /// # Errors
    /// Same as [`BaseSource::weights`] and [`BaseSource::table`].
    pub fn of(base: &BaseSource) -> Result<Self> {
        let mut this = Self::default();
        let unet = base.table(Component::Unet)?;
        for part in [Component::Unet, Component::TextEncoder, Component::TextEncoder2] {
            // No tensor is read, so the device does not matter.
            let weights = base.weights(part, &Device::flex())?;
            for (name, shape) in weights.shapes() {
                let (Some(module), 2 | 4) = (name.strip_suffix(".weight"), shape.len()) else { continue };
                let mut names = vec![module.to_owned()];
                if part == Component::Unet {
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

    /// Looks up the name and shape of a module's weight.
    pub(super) fn find(&self, part: Component, module: &str) -> Option<(&str, &[usize])> {
        self.weights.get(&(part, module.to_owned())).map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }
}
