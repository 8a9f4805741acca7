//! A file of a base with LoRAs merged into its tensors.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::{Error, Result};

use crate::weights::values;
use crate::weights::{Form, LowRank, SafetensorsFile, TensorEntry, rewrite, transposed};

/// The changes to the tensors of one file, by the file's names. A tensor may hold several weights of the base, each in a
/// form of its own.
pub(super) type FileChanges = BTreeMap<String, Vec<(Form, Vec<LowRank>)>>;

/// Writes the file `source` to `target` with `changes` added in f32 and rounded once into each tensor's own type. Every
/// other byte is the source's.
///
/// # Errors
/// Input for a change that leads out of a tensor's type, and for a place that cannot be written to; Disk for a full or
/// failing disk.
pub(super) fn merge_file(source: &SafetensorsFile, target: &Path, changes: &FileChanges) -> Result<()> {
    rewrite(source, target, |entry, bytes| match changes.get(&entry.name) {
        None => Ok(bytes),
        Some(changes) => changed(entry, &bytes, changes).map_err(|problem| {
            Error::input(format!("{}: {}", source.path().display(), entry.name), problem, "use smaller LoRA weights")
        }),
    })
}

/// A tensor's bytes with its changes; an error tells why there are none.
fn changed(
    entry: &TensorEntry,
    bytes: &[u8],
    changes: &[(Form, Vec<LowRank>)],
) -> std::result::Result<Vec<u8>, String> {
    let mut values = values::decode(entry.dtype, bytes)?;
    for (form, changes) in changes {
        match *form {
            Form::Same | Form::Linear => changes.iter().for_each(|change| change.add_to(&mut values, 0)),
            Form::Third(third) => {
                let length = values.len() / 3;
                let part = &mut values[third * length..(third + 1) * length];
                changes.iter().for_each(|change| change.add_to(part, 0));
            }
            Form::Transposed => {
                let columns = entry.shape.last().copied().unwrap_or(1);
                let mut weight = transposed(&values, columns);
                changes.iter().for_each(|change| change.add_to(&mut weight, 0));
                values = transposed(&weight, values.len() / columns.max(1));
            }
        }
    }
    values::encode(entry.dtype, &values)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    /// `[[1, 2], [3, 4]]`, of rank one would be less telling.
    fn change(rows: usize) -> Vec<LowRank> {
        let up: Vec<f32> = [[1.0, 0.0], [0.0, 1.0]].concat().into_iter().take(rows * 2).collect();
        vec![LowRank::new(vec![1.0, 2.0, 3.0, 4.0], up, 2, 1.0)]
    }

    fn merged(shape: [usize; 2], form: Form, rows: usize) -> Vec<f32> {
        let entry = TensorEntry { name: "a".into(), dtype: Dtype::F16, shape: shape.to_vec() };
        let zeros = vec![0; shape[0] * shape[1] * 2];
        let bytes = changed(&entry, &zeros, &[(form, change(rows))]);
        bytes.and_then(|bytes| values::decode(Dtype::F16, &bytes)).unwrap_or_default()
    }

    #[test]
    fn changes_find_their_place_in_every_form() {
        assert_eq!(merged([2, 2], Form::Same, 2), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(merged([2, 2], Form::Linear, 2), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(merged([2, 2], Form::Transposed, 2), [1.0, 3.0, 2.0, 4.0]);
        assert_eq!(merged([3, 2], Form::Third(1), 1), [0.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn what_leads_out_of_the_type_is_refused() {
        let entry = TensorEntry { name: "a".into(), dtype: Dtype::F16, shape: vec![1, 1] };
        let large = vec![LowRank::new(vec![1e5], vec![1.0], 1, 1.0)];
        assert!(changed(&entry, &[0, 0], &[(Form::Same, large.clone())]).is_err());
        let entry = TensorEntry { dtype: Dtype::BF16, ..entry };
        assert!(changed(&entry, &[0, 0], &[(Form::Same, large)]).is_ok());
        let entry = TensorEntry { dtype: Dtype::I16, ..entry };
        assert!(changed(&entry, &[0, 0], &[]).is_err());
    }
}
