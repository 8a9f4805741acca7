//! Files and folders that are whole or absent: written next to their place, synced, renamed. Replaces and removes only
//! what this program wrote, and never lets two processes write to one name.

mod lock;
mod mode;
mod ownership;
mod place;
mod staged_folder;
mod target;
mod whole_file;

use std::io;
use std::path::Path;

pub use mode::{UMASK, restrict_modes};
pub use ownership::{Listing, MARKER, Ownership, unlisted};
pub use place::{Hidden, append};
pub use staged_folder::StagedFolder;
pub use target::{OutputFile, apart, follow};
pub use whole_file::{write_whole, write_whole_with};

/// Copies the file `from` to the new file `to`, with the default mode of new files.
///
/// # Errors
/// Reading: as [`Error::read`](crate::Error::read). Writing: as [`Error::write`](crate::Error::write).
pub fn copy(from: &Path, to: &Path) -> crate::Result<()> {
    let source = crate::paths::open_regular(from).map_err(|source| crate::Error::read(from, source))?;
    write_whole_with(to, |file| io::copy(&mut &source, file).map(drop))
}
