//! Claim on the run folder: one training at a time, the same folder for all ranks, and the old folder kept.

use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hyperlora_core::files::{append, write_whole};
use hyperlora_core::hash::sha256_of;
use hyperlora_core::paths::{Root, open_regular};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::Ranks;

use crate::run::CONFIG_FILE;

/// Lock file in a run folder; a process that trains there holds its lock. A lock on the folder itself would not do: on
/// NFS it stays on one machine, while the lock of a regular file goes to the server.
const LOCK: &str = ".lock";

/// Name prefix of the mark file by which ranks recognise the main rank's run folder.
const MARK: &str = ".mark-";

/// Pause between two checks for the mark.
const PAUSE: Duration = Duration::from_millis(100);

/// Exclusive claim of this process on a run folder, held until it is dropped or the process ends in any way. Two
/// writers would take each other's unfinished checkpoints for leftovers.
#[derive(Debug)]
pub(crate) struct Claim {
    _locked: File,
}

impl Claim {
    /// Claims `run`, which must exist.
    ///
    /// # Errors
    /// Input: a folder that another process trains into, or that cannot be written to; Disk: a failing disk.
    pub(super) fn take(run: &Path) -> Result<Self> {
        // The retry is needed because `hyperlora status` checks the lock by holding it for a moment.
        Self::take_after(run, || thread::sleep(Duration::from_millis(200)))
    }

    /// Runs [`take`](Self::take), and calls `wait` before a second try if the folder is locked.
    fn take_after(run: &Path, wait: impl FnOnce()) -> Result<Self> {
        let path = run.join(LOCK);
        // NFS grants an exclusive lock only on a file opened for writing.
        let file = append(&path).map_err(|source| Error::write(&path, source))?;
        let mut locked = file.try_lock();
        if let Err(TryLockError::WouldBlock) = locked {
            wait();
            locked = file.try_lock();
        }
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(
                    run,
                    "another process trains into this folder",
                    "wait until it has ended, or give another folder with --out",
                ));
            }
            Err(TryLockError::Error(source)) => {
                tracing::warn!(
                    "{}: cannot be locked ({source}): make sure that no other process trains into this folder",
                    path.display()
                );
            }
        }
        Ok(Self { _locked: file })
    }
}

/// Returns whether a process trains into the folder; `None` if that cannot be determined. The check itself takes a
/// shared lock and releases it on return; a training that starts at that moment tries again.
pub fn is_claimed(run: &Path) -> Option<bool> {
    match open_regular(&run.join(LOCK)) {
        Ok(file) => match file.try_lock_shared() {
            Ok(()) => Some(false),
            Err(TryLockError::WouldBlock) => Some(true),
            Err(TryLockError::Error(_)) => None,
        },
        // Training never started here, or the folder is a copy.
        Err(source) if source.kind() == ErrorKind::NotFound => Some(false),
        Err(_) => None,
    }
}

/// Text before the checksum in the last line of a run's configuration.
const SEAL: &str = "# SHA-256 of the lines above: ";

/// Maximum size of a configuration, in bytes.
const LONGEST: u64 = 16 << 20;

/// Writes the resolved configuration with its checksum.
///
/// # Errors
/// Same as [`write_whole`].
pub(crate) fn write_config(run: &Path, yaml: &str) -> Result<()> {
    let sealed = format!("{yaml}{SEAL}{}\n", sha256_of(yaml.as_bytes()));
    write_whole(&run.join(CONFIG_FILE), sealed.as_bytes())
}

/// Compares the resolved configuration of a run with its checksum.
///
/// # Errors
/// Input: a configuration that is missing, was changed, or has no checksum because an older version wrote it; Disk: a
/// failing disk.
pub fn verify_config(run: &Path) -> Result<()> {
    let path = run.join(CONFIG_FILE);
    let text = Root::open(run)?.read(Path::new(CONFIG_FILE), LONGEST).map_err(|source| Error::read(&path, source))?;
    let text = String::from_utf8_lossy(&text);
    let remedy = "check that it matches what you trained with: the next `hyperlora train` into this folder rewrites it";
    match text.strip_suffix('\n').and_then(|text| text.rsplit_once(SEAL)) {
        None => Err(Error::file(&path, "has no checksum: an older version wrote it", remedy)),
        Some((yaml, sha256)) if sha256_of(yaml.as_bytes()) == sha256 => Ok(()),
        Some(_) => Err(Error::file(&path, "does not match its checksum", remedy)),
    }
}

/// Claims the run folder for all ranks: the main rank creates and locks it, the others look for it for up to
/// `patience`. The ranks wait for each other up to the deadline of `ranks`.
///
/// # Errors
/// Same as [`Claim::take`] on the main rank, reported on all ranks. Input, the same on all ranks: names the first rank
/// with a different run folder.
pub(crate) fn claim_together(ranks: &Ranks, run: &Path, patience: Duration) -> Result<Option<Claim>> {
    let claimed = ranks.try_on_all("rank 0 to claim the run folder", || {
        let claim = || {
            fs::create_dir_all(run).map_err(|source| Error::write(run, source))?;
            let claim = Claim::take(run)?;
            Ok((claim, Mark::put_into(run)?))
        };
        ranks.is_main().then(claim).transpose()
    })?;
    let (claim, mark) = claimed.unzip();
    let name = mark.as_ref().map(|mark| mark.name.clone());
    let name = ranks.share("the mark of rank 0", Ok(&name))?.into_iter().next().flatten().unwrap_or_default();
    let folder = std::path::absolute(run).unwrap_or_else(|_| run.into());
    let seen = sees(&folder, &name, patience).map_err(|source| source.to_string());
    let own = (folder.display().to_string(), seen.err());
    let all = ranks.share("all ranks to find the run folder", Ok(&own))?;
    let other = all.iter().enumerate().find_map(|(rank, (folder, problem))| Some((rank, folder, problem.as_ref()?)));
    match (other, all.first()) {
        (Some((rank, folder, problem)), Some((first, _))) => Err(Error::input(
            ranks.name_of(rank),
            format!("its run folder {folder} is not that of {}, {first}: {problem}", ranks.name_of(0)),
            "give a folder that all ranks share with --out: on a network file system where they run on several machines, and as an absolute path",
        )),
        _ => Ok(claim),
    }
}

