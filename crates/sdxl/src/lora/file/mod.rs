//! Reads LoRA files of other tools and of our own `generate`: low-rank updates of base weights.
//!
//! The keys determine a file's kind (see `keys`). A file may change linears and convolutions, of any ranks, in the UNet
//! and both text encoders. Everything but a plain LoRA is rejected.

mod adapter;
mod base_names;
mod keys;
pub mod names;
mod notes;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hyperlora_core::{Error, Result};

use crate::lora::file::adapter::Adapter;
use crate::lora::file::keys::{Key, Side};
use crate::source::{Component, ComponentUpdates};
use crate::weights::{LowRank, ReadError, SafetensorsFile, TensorEntry, values};

pub use adapter::ADAPTER_METADATA;
pub use base_names::BaseNames;
pub(crate) use notes::{COMMENT, notes_of};
pub use write::Layout;

/// Number of problems that one error lists.
const PROBLEMS_SHOWN: usize = 10;

const REMEDY: &str = "give a LoRA that was made for this base model";

const REMEDY_OF_FORMAT: &str = "give a LoRA in the format of sd-scripts or diffusers";

/// An opened LoRA file: keys are parsed, values are not yet read.
#[derive(Debug)]
pub struct LoraFile {
    file: SafetensorsFile,
    modules: Vec<Module>,
}

/// Update of one module: `alpha / rank * up @ down`.
#[derive(Debug)]
pub struct Module {
    /// Module name in the file.
    pub name: String,
    /// Component of the module.
    pub part: Component,
    /// Path within the component, with dots or underscores.
    pub path: String,
    /// Down matrix, `[rank, in]`, or `[rank, in, k, k]` for a convolution; unchecked.
    pub down: TensorEntry,
    /// Up matrix, `[out, rank]`, or `[out, rank, 1, 1]` for a convolution; unchecked.
    pub up: TensorEntry,
    /// Scale times rank, from the file or its kind's default.
    pub alpha: f32,
}

/// Tensors of one module.
#[derive(Debug, Default)]
struct Tensors {
    down: Option<TensorEntry>,
    up: Option<TensorEntry>,
    alpha: Option<TensorEntry>,
}

/// Tensors of a file, by what they belong to.
#[derive(Debug, Default)]
struct Contents {
    modules: BTreeMap<String, Tensors>,
    embeddings: BTreeSet<String>,
    problems: Vec<String>,
}

impl Contents {
    /// Sorts the tensors of a file by their keys.
    ///
    /// # Errors
    /// Input: a key is that of another kind of adapter.
    fn of(file: &SafetensorsFile) -> Result<Self> {
        let mut contents = Self::default();
        for entry in file.entries() {
            match keys::parse(&entry.name) {
                Key::Of(module, side) => {
                    let module = module.to_owned();
                    contents.put(module, side, entry);
                }
                Key::Embedding(name) => _ = contents.embeddings.insert(name.to_owned()),
                Key::OtherKind(kind) => {
                    let remedy = "give a plain LoRA, or convert this one with the tool that made it";
                    let problem = format!("is {kind} ({}), which is not supported", entry.name);
                    return Err(Error::file(file.path(), problem, remedy));
                }
                Key::Unknown => contents.problems.push(format!("{}: no tensor of a LoRA", entry.name)),
            }
        }
        Ok(contents)
    }

    fn put(&mut self, module: String, side: Side, entry: TensorEntry) {
        let tensors = self.modules.entry(module).or_default();
        let place = match side {
            Side::Down => &mut tensors.down,
            Side::Up => &mut tensors.up,
            Side::Alpha => &mut tensors.alpha,
        };
        if let Some(other) = place.replace(entry) {
            self.problems.push(format!("{}: the file has another one for the same module", other.name));
        }
    }

    /// Checks that there is a LoRA, and that it is not one for another base.
    ///
    /// # Errors
    /// Input: there is none, or it is.
    fn check(&self, path: &Path) -> Result<()> {
        if let Some(architecture) = self.modules.keys().find_map(|name| keys::other_architecture(name)) {
            return Err(Error::file(path, format!("was made for {architecture}, not for SDXL"), REMEDY));
        }
        if self.modules.is_empty() {
            let what = self.problems.first().map(|problem| format!(" ({problem})")).unwrap_or_default();
            return Err(Error::file(path, format!("holds no LoRA{what}"), REMEDY_OF_FORMAT));
        }
        Ok(())
    }

    /// Logs the embeddings, which are not read.
    fn tell_embeddings(&self, path: &Path) {
        if !self.embeddings.is_empty() {
            let shown: Vec<_> = self.embeddings.iter().take(PROBLEMS_SHOWN).map(String::as_str).collect();
            let (path, count, names) = (path.display(), self.embeddings.len(), shown.join(", "));
            tracing::warn!("{path}: {count} embeddings bundled with the LoRA are skipped: {names}");
        }
    }
}

impl Module {
    /// Puts a module together, with its alpha read.
    fn new(
        name: &str,
        tensors: Tensors,
        file: &SafetensorsFile,
        adapter: &Adapter,
    ) -> std::result::Result<Self, ReadError> {
        let (part, path) = keys::module(name).map_err(|problem| ReadError::Values(format!("{name}: {problem}")))?;
        let (Some(down), Some(up)) = (tensors.down, tensors.up) else {
            return Err(ReadError::Values(format!("{name}: lacks one of its two matrices")));
        };
        let rank = down.shape.first().copied().unwrap_or_default();
        let alpha = match tensors.alpha {
            Some(entry) => values::number(entry.dtype, &file.read_raw(&entry.name)?)
                .map_err(|problem| format!("{}: {problem}", entry.name)),
            None => adapter.alpha(part, &path, rank),
        };
        Ok(Self { name: name.to_owned(), part, path, down, up, alpha: alpha.map_err(ReadError::Values)? })
    }
}

