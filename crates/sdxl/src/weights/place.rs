//! Location of a tensor in a file, and one-pass loading in the type and order that a model needs.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Element, FloatDType, TensorData};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use hyperlora_core::Error;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use crate::weights::file::SafetensorsFile;
use crate::weights::values::{decode_into, float_size};

/// Elements converted at a time: few enough for a processor cache, enough for efficient disk reads.
const CHUNK: usize = 1 << 16;

/// Transform from a file's tensor to the model's tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Unchanged.
    Same,
    /// Transpose of the file's matrix.
    Transposed,
    /// First, second or last third of the rows.
    Third(usize),
    /// Linear layer that the file may store as a 1x1 convolution.
    Linear,
}

/// Failure to read a tensor.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// A model cannot use the values, for this reason.
    Values(String),
    /// The file cannot be read.
    File(Error),
}

impl From<Error> for ReadError {
    fn from(error: Error) -> Self {
        Self::File(error)
    }
}

/// A tensor, or rows of it, in a file. It is read on demand.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// `None` if only names and shapes are known.
    file: Option<Arc<SafetensorsFile>>,
    dtype: Dtype,
    /// Byte offset from the file's first tensor.
    start: usize,
    shape: Vec<usize>,
    /// The file holds the transpose of a matrix of this shape.
    transposed: bool,
}

impl Place {
    pub(super) fn new(file: &Arc<SafetensorsFile>, info: &TensorInfo) -> Self {
        Self {
            file: Some(Arc::clone(file)),
            dtype: info.dtype,
            start: info.data_offsets.0,
            shape: info.shape.clone(),
            transposed: false,
        }
    }

    pub(super) fn without_data(shape: Vec<usize>) -> Self {
        Self { file: None, dtype: Dtype::F32, start: 0, shape, transposed: false }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Selects rows of the tensor along its first axis. A matrix that the file holds transposed must be selected as a
    /// whole.
    pub(super) fn rows(&self, rows: Range<usize>) -> Self {
        let mut place = self.clone();
        let row: usize = self.shape.iter().skip(1).product();
        place.start += rows.start * row * self.dtype.bitsize() / u8::BITS as usize;
        place.shape[0] = rows.len();
        place
    }

    pub(super) fn formed(&self, form: Form) -> Self {
        let mut place = self.clone();
        match (form, self.shape.as_slice()) {
            (Form::Transposed, &[rows, columns]) => {
                place.shape = vec![columns, rows];
                place.transposed = !self.transposed;
            }
            (Form::Third(third), &[rows, ..]) if rows.is_multiple_of(3) => {
                place = self.rows(third * rows / 3..(third + 1) * rows / 3);
            }
            (Form::Linear, &[output, input, 1, 1]) => place.shape = vec![output, input],
            // A shape that does not fit stays unchanged and is reported later.
            _ => {}
        }
        place
    }

    pub(super) fn file(&self) -> Option<&Path> {
        self.file.as_deref().map(SafetensorsFile::path)
    }

    /// Returns true if the type is a supported float.
    pub(super) fn is_readable(&self) -> bool {
        float_size(self.dtype).is_ok()
    }

    pub(super) fn has_data(&self) -> bool {
        self.file.is_some()
    }

    /// Reads the values as `dtype` in the model's order or, for a matrix, transposed. Values are refused that
    /// a model cannot use.
    pub(super) fn read(&self, dtype: FloatDType, transpose: bool) -> std::result::Result<TensorData, ReadError> {
        match dtype {
            FloatDType::BF16 => self.read_as(bf16::from_f32, transpose),
            FloatDType::F16 => self.read_as(f16::from_f32, transpose),
            _ => self.read_as(|value| value, transpose),
        }
    }

    fn read_as<T: Element + Finite>(
        &self,
        convert: fn(f32) -> T,
        transpose: bool,
    ) -> std::result::Result<TensorData, ReadError> {
        // Rows and columns in the file's order.
        let transpose = transpose != self.transposed;
        let [columns, rows] = match (self.shape.as_slice(), self.transposed) {
            (&[rows, columns], false) | (&[columns, rows], true) => [columns, rows],
            _ => [self.shape.iter().product(), 1],
        };
        let mut values = bytemuck::zeroed_vec::<T>(rows * columns);
        let rows_at_once = (CHUNK / columns.max(1)).clamp(1, rows.max(1));
        // A tensor that is not transposed can be cut anywhere; a transposed one needs whole rows.
        let chunk_length = if transpose { rows_at_once * columns } else { CHUNK };
        let mut finite = true;
        let mut chunk = vec![0.0; chunk_length.min(values.len())];
        let mut bytes = Vec::new();
        for start in (0..values.len()).step_by(chunk_length.max(1)) {
            let length = chunk_length.min(values.len() - start);
            let chunk = &mut chunk[..length];
            self.read_chunk(start, chunk, &mut bytes)?;
            if transpose {
                let (first, count) = (start / columns, length / columns);
                for column in 0..columns {
                    let target = &mut values[column * rows + first..][..count];
                    for (value, line) in target.iter_mut().zip(chunk.chunks_exact(columns)) {
                        *value = convert(line[column]);
                        finite &= value.finite();
                    }
                }
            } else {
                for (value, &source) in values[start..start + length].iter_mut().zip(chunk.iter()) {
                    *value = convert(source);
                    finite &= value.finite();
                }
            }
        }
        if !finite {
            return Err(ReadError::Values("holds values that are not finite".into()));
        }
        let shape = if transpose { vec![columns, rows] } else { vec![rows, columns] };
        let shape = if self.shape.len() == 2 { shape } else { self.shape.clone() };
        Ok(TensorData::new(values, shape))
    }

    /// Reads elements from `start` on, as many as `chunk` takes, through the buffer `bytes`.
    fn read_chunk(&self, start: usize, chunk: &mut [f32], bytes: &mut Vec<u16>) -> std::result::Result<(), ReadError> {
        let Some(file) = &self.file else {
            return Err(ReadError::Values("is known by name and shape only".into()));
        };
        let size = float_size(self.dtype).map_err(ReadError::Values)?;
        let start = self.start + start * size;
        if self.dtype == Dtype::F32 {
            file.read_at(bytemuck::cast_slice_mut(chunk), start)?;
            return Ok(());
        }
        let length = chunk.len() * size;
        bytes.resize(length.div_ceil(size_of::<u16>()), 0);
        file.read_at(&mut bytemuck::cast_slice_mut(bytes)[..length], start)?;
        match self.dtype {
            Dtype::F16 => bytemuck::cast_slice::<_, f16>(bytes).convert_to_f32_slice(chunk),
            Dtype::BF16 => bytemuck::cast_slice::<_, bf16>(bytes).convert_to_f32_slice(chunk),
            other => {
                return decode_into(other, &bytemuck::cast_slice(bytes)[..length], chunk).map_err(ReadError::Values);
            }
        }
        Ok(())
    }
}

/// Float types that tensors are loaded as.
trait Finite: bytemuck::Pod {
    fn finite(&self) -> bool;
}

impl Finite for f32 {
    fn finite(&self) -> bool {
        self.is_finite()
    }
}

impl Finite for f16 {
    fn finite(&self) -> bool {
        self.is_finite()
    }
}

impl Finite for bf16 {
    fn finite(&self) -> bool {
        self.is_finite()
    }
}
