//! Killing the program at any point and starting it again with the same command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::metrics::RunSummary;
use burn_hyperlora::run::CHECKPOINTS;
use hyperlora_core::random::below;

use hyperlora_testing::experiment::STEPS;
use hyperlora_testing::kills::{Blow, Kills};
use hyperlora_testing::state::tensors;
use hyperlora_testing::world::World;

/// Starts `hyperlora train` on the world's YAML.
fn start(world: &World, run: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_hyperlora"))
        .args(["train", "-q"])
        .arg(world.path("train.yaml"))
        .arg("--out")
        .arg(world.path(run))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Returns the folder of an unfinished checkpoint, if one is being written or its run was killed meanwhile.
fn half_written(checkpoints: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(checkpoints).ok()?.map_while(Result::ok);
    let mut hidden = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".partial"));
    // The first file exists or is being written.
    hidden.find(|folder| fs::read_dir(folder.path()).is_ok_and(|files| files.count() > 0)).map(|folder| folder.path())
}

#[test]
fn killed_while_a_checkpoint_is_written_the_one_before_is_gone_on_from() {
    let world = World::small();
    world.experiment(&[("{every: 2", "{every: 1")]).unwrap();
    assert!(start(&world, "whole").wait().unwrap().success());
    let checkpoints = world.path("killed").join(CHECKPOINTS);
    let store = CheckpointStore::at(&checkpoints);
    let mut hits = 0;
    for life in 0..4 {
        let mut child = start(&world, "killed");
        let known = store.latest().unwrap().map_or(0, |latest| latest.step);
        // Every process gets one checkpoint further before it is watched.
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
    let (whole, killed) = (tensors(&world.path("whole"), STEPS), tensors(&world.path("killed"), STEPS));
    assert!(whole == killed);
}

#[test]
fn killed_right_after_the_last_checkpoint_the_same_command_tidies_the_run() {
    let world = World::small();
    world.write_yaml(&[("keep: 9", "keep: 2")]);
    let finishes = || assert!(start(&world, "run").wait().unwrap().success());
    finishes();
    let steps = || -> Vec<u64> {
        let kept = CheckpointStore::at(&world.path("run").join(CHECKPOINTS)).list().unwrap();
        kept.iter().map(|checkpoint| checkpoint.step).collect()
    };
    let summary = RunSummary::read(&world.path("run")).unwrap();
    assert!(steps() == [8, 9] && summary.stages[2].fixed_set_loss_after.is_some(), "{summary:?}");
    // State right after the last checkpoint is in its place, before anything else is done.
    let checkpoints = world.path("run").join(CHECKPOINTS);
    fs::create_dir(checkpoints.join("step-00000007")).unwrap();
    RunSummary::update(&world.path("run"), |summary| summary.stages.truncate(2)).unwrap();
    finishes();
    assert_eq!(steps(), [8, 9]);
    assert_eq!(RunSummary::read(&world.path("run")).unwrap(), summary);
}

#[test]
fn killed_at_random_moments_the_same_command_ends_with_the_same_bits() {
    let kills = Kills {
        command: || Command::new(env!("CARGO_BIN_EXE_hyperlora")),
        blow: |generator, processes| match below(generator, 5) {
            // SIGTERM ends the program like any other, before it listens for the signal.
            0 => Blow { signal: "TERM", processes: processes.into(), codes: &[Some(3), None] },
            _ => Blow { signal: "KILL", processes: processes.into(), codes: &[None] },
        },
        routine: 10,
    };
    kills.at_random();
}
