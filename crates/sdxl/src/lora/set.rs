//! LoRAs as named matrices: what is written, converted from one layout to another, and combined.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::{Error, Result};
use safetensors::Dtype;

use crate::lora::file::{LoraFile, names, notes_of};
use crate::source::Part;
use crate::weights::{TensorEntry, values};

const NOT_FINITE: &str = "holds values that are not finite";

const REMEDY: &str = "give a plain LoRA for SDXL, in the format of sd-scripts or diffusers";

/// The updates of a base's modules, by the path that diffusers gives each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraSet {
    /// By part and path.
    pub modules: BTreeMap<(Part, String), LoraModule>,
    /// Notes of the file, such as who made it and the trigger words.
    pub notes: BTreeMap<String, String>,
}

/// One module's update: `alpha / rank * up @ down`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// `[r, in]`, or `[r, in, k, k]` of a convolution.
    pub down: Matrix,
    /// `[out, r]`, or `[out, r, 1, 1]`.
    pub up: Matrix,
    /// The scale times the rank.
    pub alpha: f32,
}

/// A tensor as a file holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// F32, F16 or BF16; what a file holds in F64 or fp8 becomes F32 or F16 as it is read.
    pub dtype: Dtype,
    /// First axis first.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

impl LoraSet {
    /// Reads a file of any layout.
    ///
    /// # Errors
    /// Input, naming file and module, for a file that is no plain LoRA of an SDXL or holds values that are not finite;
    /// Disk when reading fails.
    pub fn open(path: &Path) -> Result<Self> {
        let file = LoraFile::open(path)?;
        let mut modules = BTreeMap::new();
        for module in file.modules() {
            let wrong = |problem: String| Error::input(format!("{}: {}", path.display(), module.name), problem, REMEDY);
            let name = names::diffusers_path(module.part, &module.path)?
                .ok_or_else(|| wrong("is no module of an SDXL".into()))?;
            let matrix = |entry: &TensorEntry| -> Result<Matrix> {
                let (bytes, shape) = (file.read(entry)?, entry.shape.clone());
                let dtype = match entry.dtype {
                    // Every value of fp8 is one of f16.
                    Dtype::F8_E4M3 | Dtype::F8_E5M2 => Dtype::F16,
                    Dtype::F64 => Dtype::F32,
                    dtype => return Ok(Matrix { dtype, shape, bytes }),
                };
                let values = values::decode(entry.dtype, &bytes).map_err(wrong)?;
                if !values.iter().all(|value| value.is_finite()) {
                    return Err(wrong(format!("{}: {NOT_FINITE}", entry.name)));
                }
                Matrix::of(&values, shape, dtype).map_err(wrong)
            };
            let update = LoraModule { down: matrix(&module.down)?, up: matrix(&module.up)?, alpha: module.alpha };
            update.check().map_err(wrong)?;
            if modules.insert((module.part, name), update).is_some() {
                return Err(wrong("is changed twice, under another name as well".into()));
            }
        }
        Ok(Self { modules, notes: notes_of(file.metadata()) })
    }

    /// The widest type of the matrices of both, F16 at least.
    pub fn wider(&self, other: &Self) -> Dtype {
        let modules = self.modules.values().chain(other.modules.values());
        let types = modules.flat_map(|module| [module.down.dtype, module.up.dtype]);
        types.max_by_key(Dtype::bitsize).unwrap_or(Dtype::F16)
    }
}

impl LoraModule {
    /// The number of columns of `up`.
    pub fn rank(&self) -> usize {
        self.down.shape.first().copied().unwrap_or_default()
    }

    /// What `up @ down` is multiplied by.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank() as f32
    }

    /// Says what does not fit.
    fn check(&self) -> std::result::Result<(), String> {
        let rank = self.rank();
        let (down, up) = (&self.down.shape, &self.up.shape);
        if down.contains(&0) || up.contains(&0) {
            return Err(format!("down {down:?} and up {up:?} are empty: an axis is 0"));
        }
        let matrices = down.len() >= 2 && up.len() >= 2 && up[1] == rank;
        if !matrices || up[2..].iter().any(|&axis| axis != 1) {
            return Err(format!("down {down:?} and up {up:?} do not make an update"));
        }
        for matrix in [&self.down, &self.up] {
            if !matrix.values()?.iter().all(|value| value.is_finite()) {
                return Err(NOT_FINITE.into());
            }
        }
        Ok(())
    }
}

impl Matrix {
    /// In f32.
    pub(super) fn values(&self) -> std::result::Result<Vec<f32>, String> {
        values::decode(self.dtype, &self.bytes)
    }

    /// From f32; the error tells of values that `dtype` cannot hold.
    pub(super) fn of(values: &[f32], shape: Vec<usize>, dtype: Dtype) -> std::result::Result<Self, String> {
        Ok(Self { dtype, shape, bytes: values::encode(dtype, values)? })
    }
}
