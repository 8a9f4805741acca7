//! Writes a base file with LoRAs merged into its tensors.

use std::collections::BTreeMap;
use std::path::Path;

use hyperlora_core::{Error, Result};

use crate::weights::values;
use crate::weights::{Form, LowRank, SafetensorsFile, TensorEntry, rewrite, transposed};

/// Updates of one file's tensors, by the file's names. A tensor may hold several base weights, each in its own form.
pub(super) type FileChanges = BTreeMap<String, Vec<(Form, Vec<LowRank>)>>;

/// Writes the file `source` to `target` with `changes` added in f32 and rounded once to each tensor's own type. All
/// other bytes are copied.
///
/// # Errors
/// Input: an update exceeds a tensor's type, or the path is not writable; Disk: the disk is full or failing.
pub(super) fn merge_file(source: &SafetensorsFile, target: &Path, changes: &FileChanges) -> Result<()> {
    rewrite(source, target, |entry, bytes| match changes.get(&entry.name) {
        None => Ok(bytes),
        Some(changes) => changed(entry, &bytes, changes).map_err(|problem| {
            Error::input(format!("{}: {}", source.path().display(), entry.name), problem, "use smaller LoRA weights")
        }),
    })
}

/// Applies updates to a tensor's bytes.
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

    /// `[[1, 2], [3, 4]]`: an update of rank one would detect fewer mistakes.
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
