//! Named tensors in safetensors files: read one at a time, checked as a whole, written in a fixed order.
//!
//! A model is built by asking [`WeightsAt`] for layers of the shapes that its config tells. What is missing or does not
//! fit is replaced by zeros that take no memory and noted; [`Weights::finish`] then reports everything at once, so that
//! a wrong file costs one message instead of a hunt key by key.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::{Param, ParamId};
use burn::nn::conv::Conv2d;
use burn::nn::{Embedding, GroupNorm, LayerNorm, Linear, PaddingConfig2d};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::weights::file::SafetensorsFile;

mod file;
mod save;

pub use save::{TensorEntry, bytes_of, save, save_lazily, save_with_metadata};

/// File names that diffusers and transformers give the weights of one model, in the order of preference.
const NAMES_IN_FOLDER: [&str; 4] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
];

/// How many problems one error spells out.
const PROBLEMS_SHOWN: usize = 10;

/// Reads `config.json` of a model folder.
///
/// # Errors
/// Input for a missing file, broken JSON and values that `T` does not take, with line and column.
pub fn config<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::read(&path, source))?;
    serde_json::from_str(&text).map_err(|problem| {
        Error::file(&path, problem, "use the config.json that belongs to these weights, in diffusers layout")
    })
}

/// The tensors of one model on disk, and the record of what was asked of them.
#[derive(Debug)]
pub struct Weights {
    file: SafetensorsFile,
    device: Device,
    dtype: FloatDType,
    record: RefCell<Record>,
}

/// What a model asked for so far.
#[derive(Debug, Default)]
struct Record {
    asked: BTreeSet<String>,
    problems: Vec<String>,
    failure: Option<Error>,
}

impl Weights {
    /// Opens a safetensors file, or the one in a model folder that bears a name diffusers or transformers gives.
    /// Tensors will stand on `device` in f32, whatever float type the file holds. Only the header is read here.
    ///
    /// # Errors
    /// Input for a missing file, a file that is no safetensors file (a pickle, a web page, a Git LFS pointer), and a
    /// header that does not agree with the file's length.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let path = if path.is_dir() { weights_in(path)? } else { path.to_path_buf() };
        Ok(Self {
            file: SafetensorsFile::open(&path)?,
            device: device.clone(),
            dtype: FloatDType::F32,
            record: RefCell::default(),
        })
    }

    /// Makes tensors of `dtype` instead of f32.
    #[must_use]
    pub fn with_dtype(self, dtype: FloatDType) -> Self {
        Self { dtype, ..self }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Every tensor's name and shape, sorted by name.
    pub fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.file.shapes()
    }

    /// A handle for the keys that start with `prefix` and a dot; an empty prefix means all.
    pub fn at(&self, prefix: impl Into<String>) -> WeightsAt<'_> {
        WeightsAt { weights: self, prefix: prefix.into() }
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// Input that lists the first ten missing, misshaped, mistyped or unexpected keys and counts them all; Disk when
    /// reading failed.
    pub fn finish(self) -> Result<()> {
        let path = self.path().to_path_buf();
        let Record { asked, mut problems, failure } = self.record.into_inner();
        if let Some(failure) = failure {
            return Err(failure);
        }
        let unexpected = self.file.shapes().into_keys().filter(|&name| !asked.contains(name));
        problems.extend(unexpected.map(|name| format!("{name}: not a part of this model")));
        if problems.is_empty() {
            return Ok(());
        }
        let count = problems.len();
        problems.truncate(PROBLEMS_SHOWN);
        if count > PROBLEMS_SHOWN {
            problems.push(format!("and {} more", count - PROBLEMS_SHOWN));
        }
        Err(Error::file(
            &path,
            format!("{count} tensors do not fit the model:\n    {}", problems.join("\n    ")),
            "use weights of the architecture that config.json describes",
        ))
    }

    fn ask<const D: usize>(&self, name: String, shape: [usize; D]) -> Option<Vec<f32>> {
        let mut record = self.record.borrow_mut();
        let found = self.file.shape(&name).map(<[usize]>::to_vec);
        record.asked.insert(name.clone());
        let problem = match found {
            None => format!("{name}: missing, expected {shape:?}"),
            Some(found) if found != shape => format!("{name}: shape {found:?}, expected {shape:?}"),
            Some(_) => match self.file.read(&name) {
                Ok(Ok(values)) if values.iter().all(|value| value.is_finite()) => return Some(values),
                Ok(Ok(_)) => format!("{name}: holds values that are not finite"),
                Ok(Err(problem)) => format!("{name}: {problem}"),
                Err(failure) => {
                    record.failure.get_or_insert(failure);
                    return None;
                }
            },
        };
        record.problems.push(problem);
        None
    }

    fn place<const D: usize>(&self, values: Option<Vec<f32>>, shape: [usize; D]) -> Tensor<D> {
        let options = (&self.device, DType::from(self.dtype));
        match values {
            Some(values) => Tensor::from_data(TensorData::new(values, shape), options),
            None => Tensor::<D>::zeros([1; D], options).expand(shape),
        }
    }
}

