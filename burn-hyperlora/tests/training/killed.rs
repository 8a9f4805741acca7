//! The program itself, killed at whatever moment and started again with the same command.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

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
