//! Rewrites a safetensors file with some tensors changed.

use std::io::{BufWriter, Write};
use std::path::Path;

use hyperlora_core::Result;
use hyperlora_core::files::write_whole_with;

use crate::weights::file::SafetensorsFile;
use crate::weights::save::{TensorEntry, stop};

/// Writes `source` to `target` with the same header except for tensor hashes. `change` receives each tensor's bytes and
/// returns the same number of bytes. One tensor is in memory at a time, and the file appears atomically.
///
/// # Errors
/// Errors of `change`; Input: the path is not writable; Disk: the disk is full or failing.
pub fn rewrite(
    source: &SafetensorsFile,
    target: &Path,
    mut change: impl FnMut(&TensorEntry, Vec<u8>) -> Result<Vec<u8>>,
) -> Result<()> {
    let head = source.head()?;
    // Errors of the disk and of `change` are kept apart, because only the former are write errors.
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