/// [`Weights`] below a prefix: what one module of a model sees.
///
/// The layers it makes are frozen: they stand on the plain device and collect no gradients.
#[derive(Debug, Clone)]
pub struct WeightsAt<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl<'a> WeightsAt<'a> {
    /// The handle of a submodule.
    pub fn at(&self, name: impl std::fmt::Display) -> WeightsAt<'a> {
        WeightsAt { weights: self.weights, prefix: self.key(name) }
    }

    /// The full key of `name`.
    pub fn key(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Whether the file holds `name`.
    pub fn has(&self, name: &str) -> bool {
        self.weights.file.shape(&self.key(name)).is_some()
    }

    /// Lets `name` pass unread: a buffer that this implementation computes by itself.
    pub fn ignore(&self, name: &str) {
        self.weights.record.borrow_mut().asked.insert(self.key(name));
    }

    /// Lets everything below this handle pass unread: a part that nothing asks for.
    pub fn ignore_all(&self) {
        let below = self.key("");
        let names = self.weights.file.shapes().into_keys().filter(|name| name.starts_with(&below)).map(String::from);
        self.weights.record.borrow_mut().asked.extend(names);
    }

    /// A tensor as the file lays it out.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Tensor<D> {
        let values = self.weights.ask(self.key(name), shape);
        self.weights.place(values, shape)
    }

    /// `weight` `[out, in]`, and `bias` `[out]` where there is one. Burn keeps the transpose.
    pub fn linear(&self, d_input: usize, d_output: usize, bias: bool) -> Linear {
        let values = self.weights.ask(self.key("weight"), [d_output, d_input]);
        let transposed = values.map(|values| transpose(&values, d_output, d_input));
        Linear {
            weight: frozen(self.weights.place(transposed, [d_input, d_output])),
            bias: bias.then(|| frozen(self.tensor("bias", [d_output]))),
        }
    }

    /// One stored linear with bias as two: the first and the second half of its `2 d_half` outputs.
    pub fn linear_halves(&self, d_input: usize, d_half: usize) -> [Linear; 2] {
        let weight = self.weights.ask(self.key("weight"), [2 * d_half, d_input]);
        let bias = self.weights.ask(self.key("bias"), [2 * d_half]);
        let half_of = |values: &Option<Vec<f32>>, half: usize| {
            values.as_ref().map(|values| values[half * values.len() / 2..(half + 1) * values.len() / 2].to_vec())
        };
        [0, 1].map(|half| {
            let transposed = half_of(&weight, half).map(|values| transpose(&values, d_half, d_input));
            Linear {
                weight: frozen(self.weights.place(transposed, [d_input, d_half])),
                bias: Some(frozen(self.weights.place(half_of(&bias, half), [d_half]))),
            }
        })
    }

    /// `weight` `[out, in, kernel, kernel]` and `bias` `[out]`; `padding` is the same on all sides.
    pub fn conv2d(&self, channels: [usize; 2], kernel: usize, stride: usize, padding: usize) -> Conv2d {
        Conv2d {
            weight: frozen(self.tensor("weight", [channels[1], channels[0], kernel, kernel])),
            bias: Some(frozen(self.tensor("bias", [channels[1]]))),
            stride: [stride; 2],
            kernel_size: [kernel; 2],
            dilation: [1; 2],
            groups: 1,
            padding: PaddingConfig2d::Explicit(padding, padding, padding, padding),
        }
    }

    /// `weight` and `bias`, both `[channels]`.
    pub fn group_norm(&self, groups: usize, channels: usize, epsilon: f64) -> GroupNorm {
        GroupNorm {
            gamma: Some(frozen(self.tensor("weight", [channels]))),
            beta: Some(frozen(self.tensor("bias", [channels]))),
            num_groups: groups,
            num_channels: channels,
            epsilon,
            affine: true,
        }
    }

    /// `weight` and `bias`, both `[width]`.
    pub fn layer_norm(&self, width: usize, epsilon: f64) -> LayerNorm {
        let mut norm = burn::nn::LayerNormConfig::new(width).with_epsilon(epsilon).init(&self.weights.device);
        norm.gamma = frozen(self.tensor("weight", [width]));
        norm.beta = Some(frozen(self.tensor("bias", [width])));
        norm
    }

    /// A tensor without axes; 0 where it is missing, which [`Weights::finish`] reports.
    pub fn scalar(&self, name: &str) -> f32 {
        self.weights.ask(self.key(name), []).and_then(|values| values.first().copied()).unwrap_or_default()
    }

    /// `weight` `[entries, width]`.
    pub fn embedding(&self, entries: usize, width: usize) -> Embedding {
        Embedding { weight: frozen(self.tensor("weight", [entries, width])) }
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor).set_require_grad(false)
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; values.len()];
    for (row, line) in values.chunks_exact(columns.max(1)).enumerate() {
        for (column, &value) in line.iter().enumerate() {
            transposed[column * rows + row] = value;
        }
    }
    transposed
}

fn weights_in(folder: &Path) -> Result<PathBuf> {
    NAMES_IN_FOLDER.iter().map(|name| folder.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        Error::file(
            folder,
            format!("holds none of {}", NAMES_IN_FOLDER.join(", ")),
            "give a model folder in diffusers layout; pickles (.bin, .ckpt) are never read: convert them to safetensors",
        )
    })
}
