//! A folder that appears whole, and may replace one that this program wrote.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use super::lock::Lock;
use super::ownership::Ownership;
use super::place::{Hidden, parent_of, stands, sync_parent};
use super::target::resolve;
use crate::{Error, Result};

/// Folder under construction: fill [`path`](Self::path), then [`commit`](Self::commit). Dropped without a commit, it
/// leaves nothing behind.
///
/// # Examples
/// ```
/// use hyperlora_core::files::{Ownership, StagedFolder, write_whole};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let folder = folder.path();
/// let target = folder.join("shards");
/// let staged = StagedFolder::new(&target, Ownership::Marked)?;
/// write_whole(&staged.path().join("manifest.json"), b"{}")?;
/// assert!(!target.exists());
/// staged.commit()?;
/// assert!(target.join("manifest.json").is_file());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct StagedFolder {
    staged: PathBuf,
    target: PathBuf,
    ownership: Ownership,
    /// True if this value must not clean up: the folder is committed, or another process commits it.
    settled: bool,
    _lock: Option<Lock>,
}

impl StagedFolder {
    /// Makes an empty folder next to `target`, which the user named: a link there is followed. Call it before the work
    /// begins, because it finds everything that would make [`commit`](Self::commit) fail. First removes what a killed
    /// run left next to `target`, and puts back a folder that such a run had moved away but not yet replaced.
    ///
    /// # Errors
    /// Input: `ownership` does not allow replacing the folder, another process writes to it, or the place cannot be
    /// written to. Disk: a failing disk.
    pub fn new(target: &Path, ownership: Ownership) -> Result<Self> {
        let named = target;
        let failed = |source| Error::write(named, source);
        let target = resolve(named)?;
        fs::create_dir_all(parent_of(&target)).map_err(failed)?;
        let lock = put_back(&target)?;
        ownership.check(&target)?;
        remove_leftovers(&target, ownership)?;
        let staged = Hidden::Partial.beside(&target);
        fs::create_dir(&staged).map_err(failed)?;
        Ok(Self { staged, target, ownership, settled: false, _lock: Some(lock) })
    }

    /// Clears what killed runs left next to `target`, as [`new`](Self::new) does, without starting a folder. A leftover
    /// stays, with a warning, if it contains foreign files or cannot be removed: NFS keeps a folder as long as a
    /// process has one of its files open.
    ///
    /// # Errors
    /// Input: another process writes to `target`, or the place cannot be written to. Disk: a failing disk.
    pub fn clear(target: &Path, ownership: Ownership) -> Result<()> {
        let _lock = put_back(target)?;
        if let Err(error) = remove_leftovers(target, ownership) {
            tracing::warn!("{error}");
        }
        Ok(())
    }

    /// Opens the folder that several processes fill for `target`, and creates it if absent. One process commits it, the
    /// others [`leave`](Self::leave) it. The caller must have removed what a killed run left there, and no other run
    /// may write there.
    ///
    /// # Errors
    /// Input: the place cannot be written to. Disk: a failing disk.
    pub fn shared(target: &Path, ownership: Ownership) -> Result<Self> {
        let staged = Hidden::Partial.beside(target);
        fs::create_dir_all(&staged).map_err(|source| Error::write(&staged, source))?;
        Ok(Self { staged, target: target.into(), ownership, settled: false, _lock: None })
    }

    /// Leaves the folder to the process that commits it.
    pub fn leave(mut self) {
        self.settled = true;
    }

    /// Returns the path to write the folder's files to, until it is committed.
    pub fn path(&self) -> &Path {
        &self.staged
    }

    /// Syncs every file and moves the folder to its place, replacing an existing one.
    ///
    /// # Errors
    /// As [`new`](Self::new); an existing folder at the target then stays. If somebody wrote into it since the start,
    /// the finished folder is kept next to it, and the error names it.
    pub fn commit(mut self) -> Result<()> {
        let failed = |source| Error::write(&self.target, source);
        self.ownership.mark(&self.staged)?;
        sync_all(&self.staged).map_err(failed)?;
        if stands(&self.target) {
            let replaced = self.replace();
            self.settled = replaced.is_ok();
            return replaced;
        }
        fs::rename(&self.staged, &self.target).map_err(failed)?;
        self.settled = true;
        sync_parent(&self.target).map_err(failed)
    }

