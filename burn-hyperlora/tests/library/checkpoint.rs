//! Checkpoints are whole or absent, detect any damage, and survive kills and full disks.

use std::path::Path;
use std::{fs, io};

use burn_hyperlora::checkpoint::{Checkpoint, CheckpointStore, RankPart};
use hyperlora_core::{Error, Result};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    stage: String,
}

fn state(step: u64) -> State {
    State { step, stage: "base".into() }
}

/// Writes the contents of every test's checkpoint of a step.
fn fill(step: u64) -> impl FnOnce(&mut RankPart<'_>) -> Result<()> {
    move |part| {
        add(part, "hyper_lora/resampler.safetensors", &[7; 3_000])?;
        add(part, "optimizer.safetensors", &[1; 5_000])?;
        part.state(&state(step))
    }
}

fn add(part: &mut RankPart<'_>, name: &str, bytes: &[u8]) -> Result<()> {
    part.file(name, |path| fs::write(path, bytes).map_err(|source| Error::write(path, source)))
}

fn steps(store: &CheckpointStore) -> Vec<u64> {
    store.list().unwrap().iter().map(|checkpoint| checkpoint.step).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(&folder.path().join("checkpoints")).unwrap();
    assert_eq!(store.latest().unwrap(), None);
    for step in [100, 20, 3] {
        store.write(step, fill(step)).unwrap();
    }
    let latest = store.latest().unwrap().unwrap();
    assert_eq!(latest.step, 100);
    latest.verify().unwrap();
    assert_eq!(latest.state::<State>().unwrap(), state(100));
    assert_eq!(fs::read(latest.path().join("hyper_lora/resampler.safetensors")).unwrap(), [7; 3_000]);
    assert_eq!(Checkpoint::at(latest.path()).unwrap(), latest);
    assert_eq!(Checkpoint::at(folder.path()).unwrap_err().exit_code(), 2);
}

#[test]
fn every_damage_is_named_with_its_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    let files = ["hyper_lora/resampler.safetensors", "optimizer.safetensors", "state.json", "checksums.json"];
    type Damage = (&'static str, fn(&Path) -> io::Result<()>);
    let damages: [Damage; 3] = [
        ("cut short", |path| fs::write(path, &fs::read(path)?[..10])),
        ("one bit flipped", |path| {
            let mut bytes = fs::read(path)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes)
        }),
        ("missing", |path| fs::remove_file(path)),
    ];
    for file in files {
        for (what, damage) in &damages {
            let checkpoint = store.write(5, fill(5)).unwrap();
            damage(&checkpoint.path().join(file)).unwrap();
            let verified = checkpoint.verify();
            assert!(verified.is_err(), "{file} {what} goes unnoticed");
            let error = verified.unwrap_err();
            let message = error.to_string();
            // A bit flipped in the list of checksums is reported as another file that does not match it.
            let named = file == "checksums.json" || message.contains(file);
            assert!(named && message.contains("step-00000005"), "{file} {what}: {message}");
            assert!(message.contains("delete the folder"), "{file} {what}: {message}");
            assert_eq!(error.exit_code(), 2, "{file} {what}");
            fs::remove_dir_all(checkpoint.path()).unwrap();
        }
    }
}

#[test]
fn leftovers_of_killed_runs_are_cleared_and_a_replaced_one_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let store = CheckpointStore::open(root).unwrap();
    store.write(1, fill(1)).unwrap();
    store.write(2, fill(2)).unwrap();
    fs::create_dir(root.join(".step-00000003.hyperlora.partial")).unwrap();
    fs::write(root.join(".step-00000003.hyperlora.partial/optimizer.safetensors"), "half").unwrap();
    // State after a kill between the two renames of a replacement.
    fs::rename(root.join("step-00000002"), root.join(".step-00000002.hyperlora.old")).unwrap();
    fs::create_dir(root.join(".step-00000001.hyperlora.old")).unwrap();
    fs::write(root.join("notes.txt"), "the user's own").unwrap();

    assert_eq!(steps(&store), [1]);
    let store = CheckpointStore::open(root).unwrap();
    assert_eq!(steps(&store), [1, 2]);
    store.latest().unwrap().unwrap().verify().unwrap();
    assert_eq!(names(root), ["notes.txt", "step-00000001", "step-00000002"]);

    // A folder named like a leftover but with other contents belongs to the user.
    fs::create_dir(root.join(".step-00000001.hyperlora.old")).unwrap();
    fs::write(root.join(".step-00000001.hyperlora.old/thesis.tex"), "years of work").unwrap();
    assert_eq!(steps(&CheckpointStore::open(root).unwrap()), [1, 2]);
    assert!(root.join(".step-00000001.hyperlora.old/thesis.tex").exists());
}

