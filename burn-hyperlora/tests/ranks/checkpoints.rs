//! Checkpoints in parts: written by some ranks, read by others, consolidated, and refused by a disk.

use std::fs;
use std::path::Path;
use std::process::Command;

use burn_hyperlora::checkpoint::CheckpointStore;
use burn_hyperlora::run::{CHECKPOINTS, archive};

use crate::training::train;
use hyperlora_testing::mpirun::{end_of, mpirun};
use hyperlora_testing::state::numbers;
use hyperlora_testing::world::World;

/// Batch that 4, 3, 2 and 1 ranks can share.
const SHARED: [(&str, &str); 2] = [("micro_batch: 2", "micro_batch: 1"), ("global_batch: 4", "global_batch: 12")];

/// Step in the middle of the second stage.
const STEP: u64 = 4;

fn moment_files(run: &Path) -> Vec<String> {
    files_of(run, "", "optimizer")
}

/// Lists the names in `folder` of the checkpoint that begin with `start`.
fn files_of(run: &Path, folder: &str, start: &str) -> Vec<String> {
    let entries = fs::read_dir(run.join(CHECKPOINTS).join(format!("step-{STEP:08}")).join(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(start)).collect();
    names.sort();
    names
}

fn checkpoint(arguments: &[&str]) -> (Option<i32>, String) {
    end_of(&Command::new(env!("CARGO_BIN_EXE_hyperlora")).arg("checkpoint").args(arguments).output().unwrap())
}

#[test]
fn moments_go_through_every_world_size_bit_for_bit() {
    let world = World::small();
    world.experiment(&SHARED).unwrap();
    let run = world.path("run");
    let mut written = None;
    // Each resume from step 4 that pauses there rewrites the checkpoint.
    for ranks in [4, 2, 1, 3] {
        let (code, text) = train(&world, ranks, "run", &["--max-steps", &STEP.to_string()]);
        assert!(code == Some(0) && text.contains("paused after 4 steps"), "{text}");
        let found = numbers(&run, STEP);
        let moments = found.keys().filter(|name| name.starts_with("optimizer: exp_avg_sq.")).count();
        assert!(moments > 10 && found.values().flatten().any(|number| *number != 0.0), "{moments}");
        assert!(*written.get_or_insert_with(|| found.clone()) == found, "{ranks} ranks change the state");
        let files = match ranks {
            1 => vec!["optimizer.safetensors".to_owned()],
            _ => (1..=ranks).map(|rank| format!("optimizer-{rank:05}-of-{ranks:05}.safetensors")).collect(),
        };
        assert_eq!(moment_files(&run), files);
        let shards = if ranks == 1 { 0 } else { ranks };
        assert_eq!(files_of(&run, "weights", "hyper_lora_modules-").len(), shards, "every rank writes its share");
    }

    let path = run.to_str().unwrap();
    let (code, listed) = checkpoint(&["list", path]);
    let line: Vec<&str> = listed.lines().last().unwrap().split_whitespace().collect();
    let shown = (line[0], line[1], line[3], line[4]);
    assert!(code == Some(0) && shown == ("4", "id_clip", "3", "yes"), "{listed}");

    let (code, text) = checkpoint(&["consolidate", path]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(moment_files(&run), ["optimizer.safetensors"]);
    assert_eq!(files_of(&run, "weights", "hyper_lora"), ["hyper_lora_modules.json", "hyper_lora_modules.safetensors"]);
    assert!(written.unwrap() == numbers(&run, STEP));
    assert_eq!(checkpoint(&["verify", path]).0, Some(0));
    let (code, text) = train(&world, 1, "run", &[]);
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn a_part_that_is_missing_or_damaged_is_named() {
    let world = World::small();
    world.experiment(&SHARED).unwrap();
    assert_eq!(train(&world, 2, "run", &["--max-steps", "4"]).0, Some(0));
    let run = world.path("run");
    let released = world.path("released");
    let path = run.to_str().unwrap();
    let (code, text) = checkpoint(&["consolidate", path, "-o", released.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{text}");
    assert!(released.join("hyper_lora_modules.safetensors").is_file() && moment_files(&run).len() == 2);

    let part = run.join(CHECKPOINTS).join("step-00000004/optimizer-00002-of-00002.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&part, &bytes).unwrap();
    for command in ["verify", "consolidate"] {
        let (code, text) = checkpoint(&[command, path]);
        assert!(code == Some(2) && text.contains("optimizer-00002-of-00002.safetensors: does not match"), "{text}");
    }
    let summaries = || -> Vec<bool> {
        archive::checkpoints(&run).unwrap().iter().map(|checkpoint| archive::summary(checkpoint).whole).collect()
    };
    assert_eq!(summaries(), [true, true], "`list` looks at lengths alone");
    fs::write(&part, &bytes[..9]).unwrap();
    assert_eq!(summaries(), [true, false]);
    fs::remove_file(&part).unwrap();
    let (code, text) = train(&world, 2, "run", &[]);
    assert_eq!(code, Some(2), "of rank 0, and of the one that heard of it: {text}");
    assert!(text.contains("optimizer-00002-of-00002.safetensors: is missing"), "{text}");
}

#[test]
fn a_full_disk_ends_all_ranks_with_its_name_and_leaves_the_older_ones() {
    let world = World::small();
    world.experiment(&SHARED).unwrap();
    assert_eq!(train(&world, 2, "run", &["--max-steps", "2"]).0, Some(0));
    // The limit of 16 KiB per file acts like a full disk.
    let mut command = mpirun(2);
    command.args(["bash", "-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "limited"]);
    command.arg(env!("CARGO_BIN_EXE_hyperlora")).arg("train").arg(world.path("train.yaml"));
    let (code, text) = end_of(&command.arg("--out").arg(world.path("run")).output().unwrap());
    assert!(code == Some(1) && text.contains("free some space"), "{code:?} {text}");
    let store = CheckpointStore::open(&world.path("run").join(CHECKPOINTS)).unwrap();
    assert_eq!(store.list().unwrap().iter().map(|checkpoint| checkpoint.step).collect::<Vec<_>>(), [2]);
    let (code, text) = train(&world, 2, "run", &["--max-steps", "4"]);
    assert_eq!(code, Some(0), "{text}");
}
