//! A file that appears whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::lock::{Lock, busy};
use super::place::{Hidden, sync_parent};
use super::target::no_file;
use crate::{Error, Result};

/// Writes `path` in one piece: the previous file stays until the last byte is on the disk. Replaces a link instead of
/// following it; for a path that the user named, use an [`OutputFile`](super::OutputFile).
///
/// # Errors
/// Input: the place cannot be written to or contains something other than a file, or another process is writing the
/// file. Disk: a full or failing disk.
///
/// # Examples
/// ```
/// use hyperlora_core::files::write_whole;
/// use hyperlora_core::hash::{sha256_of, sha256_of_file};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let path = folder.join("state.json");
/// write_whole(&path, b"{}")?;
/// assert_eq!(sha256_of_file(&path)?, sha256_of(b"{}"));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_with(path, |file| file.write_all(bytes))
}

/// Writes a file like [`write_whole`], with content that is generated while it is written.
///
/// # Errors
/// As [`write_whole`]; an error of `fill` counts as a disk error.
pub fn write_whole_with(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    // The rename would replace a device or a pipe by a file.
    if fs::metadata(path).is_ok_and(|stands| !stands.is_file()) {
        return Err(no_file(path));
    }
    let failed = |source| Error::write(path, source);
    let beside = Hidden::Partial.beside(path);
    // Dropping it removes the half-written file. What a killed run left there is overwritten.
    let mut partial = Lock::take(&beside).map_err(failed)?.ok_or_else(|| busy(path))?;
    let file = &mut partial.file;
    file.set_len(0)
        .and_then(|()| fill(file))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path))
        .and_then(|()| sync_parent(path))
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        write_whole(&path, b"old").unwrap();
        let failed = write_whole_with(&path, |file| {
            file.write_all(b"half of the ne")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.unwrap_err().exit_code(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["weights"]);
    }

    #[test]
    fn only_files_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        // No device of the machine: a user who may do all would lose it where this fails.
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [folder.path(), &pipe] {
            let error = write_whole(path, b"new").unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("is not a regular file"), "{error}");
        }
        assert!(!fs::metadata(&pipe).unwrap().is_file());
        assert_eq!(names(folder.path()), ["pipe"]);
    }

    #[test]
    fn of_two_that_write_one_file_the_second_is_refused_and_what_a_killed_one_left_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lora.safetensors");
        write_whole_with(&path, |file| {
            file.write_all(b"first")?;
            let refused = write_whole(&path, b"second").unwrap_err();
            assert!(refused.exit_code() == 2 && refused.to_string().contains("another process"), "{refused}");
            Ok(())
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        fs::write(Hidden::Partial.beside(&path), "longer than what follows").unwrap();
        write_whole(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(names(folder.path()), ["lora.safetensors"]);
    }

    #[test]
    fn files_of_like_names_are_nobodys_leftovers() {
        let folder = tempfile::tempdir().unwrap();
        for other in [".a.partial", "a.partial", ".a.lock"] {
            fs::write(folder.path().join(other), "mine").unwrap();
        }
        write_whole(&folder.path().join("a"), b"new").unwrap();
        assert_eq!(names(folder.path()), [".a.lock", ".a.partial", "a", "a.partial"]);
        assert_eq!(fs::read(folder.path().join(".a.partial")).unwrap(), b"mine");
    }

    #[test]
    fn nothing_is_written_through_a_link_that_waits_beside() {
        let folder = tempfile::tempdir().unwrap();
        let (path, victim) = (folder.path().join("a"), folder.path().join("victim"));
        fs::write(&victim, "mine").unwrap();
        std::os::unix::fs::symlink(&victim, Hidden::Partial.beside(&path)).unwrap();
        assert_eq!(write_whole(&path, b"new").unwrap_err().exit_code(), 2);
        assert_eq!(fs::read(&victim).unwrap(), b"mine");
    }
}
