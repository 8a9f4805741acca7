//! Checkpoints are whole or absent, notice every damage, and outlive kills and full disks.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io;
use std::path::Path;

use burn_hyperlora::checkpoint::{Checkpoint, CheckpointStore};
use burn_hyperlora::{Error, Result};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    stage: String,
}

fn state(step: u64) -> State {
    State { step, stage: "base".into() }
}

fn fill(folder: &Path) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        fs::write(folder.join(name), bytes).map_err(|source| Error::write(&folder.join(name), source))
    };
    fs::create_dir(folder.join("hyper_lora")).unwrap();
    write("hyper_lora/resampler.safetensors", &[7; 3_000])?;
    write("optimizer.safetensors", &[1; 5_000])
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
        store.write(step, &state(step), fill).unwrap();
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
            let checkpoint = store.write(5, &state(5), fill).unwrap();
            damage(&checkpoint.path().join(file)).unwrap();
            let verified = checkpoint.verify();
            assert!(verified.is_err(), "{file} {what} goes unnoticed");
            let error = verified.unwrap_err();
            let message = error.to_string();
            // A bit flipped in the list of checksums shows as another file that does not match it.
            let named = file == "checksums.json" || message.contains(file);
            assert!(named && message.contains("step-00000005"), "{file} {what}: {message}");
            assert!(message.contains("delete the folder"), "{file} {what}: {message}");
            assert_eq!(error.exit_code(), 2, "{file} {what}");
        }
    }
}

#[test]
fn leftovers_of_killed_runs_are_cleared_and_a_replaced_one_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let store = CheckpointStore::open(root).unwrap();
    store.write(1, &state(1), fill).unwrap();
    store.write(2, &state(2), fill).unwrap();
    fs::create_dir(root.join(".step-00000003.partial")).unwrap();
    fs::write(root.join(".step-00000003.partial/optimizer.safetensors"), "half").unwrap();
    // Killed between the two renames of a replacement.
    fs::rename(root.join("step-00000002"), root.join(".step-00000002.old")).unwrap();
    fs::create_dir(root.join(".step-00000001.old")).unwrap();
    fs::write(root.join("notes.txt"), "the user's own").unwrap();

    assert_eq!(steps(&store), [1]);
    let store = CheckpointStore::open(root).unwrap();
    assert_eq!(steps(&store), [1, 2]);
    store.latest().unwrap().unwrap().verify().unwrap();
    assert_eq!(names(root), ["notes.txt", "step-00000001", "step-00000002"]);
}

#[test]
fn a_failed_write_leaves_the_older_ones_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    store.write(1, &state(1), fill).unwrap();
    let failed = store.write(2, &state(2), |folder| {
        fill(folder)?;
        Err(Error::write(&folder.join("optimizer.safetensors"), io::ErrorKind::StorageFull.into()))
    });
    assert_eq!(failed.unwrap_err().exit_code(), 1);
    assert_eq!(names(folder.path()), ["step-00000001"]);
    store.latest().unwrap().unwrap().verify().unwrap();
}

#[test]
fn a_full_disk_is_a_disk_error() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    store.write(1, &state(1), fill).unwrap();
    // Every write to /dev/full ends in ENOSPC, whoever runs the test.
    let failed = store.write(2, &state(2), |folder| {
        std::os::unix::fs::symlink("/dev/full", folder.join("weights")).unwrap();
        fs::write(folder.join("weights"), "x").map_err(|source| Error::write(&folder.join("weights"), source))
    });
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
        store.write(step * 10, &state(step * 10), fill).unwrap();
    }
    store.prune(2).unwrap();
    assert_eq!(steps(&store), [40, 50]);
    store.prune(0).unwrap();
    assert_eq!(steps(&store), [50]);
    assert_eq!(names(folder.path()), ["step-00000050"]);
}

#[test]
fn a_place_that_cannot_be_written_to_is_the_users_to_mend() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run");
    fs::write(&file, "a file stands here").unwrap();
    assert_eq!(CheckpointStore::open(&file.join("checkpoints")).unwrap_err().exit_code(), 2);
}
