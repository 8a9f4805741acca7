//! Disk cache for parts of remote shards: each is a file named by its checksum, whole or absent, up to a total size.

use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hyperlora_core::hash::sha256_of;
use hyperlora_core::paths::read_regular;
use hyperlora_core::{Error, Result};

use crate::shard::manifest::is_sha256;

/// Age from which a half-written file belongs to no living process.
const STALE: Duration = Duration::from_hours(1);

/// Pause between two checks whether another process is done.
const PAUSE: Duration = Duration::from_millis(10);

/// Folder of the files that processes lock, one for each piece that is being requested.
const LOCKS: &str = "locks";

/// File that marks the folder as this program's, and tells backups to skip it (<https://bford.info/cachedir/>).
const MARK: &str = "CACHEDIR.TAG";
const MARK_TEXT: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# Parts of shards that hyperlora read from a URL.\n";

/// Suffix of the file with the checksum of the last content of a place.
const LATEST: &str = ".latest";

/// Suffix of half-written files.
const PARTIAL: &str = ".partial";

/// Cache folder, which several processes may share.
#[derive(Debug)]
pub(super) struct PieceCache {
    folder: PathBuf,
    limit: u64,
    /// Bytes written since the folder was last scanned.
    written: AtomicU64,
    warned: AtomicBool,
}

/// Right to request a piece, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    path: PathBuf,
    _file: File,
}

impl Drop for Turn {
    fn drop(&mut self) {
        // A process that waits for the removed file gets its turn at the same time as one that recreates it. Both then
        // find the piece in the cache.
        let _ = fs::remove_file(&self.path);
    }
}

impl PieceCache {
    /// Opens a cache of `limit` bytes, which it may exceed a little during a write.
    ///
    /// # Errors
    /// Input: the folder contains foreign files, which must neither count against the limit nor be removed. Input or
    /// Disk: the folder cannot be made.
    pub(super) fn open(folder: &Path, limit: u64) -> Result<Self> {
        let (written, warned) = Default::default();
        let cache = Self { folder: folder.into(), limit, written, warned };
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(folder).map_err(|source| Error::write(folder, source))?;
        if !cache.is_marked() {
            if let Some(other) = cache.foreign()? {
                let problem = format!("holds `{other}`, which no cache of shards does");
                return Err(Error::file(folder, problem, "name an empty folder in `data.remote.cache`"));
            }
            cache.write(&folder.join(MARK), MARK_TEXT.as_bytes());
        }
        let locks = folder.join(LOCKS);
        make(&locks).map_err(|source| Error::write(&locks, source))?;
        cache.shrink();
        Ok(cache)
    }

    fn is_marked(&self) -> bool {
        let limit = MARK_TEXT.len() as u64;
        read_regular(&self.folder.join(MARK), limit).is_ok_and(|text| text == MARK_TEXT.as_bytes())
    }

    /// Returns a foreign file in a folder without the mark. Excludes what a process that starts at the same moment
    /// writes first, its mark and its locks. Folders of older versions have no mark, but they have locks.
    fn foreign(&self) -> Result<Option<String>> {
        let entries = fs::read_dir(&self.folder).map_err(|source| Error::read(&self.folder, source))?;
        let names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let is_cache = names.iter().any(|name| name == LOCKS);
        let own = |name: &String| match &**name {
            MARK => self.is_marked(),
            name => is_partial(name) || is_cache && (name == LOCKS || is_piece(name)),
        };
        Ok(names.into_iter().find(|name| !own(name)))
    }

    /// Returns the piece with this checksum, of at most `limit` bytes, if it is present and intact.
    pub(super) fn get(&self, sha256: &str, limit: u64) -> Option<Bytes> {
        let path = self.path(sha256)?;
        let bytes = match read_regular(&path, limit) {
            Ok(bytes) if sha256_of(&bytes) == sha256 => bytes,
            Err(error) if error.kind() != ErrorKind::FileTooLarge => return None,
            _ => {
                let _ = fs::remove_file(&path);
                return None;
            }
        };
        // The time of the last use decides which piece is removed first. In a read-only folder, the time of writing
        // remains.
        let now = FileTimes::new().set_modified(SystemTime::now());
        let _ = File::options().append(true).open(&path).and_then(|file| file.set_times(now));
        Some(bytes.into())
    }

