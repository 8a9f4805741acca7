//! Writing safetensors: the same tensors give the same bytes.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::tensor::{DType, TensorData};
use data_prep::files::write_whole_with;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Serialize;

use crate::error::{Error, Result};

/// The alignment of the first tensor, in bytes.
const ALIGNMENT: usize = 8;

#[derive(Serialize)]
struct Header {
    __metadata__: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorInfo>,
}

/// Writes `tensors` to `path` in one piece, sorted by element size (widest first, which keeps all aligned) and name.
///
/// # Errors
/// Input for a place that cannot be written to, Disk for a full or failing disk, Fault for two tensors of one name or
/// an element type that safetensors files do not hold.
pub fn save(path: &Path, tensors: impl IntoIterator<Item = (String, TensorData)>) -> Result<()> {
    save_with_metadata(path, BTreeMap::new(), tensors)
}

/// [`save`] with entries for the file's metadata.
///
/// # Errors
/// As [`save`].
pub fn save_with_metadata(
    path: &Path,
    mut metadata: BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = (String, TensorData)>,
) -> Result<()> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| y.dtype().size().cmp(&x.dtype().size()).then_with(|| a.cmp(b)));

    let mut end = 0;
    let mut infos = BTreeMap::new();
    for (name, data) in &tensors {
        let start = end;
        end += data.as_bytes().len();
        let info = TensorInfo { dtype: dtype(data.dtype())?, shape: data.shape().to_vec(), data_offsets: (start, end) };
        if infos.insert(name.clone(), info).is_some() {
            return Err(Error::Fault(format!("two tensors named {name} for {}", path.display())));
        }
    }
    // PyTorch's readers look for this entry.
    metadata.insert("format".into(), "pt".into());
    let header = Header { __metadata__: metadata, tensors: infos };
    let mut header =
        serde_json::to_vec(&header).map_err(|problem| Error::Fault(format!("safetensors header: {problem}")))?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');

    write_whole_with(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, data) in &tensors {
            out.write_all(data.as_bytes())?;
        }
        out.flush()
    })
}

fn dtype(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
        other => return Err(Error::Fault(format!("safetensors files do not hold {other:?}"))),
    })
}
