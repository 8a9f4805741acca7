//! Parts of remote shards on this machine's disk, each a file named by its checksum: whole or absent, up to a size.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::shard::manifest::{Piece, sha256_of};

/// Half-written files of this age belong to no living process.
const STALE: Duration = Duration::from_secs(3600);

/// A folder that several processes may share.
#[derive(Debug)]
pub(super) struct PieceCache {
    folder: PathBuf,
    limit: u64,
    /// Bytes written since the folder was last looked through.
    written: AtomicU64,
    /// Makes names of half-written files unique.
    count: AtomicU64,
}

impl PieceCache {
    /// # Errors
    /// Input or Disk for a folder that cannot be made.
    pub(super) fn open(folder: &Path, limit: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))?;
        let cache = Self { folder: folder.into(), limit, written: AtomicU64::new(0), count: AtomicU64::new(0) };
        cache.shrink();
        Ok(cache)
    }

    /// The piece, where it is there and still has its checksum.
    pub(super) fn get(&self, piece: &Piece) -> Option<Bytes> {
        let path = self.folder.join(&piece.sha256);
        let bytes = fs::read(&path).ok()?;
        if bytes.len() as u64 != piece.bytes || sha256_of(&bytes) != piece.sha256 {
            let _ = fs::remove_file(&path);
            return None;
        }
        // The time of the last use decides what goes first; a folder that cannot be changed keeps the time of writing.
        let now = FileTimes::new().set_modified(SystemTime::now());
        let _ = File::options().append(true).open(&path).and_then(|file| file.set_times(now));
        Some(bytes.into())
    }

    /// Keeps a piece. A disk that has no room for it costs speed, never the run.
    pub(super) fn put(&self, piece: &Piece, bytes: &[u8]) {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let partial = self.folder.join(format!(".{}.{}.{number}.partial", piece.sha256, std::process::id()));
        let kept = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, self.folder.join(&piece.sha256)));
        if let Err(error) = kept {
            let _ = fs::remove_file(&partial);
            tracing::warn!("{}: cannot keep what was read: {error}", self.folder.display());
        }
        // Looking through the folder takes time: only once in a while, also for what other processes wrote.
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written >= self.limit / 16 {
            self.written.store(0, Ordering::Relaxed);
            self.shrink();
        }
    }

    /// Removes what was not used for longest until the rest keeps to the limit.
    fn shrink(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            let Ok(used) = metadata.modified() else { continue };
            if entry.file_name().to_string_lossy().starts_with('.') {
                if used.elapsed().is_ok_and(|age| age > STALE) {
                    let _ = fs::remove_file(entry.path());
                }
            } else if metadata.is_file() {
                files.push((used, metadata.len(), entry.path()));
            }
        }
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= self.limit {
                return;
            }
            // Another process may have removed it: then it takes no room either.
            let _ = fs::remove_file(&path);
            total -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn piece(number: u8) -> (Piece, Vec<u8>) {
        let bytes = vec![number; 1000];
        (Piece { offset: 0, bytes: 1000, sha256: sha256_of(&bytes) }, bytes)
    }

    #[test]
    fn pieces_stay_within_the_limit_and_the_longest_unused_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(folder.path(), 3500).unwrap();
        for number in 0..5 {
            let (piece, bytes) = piece(number);
            cache.put(&piece, &bytes);
            // Coarse clocks give neighbours the same time.
            let time = SystemTime::now() - Duration::from_secs(100 - u64::from(number));
            let file = File::options().append(true).open(folder.path().join(&piece.sha256)).unwrap();
            file.set_times(FileTimes::new().set_modified(time)).unwrap();
            if number == 2 {
                assert!(cache.get(&self::piece(0).0).is_some());
            }
        }
        let there: Vec<u8> = (0..5).filter(|&number| cache.get(&piece(number).0).is_some()).collect();
        assert_eq!(there, [0, 3, 4]);
    }

    #[test]
    fn what_changed_on_the_disk_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(folder.path(), 1 << 20).unwrap();
        let (piece, bytes) = piece(1);
        cache.put(&piece, &bytes);
        assert_eq!(cache.get(&piece).unwrap(), bytes);
        let path = folder.path().join(&piece.sha256);
        fs::write(&path, vec![2; 1000]).unwrap();
        assert_eq!(cache.get(&piece), None);
        assert!(!path.exists());
        // A folder that is gone costs speed only.
        fs::remove_dir_all(folder.path()).unwrap();
        cache.put(&piece, &bytes);
        assert_eq!(cache.get(&piece), None);
    }
}