/// Waits up to `patience` for the mark, because a network file system may show it late.
fn sees(run: &Path, name: &str, patience: Duration) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        // Opening a folder makes NFS compare its cache with the server; nothing else does.
        for folder in [run.parent(), Some(run)].into_iter().flatten() {
            drop(File::open(folder));
        }
        match fs::metadata(run.join(name)) {
            Err(_) if begun.elapsed() < patience => thread::sleep(PAUSE),
            found => return found.map(drop),
        }
    }
}

/// Mark file of the main rank, by which the other ranks recognise its run folder; removed on drop. Its name is new
/// every time, so that no file system can answer from its cache.
struct Mark {
    path: PathBuf,
    name: String,
}

impl Mark {
    fn put_into(run: &Path) -> Result<Self> {
        let failed = |source| Error::write(run, source);
        // Marks left by a start that was killed.
        for entry in fs::read_dir(run).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if name.to_string_lossy().starts_with(MARK) {
                // A mark that cannot be removed does no harm.
                let _ = fs::remove_file(run.join(name));
            }
        }
        let name = format!("{MARK}{:016x}", RandomState::new().build_hasher().finish());
        let path = run.join(&name);
        File::create_new(&path).map_err(|source| Error::write(&path, source))?;
        Ok(Self { path, name })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // If this fails, the next start removes the mark.
        let _ = fs::remove_file(&self.path);
    }
}

/// Moves a run folder aside, to `<run>.1`, `<run>.2` and so on, and returns the new path; `None` if there is no folder.
///
/// # Errors
/// Input: a folder that another process trains into; Input or Disk: the folder cannot be renamed.
pub fn move_aside(run: &Path) -> Result<Option<PathBuf>> {
    if !run.exists() {
        return Ok(None);
    }
    let _claim = Claim::take(run)?;
    let name = run.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let free = (1_u32..).map(|number| run.with_file_name(format!("{name}.{number}"))).find(|path| !path.exists());
    let Some(aside) = free else { return Err(Error::Fault(format!("no free name beside {}", run.display()))) };
    fs::rename(run, &aside).map_err(|source| Error::write(run, source))?;
    Ok(Some(aside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_at_the_lock_keeps_nobody_from_training_and_another_training_does() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(is_claimed(run.path()), Some(false));
        drop(Claim::take(run.path()).unwrap());
        let look = File::open(run.path().join(LOCK)).unwrap();
        look.try_lock_shared().unwrap();
        let claim = Claim::take_after(run.path(), || drop(look)).unwrap();
        let refused = Claim::take_after(run.path(), || ()).unwrap_err();
        assert!(refused.exit_code() == 2 && refused.to_string().contains("another process trains"), "{refused}");
        assert_eq!(is_claimed(run.path()), Some(true));
        drop(claim);
        assert_eq!(is_claimed(run.path()), Some(false));
        Claim::take_after(run.path(), || ()).unwrap();
    }

    #[test]
    fn the_lock_is_that_of_a_file_which_goes_along_when_the_run_is_moved() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("quickstart");
        fs::create_dir(&run).unwrap();
        // A program that locks the folder itself would find it free.
        let claim = Claim::take(&run).unwrap();
        File::open(&run).unwrap().try_lock().unwrap();
        assert_eq!(move_aside(&run).unwrap_err().exit_code(), 2);
        let moved = root.path().join("moved");
        fs::rename(&run, &moved).unwrap();
        assert_eq!(is_claimed(&moved), Some(true));
        drop(claim);
        // If the lock file cannot be opened, the claim is unknown.
        fs::remove_file(moved.join(LOCK)).unwrap();
        std::os::unix::fs::symlink(LOCK, moved.join(LOCK)).unwrap();
        assert_eq!(is_claimed(&moved), None);
    }

    #[test]
    fn a_configuration_tells_whether_it_was_changed() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(CONFIG_FILE);
        write_config(run.path(), "name: a\nseed: 1\n").unwrap();
        verify_config(run.path()).unwrap();
        let sealed = fs::read_to_string(&path).unwrap();
        for (text, words) in [
            (sealed.replace("seed: 1", "seed: 2"), "does not match"),
            (format!("{sealed}runtime: ./evil.so\n"), "does not match"),
            (format!("runtime: ./evil.so\n{sealed}"), "does not match"),
            ("name: a\nseed: 1\n".into(), "no checksum"),
        ] {
            fs::write(&path, text).unwrap();
            let error = verify_config(run.path()).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{words}: {error}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert_eq!(verify_config(run.path()).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn an_old_run_is_kept_under_the_next_free_name() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("quickstart");
        assert_eq!(move_aside(&run).unwrap(), None);
        for number in 1..=2 {
            fs::create_dir(&run).unwrap();
            fs::write(run.join("summary.json"), number.to_string()).unwrap();
            assert_eq!(move_aside(&run).unwrap(), Some(root.path().join(format!("quickstart.{number}"))));
        }
        assert!(!run.exists());
        assert_eq!(fs::read_to_string(root.path().join("quickstart.1/summary.json")).unwrap(), "1");
    }
}