    /// Stores a piece. A full disk costs speed, but never the run.
    pub(super) fn put(&self, sha256: &str, bytes: &[u8]) {
        let Some(path) = self.path(sha256) else { return };
        self.write(&path, bytes);
        // Scanning the folder takes time, so it happens only occasionally. It also covers what other processes wrote.
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written >= self.limit / 16 {
            self.written.store(0, Ordering::Relaxed);
            self.shrink();
        }
    }

    /// Returns the content that [`put_latest`](Self::put_latest) last stored for `place`.
    pub(super) fn latest(&self, place: &Path, limit: u64) -> Option<Bytes> {
        let sha256 = read_regular(&self.path_of_latest(place), 64).ok()?;
        self.get(&String::from_utf8(sha256).ok()?, limit)
    }

    /// Stores the content of a place whose checksum is not known in advance.
    pub(super) fn put_latest(&self, place: &Path, bytes: &[u8]) {
        let sha256 = sha256_of(bytes);
        self.put(&sha256, bytes);
        self.write(&self.path_of_latest(place), sha256.as_bytes());
    }

    /// Waits until no other thread or process holds the turn for this piece, at most until `until`. Returns `None`
    /// after a timeout, and on a file system without locks: then every process may request it.
    pub(super) fn turn(&self, sha256: &str, until: Instant) -> Option<Turn> {
        let path = self.folder.join(LOCKS).join(self.path(sha256)?.file_name()?);
        // A planted link must not create a file elsewhere, and a planted pipe must not block.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().create(true).append(true).custom_flags(flags).mode(0o600).open(&path).ok()?;
        loop {
            match file.try_lock() {
                Ok(()) => return Some(Turn { path, _file: file }),
                Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(PAUSE),
                Err(_) => return None,
            }
        }
    }

    /// Returns the path of a piece, `None` for an invalid checksum: a foreign manifest must not name other files.
    fn path(&self, sha256: &str) -> Option<PathBuf> {
        is_sha256(sha256).then(|| self.folder.join(sha256))
    }

    fn path_of_latest(&self, place: &Path) -> PathBuf {
        self.folder.join(format!("{}{LATEST}", sha256_of(place.as_os_str().as_encoded_bytes())))
    }

    fn write(&self, path: &Path, bytes: &[u8]) {
        let written = self.begin(path).and_then(|(partial, mut file)| {
            let whole = file.write_all(bytes).and_then(|()| fs::rename(&partial, path));
            whole.inspect_err(|_| drop(fs::remove_file(&partial)))
        });
        if let Err(error) = written
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("{}: cannot keep what was read: {error}", self.folder.display());
        }
    }

    /// Creates a file next to `path` that no other process writes to, even one on another machine. Its name is random
    /// because process ids are unique only within a machine.
    fn begin(&self, path: &Path) -> std::io::Result<(PathBuf, File)> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        loop {
            let number = RandomState::new().build_hasher().finish();
            let partial = self.folder.join(format!(".{name}.{number:016x}{PARTIAL}"));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                file => return Ok((partial, file?)),
            }
        }
    }

    /// Removes the pieces that were unused for longest until the rest is within the limit. Foreign files are neither
    /// removed nor counted.
    fn shrink(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        // Files that another process removes meanwhile are skipped.
        let files = entries.flatten().filter_map(|entry| {
            let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            let name = entry.file_name().into_string().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), name))
        });
        let mut files: Vec<(SystemTime, u64, String)> =
            files.filter(|(_, _, name)| is_piece(name) || is_partial(name)).collect();
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (used, bytes, name) in files {
            let is_in_excess =
                if is_partial(&name) { used.elapsed().is_ok_and(|age| age > STALE) } else { total > self.limit };
            if is_in_excess {
                let _ = fs::remove_file(self.folder.join(name));
                total -= bytes;
            }
        }
    }
}

