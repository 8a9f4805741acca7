//! The program itself, killed at whatever moment and started again with the same command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::train::CHECKPOINTS;

use crate::runs::{STEPS, tensors};
use crate::world::World;

/// Starts `hyperlora train` on the world's YAML.
fn start(world: &World, run: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_hyperlora"))
        .args(["train", "-q"])
        .arg(world.path().join("train.yaml"))
        .arg("--out")
        .arg(world.run(run))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Whether a checkpoint is being written, or was when its run was killed.
fn half_written(checkpoints: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(checkpoints).ok()?.map_while(Result::ok);
    let mut hidden = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".partial"));
    // The first file is there, or on its way.
    hidden.find(|folder| fs::read_dir(folder.path()).is_ok_and(|files| files.count() > 0)).map(|folder| folder.path())
}

#[test]
fn killed_while_a_checkpoint_is_written_the_one_before_is_gone_on_from() {
    let world = World::new();
    world.experiment(&[("{every: 2", "{every: 1")]).unwrap();
    assert!(start(&world, "whole").wait().unwrap().success());
    let checkpoints = world.run("killed").join(CHECKPOINTS);
    let store = CheckpointStore::at(&checkpoints);
    let mut hits = 0;
    for life in 0..4 {
        let mut child = start(&world, "killed");
        let known = store.latest().unwrap().map_or(0, |latest| latest.step);
        // Every life gets one checkpoint further before it is watched.
        while child.try_wait().unwrap().is_none() {
            let latest = store.latest().unwrap().map_or(0, |latest| latest.step);
            if (life == 0 || latest > known) && half_written(&checkpoints).is_some() {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for checkpoint in store.list().unwrap() {
            checkpoint.verify().unwrap();
        }
        hits += usize::from(half_written(&checkpoints).is_some());
    }
    assert!(hits > 0, "no life ended while a checkpoint was written");
    assert!(start(&world, "killed").wait().unwrap().success());
    assert_eq!(half_written(&checkpoints), None);
    let (whole, killed) = (tensors(&world.run("whole"), STEPS), tensors(&world.run("killed"), STEPS));
    assert!(whole == killed);
}

#[test]
fn killed_again_and_again_the_same_command_ends_with_the_same_bits() {
    let world = World::new();
    world.experiment(&[("{every: 2", "{every: 1")]).unwrap();
    assert!(start(&world, "whole").wait().unwrap().success());

    // Moments in start-up, between steps, and within the writing of checkpoints, which comes after every step.
    for pause in [90, 400, 650, 900, 1200, 1600, 2100] {
        let mut child = start(&world, "killed");
        thread::sleep(Duration::from_millis(pause));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(start(&world, "killed").wait().unwrap().success());
    let (whole, killed) = (tensors(&world.run("whole"), STEPS), tensors(&world.run("killed"), STEPS));
    assert!(whole.keys().eq(killed.keys()));
    for (file, bytes) in whole {
        assert!(killed[&file] == bytes, "{file} differs");
    }
}
