//! Ranks that die, hang, or are asked to stop, during a training run.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::data::quarantine::QUARANTINE_FILE;
use burn_hyperlora::run::CHECKPOINTS;

use crate::training::finished;
use hyperlora_testing::mpirun::{end_of, mpirun};
use hyperlora_testing::world::World;

const RANKS: usize = 3;
const PROGRAM: &str = env!("CARGO_BIN_EXE_hyperlora");

/// Training in progress, with the process of mpirun.
struct Run<'a> {
    world: &'a World,
    mpirun: Child,
}

/// Starts a long training of [`RANKS`] ranks and waits until it has saved at least twice.
fn under_way<'a>(world: &'a World, more: &[(&str, &str)]) -> Run<'a> {
    let changes = [
        ("global_batch: 4", "global_batch: 12"),
        ("{every: 2, keep: 9}", "{every: 1, keep: 2}"),
        ("recompute: false", "recompute: false\n  collective_timeout_s: 20"),
        ("base: {steps: 2", "base: {steps: 100000"),
    ];
    world.experiment(&[&changes[..], more].concat()).unwrap();
    let mut command = mpirun(RANKS);
    command.arg(PROGRAM).arg("train").arg(world.path("train.yaml"));
    command.arg("--out").arg(world.path("run")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = Run { world, mpirun: command.spawn().unwrap() };
    let begun = Instant::now();
    while run.last_step().unwrap_or(0) < 2 {
        assert!(begun.elapsed() < Duration::from_mins(4) && run.mpirun.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(50));
    }
    run
}

impl Run<'_> {
    /// Returns the steps of the last complete checkpoint.
    fn last_step(&self) -> Option<u64> {
        let store = CheckpointStore::at(&self.world.path("run").join(CHECKPOINTS));
        store.latest().unwrap().map(|checkpoint| checkpoint.step)
    }

    /// Finds the process of a rank by the environment that mpirun sets.
    fn process_of(&self, rank: usize) -> String {
        let children = Command::new("pgrep").args(["-P", &self.mpirun.id().to_string()]).output().unwrap();
        let children = String::from_utf8(children.stdout).unwrap();
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_it = |process: &&str| {
            let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        children.lines().find(is_it).unwrap().to_owned()
    }

    fn signal(&self, rank: usize, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.process_of(rank)]).status().unwrap().success());
    }

    /// Waits for mpirun; returns exit code and output.
    fn end(self) -> (Option<i32>, String) {
        end_of(&self.mpirun.wait_with_output().unwrap())
    }
}

/// Asserts that the last checkpoint is complete and that the run resumes from it with any number of ranks.
fn goes_on(world: &World) {
    let store = CheckpointStore::at(&world.path("run").join(CHECKPOINTS));
    let latest = store.latest().unwrap().unwrap();
    latest.verify().unwrap();
    let target = latest.step + 2;
    let mut command = mpirun(2);
    command.arg(PROGRAM).arg("train").arg(world.path("train.yaml"));
    command.arg("--out").arg(world.path("run")).args(["--max-steps", &target.to_string()]);
    let (code, text) = end_of(&command.output().unwrap());
    assert!(code == Some(0) && text.contains(&format!("paused after {target} steps")), "{text}");
}

#[test]
fn a_killed_rank_ends_the_others_and_leaves_a_whole_checkpoint() {
    let world = World::small();
    let run = under_way(&world, &[]);
    run.signal(1, "-KILL");
    let clock = Instant::now();
    let (code, text) = run.end();
    assert!(code != Some(0) && clock.elapsed() < Duration::from_mins(4), "{text}");
    assert!(text.contains("rank 1") && text.contains("signal 9"), "mpirun names the rank: {text}");
    goes_on(&world);
}

#[test]
fn a_hung_rank_is_named_within_the_deadline() {
    let world = World::small();
    let run = under_way(&world, &[]);
    run.signal(1, "-STOP");
    let clock = Instant::now();
    let (code, text) = run.end();
    assert_eq!(code, Some(75), "{text}");
    assert!(clock.elapsed() < Duration::from_mins(4));
    assert!(text.contains("no word from rank 1 ("), "{text}");
    goes_on(&world);
}

#[test]
fn a_signal_to_one_rank_stops_all_at_the_same_step_with_everything_saved() {
    let world = World::small();
    let run = under_way(&world, &[]);
    run.signal(2, "-TERM");
    let (code, text) = run.end();
    assert!(code == Some(3) && text.contains("stopped by SIGTERM after"), "{code:?} {text}");
    goes_on(&world);
}

