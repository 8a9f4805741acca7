//! LoRAs as named matrices, for writing, converting and combining.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::{Error, Result};
use safetensors::Dtype;

use crate::lora::file::{LoraFile, names, notes_of};
use crate::source::Component;
use crate::weights::{TensorEntry, values};

const NOT_FINITE: &str = "holds values that are not finite";

const REMEDY: &str = "give a plain LoRA for SDXL, in the format of sd-scripts or diffusers";

/// Updates of a base's modules, by diffusers path.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::lora::file::Layout;
/// use hyperlora_sdxl::lora::{LoraModule, LoraSet, Matrix};
/// use hyperlora_sdxl::source::Component;
/// use safetensors::Dtype;
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let zeros = |shape: [usize; 2]| Matrix {
///     dtype: Dtype::F16,
///     shape: shape.to_vec(),
///     bytes: vec![0; 2 * shape[0] * shape[1]],
/// };
/// let mut lora = LoraSet::default();
/// let module = LoraModule { down: zeros([4, 640]), up: zeros([640, 4]), alpha: 4.0 };
/// lora.modules.insert((Component::Unet, "down_blocks.1.attentions.0.proj_in".into()), module);
/// lora.save(&folder.join("lora.safetensors"), Layout::Kohya)?;
/// assert_eq!(LoraSet::open(&folder.join("lora.safetensors"))?.modules, lora.modules);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraSet {
    /// Updates by component and path.
    pub modules: BTreeMap<(Component, String), LoraModule>,
    /// Metadata of the file, such as author and trigger words.
    pub notes: BTreeMap<String, String>,
}

/// Update of one module: `alpha / rank * up @ down`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// Down matrix, `[r, in]`, or `[r, in, k, k]` for a convolution.
    pub down: Matrix,
    /// Up matrix, `[out, r]`, or `[out, r, 1, 1]` for a convolution.
    pub up: Matrix,
    /// Scale times rank.
    pub alpha: f32,
}

/// A tensor in its stored type.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// F32, F16 or BF16. On reading, F64 becomes F32 and fp8 becomes F16.
    pub dtype: Dtype,
    /// Axis lengths, first axis first.
    pub shape: Vec<usize>,
    /// Values, little-endian.
    pub bytes: Vec<u8>,
}

impl LoraSet {
    /// Reads a LoRA file of any layout.
    ///
    /// # Errors
    /// Input, with file and module: the file is not a plain SDXL LoRA, or holds values that are not finite; Disk: a
    /// read fails.
    pub fn open(path: &Path) -> Result<Self> {
        let file = LoraFile::open(path)?;
        let mut modules = BTreeMap::new();
        for module in file.modules() {
            let wrong = |problem: String| Error::input(format!("{}: {}", path.display(), module.name), problem, REMEDY);
            let name = names::diffusers_path(module.part, &module.path)?
                .ok_or_else(|| wrong("is not a module of SDXL".into()))?;
            let matrix = |entry: &TensorEntry| -> Result<Matrix> {
                let (bytes, shape) = (file.read(entry)?, entry.shape.clone());
                let dtype = match entry.dtype {
                    // F16 represents every fp8 value exactly.
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

    /// Returns the widest matrix type of both LoRAs, F16 at least.
    pub fn wider(&self, other: &Self) -> Dtype {
        let modules = self.modules.values().chain(other.modules.values());
        let types = modules.flat_map(|module| [module.down.dtype, module.up.dtype]);
        types.max_by_key(Dtype::bitsize).unwrap_or(Dtype::F16)
    }
}

impl LoraModule {
    /// LoRA rank: the number of columns of `up`.
    pub fn rank(&self) -> usize {
        self.down.shape.first().copied().unwrap_or_default()
    }

    /// Factor of `up @ down`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank() as f32
    }

    /// Checks shapes and values. The error reports a mismatch.
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
    /// Decodes the values to f32.
    pub(super) fn values(&self) -> std::result::Result<Vec<f32>, String> {
        values::decode(self.dtype, &self.bytes)
    }

    /// Encodes f32 values. The error reports values that `dtype` cannot hold.
    pub(super) fn of(values: &[f32], shape: Vec<usize>, dtype: Dtype) -> std::result::Result<Self, String> {
        Ok(Self { dtype, shape, bytes: values::encode(dtype, values)? })
    }
}