/// Tells whether this is the name of a piece, or of a file that names one.
fn is_piece(name: &str) -> bool {
    is_sha256(name.strip_suffix(LATEST).unwrap_or(name))
}

/// Tells whether this is the name of a half-written file of the cache, of this version or an older one.
fn is_partial(name: &str) -> bool {
    let Some(name) = name.strip_prefix('.').and_then(|name| name.strip_suffix(PARTIAL)) else { return false };
    let number = match name.split_at_checked(64) {
        Some((sha256, rest)) if is_sha256(sha256) => Some(rest.strip_prefix(LATEST).unwrap_or(rest)),
        _ => name.strip_prefix(MARK),
    };
    // Older names have the process id before the number.
    number.is_some_and(|number| {
        number.starts_with('.') && number.bytes().all(|letter| letter == b'.' || letter.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn every_piece_has_a_turn_of_its_own_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(dir.path(), 1 << 20).unwrap();
        // Two checksums that begin alike.
        let [one, other] = ["1", "2"].map(|end| format!("{}{end}", "a".repeat(63)));
        let turn = |sha256: &str| cache.turn(sha256, Instant::now());
        let turns = [turn(&one), turn(&other)];
        assert!(turns.iter().all(Option::is_some));
        // A process that waited in vain removes nobody's file.
        assert!(turn(&one).is_none() && turn(&one).is_none());
        drop(turns);
        assert!(turn(&one).is_some());
        assert_eq!(fs::read_dir(dir.path().join(LOCKS)).unwrap().count(), 0);
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn aged(path: &Path, text: &[u8]) {
        fs::write(path, text).unwrap();
        let file = File::options().append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3 * 3600)).unwrap();
    }

    #[test]
    fn files_of_others_are_neither_removed_nor_counted() {
        let dir = tempfile::tempdir().unwrap();
        let piece = "a".repeat(64);
        // Names close to those of our half-written files.
        let [unlike, joined] = [format!(".{}.00ff.partial", "x".repeat(64)), format!(".{piece}00ff.partial")];
        let others = ["holiday.jpg", "notes.partial", ".thesis.tex.12.0.partial", "model.latest", &*unlike, &*joined];
        let named_alike = [(MARK, true), (&*piece, true), (&*piece, false)];
        for (other, alone) in others.iter().map(|other| (*other, true)).chain(named_alike) {
            // Matching names prove nothing in an unmarked folder: other programs name files by checksums, too.
            let folder = dir.path().join(format!("{other}-{alone}"));
            fs::create_dir(&folder).unwrap();
            aged(&folder.join(other), b"mine");
            if !alone {
                aged(&folder.join("holiday.jpg"), b"mine");
            }
            let before = names(&folder);
            let error = PieceCache::open(&folder, 0).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("data.remote.cache"), "{error}");
            assert_eq!(names(&folder), before);
        }
        // Foreign files that came later.
        let folder = dir.path().join("cache");
        PieceCache::open(&folder, 0).unwrap();
        others.iter().for_each(|other| aged(&folder.join(other), b"mine"));
        for own in [
            piece.clone(),
            format!("{piece}.latest"),
            format!(".{piece}.7.0.partial"),
            format!(".{piece}.00ff.partial"),
        ] {
            aged(&folder.join(own), b"ours");
        }
        PieceCache::open(&folder, 0).unwrap().put(&sha256_of(b"new"), b"new");
        let mut expected: Vec<&str> = others.into_iter().chain([LOCKS, MARK]).collect();
        expected.sort_unstable();
        assert_eq!(names(&folder), expected);
    }

    #[test]
    fn a_cache_of_an_older_version_is_taken_over_and_processes_that_begin_at_once_share_one() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old");
        fs::create_dir_all(old.join(LOCKS)).unwrap();
        let sha256 = sha256_of(b"piece");
        fs::write(old.join(&sha256), b"piece").unwrap();
        assert_eq!(PieceCache::open(&old, 100).unwrap().get(&sha256, 5).unwrap(), &b"piece"[..]);
        let new = dir.path().join("new");
        thread::scope(|scope| {
            for number in 0..8_u8 {
                let new = &new;
                scope.spawn(move || {
                    let cache = PieceCache::open(new, 1 << 20).unwrap();
                    let sha256 = sha256_of(&[number]);
                    (0..20).for_each(|_| cache.put(&sha256, &[number]));
                    assert_eq!(cache.get(&sha256, 1).unwrap(), &[number][..]);
                });
            }
        });
        assert_eq!(names(&new).len(), 8 + 2);
    }

    #[test]
    fn what_was_used_last_and_what_is_being_written_stay() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(dir.path(), 100).unwrap();
        let [one, other, third] = [&b"one"[..], b"two", b"six"].map(sha256_of);
        for (piece, bytes) in [(&one, b"one"), (&other, b"two"), (&third, b"six")] {
            aged(&dir.path().join(piece), bytes);
        }
        let partial = format!(".{one}.00ff.partial");
        fs::write(dir.path().join(&partial), b"on").unwrap();
        assert_eq!(cache.get(&one, 3).unwrap(), &b"one"[..]);
        PieceCache::open(dir.path(), 8).unwrap();
        let left = names(dir.path());
        assert!(left.contains(&one) && left.contains(&partial), "{left:?}");
        // No more went than had to: the three pieces and the half-written file are 11 bytes.
        assert_eq!(left.len(), 2 + 3, "{left:?}");
    }

    #[test]
    fn a_piece_is_what_its_name_says_and_nobody_elses() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("cache");
        let cache = PieceCache::open(&folder, 1 << 20).unwrap();
        let sha256 = sha256_of(b"piece");
        cache.put(&sha256, b"piece");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!([mode(&folder), mode(&folder.join(&sha256))], [0o700, 0o600]);
        // Longer than asked for, and changed: both are gone then.
        assert!(cache.get(&sha256, 4).is_none() && !folder.join(&sha256).exists());
        fs::write(folder.join(&sha256), b"peace").unwrap();
        assert!(cache.get(&sha256, 5).is_none() && !folder.join(&sha256).exists());
        // Something stands in its place.
        fs::create_dir(folder.join(&sha256)).unwrap();
        cache.put(&sha256, b"piece");
        assert_eq!(names(&folder), [&*sha256, MARK, LOCKS]);
        fs::write(outer.path().join("other"), b"mine").unwrap();
        cache.put("../new", b"piece");
        assert!(cache.get("../other", 4).is_none());
        assert_eq!(names(outer.path()), ["cache", "other"]);
    }

    #[test]
    fn a_turn_follows_no_link_and_waits_for_no_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(dir.path(), 1 << 20).unwrap();
        let (linked, piped) = (sha256_of(b"1"), sha256_of(b"2"));
        let lock = |sha256: &str| dir.path().join(LOCKS).join(sha256);
        std::os::unix::fs::symlink(dir.path().join("new"), lock(&linked)).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(lock(&piped)).status().unwrap().success());
        assert!([linked, piped].iter().all(|sha256| cache.turn(sha256, Instant::now()).is_none()));
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn a_piece_that_grew_and_a_pipe_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PieceCache::open(dir.path(), 1 << 20).unwrap();
        let (grown, pipe) = (sha256_of(b"1"), sha256_of(b"2"));
        File::create(dir.path().join(&grown)).unwrap().set_len(1 << 40).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(dir.path().join(&pipe)).status().unwrap().success());
        assert!(cache.get(&grown, 1).is_none() && cache.get(&pipe, 1).is_none());
        assert_eq!(names(dir.path()), [MARK, pipe.as_str(), LOCKS]);
    }
}
