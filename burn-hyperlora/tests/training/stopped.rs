//! Stop requests while the program is busy: it responds soon and loses nothing.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::data::quarantine::QUARANTINE_FILE;
use burn_hyperlora::metrics::LastScalars;
use burn_hyperlora::run::saved::SavedState;
use burn_hyperlora::run::{CHECKPOINTS, TENSORBOARD};

use hyperlora_testing::experiment::STEPS;
use hyperlora_testing::state::tensors;
use hyperlora_testing::world::World;

/// Waits until `moment` returns true.
fn until(child: &mut Child, moment: impl Fn() -> bool) {
    let begun = Instant::now();
    while !moment() {
        assert!(begun.elapsed() < Duration::from_mins(4) && child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(2));
    }
}

/// Builds the program's command with a terminal's signal defaults, even if these tests run under nohup.
fn program() -> Command {
    let mut program = Command::new("env");
    program.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_hyperlora")]);
    program
}

fn command(world: &World, run: &str) -> Command {
    let mut command = program();
    command.args(["train", "-q"]).arg(world.path("train.yaml")).arg("--out").arg(world.path(run));
    command
}

/// Trains into `run` until `moment` returns true, then asks for a stop; returns the saved state.
fn stopped(world: &World, moment: impl Fn(&Path) -> bool) -> SavedState {
    let run = world.path("run");
    let mut child = command(world, "run").stderr(Stdio::null()).spawn().unwrap();
    until(&mut child, || moment(&run));
    send("TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    saved(&run)
}

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap().success());
}

/// Reads the state of a run's latest checkpoint, after verifying it.
fn saved(run: &Path) -> SavedState {
    let latest = CheckpointStore::at(&run.join(CHECKPOINTS)).latest().unwrap().unwrap();
    latest.verify().unwrap();
    latest.state().unwrap()
}

/// Returns the last value of a curve, including those of earlier processes.
fn curve(run: &Path, name: &str) -> Option<f64> {
    LastScalars::read(&run.join(TENSORBOARD)).unwrap().values.get(name).copied()
}

#[test]
fn a_stop_while_the_fixed_set_is_measured_is_heard_at_once_and_loses_nothing() {
    let world = World::small();
    // The measurement takes seconds, so the signal always arrives before its end.
    let long = [("{triples: 6}", "{triples: 200}"), ("log_every: 2", "log_every: 1")];
    world.experiment(&long).unwrap();
    let saved = stopped(&world, |run| run.join(CHECKPOINTS).is_dir());
    assert!(saved.train.global_step == 0 && saved.train.records.is_empty(), "{saved:?}");
    assert_eq!(curve(&world.path("run"), "fixed_set/base"), None);

    // After the last step of a stage: a resume repeats the end of the stage, but none of its steps.
    let saved = stopped(&world, |run| LastScalars::read(&run.join(TENSORBOARD)).unwrap().step == Some(2));
    let state = &saved.train;
    assert_eq!((state.stage, state.stage_step, state.global_step), (0, 2, 2));
    assert!(state.records[0].fixed_set_loss_before.is_some() && state.records[0].fixed_set_loss_after.is_none());

    // Between two stages: the checkpoint of the first stage is in its place before the next one is measured.
    let ended = |run: &Path| {
        let latest = CheckpointStore::at(&run.join(CHECKPOINTS)).latest().unwrap().unwrap();
        latest.state::<SavedState>().is_ok_and(|saved| saved.train.stage == 1)
    };
    let saved = stopped(&world, ended);
    assert!(saved.train.global_step == 2 && saved.train.records[0].fixed_set_loss_after.is_some(), "{saved:?}");
    assert_eq!(curve(&world.path("run"), "fixed_set/id_clip"), None);

    // Measuring does not affect training.
    world.experiment(&[]).unwrap();
    for run in ["run", "undisturbed"] {
        assert!(command(&world, run).status().unwrap().success());
    }
    assert!(tensors(&world.path("run"), STEPS) == tensors(&world.path("undisturbed"), STEPS));
}