    fn replace(&mut self) -> Result<()> {
        let (target, old) = (&self.target, Hidden::Old.beside(&self.target));
        let failed = |source| Error::write(target, source);
        self.ownership.check(&old)?;
        remove(&old).and_then(|()| fs::rename(target, &old)).map_err(failed)?;
        // Check again, now that nobody else uses the folder: files that somebody added since the start must not be
        // lost.
        let foreign = self.ownership.check(&old).err();
        let placed = if foreign.is_some() { Ok(()) } else { fs::rename(&self.staged, target) };
        if foreign.is_some() || placed.is_err() {
            fs::rename(&old, target).map_err(failed)?;
            placed.map_err(failed)?;
        }
        if let Some(error) = foreign {
            let kept = keep(&self.staged, target).map_err(failed)?;
            let remedy = format!("the new folder is complete and kept as {}: move either one by hand", kept.display());
            return Err(error.with_remedy(remedy));
        }
        // The new folder is in place. NFS keeps the old one as long as a process has one of its files open.
        if let Err(source) = remove(&old) {
            tracing::warn!("{}: cannot be removed: {source}", old.display());
        }
        sync_parent(target).map_err(failed)
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.settled {
            // Nothing refers to the folder: failing to remove it must not hide the original error.
            let _ = fs::remove_dir_all(&self.staged);
        }
    }
}

/// Locks the name `target`, and puts back a folder that a killed run had moved away.
fn put_back(target: &Path) -> Result<Lock> {
    let lock = Lock::claim(target)?;
    let old = Hidden::Old.beside(target);
    if stands(&old) && !stands(target) {
        fs::rename(&old, target).map_err(|source| Error::write(target, source))?;
    }
    Ok(lock)
}

/// Removes what a killed run left. Both names contain that of this program, and the caller holds the lock. A replaced
/// folder must also be one that this program wrote.
fn remove_leftovers(target: &Path, ownership: Ownership) -> Result<()> {
    ownership.check(&Hidden::Old.beside(target))?;
    [Hidden::Old, Hidden::Partial].into_iter().try_for_each(|hidden| {
        let leftover = hidden.beside(target);
        remove(&leftover).map_err(|source| Error::write(&leftover, source))
    })
}