#[test]
fn a_rank_whose_data_are_stuck_stops_and_saves_with_the_others() {
    let world = World::small();
    // Nothing is kept in memory, so the damaged row group is read again.
    let run = under_way(&world, &[("shards: shards", "shards: shards\n  cache_mib: 0\n  prefetch_mib: 0")]);
    // A damaged row group is recorded under a lock, so a thread that waits for the lock is as stuck as one in a read.
    let lock = OpenOptions::new().append(true).create(true).open(world.path("run").join(QUARANTINE_FILE)).unwrap();
    lock.lock().unwrap();
    let inode = format!(":{} ", lock.metadata().unwrap().ino());
    let shard = world.path("shards/shard-00000.parquet");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[200] ^= 1;
    fs::write(shard, bytes).unwrap();
    let begun = Instant::now();
    let waited_for = |lock: &str| lock.contains("->") && lock.contains(&inode);
    while !fs::read_to_string("/proc/locks").unwrap().lines().any(waited_for) {
        assert!(begun.elapsed() < Duration::from_mins(1), "nobody reads the damaged row group");
        thread::sleep(Duration::from_millis(5));
    }
    // The other ranks now wait for its losses.
    thread::sleep(Duration::from_secs(1));
    for rank in 0..RANKS {
        run.signal(rank, "-TERM");
    }
    let (code, text) = run.end();
    assert!(code == Some(3) && text.contains("stopped by SIGTERM after"), "{code:?} {text}");
    drop(lock);
    goes_on(&world);
}

/// Starts two ranks, of which rank 1 runs another `program` with its own YAML, `other.yaml`.
fn each_its_own(world: &World, program: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut command = mpirun(1);
    // Ranks that refuse end immediately, but mpirun waits for this whole time, once for each.
    command.env("OMPI_MCA_odls_base_sigkill_timeout", "3");
    // mpirun's colon starts other arguments for some of the ranks.
    let own = [(&[][..], Path::new(PROGRAM), "train.yaml"), (&[":", "-n", "1"][..], program, "other.yaml")];
    for (separator, program, yaml) in own {
        command.args(separator).arg(program).arg("train").arg(world.path(yaml)).arg("--out").arg(world.path("run"));
        command.args(more);
    }
    end_of(&command.output().unwrap())
}

/// Runs [`each_its_own`] with `changes` in the YAML of rank 1.
fn at_odds(world: &World, changes: &[(&str, &str)], more: &[&str]) -> (Option<i32>, String) {
    world.experiment(changes).unwrap();
    fs::rename(world.path("train.yaml"), world.path("other.yaml")).unwrap();
    world.experiment(&[]).unwrap();
    each_its_own(world, Path::new(PROGRAM), more)
}

/// Asserts that rank 1 reported the problem and rank 0 received it.
#[track_caller]
fn told((code, text): &(Option<i32>, String), problem: &str) {
    let heard = |line: &str| line.contains("error: rank 1 (") && line.contains(") failed: ") && line.contains(problem);
    assert!(*code == Some(2) && text.lines().any(heard), "{code:?} {text}");
    assert!(text.lines().any(|line| line.starts_with("error: ") && line.contains(problem) && !heard(line)), "{text}");
}

#[test]
fn ranks_with_different_settings_do_not_begin_and_do_not_go_on() {
    let world = World::small();
    let refused = || {
        let (code, text) = at_odds(&world, &[("seed: 5", "seed: 6")], &[]);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains("rank 1 (") && text.contains("its configuration is "), "{text}");
    };
    refused();
    // File locations and the number of threads may differ between ranks.
    let elsewhere = [("shards: shards", "shards: ./also-here\n  workers: 1")];
    std::os::unix::fs::symlink(world.path("shards"), world.path("also-here")).unwrap();
    let (code, text) = at_odds(&world, &elsewhere, &["--max-steps", "2"]);
    assert_eq!(code, Some(0), "{text}");
    refused();
    finished(&world, 2, "run");
}

#[test]
fn what_one_rank_alone_cannot_read_it_tells_the_others() {
    let world = World::small();
    world.experiment(&[]).unwrap();
    told(&each_its_own(&world, Path::new(PROGRAM), &[]), "other.yaml");
    fs::write(world.path("other.yaml"), "name: [").unwrap();
    told(&each_its_own(&world, Path::new(PROGRAM), &[]), "other.yaml");
    fs::create_dir(world.path("no-models")).unwrap();
    let elsewhere = |place: &str| [("shards: shards", place.to_owned())];
    for (shards, faces, problem) in [
        ("nowhere", "", "/nowhere"),
        ("${UNSET_ON_RANK_1}", "", "UNSET_ON_RANK_1"),
        ("nowhere", "faces: {models: no-models}\n", "/nowhere"),
        ("shards", "faces: {models: no-models}\n", "holds no ONNX files"),
    ] {
        let [(from, to)] = elsewhere(&format!("shards: {shards}"));
        told(&at_odds(&world, &[(from, &to), ("data:\n", &format!("{faces}data:\n"))], &[]), problem);
    }
    // No run was started.
    assert!(!world.path("run").join(CHECKPOINTS).exists());
}

#[test]
fn ranks_of_different_builds_do_not_begin() {
    let world = World::small();
    world.experiment(&[]).unwrap();
    fs::copy(world.path("train.yaml"), world.path("other.yaml")).unwrap();
    let program = world.path("hyperlora");
    fs::copy(PROGRAM, &program).unwrap();
    // Bytes after the last section of a program are never loaded.
    fs::OpenOptions::new().append(true).open(&program).unwrap().write_all(b"another build").unwrap();
    let (code, text) = each_its_own(&world, &program, &[]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("rank 1 (") && text.contains("its program is "), "{text}");
    assert!(!world.path("run").join(CHECKPOINTS).exists());
}
