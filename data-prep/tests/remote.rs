//! Shard folders behind a URL: they give the rows of the local folder, whatever the server does wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod shard_folder;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, thread};

use data_prep::shard::{FaceRecord, MANIFEST_FILE, ReadError, RemoteConfig, ShardFolder};
use hyperlora_core::{Error, Result};
use tempfile::TempDir;

use crate::shard_folder::labels;
use hyperlora_testing::file_server::{Answer, FileServer};

/// Fault of a server's next answer. Faults are taken from the end of a list; afterwards the server works.
#[derive(Debug, Clone, Copy)]
enum Mischief {
    /// Answers 503.
    Busy,
    /// Answers 403.
    Forbidden,
    /// Closes the connection in the middle of the content.
    HalfOfIt,
    /// Flips one bit.
    FlippedBit,
    /// Sends more than was requested.
    TooMuch,
    /// Announces content that never ends.
    Endless,
    /// Sends an HTML page.
    Page,
    /// Sends nothing until the client leaves.
    Silence,
}

impl Mischief {
    fn done_to(self, mut answer: Answer) -> Option<Answer> {
        match self {
            Self::Busy => Some(Answer::new("503 Service Unavailable", "")),
            Self::Forbidden => Some(Answer::new("403 Forbidden", "<Code>AccessDenied</Code>")),
            Self::HalfOfIt => {
                answer.body.truncate(answer.length / 2);
                Some(answer)
            }
            Self::FlippedBit => {
                answer.body[answer.length / 2] ^= 4;
                Some(answer)
            }
            Self::TooMuch => {
                answer.body.extend(vec![b'x'; 1 << 20]);
                answer.length = answer.body.len();
                Some(answer)
            }
            Self::Endless => {
                answer.length = 1 << 60;
                Some(answer)
            }
            Self::Page => Some(Answer::new("200 OK", "<!DOCTYPE html><title>Sign in</title>")),
            Self::Silence => None,
        }
    }
}

/// Shard folder with its server and a cache.
struct World {
    dir: TempDir,
    records: Vec<FaceRecord>,
    server: FileServer,
    mischief: Arc<Mutex<Vec<Mischief>>>,
    /// Every request.
    asked: Arc<Mutex<Vec<String>>>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("faces")).unwrap();
        let records = shard_folder::write(&dir.path().join("faces"));
        let (mischief, asked) = (Arc::<Mutex<Vec<Mischief>>>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (planned, seen) = (Arc::clone(&mischief), Arc::clone(&asked));
        let server = FileServer::start(dir.path(), move |request, answer| {
            seen.lock().unwrap().push(request.to_owned());
            match planned.lock().unwrap().pop() {
                Some(mischief) => mischief.done_to(answer),
                None => Some(answer),
            }
        });
        Self { dir, records, server, mischief, asked }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("faces").join(name)
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn plan(&self, mischief: &[Mischief]) {
        *self.mischief.lock().unwrap() = mischief.to_vec();
    }

    /// Returns the requests since the last call.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn config(&self, deadline_seconds: u64) -> RemoteConfig {
        RemoteConfig { cache: self.cache(), cache_bytes: 1 << 20, deadline: Duration::from_secs(deadline_seconds) }
    }

    fn open(&self, folder: &str) -> Result<ShardFolder> {
        ShardFolder::open_remote(&self.server.url(folder), &self.config(60))
    }

    fn open_well(&self) -> ShardFolder {
        self.open("faces").unwrap()
    }
}

fn rows(folder: &ShardFolder) -> Vec<FaceRecord> {
    folder.row_groups().iter().flat_map(|group| folder.read(group).unwrap()).collect()
}

/// Checks for one line of cause with all of `parts`, and one line of remedy.
#[track_caller]
fn assert_refused(error: &Error, code: u8, parts: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.exit_code(), code, "{text}");
    let (problem, remedy) = text.split_once("\n  remedy: ").unwrap();
    assert!(!problem.contains('\n') && !remedy.contains('\n'), "{text}");
    parts.iter().for_each(|part| assert!(problem.contains(part), "`{part}` is not in: {text}"));
}

