//! Ranks that die, hang, or are asked to stop, in the middle of a training.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::train::CHECKPOINTS;

use crate::mpirun::{end_of, mpirun};
use crate::training::finished;
use crate::world::World;

const RANKS: usize = 3;

/// A training that is under way: mpirun, and the run's name.
struct Run<'a> {
    world: &'a World,
    mpirun: Child,
}

/// A long training of [`RANKS`] ranks that has saved at least twice.
fn under_way(world: &World) -> Run<'_> {
    let changes = [
        ("global_batch: 4", "global_batch: 12"),
        ("{every: 2, keep: 9}", "{every: 1, keep: 2}"),
        ("recompute: false", "recompute: false\n  collective_timeout_s: 20"),
        ("base: {steps: 2", "base: {steps: 100000"),
    ];
    world.experiment(&changes).unwrap();
    let mut command = mpirun(RANKS);
    command.arg(env!("CARGO_BIN_EXE_hyperlora")).arg("train").arg(world.path("train.yaml"));
    command.arg("--out").arg(world.path("run")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = Run { world, mpirun: command.spawn().unwrap() };
    let begun = Instant::now();
    while run.last_step().unwrap_or(0) < 2 {
        assert!(begun.elapsed() < Duration::from_secs(240) && run.mpirun.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(50));
    }
    run
}

impl Run<'_> {
    /// Steps of the last whole checkpoint.
    fn last_step(&self) -> Option<u64> {
        let store = CheckpointStore::at(&self.world.path("run").join(CHECKPOINTS));
        store.latest().unwrap().map(|checkpoint| checkpoint.step)
    }

    /// The process of a rank, by what mpirun wrote into its environment.
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

    /// Waits for mpirun: exit code and everything that was said.
    fn end(self) -> (Option<i32>, String) {
        end_of(&self.mpirun.wait_with_output().unwrap())
    }
}

/// The last checkpoint is whole, and the run goes on from it, by however many ranks.
fn goes_on(world: &World) {
    let store = CheckpointStore::at(&world.path("run").join(CHECKPOINTS));
    let latest = store.latest().unwrap().unwrap();
    latest.verify().unwrap();
    let target = latest.step + 2;
    let mut command = mpirun(2);
    command.arg(env!("CARGO_BIN_EXE_hyperlora")).arg("train").arg(world.path("train.yaml"));
    command.arg("--out").arg(world.path("run")).args(["--max-steps", &target.to_string()]);
    let (code, text) = end_of(&command.output().unwrap());
    assert!(code == Some(0) && text.contains(&format!("paused after {target} steps")), "{text}");
}

#[test]
fn a_killed_rank_ends_the_others_and_leaves_a_whole_checkpoint() {
    let world = World::new();
    let run = under_way(&world);
    run.signal(1, "-KILL");
    let clock = Instant::now();
    let (code, text) = run.end();
    assert!(code != Some(0) && clock.elapsed() < Duration::from_secs(240), "{text}");
    assert!(text.contains("rank 1") && text.contains("signal 9"), "mpirun names the rank: {text}");
    goes_on(&world);
}

#[test]
fn a_hung_rank_is_named_within_the_deadline() {
    let world = World::new();
    let run = under_way(&world);
    run.signal(1, "-STOP");
    let clock = Instant::now();
    let (code, text) = run.end();
    assert_eq!(code, Some(75), "{text}");
    assert!(clock.elapsed() < Duration::from_secs(240));
    assert!(text.contains("no word from rank 1 ("), "{text}");
    goes_on(&world);
}

#[test]
fn a_signal_to_one_rank_stops_all_at_the_same_step_with_everything_saved() {
    let world = World::new();
    let run = under_way(&world);
    run.signal(2, "-TERM");
    let (code, text) = run.end();
    assert!(code == Some(3) && text.contains("stopped by SIGTERM after"), "{code:?} {text}");
    goes_on(&world);
}

/// Two ranks, of which rank 1 has a YAML of its own; `changes` are what is different in it.
fn at_odds(world: &World, changes: &[(&str, &str)], more: &[&str]) -> (Option<i32>, String) {
    world.experiment(changes).unwrap();
    fs::rename(world.path("train.yaml"), world.path("other.yaml")).unwrap();
    world.experiment(&[]).unwrap();
    // mpirun's colon starts other arguments for some of the ranks.
    let program = env!("CARGO_BIN_EXE_hyperlora");
    let mut command = mpirun(1);
    for (separator, yaml) in [(&[][..], "train.yaml"), (&[":", "-n", "1"][..], "other.yaml")] {
        command.args(separator).arg(program).arg("train").arg(world.path(yaml)).arg("--out").arg(world.path("run"));
        command.args(more);
    }
    end_of(&command.output().unwrap())
}

#[test]
fn ranks_with_different_settings_do_not_begin_and_do_not_go_on() {
    let world = World::new();
    let refused = || {
        let (code, text) = at_odds(&world, &[("seed: 5", "seed: 6")], &[]);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains("rank 1 (") && text.contains("its configuration is "), "{text}");
    };
    refused();
    // Where a rank's files lie is its own affair, and how many threads it has.
    let elsewhere = [("shards: shards", "shards: ./also-here\n  workers: 1")];
    std::os::unix::fs::symlink(world.path("shards"), world.path("also-here")).unwrap();
    let (code, text) = at_odds(&world, &elsewhere, &["--max-steps", "2"]);
    assert_eq!(code, Some(0), "{text}");
    refused();
    // What one rank alone misses, it tells the others.
    let (code, text) = at_odds(&world, &[("shards: shards", "shards: nowhere")], &[]);
    let told = |text: &str| text.lines().any(|line| line.contains("rank 1 (") && line.contains(") failed: "));
    assert!(code == Some(2) && told(&text) && text.contains("/nowhere"), "{code:?} {text}");
    finished(&world, 2, "run");
}
