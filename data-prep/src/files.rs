//! Files and folders that are whole or absent: written beside, synced, renamed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes `path` in one piece: until the last byte is on the disk, what stood there before stays.
///
/// # Errors
/// Input for a place that cannot be written to or holds something else than a file, Disk for a full or failing disk.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_with(path, |file| file.write_all(bytes))
}

/// [`write_whole`] for content that is made while it is written.
///
/// # Errors
/// As [`write_whole`]; an error of `fill` counts as one of the disk.
pub fn write_whole_with(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    // The rename would put a file in the place of a device or a pipe.
    if fs::metadata(path).is_ok_and(|stands| !stands.is_file()) {
        return Err(Error::file(path, "is no regular file", "name a file that may be written or replaced"));
    }
    let beside = beside(path);
    let written = File::create(&beside)
        .and_then(|mut file| fill(&mut file).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, path))
        .and_then(|()| sync_parent(path));
    written.map_err(|source| {
        // The half-written file is of no use; failing to remove it changes nothing for the caller.
        let _ = fs::remove_file(&beside);
        Error::write(path, source)
    })
}

/// A folder under construction: fill [`path`](Self::path), then [`commit`](Self::commit).
/// Dropped without a commit, it leaves nothing behind.
#[derive(Debug)]
pub struct StagedFolder {
    staged: PathBuf,
    target: PathBuf,
    /// Whether someone else looks after it: it is committed, or another process's to commit.
    settled: bool,
}

impl StagedFolder {
    /// Makes an empty folder beside `target`; one left there by a killed run is removed first. A folder that such a run
    /// had already moved out of the way, but not yet replaced, is put back.
    ///
    /// # Errors
    /// Input for a place that cannot be written to, Disk for a failing disk.
    pub fn new(target: &Path) -> Result<Self> {
        let (staged, old) = (beside(target), hidden(target, "old"));
        if old.exists() && !target.exists() {
            fs::rename(&old, target).map_err(|source| Error::write(target, source))?;
        }
        let made = match fs::remove_dir_all(&staged) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(source),
            _ => fs::create_dir_all(&staged),
        };
        made.map_err(|source| Error::write(&staged, source))?;
        Ok(Self { staged, target: target.into(), settled: false })
    }

    /// The folder that several processes fill for `target`, made where it does not stand yet. One of them commits it, the
    /// others [`leave`](Self::leave) it. What a killed run left there must be gone before.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(target: &Path) -> Result<Self> {
        let staged = beside(target);
        fs::create_dir_all(&staged).map_err(|source| Error::write(&staged, source))?;
        Ok(Self { staged, target: target.into(), settled: false })
    }

    /// Leaves the folder to the process that commits it.
    pub fn leave(mut self) {
        self.settled = true;
    }

    /// Where to write the folder's files until it is committed.
    pub fn path(&self) -> &Path {
        &self.staged
    }

    /// Syncs every file and puts the folder in its place, instead of one that stood there.
    ///
    /// # Errors
    /// As [`new`](Self::new); a folder that stood at the target is then still there.
    pub fn commit(mut self) -> Result<()> {
        let place = || -> std::io::Result<()> {
            for entry in fs::read_dir(&self.staged)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&self.staged)?.sync_all()?;
            if self.target.exists() {
                let old = hidden(&self.target, "old");
                if old.exists() {
                    fs::remove_dir_all(&old)?;
                }
                fs::rename(&self.target, &old)?;
                fs::rename(&self.staged, &self.target)?;
                // The new one is in its place: NFS keeps the old one as long as someone has a file of it open.
                if let Err(source) = fs::remove_dir_all(&old) {
                    tracing::warn!("{}: cannot be removed: {source}", old.display());
                }
            } else {
                fs::rename(&self.staged, &self.target)?;
            }
            sync_parent(&self.target)
        };
        place().map_err(|source| Error::write(&self.target, source))?;
        self.settled = true;
        Ok(())
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.settled {
            // Nothing refers to it: a failure to remove it must not hide the error that led here.
            let _ = fs::remove_dir_all(&self.staged);
        }
    }
}

