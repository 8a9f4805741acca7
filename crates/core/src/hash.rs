//! SHA-256 of bytes and files.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::paths::open_regular;

/// Returns the SHA-256 of bytes in memory, in lower-case hexadecimal.
///
/// # Examples
/// ```
/// use hyperlora_core::hash::sha256_of;
///
/// assert!(sha256_of(b"abc").starts_with("ba7816bf8f01cfea"));
/// ```
pub fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Returns the SHA-256 of the file at `path`, in lower-case hexadecimal. Reads it in pieces.
///
/// # Errors
/// As [`Error::read`].
pub fn sha256_of_file(path: &Path) -> Result<String> {
    let failed = |source| Error::read(path, source);
    let mut file = open_regular(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 16];
    loop {
        match file.read(&mut piece).map_err(failed)? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&piece[..read]),
        }
    }
}

/// Formats bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
