//! Parts of remote shards on this machine's disk, each a file named by its checksum: whole or absent, up to a size.

use std::fs::{self, File, FileTimes, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::shard::manifest::sha256_of;

/// Half-written files of this age belong to no living process.
const STALE: Duration = Duration::from_secs(3600);

/// Between two looks at whether another process is done.
const PAUSE: Duration = Duration::from_millis(10);

/// Folder of the files that processes lock, one for each piece that is being asked for.
const LOCKS: &str = "locks";

/// A folder that several processes may share.
#[derive(Debug)]
pub(super) struct PieceCache {
    folder: PathBuf,
    limit: u64,
    /// Bytes written since the folder was last looked through.
    written: AtomicU64,
    /// Makes names of half-written files unique.
    count: AtomicU64,
    warned: AtomicBool,
}

/// The right to ask for a piece, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    path: PathBuf,
    _file: File,
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Who waits for the removed file gets its turn beside who makes it anew; both find the piece that was kept meanwhile.
        let _ = fs::remove_file(&self.path);
    }
}

impl PieceCache {
    /// A cache of `limit` bytes; a little more while it is written to.
    ///
    /// # Errors
    /// Input or Disk for a folder that cannot be made.
    pub(super) fn open(folder: &Path, limit: u64) -> Result<Self> {
        let locks = folder.join(LOCKS);
        fs::create_dir_all(&locks).map_err(|source| Error::write(&locks, source))?;
        let (written, count, warned) = Default::default();
        let cache = Self { folder: folder.into(), limit, written, count, warned };
        cache.shrink();
        Ok(cache)
    }

    /// The piece with this checksum, where it is there and still has it.
    pub(super) fn get(&self, sha256: &str) -> Option<Bytes> {
        let path = self.path(sha256)?;
        let bytes = fs::read(&path).ok()?;
        if sha256_of(&bytes) != sha256 {
            let _ = fs::remove_file(&path);
            return None;
        }
        // The time of the last use decides what goes first; a folder that cannot be changed keeps the time of writing.
        let now = FileTimes::new().set_modified(SystemTime::now());
        let _ = File::options().append(true).open(&path).and_then(|file| file.set_times(now));
        Some(bytes.into())
    }

    /// Keeps a piece. A disk that has no room for it costs speed, never the run.
    pub(super) fn put(&self, sha256: &str, bytes: &[u8]) {
        let Some(path) = self.path(sha256) else { return };
        self.write(&path, bytes);
        // Looking through the folder takes time: only once in a while, also for what other processes wrote.
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written >= self.limit / 16 {
            self.written.store(0, Ordering::Relaxed);
            self.shrink();
        }
    }

    /// What [`put_latest`](Self::put_latest) kept last for `place`.
    pub(super) fn latest(&self, place: &Path) -> Option<Bytes> {
        self.get(&fs::read_to_string(self.path_of_latest(place)).ok()?)
    }

    /// Keeps the content of a place whose checksum nobody knows beforehand.
    pub(super) fn put_latest(&self, place: &Path, bytes: &[u8]) {
        let sha256 = sha256_of(bytes);
        self.put(&sha256, bytes);
        self.write(&self.path_of_latest(place), sha256.as_bytes());
    }

    /// Waits while another thread or process holds the turn for this piece, at most `until` then. `None` where the wait was
    /// in vain, and on a file system without locks: everybody may ask.
    pub(super) fn turn(&self, sha256: &str, until: Instant) -> Option<Turn> {
        let path = self.folder.join(LOCKS).join(self.path(sha256)?.file_name()?);
        let file = File::options().create(true).append(true).open(&path).ok()?;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(Turn { path, _file: file }),
                Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(PAUSE),
                Err(_) => return None,
            }
        }
    }

    /// `None` for what is no checksum: a manifest from elsewhere must not name other files.
    fn path(&self, sha256: &str) -> Option<PathBuf> {
        let is_checksum = sha256.len() == 64 && sha256.bytes().all(|letter| letter.is_ascii_hexdigit());
        is_checksum.then(|| self.folder.join(sha256))
    }

    fn path_of_latest(&self, place: &Path) -> PathBuf {
        self.folder.join(format!("{}.latest", sha256_of(place.as_os_str().as_encoded_bytes())))
    }

    fn write(&self, path: &Path, bytes: &[u8]) {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = self.folder.join(format!(".{name}.{}.{number}.partial", std::process::id()));
        if let Err(error) = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path)) {
            let _ = fs::remove_file(&partial);
            if !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!("{}: cannot keep what was read: {error}", self.folder.display());
            }
        }
    }

    /// Removes what was not used for longest until the rest keeps to the limit.
    fn shrink(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        // What another process removes meanwhile is passed over.
        let files = entries.flatten().filter_map(|entry| {
            let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        });
        let mut files: Vec<(SystemTime, u64, PathBuf)> = files.collect();
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (used, bytes, path) in files {
            let is_partial = path.extension().is_some_and(|extension| extension == "partial");
            let is_in_excess =
                if is_partial { used.elapsed().is_ok_and(|age| age > STALE) } else { total > self.limit };
            if is_in_excess {
                let _ = fs::remove_file(&path);
                total -= bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_piece_has_a_turn_of_its_own_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(dir.path(), 1 << 20).unwrap();
        // They begin alike.
        let [one, other] = ["1", "2"].map(|end| format!("{}{end}", "a".repeat(63)));
        let turn = |sha256: &str| cache.turn(sha256, Instant::now());
        let turns = [turn(&one), turn(&other)];
        assert!(turns.iter().all(Option::is_some));
        // Who waited in vain takes nobody's file away.
        assert!(turn(&one).is_none() && turn(&one).is_none());
        drop(turns);
        assert!(turn(&one).is_some());
        assert_eq!(fs::read_dir(dir.path().join(LOCKS)).unwrap().count(), 0);
    }
}
