//! Locks for output names: only one process writes to a name, until that process ends, however it ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::place::{Hidden, leads_to, open_own};
use crate::{Error, Result};

/// Locked file, removed on drop unless it was renamed.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    pub(super) file: File,
}

impl Lock {
    /// Locks the file at `path` and creates it if absent. Returns `None` if another process holds the lock.
    pub(super) fn take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            // NFS grants an exclusive lock only on a file that is open for writing.
            let mut options = OpenOptions::new();
            let file = open_own(options.read(true).write(true).create(true).truncate(false), path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(source)) => {
                    tracing::debug!("{}: cannot be locked ({source})", path.display());
                }
            }
            // The previous holder may have renamed or removed the file between opening and locking.
            if leads_to(path, &file)? {
                return Ok(Some(Self { path: path.into(), file }));
            }
        }
    }

    /// Locks the name `target` for this process.
    ///
    /// # Errors
    /// Input: another process writes to it, or the place cannot be written to. Disk: a failing disk.
    pub(super) fn claim(target: &Path) -> Result<Self> {
        Self::take(&Hidden::Lock.beside(target))
            .map_err(|source| Error::write(target, source))?
            .ok_or_else(|| busy(target))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // As long as the file is locked, no other process replaces it. A file that stays behind is locked by the next
        // process.
        if leads_to(&self.path, &self.file).unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub(super) fn busy(target: &Path) -> Error {
    Error::file(target, "another process writes to it", "wait until that has ended, or name another place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_on_a_file_that_was_renamed_away_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = Lock::take(&path).unwrap().unwrap();
        assert!(Lock::take(&path).unwrap().is_none());
        fs::rename(&path, folder.path().join("result")).unwrap();
        // The holder renamed its file: the next one gets its own file, which the first one leaves alone.
        let second = Lock::take(&path).unwrap().unwrap();
        drop(first);
        assert!(leads_to(&path, &second.file).unwrap());
        drop(second);
        assert!(!path.exists() && folder.path().join("result").exists());
    }

    #[test]
    fn whoever_waited_for_a_file_that_is_gone_takes_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || {
                    (0..200)
                        .filter(|_| {
                            let Some(lock) = Lock::take(&path).unwrap() else { return false };
                            // No other process holds the name at the same time.
                            assert!(Lock::take(&path).unwrap().is_none() && leads_to(&path, &lock.file).unwrap());
                            true
                        })
                        .count()
                })
            })
            .collect();
        assert!(held.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>() > 0);
        assert!(!path.exists());
    }
}