impl LoraFile {
    /// Reads the header and the alphas. Bundled embeddings are skipped with a warning that names them.
    ///
    /// # Errors
    /// Input: the file is missing, not safetensors, not a plain LoRA (DoRA, LoHa, LoKr, ...), or lacks tensors of a
    /// module; Disk: a read fails.
    pub fn open(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let mut contents = Contents::of(&file)?;
        contents.check(path)?;
        let adapter = Adapter::of(&file)?;
        let mut modules = Vec::with_capacity(contents.modules.len());
        for (name, tensors) in std::mem::take(&mut contents.modules) {
            match Module::new(&name, tensors, &file, &adapter) {
                Ok(module) => modules.push(module),
                Err(ReadError::Values(problem)) => contents.problems.push(problem),
                Err(ReadError::File(error)) => return Err(error),
            }
        }
        refuse(path, &contents.problems, REMEDY_OF_FORMAT)?;
        contents.tell_embeddings(path);
        Ok(Self { file, modules })
    }

    /// Module updates, by name.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Metadata of the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.file.metadata()
    }

    /// Reads the bytes of a tensor of [`modules`](Self::modules).
    ///
    /// # Errors
    /// Disk: a read fails.
    pub fn read(&self, entry: &TensorEntry) -> Result<Vec<u8>> {
        self.file.read_raw(&entry.name)
    }

    /// Adds this LoRA's updates, scaled by `weight`, to `updates`.
    ///
    /// # Errors
    /// Input: the base lacks modules or has them in other sizes (counts all, lists the first ten); Disk: a read fails.
    pub fn add_to(&self, updates: &mut ComponentUpdates, base: &BaseNames, weight: f32) -> Result<()> {
        let mut problems = Vec::new();
        for module in &self.modules {
            let Some((weight_name, shape)) = base.find(module.part, &module.path) else {
                problems.push(format!("{}: the base has no such module", module.name));
                continue;
            };
            match self.change(module, shape, weight) {
                Ok(change) => {
                    let part = updates.entry(module.part).or_default();
                    part.entry(weight_name.to_owned()).or_default().push(change);
                }
                Err(ReadError::Values(problem)) => problems.push(problem),
                Err(ReadError::File(error)) => return Err(error),
            }
        }
        refuse(self.file.path(), &problems, REMEDY)
    }

    /// Computes the update of a weight of this shape.
    fn change(&self, module: &Module, shape: &[usize], weight: f32) -> std::result::Result<LowRank, ReadError> {
        let Module { down, up, alpha, .. } = module;
        let rank = down.shape.first().copied().unwrap_or_default();
        // A linear layer may be stored as a 1x1 convolution, and the other way round.
        let expected = [[&[rank], &shape[1..]].concat(), vec![shape[0], rank]];
        for (entry, expected) in [down, up].into_iter().zip(expected) {
            if entry.shape.contains(&0) || trimmed(&entry.shape) != trimmed(&expected) {
                let problem = format!("{}: shape {:?}, expected {expected:?}", entry.name, entry.shape);
                return Err(ReadError::Values(problem));
            }
        }
        let mut matrices = Vec::with_capacity(2);
        for entry in [down, up] {
            let unusable = |problem: &str| ReadError::Values(format!("{}: {problem}", entry.name));
            let floats = values::decode(entry.dtype, &self.file.read_raw(&entry.name)?);
            let floats = floats.map_err(|problem| unusable(&problem))?;
            if !floats.iter().all(|value| value.is_finite()) {
                return Err(unusable("holds values that are not finite"));
            }
            matrices.push(floats);
        }
        let [down, up] = <[Vec<f32>; 2]>::try_from(matrices).unwrap_or_default();
        Ok(LowRank::new(down, up, rank, alpha / rank as f32 * weight))
    }
}

/// Sums several weighted LoRAs for one base.
///
/// # Errors
/// Same as [`LoraFile::add_to`].
pub fn sum(loras: &[(LoraFile, f32)], base: &BaseNames) -> Result<ComponentUpdates> {
    let mut updates = ComponentUpdates::new();
    loras.iter().try_for_each(|(lora, weight)| lora.add_to(&mut updates, base, *weight))?;
    Ok(updates)
}

/// Strips trailing axes of length one from a shape.
fn trimmed(shape: &[usize]) -> &[usize] {
    let end = shape.iter().rposition(|&length| length != 1).map_or(0, |last| last + 1);
    &shape[..end]
}

fn refuse(path: &Path, problems: &[String], remedy: &str) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let mut shown = problems.iter().take(PROBLEMS_SHOWN).cloned().collect::<Vec<_>>();
    if problems.len() > PROBLEMS_SHOWN {
        shown.push(format!("and {} more", problems.len() - PROBLEMS_SHOWN));
    }
    Err(Error::file(path, format!("{} modules do not fit:\n    {}", problems.len(), shown.join("\n    ")), remedy))
}