/// Damages the first row group of the world's shards.
fn damage(world: &World) {
    let shard = world.path("shards/shard-00000.parquet");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[200] ^= 1;
    fs::write(shard, bytes).unwrap();
}

/// Returns whether the kernel reports a waiter for the lock on `file`.
fn waited_for(file: &File) -> bool {
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|lock| lock.contains("->") && lock.contains(&inode))
}

#[test]
fn a_data_thread_that_is_stuck_does_not_keep_a_run_from_stopping() {
    let world = World::small();
    let fixed_set = "\n  fixed_set: {triples: 6}";
    let one_worker = ("shards: shards", "shards: shards\n  workers: 1");
    // The first reader is stuck: the loader, or the measurement if the fixed set has damaged photos.
    for (changes, steps) in [
        ([one_worker, (fixed_set, "")], 1),
        ([one_worker, (fixed_set, "\n  fixed_set: {triples: 40, split: held_out, references: train}")], 2),
    ] {
        let (run, free) = (format!("stuck {steps}"), format!("free {steps}"));
        world.experiment(&changes).unwrap();
        for run in [&run, &free] {
            let paused = command(&world, run).args(["--max-steps", &steps.to_string()]).status().unwrap();
            assert!(paused.success());
        }
        let intact = fs::read(world.path("shards/shard-00000.parquet")).unwrap();
        damage(&world);
        // A damaged row group is recorded under a lock, so a thread that waits for the lock is as stuck as a read.
        let path = world.path(&run).join(QUARANTINE_FILE);
        let lock = OpenOptions::new().append(true).create(true).open(path).unwrap();
        lock.lock().unwrap();
        for signal in ["TERM", "HUP"] {
            let mut child = command(&world, &run).stderr(Stdio::null()).spawn().unwrap();
            until(&mut child, || waited_for(&lock));
            // Ready batches are trained on before all threads wait.
            thread::sleep(Duration::from_secs(1));
            send(signal, &child);
            let asked = Instant::now();
            let code = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status.code(),
                    None if asked.elapsed() > Duration::from_mins(1) => {
                        child.kill().unwrap();
                        break None;
                    }
                    None => thread::sleep(Duration::from_millis(20)),
                }
            };
            assert_eq!(code, Some(3), "{signal}");
            assert!(saved(&world.path(&run)).train.global_step >= steps);
        }
        drop(lock);
        // No interrupted work is trained twice or skipped.
        for run in [&run, &free] {
            assert!(command(&world, run).status().unwrap().success());
        }
        assert!(tensors(&world.path(&run), STEPS) == tensors(&world.path(&free), STEPS));
        fs::write(world.path("shards/shard-00000.parquet"), intact).unwrap();
    }
}

#[test]
fn a_terminal_that_closes_saves_the_run_unless_nohup_was_asked_for() {
    let world = World::small();
    world.experiment(&[("{triples: 6}", "{triples: 200}")]).unwrap();
    let begun = |run: &str| world.path(run).join(CHECKPOINTS).is_dir();
    // Further output of the run goes nowhere.
    let mut talkative = program();
    talkative.args(["train", "-v"]).arg(world.path("train.yaml")).arg("--out").arg(world.path("closed"));
    let mut child = talkative.stderr(Stdio::piped()).spawn().unwrap();
    until(&mut child, || begun("closed"));
    drop(child.stderr.take());
    send("HUP", &child);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    saved(&world.path("closed"));

    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_hyperlora")).args(["train", "-q"]).arg(world.path("train.yaml")).arg("--out");
    nohup.arg(world.path("nohup")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = nohup.spawn().unwrap();
    until(&mut child, || begun("nohup"));
    send("HUP", &child);
    assert!(child.wait().unwrap().success());
}
