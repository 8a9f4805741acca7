//! A safetensors file written again with some of its tensors changed.

use std::io::{BufWriter, Write};
use std::path::Path;

use hyperlora_core::Result;
use hyperlora_core::files::write_whole_with;

use crate::weights::file::SafetensorsFile;
use crate::weights::save::{TensorEntry, stop};

/// Writes `source` to `target` with the same header, but for hashes of the tensors: `change` is asked for the bytes of each tensor, given those of the
/// source, and gives as many. One tensor is in memory at a time; the file appears whole or not at all.
///
/// # Errors
/// Those of `change`; Input for a place that cannot be written to, Disk for a full or failing disk.
pub fn rewrite(
    source: &SafetensorsFile,
    target: &Path,
    mut change: impl FnMut(&TensorEntry, Vec<u8>) -> Result<Vec<u8>>,
) -> Result<()> {
    let head = source.head()?;
    // What the disk reports is told apart from what `change` reports: only the first is an error of writing.
    let mut failure = None;
    let written = write_whole_with(target, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&head)?;
        for entry in source.entries() {
            let bytes = source.read_raw(&entry.name).and_then(|bytes| change(&entry, bytes));
            out.write_all(&bytes.map_err(|error| stop(&mut failure, error))?)?;
        }
        out.flush()
    });
    failure.map_or(written, Err)
}