#[test]
fn a_failed_write_leaves_the_older_ones_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    store.write(1, fill(1)).unwrap();
    let failed = store.write(2, |part| {
        fill(2)(part)?;
        part.file("weights", |path| Err(Error::write(path, io::ErrorKind::StorageFull.into())))
    });
    assert_eq!(failed.unwrap_err().exit_code(), 1);
    assert_eq!(names(folder.path()), ["step-00000001"]);
    store.latest().unwrap().unwrap().verify().unwrap();
}

fn full_disk(part: &mut RankPart<'_>) -> Result<()> {
    part.file("weights", |path| {
        std::os::unix::fs::symlink("/dev/full", path).unwrap();
        fs::write(path, "x").map_err(|source| Error::write(path, source))
    })
}

#[test]
fn a_full_disk_is_a_disk_error() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    store.write(1, fill(1)).unwrap();
    // Every write to /dev/full fails with ENOSPC, even for root.
    let failed = store.write(2, full_disk);
    let error = failed.unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("free some space"), "{error}");
    assert_eq!(names(folder.path()), ["step-00000001"]);
}

#[test]
fn only_the_newest_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    for step in 1..=5 {
        store.write(step * 10, fill(step * 10)).unwrap();
    }
    store.prune(2, None, Some(20)).unwrap();
    assert_eq!(steps(&store), [20, 40, 50], "that of step 20 is needed");
    store.prune(0, None, None).unwrap();
    assert_eq!(steps(&store), [50]);
    assert_eq!(names(folder.path()), ["step-00000050"]);
}

#[test]
fn what_cannot_be_removed_does_not_end_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let store = CheckpointStore::open(root).unwrap();
    for step in 1..=3 {
        store.write(step, fill(step)).unwrap();
    }
    // Not even root can remove a file as a folder, or replace a file by a folder.
    for hidden in [".step-00000001.hyperlora.partial", ".step-00000003.hyperlora.old"] {
        fs::write(root.join(hidden), "in the way").unwrap();
    }
    store.prune(1, None, None).unwrap();
    assert_eq!(steps(&store), [1, 3], "the others are removed all the same");
    let store = CheckpointStore::open(root).unwrap();
    assert_eq!(steps(&store), [1, 3]);
    for hidden in [".step-00000001.hyperlora.partial", ".step-00000003.hyperlora.old"] {
        fs::remove_file(root.join(hidden)).unwrap();
    }
    store.prune(1, None, None).unwrap();
    assert_eq!(names(root), ["step-00000003"]);
}

#[test]
fn the_first_of_every_span_stays_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    // Stages may end at any step, so steps are not all multiples of the interval.
    let mut left = Vec::new();
    for step in [0, 30, 60, 90, 115, 145, 175, 205, 235, 265, 295, 325] {
        store.write(step, fill(step)).unwrap();
        store.prune(2, Some(100), None).unwrap();
        left = steps(&store);
    }
    assert_eq!(left, [115, 205, 295, 325]);
}

#[test]
fn a_place_that_cannot_be_written_to_is_the_users_to_mend() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run");
    fs::write(&file, "a file stands here").unwrap();
    assert_eq!(CheckpointStore::open(&file.join("checkpoints")).unwrap_err().exit_code(), 2);
}