#[test]
fn the_rows_are_those_of_the_local_folder_and_come_from_the_cache_the_second_time() {
    let world = World::new();
    let (local, remote) = (ShardFolder::open(&world.file("")).unwrap(), world.open_well());
    assert_eq!(remote.checksum(), local.checksum());
    assert_eq!(labels(&remote), labels(&local));
    assert_eq!(rows(&remote), world.records);
    // Manifest, index, 5 row groups and the footers of 3 shards, each once.
    let asked = world.asked();
    assert_eq!(asked.len(), 1 + 1 + 5 + 3, "{asked:?}");
    assert_eq!(asked[0], "GET /faces/manifest.json whole");

    // Another process requests only the manifest again, because it contains the checksums.
    let again = world.open_well();
    again.verify().unwrap();
    assert_eq!(rows(&again), world.records);
    assert_eq!(world.asked(), ["GET /faces/manifest.json whole"]);

    // Without the server, everything comes from the cache.
    let World { dir, server, records, .. } = world;
    let url = server.url("faces");
    drop(server);
    let config = |cache: &str| RemoteConfig {
        cache: dir.path().join(cache),
        cache_bytes: 1 << 20,
        deadline: Duration::from_secs(2),
    };
    let alone = ShardFolder::open_remote(&url, &config("cache")).unwrap();
    assert_eq!(alone.checksum(), local.checksum());
    assert_eq!(rows(&alone), records);
    let error = ShardFolder::open_remote(&url, &config("another")).unwrap_err();
    assert_refused(&error, 1, &["/faces/manifest.json: reading failed", "refused"]);
}

/// Environment variable with the URL for [`the_rows_behind_a_url_are_those_of_the_local_folder`], which runs in its own
/// process.
const URL: &str = "SHARDS_URL";
/// Environment variable with the local folder to compare with.
const FOLDER: &str = "SHARDS_FOLDER";

#[test]
#[ignore = "run by buckets_are_found_through_the_environment"]
fn the_rows_behind_a_url_are_those_of_the_local_folder() {
    let [url, folder] = [URL, FOLDER].map(|name| std::env::var(name).unwrap());
    let cache = tempfile::tempdir().unwrap();
    let config = RemoteConfig { cache: cache.path().into(), cache_bytes: 1 << 20, deadline: Duration::from_mins(1) };
    let (remote, local) =
        (ShardFolder::open_remote(&url, &config).unwrap(), ShardFolder::open(folder.as_ref()).unwrap());
    assert_eq!(labels(&remote), labels(&local));
    assert_eq!(rows(&remote), rows(&local));
}

#[test]
fn buckets_are_found_through_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("bucket/some/faces");
    fs::create_dir_all(&folder).unwrap();
    shard_folder::write(&folder);
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&asked);
    let server = FileServer::start(dir.path(), move |request, mut answer| {
        seen.lock().unwrap().push(request.to_owned());
        // Google's clients need a version of the object.
        answer.head.push_str("ETag: \"1\"\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n");
        Some(answer)
    });
    let address = server.url("");
    let address = address.trim_end_matches('/');
    let settings = [
        ("AWS_ACCESS_KEY_ID", "me"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "here"),
        ("AWS_ENDPOINT", address),
        ("AWS_ALLOW_HTTP", "true"),
        ("GOOGLE_BASE_URL", address),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
    ];
    for scheme in ["s3", "gs"] {
        // Environment variables apply to a whole process, so this test starts itself again.
        let mut reader = Command::new(std::env::current_exe().unwrap());
        reader.args(["--ignored", "--exact", "the_rows_behind_a_url_are_those_of_the_local_folder"]).envs(settings);
        let ended = reader.env(URL, format!("{scheme}://bucket/some/faces")).env(FOLDER, &folder).output().unwrap();
        assert!(ended.status.success(), "{scheme}: {}", String::from_utf8_lossy(&ended.stdout));
        let asked = std::mem::take(&mut *asked.lock().unwrap());
        assert_eq!(asked.len(), 1 + 1 + 5 + 3, "{scheme}: {asked:?}");
        assert!(asked.iter().all(|asked| asked.starts_with("GET /bucket/some/faces/")), "{asked:?}");
    }
}

#[test]
fn processes_that_read_at_once_ask_once() {
    let world = World::new();
    let folders: Vec<ShardFolder> = (0..4).map(|_| world.open_well()).collect();
    world.asked();
    thread::scope(|scope| {
        for folder in &folders {
            scope.spawn(|| {
                assert_eq!(labels(folder).len(), 10);
                assert_eq!(rows(folder), world.records);
            });
        }
    });
    let asked = world.asked();
    assert_eq!(asked.len(), 1 + 5 + 3, "{asked:?}");
}

