//! The program itself, asked to stop while it measures the fixed set: it answers after a micro-batch, and loses nothing.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::metrics::LastScalars;
use burn_hyperlora::train::checkpoints::SavedState;
use burn_hyperlora::train::{CHECKPOINTS, TENSORBOARD};

use crate::experiment::STEPS;
use crate::state::tensors;
use crate::world::World;

/// Waits until `moment` has come.
fn until(child: &mut Child, moment: impl Fn() -> bool) {
    let begun = Instant::now();
    while !moment() {
        assert!(begun.elapsed() < Duration::from_secs(240) && child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(2));
    }
}

fn command(world: &World, run: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hyperlora"));
    command.args(["train", "-q"]).arg(world.path("train.yaml")).arg("--out").arg(world.path(run));
    command
}

/// Trains into `run` until `moment` has come, and asks for a stop: what is saved then.
fn stopped(world: &World, moment: impl Fn(&Path) -> bool) -> SavedState {
    let run = world.path("run");
    let mut child = command(world, "run").stderr(Stdio::null()).spawn().unwrap();
    until(&mut child, || moment(&run));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let latest = CheckpointStore::at(&run.join(CHECKPOINTS)).latest().unwrap().unwrap();
    latest.verify().unwrap();
    latest.state().unwrap()
}

/// The last value of a curve of this life or one before.
fn curve(run: &Path, name: &str) -> Option<f64> {
    LastScalars::read(&run.join(TENSORBOARD)).unwrap().values.get(name).copied()
}

#[test]
fn a_stop_while_the_fixed_set_is_measured_is_heard_at_once_and_loses_nothing() {
    let world = World::new();
    // Measured for seconds: whenever it may be, the signal comes before the end.
    let long = [("{triples: 6}", "{triples: 200}"), ("log_every: 2", "log_every: 1")];
    world.experiment(&long).unwrap();
    let saved = stopped(&world, |run| run.join(CHECKPOINTS).is_dir());
    assert!(saved.train.global_step == 0 && saved.train.records.is_empty(), "{saved:?}");
    assert_eq!(curve(&world.path("run"), "fixed_set/base"), None);

    // After the last step of a stage: its end comes again, none of its steps.
    let saved = stopped(&world, |run| LastScalars::read(&run.join(TENSORBOARD)).unwrap().step == Some(2));
    let state = &saved.train;
    assert_eq!((state.stage, state.stage_step, state.global_step), (0, 2, 2));
    assert!(state.records[0].fixed_set_loss_before.is_some() && state.records[0].fixed_set_loss_after.is_none());

    // Between two stages: what the first one taught is in its place before the next one is measured.
    let ended = |run: &Path| {
        let latest = CheckpointStore::at(&run.join(CHECKPOINTS)).latest().unwrap().unwrap();
        latest.state::<SavedState>().is_ok_and(|saved| saved.train.stage == 1)
    };
    let saved = stopped(&world, ended);
    assert!(saved.train.global_step == 2 && saved.train.records[0].fixed_set_loss_after.is_some(), "{saved:?}");
    assert_eq!(curve(&world.path("run"), "fixed_set/id_clip"), None);

    // What is measured has no say in what is learnt.
    world.experiment(&[]).unwrap();
    for run in ["run", "undisturbed"] {
        assert!(command(&world, run).status().unwrap().success());
    }
    assert!(tensors(&world.path("run"), STEPS) == tensors(&world.path("undisturbed"), STEPS));
}