/// Moves a finished folder that cannot take its place to the first free name of `target-1`, `target-2`, ...
fn keep(staged: &Path, target: &Path) -> io::Result<PathBuf> {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push("-");
    for number in 1.. {
        let mut name = name.clone();
        name.push(number.to_string());
        let kept = target.with_file_name(name);
        // Create the folder first, so that the rename cannot replace one that another process just made.
        match fs::create_dir(&kept) {
            Ok(()) => return fs::rename(staged, &kept).map(|()| kept),
            Err(source) if source.kind() == ErrorKind::AlreadyExists => {}
            Err(source) => return Err(source),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Syncs every file in `folder`, and every folder after its content.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in WalkDir::new(folder).contents_first(true) {
        let entry = entry?;
        if !entry.file_type().is_symlink() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::{MARKER, write_whole};
    use super::*;

    fn marked(target: &Path) -> Result<StagedFolder> {
        StagedFolder::new(target, Ownership::Marked)
    }

    fn write_folder(target: &Path, content: &[u8]) -> Result<()> {
        let staged = marked(target)?;
        fs::create_dir(staged.path().join("sub")).unwrap();
        write_whole(&staged.path().join("sub/a"), content)?;
        staged.commit()
    }

    fn content(target: &Path) -> Vec<u8> {
        fs::read(target.join("sub/a")).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/step-1");
        drop(marked(&target).unwrap());
        assert_eq!(names(&root.path().join("deep")), [""; 0]);
        for made in [b"first", b"again"] {
            write_folder(&target, made).unwrap();
            assert_eq!(content(&target), made);
        }
        assert_eq!(names(&root.path().join("deep")), ["step-1"]);
        assert_eq!(names(&target), [MARKER, "sub"]);
    }

    #[test]
    fn several_fill_a_folder_that_one_commits() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("step-1");
        let listed = Ownership::Listed(|_| Some(["a", "b"].map(|name| (name.into(), None)).into()));
        for made in [b"first", b"again"] {
            let staged = StagedFolder::shared(&target, listed).unwrap();
            write_whole(&staged.path().join("a"), made).unwrap();
            let other = StagedFolder::shared(&target, listed).unwrap();
            write_whole(&other.path().join("b"), made).unwrap();
            other.leave();
            staged.commit().unwrap();
            assert_eq!([fs::read(target.join("a")).unwrap(), fs::read(target.join("b")).unwrap()], [made, made]);
        }
        assert_eq!(names(root.path()), ["step-1"]);
    }

    #[test]
    fn a_folder_is_replaced_where_it_holds_what_was_written_and_nothing_else() {
        type Change = fn(&Path);
        let changes: [(Change, &str); 10] = [
            (|folder| fs::write(folder.join("notes.txt"), "mine").unwrap(), "`notes.txt`, which this program did not"),
            (|folder| fs::write(folder.join("sub/notes.txt"), "mine").unwrap(), "`sub/notes.txt`"),
            (|folder| fs::create_dir(folder.join("mine")).unwrap(), "`mine`"),
            (|folder| symlink("sub", folder.join("link")).unwrap(), "`link`"),
            (|folder| fs::write(folder.join("sub/a"), "written on").unwrap(), "`sub/a`, which was changed"),
            (
                |folder| {
                    // As long as the file that it stands for.
                    fs::remove_file(folder.join("sub/a")).unwrap();
                    symlink("mine!", folder.join("sub/a")).unwrap();
                },
                "`sub/a`, which this program did not",
            ),
            (|folder| fs::remove_file(folder.join(MARKER)).unwrap(), "nothing in it tells"),
            (
                |folder| {
                    let mut marker = fs::read(folder.join(MARKER)).unwrap();
                    marker.resize((16 << 20) + 1, b' ');
                    fs::write(folder.join(MARKER), marker).unwrap();
                },
                "nothing in it tells",
            ),
            (|folder| fs::write(folder.join(MARKER), "{}").unwrap(), "nothing in it tells"),
            (
                |folder| fs::write(folder.join(MARKER), r#"{"made_by": "pip", "files": {"sub/a": 5}}"#).unwrap(),
                "nothing in",
            ),
        ];
        for (change, words) in changes {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("mine");
            write_folder(&target, b"first").unwrap();
            // Started before the foreign change.
            let staged = marked(&target).unwrap();
            change(&target);
            let before = names(&target);
            let at_the_end = staged.commit().unwrap_err();
            let at_the_start = marked(&target).unwrap_err();
            for error in [&at_the_end, &at_the_start] {
                assert!(error.exit_code() == 2 && error.to_string().contains(words), "{words}: {error}");
            }
            assert_eq!(names(&target), before);
            assert!(at_the_end.to_string().contains("mine-1"), "{at_the_end}");
            assert_eq!(names(root.path()), ["mine", "mine-1"]);
            assert_eq!(names(&root.path().join("mine-1")), [MARKER]);
        }
    }

    #[test]
    fn a_marker_that_names_files_outside_of_its_folder_tells_nothing_of_them() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("mine");
        write_folder(&target, b"first").unwrap();
        fs::write(root.path().join("other"), "longer than one byte").unwrap();
        let marker = r#"{"made_by": "hyperlora", "files": {"sub/a": 5, "../other": 1}}"#;
        fs::write(target.join(MARKER), marker).unwrap();
        write_folder(&target, b"again").unwrap();
        assert_eq!(content(&target), b"again");
    }

    #[test]
    fn a_foreign_folder_in_the_place_of_a_leftover_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let (target, old) = (root.path().join("faces"), root.path().join(".faces.hyperlora.old"));
        write_folder(&target, b"first").unwrap();
        let staged = marked(&target).unwrap();
        fs::create_dir(&old).unwrap();
        fs::write(old.join("1.jpg"), "mine").unwrap();
        for error in [staged.commit().unwrap_err(), marked(&target).unwrap_err()] {
            let message = error.to_string();
            assert!(error.exit_code() == 2 && message.contains(".faces.hyperlora.old: is not empty"), "{message}");
            assert_eq!(fs::read(old.join("1.jpg")).unwrap(), b"mine");
            assert_eq!(names(root.path()), [".faces.hyperlora.old", "faces"]);
        }
    }

    #[test]
    fn a_finished_folder_that_cannot_take_its_place_takes_no_others_place() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("faces");
        write_folder(&target, b"first").unwrap();
        let staged = marked(&target).unwrap();
        fs::write(target.join("notes.txt"), "mine").unwrap();
        // An empty one is somebody's, too.
        fs::create_dir(root.path().join("faces-1")).unwrap();
        let error = staged.commit().unwrap_err();
        assert!(error.to_string().contains("faces-2: move either"), "{error}");
        assert_eq!(names(root.path()), ["faces", "faces-1", "faces-2"]);
        assert_eq!(names(&root.path().join("faces-1")), [""; 0]);
        assert_eq!(names(&root.path().join("faces-2")), [MARKER]);
    }

    #[test]
    fn a_foreign_folder_a_file_and_a_missing_name_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str| root.path().join(name);
        fs::create_dir_all(place("photos")).unwrap();
        fs::write(place("photos/1.jpg"), "years of work").unwrap();
        fs::write(place("file"), "mine").unwrap();
        fs::create_dir(place("empty")).unwrap();
        for (name, words) in
            [("photos", "is not empty"), ("file", "is a file"), ("photos/..", "has no name of its own")]
        {
            let error = marked(&place(name)).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{name}: {error}");
        }
        let error = StagedFolder::new(&place("photos"), Ownership::Never).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        write_folder(&place("empty"), b"made").unwrap();
        assert_eq!(names(root.path()), ["empty", "file", "photos"]);
        // A folder that appears during the work is not lost either.
        let staged = marked(&place("new")).unwrap();
        fs::create_dir(place("new")).unwrap();
        fs::write(place("new/1.jpg"), "mine").unwrap();
        assert_eq!(staged.commit().unwrap_err().exit_code(), 2);
        assert_eq!(names(&place("new")), ["1.jpg"]);
    }

    #[test]
    fn of_two_that_make_one_folder_the_second_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("faces");
        let first = marked(&target).unwrap();
        write_whole(&first.path().join("a"), b"first").unwrap();
        let refused = marked(&target).unwrap_err();
        assert!(refused.exit_code() == 2 && refused.to_string().contains("another process"), "{refused}");
        first.commit().unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"first");
        assert_eq!(names(root.path()), ["faces"]);
        drop(marked(&target).unwrap());
    }

    #[test]
    fn a_replacement_touches_no_folder_of_a_like_name() {
        let root = tempfile::tempdir().unwrap();
        let (target, others) =
            (root.path().join("data.v1"), ["data.old", "data.v1.old", ".data.v1.old", ".data.v1.partial"]);
        for other in others {
            write_folder(&root.path().join(other), b"mine").unwrap();
        }
        write_folder(&target, b"first").unwrap();
        write_folder(&target, b"again").unwrap();
        assert_eq!(content(&target), b"again");
        for other in others {
            assert_eq!(content(&root.path().join(other)), b"mine", "{other}");
        }
    }

    #[test]
    fn what_killed_runs_left_is_put_back_or_removed() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("faces");
        write_folder(&target, b"whole").unwrap();
        // Killed between the renames.
        fs::rename(&target, Hidden::Old.beside(&target)).unwrap();
        // Killed during the work.
        fs::create_dir(Hidden::Partial.beside(&target)).unwrap();
        fs::write(Hidden::Partial.beside(&target).join("half"), "").unwrap();
        fs::write(Hidden::Lock.beside(&target), "").unwrap();
        drop(marked(&target).unwrap());
        assert_eq!(content(&target), b"whole");
        assert_eq!(names(root.path()), ["faces"]);
        // Killed before the old folder was removed.
        write_folder(&root.path().join("copy"), b"older").unwrap();
        fs::rename(root.path().join("copy"), Hidden::Old.beside(&target)).unwrap();
        write_folder(&target, b"newer").unwrap();
        assert_eq!(names(root.path()), ["faces"]);
        assert_eq!(content(&target), b"newer");
    }

    #[test]
    fn a_link_is_followed_to_the_folder_it_names() {
        let root = tempfile::tempdir().unwrap();
        let (disk, link) = (root.path().join("disk"), root.path().join("link"));
        fs::create_dir(&disk).unwrap();
        symlink("disk/faces", &link).unwrap();
        for made in [b"first", b"again"] {
            write_folder(&link.join(""), made).unwrap();
            assert_eq!(content(&disk.join("faces")), made);
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        }
        assert_eq!(names(&disk), ["faces"]);
    }

    #[test]
    fn the_place_where_a_disk_is_mounted_is_refused() {
        let error = marked(Path::new("/proc")).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("file system is mounted"), "{error}");
    }
}