#[test]
fn who_waits_for_another_process_in_vain_asks_itself() {
    let world = World::new();
    let remote = ShardFolder::open_remote(&world.server.url("faces"), &world.config(5)).unwrap();
    let checksum = &remote.manifest().shards[0].row_groups[0].sha256;
    let held = fs::File::create(world.cache().join("locks").join(checksum)).unwrap();
    held.lock().unwrap();
    assert_eq!(remote.read(&remote.row_groups()[0]).unwrap(), world.records[..2]);
}

#[test]
fn a_busy_server_and_one_that_stops_in_the_middle_are_asked_again() {
    let world = World::new();
    world.plan(&[Mischief::HalfOfIt, Mischief::Busy]);
    let remote = world.open_well();
    assert_eq!(world.asked().len(), 3);
    world.plan(&[Mischief::Busy, Mischief::HalfOfIt, Mischief::HalfOfIt]);
    assert_eq!(rows(&remote), world.records);
    assert_eq!(world.asked().len(), 5 + 3 + 3);
}

#[test]
fn what_is_not_what_was_written_is_asked_for_once_more_and_then_counts_as_damaged() {
    let world = World::new();
    let remote = world.open_well();
    world.plan(&[Mischief::FlippedBit]);
    assert_eq!(rows(&remote), world.records);

    // The reader does not wait for more than it requested.
    fs::remove_dir_all(world.cache()).unwrap();
    let remote = world.open_well();
    world.plan(&[Mischief::TooMuch, Mischief::TooMuch]);
    assert!(remote.read(&remote.row_groups()[0]).unwrap_err().damage().unwrap().to_string().contains("SHA-256"));
    world.plan(&[Mischief::Endless]);
    assert_refused(
        &world.open("faces").unwrap_err(),
        2,
        &["/faces/manifest.json: is not a manifest: it holds more than"],
    );

    // Damage on the server, not in a cache: only that row group is refused, after two requests.
    fs::remove_dir_all(world.cache()).unwrap();
    let remote = world.open_well();
    let whole = fs::read(world.file("shard-00001.parquet")).unwrap();
    let mut damaged = whole.clone();
    damaged[20] ^= 1;
    fs::write(world.file("shard-00001.parquet"), damaged).unwrap();
    world.asked();
    let [before, of_it] = [1, 2].map(|group| remote.read(&remote.row_groups()[group]));
    assert_eq!(before.unwrap(), world.records[2..4]);
    assert!(of_it.unwrap_err().damage().unwrap().to_string().contains("SHA-256"));
    assert_eq!(world.asked().iter().filter(|asked| asked.contains("shard-00001")).count(), 1 + 2);
    assert_refused(&remote.verify().unwrap_err(), 2, &["shard-00001.parquet: row group 0 is damaged"]);

    // Truncated: its footer is beyond the end.
    fs::remove_dir_all(world.cache()).unwrap();
    fs::write(world.file("shard-00001.parquet"), &whole[..whole.len() / 2]).unwrap();
    let damage = world.open_well().read(&remote.row_groups()[2]).unwrap_err().damage().unwrap();
    assert!(damage.to_string().contains("the file ends within it"), "{damage}");
}

#[test]
fn a_server_that_is_silent_is_given_up_at_the_deadline() {
    let world = World::new();
    world.plan(&[Mischief::Silence; 100]);
    let began = Instant::now();
    let error = ShardFolder::open_remote(&world.server.url("faces"), &world.config(2)).unwrap_err();
    assert_refused(&error, 1, &["/faces/manifest.json: reading failed: ", "time"]);
    // Far below the client's own 3 minutes.
    assert!(began.elapsed() < Duration::from_mins(1));
}

