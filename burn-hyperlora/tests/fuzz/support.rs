//! What all of these tests need: bounds, files to start from, and what every outcome must hold to.

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

/// What reading a small file may take: its size and that of the tiny base many times over, and far from what a lie of a
/// few digits asks for.
const MEMORY: usize = 512 << 20;

/// The same cases every time.
pub(crate) fn bounded(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() }
}

pub(crate) fn device() -> Device {
    Device::flex()
}

/// The quickstart's base model.
pub(crate) fn base() -> PathBuf {
    hyperlora_testing::repository().join("experiments/quickstart/base")
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture(name)
}

/// A folder like `original`, but for the file `name`, which holds `bytes`.
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

/// Runs `read` and holds it to what every reader promises: little memory, and where it fails an error of the input that
/// names something below `folder` and a remedy. Whether it succeeded.
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
