//! Shared parts of these tests: bounds, seed files, and checks of every outcome.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use burn::tensor::Device;
use hyperlora_core::Result;
use proptest::prelude::ProptestConfig;
use proptest::test_runner::RngSeed;

use hyperlora_testing::ALLOCATOR;
use hyperlora_testing::fuzz::{TURN, scratch};

/// Memory limit for reading a small file, in bytes: many times its size and that of the tiny base, but far below what a
/// false size of a few digits asks for.
const MEMORY: usize = 512 << 20;

/// Configures the same cases on every run.
pub(crate) fn bounded(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() }
}

pub(crate) fn device() -> Device {
    Device::flex()
}

/// Returns the folder of the quickstart's base model.
pub(crate) fn base() -> PathBuf {
    hyperlora_testing::repository().join("experiments/quickstart/base")
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture(name)
}

/// Creates a folder like `original`, except for the file `name`, which holds `bytes`.
pub(crate) fn with_file(original: &Path, name: &str, bytes: &[u8]) -> tempfile::TempDir {
    let folder = scratch();
    link(original, folder.path());
    let path = folder.path().join(name);
    fs::remove_file(&path).unwrap();
    fs::write(path, bytes).unwrap();
    folder
}

fn link(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            link(&entry.path(), &target);
        } else {
            symlink(entry.path(), target).unwrap();
        }
    }
}

/// Runs `read` and checks the contract of every reader: little memory, and on failure an input error that names a path
/// below `folder` and a remedy. Returns whether it succeeded.
#[track_caller]
pub(crate) fn survives(folder: &Path, read: impl FnOnce() -> Result<()>) -> bool {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = read();
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(peak < MEMORY, "{} MiB were taken; {result:?}", peak >> 20);
    match result {
        Ok(()) => true,
        Err(error) => {
            let message = error.to_string();
            assert_eq!(error.exit_code(), 2, "{message}");
            assert!(message.contains(&*folder.to_string_lossy()) && message.contains("remedy: "), "{message}");
            assert!(message.len() < 20_000, "a message of {} bytes", message.len());
            false
        }
    }
}