#[test]
fn what_is_no_shard_folder_is_refused_with_its_cause() {
    let world = World::new();
    let error = world.open("nowhere").unwrap_err();
    assert_refused(&error, 2, &[&format!("/nowhere/{MANIFEST_FILE}: does not exist")]);
    world.plan(&[Mischief::Page]);
    assert_refused(
        &world.open("faces").unwrap_err(),
        2,
        &["/faces/manifest.json: is not a manifest", "<!DOCTYPE html>"],
    );
    world.plan(&[Mischief::Forbidden]);
    assert_refused(&world.open("faces").unwrap_err(), 2, &["/faces/manifest.json: may not be read", "AccessDenied"]);
    // A page in place of a part, as from a server without range requests.
    let remote = world.open_well();
    world.plan(&[Mischief::Page]);
    let ReadError::Failed(error) = remote.read(&remote.row_groups()[0]).unwrap_err() else { unreachable!() };
    assert_refused(&error, 2, &["/faces/shard-00000.parquet: the server sent something else"]);

    // A folder with foreign files is not a cache.
    fs::write(world.dir.path().join("faces/holiday.jpg"), "mine").unwrap();
    let config = RemoteConfig { cache: world.file(""), ..world.config(60) };
    let error = ShardFolder::open_remote(&world.server.url("faces"), &config).unwrap_err();
    assert_refused(&error, 2, &["/faces/: holds `"]);

    // A query or a password may be a secret: the message masks it.
    for (url, shown, problem) in [
        ("ftp://host/faces", "ftp://host/faces", "cannot be opened"),
        ("az://container/faces", "az://container/faces", "cannot be opened"),
        ("https://", "https://", "is not a URL"),
        ("https://host/faces?token=1", "https://host/faces?***", "`?`"),
        ("https://me:secret@host/faces", "https://***@host/faces", "has a user"),
    ] {
        let error = ShardFolder::open_remote(url, &world.config(60)).unwrap_err();
        assert_refused(&error, 2, &[&format!("{shown}: "), problem]);
    }
}

#[test]
fn the_cache_keeps_to_its_size_and_the_longest_unused_goes_first() {
    let world = World::new();
    let remote = world.open_well();
    assert_eq!(rows(&remote), world.records);
    labels(&remote);
    let pieces = || {
        let files = fs::read_dir(world.cache()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file() && !path.ends_with("CACHEDIR.TAG")).collect::<Vec<_>>()
    };
    let size = |pieces: &[PathBuf]| pieces.iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    let of_group =
        |shard: usize, group: usize| world.cache().join(&remote.manifest().shards[shard].row_groups[group].sha256);
    for path in pieces() {
        let age = if path == of_group(1, 0) { 10 } else { 100 };
        let file = fs::File::options().append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    // Room for all but one row group, and one was used since.
    remote.read(&remote.row_groups()[0]).unwrap();
    let [used, kept] = [of_group(0, 0), of_group(1, 0)].map(|path| fs::metadata(path).unwrap().len());
    let footer = world.cache().join(&remote.manifest().shards[0].footer_sha256);
    let limit = used + kept + fs::metadata(footer).unwrap().len();
    let manifest = fs::metadata(world.file(MANIFEST_FILE)).unwrap().len();
    assert!(size(&pieces()) > limit + manifest + 64);
    let config = RemoteConfig { cache_bytes: limit, ..world.config(60) };
    drop(ShardFolder::open_remote(&world.server.url("nowhere"), &config).unwrap_err());
    assert!(size(&pieces()) <= limit);
    assert!(of_group(0, 0).exists() && of_group(1, 0).exists() && !of_group(0, 1).exists());
}

#[test]
fn what_changed_in_the_cache_is_read_anew_and_a_manifest_names_nothing_else() {
    let world = World::new();
    assert_eq!(rows(&world.open_well()), world.records);
    for entry in fs::read_dir(world.cache()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && !path.ends_with("CACHEDIR.TAG") {
            fs::write(path, "changed").unwrap();
        }
    }
    let remote = world.open_well();
    assert_eq!(rows(&remote), world.records);
    // A missing cache only costs speed.
    fs::remove_dir_all(world.cache()).unwrap();
    assert_eq!(rows(&remote), world.records);

    let mine = world.dir.path().join("mine");
    fs::write(&mine, "mine").unwrap();
    let manifest = fs::read_to_string(world.file(MANIFEST_FILE)).unwrap();
    let checksum = &remote.manifest().shards[0].row_groups[0].sha256;
    fs::write(world.file(MANIFEST_FILE), manifest.replace(checksum, mine.to_str().unwrap())).unwrap();
    assert_refused(&world.open("faces").unwrap_err(), 2, &["/faces/manifest.json: is damaged", "is not a SHA-256"]);
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
}
