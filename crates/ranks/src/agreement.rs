//! Agreement of all ranks on what they run, checked once at the start: a rank with another build or another file would
//! not fail, it would corrupt the weights.

use std::path::PathBuf;

use hyperlora_core::hash::sha256_of_file;
use hyperlora_core::{Error, Result};

use super::Collective;

/// Identifies this build: returns the first 12 hexadecimal digits of the SHA-256 of the program's file.
///
/// # Errors
/// Fault: the system does not name the program's file. Otherwise those of reading it.
pub fn program() -> Result<String> {
    // On Linux this is the running program, even if another build has replaced the file on the disk.
    let linux = PathBuf::from("/proc/self/exe");
    let path = if linux.exists() { Ok(linux) } else { std::env::current_exe() };
    let path = path.map_err(|source| Error::Fault(format!("the file of this program cannot be found: {source}")))?;
    let mut checksum = sha256_of_file(&path)?;
    checksum.truncate(12);
    Ok(checksum)
}

/// Compares the claims of each rank with those of rank 0. A claim is a name (`version`, `configuration`) and a value;
/// the names are the same on every rank. All ranks reach the same result.
///
/// # Errors
/// Input, the same on all ranks: names the first rank that differs, its machine and the difference.
pub fn agree(world: &dyn Collective, claims: &[(&str, String)]) -> Result<()> {
    let note: String = claims.iter().map(|(name, value)| format!("{name}\t{value}\n")).collect();
    let notes = world.exchange("all ranks to tell what they run", note.as_bytes())?;
    let notes: Vec<String> = notes.iter().map(|note| String::from_utf8_lossy(note).into_owned()).collect();
    let Some(first) = notes.first() else { return Ok(()) };
    let Some((rank, note)) = notes.iter().enumerate().find(|(_, note)| *note != first) else { return Ok(()) };
    let (wanted, found) =
        first.lines().zip(note.lines()).find(|(wanted, found)| wanted != found).unwrap_or((first, note));
    let (name, wanted) = wanted.split_once('\t').unwrap_or(("build", wanted));
    let found = found.split_once('\t').map_or(found, |(_, value)| value);
    Err(Error::input(
        world.name_of(rank),
        format!("its {name} is {found}, that of {} is {wanted}", world.name_of(0)),
        "give all machines the same program, configuration and data",
    ))
}
