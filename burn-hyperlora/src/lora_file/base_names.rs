//! What LoRA files call the modules of a base.

use std::collections::{BTreeMap, HashMap};

use crate::lora_file::keys::Part;

/// What published files put before the paths of text modules, and recent transformers leave out.
const TEXT_MODEL: &str = "text_model.";

/// The weights of a base that a LoRA can change, under every name that LoRA files have for their modules.
#[derive(Debug, Default)]
pub struct BaseNames {
    /// Part and module to the weight's name and shape.
    weights: HashMap<(Part, String), (String, Vec<usize>)>,
}

impl BaseNames {
    /// Adds the linears and convolutions among a part's tensors. `other_name` tells what else a module is called, as in
    /// single-file checkpoints.
    pub fn add(&mut self, part: Part, shapes: &BTreeMap<&str, &[usize]>, other_name: impl Fn(&str) -> Option<String>) {
        for (&name, shape) in shapes {
            let (Some(module), 2 | 4) = (name.strip_suffix(".weight"), shape.len()) else { continue };
            let mut names = vec![module.to_owned()];
            names.extend(other_name(module));
            if part != Part::Unet {
                let bare = module.strip_prefix(TEXT_MODEL).unwrap_or(module);
                names.extend([bare.to_owned(), format!("{TEXT_MODEL}{bare}")]);
            }
            for alias in names {
                let weight = (name.to_owned(), shape.to_vec());
                self.weights.insert((part, alias.replace('.', "_")), weight.clone());
                self.weights.insert((part, alias), weight);
            }
        }
    }

    /// The name and shape of the weight of a module.
    pub(super) fn find(&self, part: Part, module: &str) -> Option<(&str, &[usize])> {
        self.weights.get(&(part, module.to_owned())).map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }
}