/// `folder/name` -> `folder/.name.partial`, on the same file system, so that the rename is atomic.
fn beside(path: &Path) -> PathBuf {
    hidden(path, "partial")
}

/// `folder/name` -> `folder/.name.role`: the whole name stays in it, so that no two targets share one.
fn hidden(path: &Path, role: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{role}"))
}

/// A rename is on the disk only once its folder is.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => File::open(parent)?.sync_all(),
        None => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::write(Path::new("tmp"), e))?;
        let path = folder.path().join("weights");
        write_whole(&path, b"old")?;
        let failed = write_whole_with(&path, |file| {
            file.write_all(b"half of the ne")?;
            Err(std::io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.map_err(|e| e.exit_code()), Err(1));
        assert_eq!(fs::read(&path).ok().as_deref(), Some(&b"old"[..]));
        assert_eq!(fs::read_dir(folder.path()).map(Iterator::count).ok(), Some(1));
        Ok(())
    }

    #[test]
    fn only_files_are_replaced() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::write(Path::new("tmp"), e))?;
        for path in [folder.path(), Path::new("/dev/full")] {
            assert_eq!(write_whole(path, b"new").map_err(|e| e.exit_code()), Err(2));
        }
        assert!(fs::metadata("/dev/full").is_ok_and(|stands| !stands.is_file()));
        Ok(())
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() -> Result<()> {
        let root = tempfile::tempdir().map_err(|e| Error::write(Path::new("tmp"), e))?;
        let target = root.path().join("step-1");
        drop(StagedFolder::new(&target)?);
        assert_eq!(fs::read_dir(root.path()).map(Iterator::count).ok(), Some(0));
        for content in [b"first", b"again"] {
            let staged = StagedFolder::shared(&target)?;
            write_whole(&staged.path().join("a"), content)?;
            let other = StagedFolder::shared(&target)?;
            write_whole(&other.path().join("b"), content)?;
            other.leave();
            staged.commit()?;
            assert_eq!(fs::read(target.join("b")).ok().as_deref(), Some(&content[..]));
            assert_eq!(fs::read(target.join("a")).ok().as_deref(), Some(&content[..]));
        }
        assert_eq!(fs::read_dir(root.path()).map(Iterator::count).ok(), Some(1));
        Ok(())
    }

    #[test]
    fn a_replacement_touches_no_folder_of_a_like_name() -> Result<()> {
        let root = tempfile::tempdir().map_err(|e| Error::write(Path::new("tmp"), e))?;
        let (target, others) = (root.path().join("data.v1"), ["data.old", "data.v1.old", "data.v2"]);
        for other in others {
            write_folder(&root.path().join(other), b"mine")?;
        }
        write_folder(&target, b"first")?;
        write_folder(&target, b"again")?;
        assert_eq!(fs::read(target.join("a")).ok().as_deref(), Some(&b"again"[..]));
        for other in others {
            assert_eq!(fs::read(root.path().join(other).join("a")).ok().as_deref(), Some(&b"mine"[..]), "{other}");
        }
        Ok(())
    }

    #[test]
    fn a_folder_comes_back_after_a_kill_between_the_renames() -> Result<()> {
        let root = tempfile::tempdir().map_err(|e| Error::write(Path::new("tmp"), e))?;
        let target = root.path().join("faces");
        write_folder(&target, b"whole")?;
        fs::rename(&target, root.path().join(".faces.old")).map_err(|e| Error::write(&target, e))?;
        drop(StagedFolder::new(&target)?);
        assert_eq!(fs::read(target.join("a")).ok().as_deref(), Some(&b"whole"[..]));
        Ok(())
    }

    fn write_folder(target: &Path, content: &[u8]) -> Result<()> {
        let staged = StagedFolder::new(target)?;
        write_whole(&staged.path().join("a"), content)?;
        staged.commit()
    }
}
