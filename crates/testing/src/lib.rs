//! Helpers that tests of several crates share: fixtures, a small world to train in, kills and comparisons of runs, a
//! file server, and the fuzz harness.
//!
//! Start with [`fixture`] and [`asset`], which find files of tests, and [`fuzz`], which runs a target on mutated files.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use peak_alloc::PeakAlloc;

#[cfg(feature = "training")]
pub mod experiment;
pub mod file_server;
pub mod fuzz;
#[cfg(feature = "training")]
pub mod kills;
pub mod mpirun;
pub mod mutate;
pub mod reference;
#[cfg(feature = "training")]
pub mod stability;
#[cfg(feature = "training")]
pub mod state;
#[cfg(feature = "training")]
pub mod world;

/// Counts the memory of every test program that links this crate.
#[global_allocator]
pub static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Returns the root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Returns the path of a model fixture: a file or folder that a script in `ci/parity` wrote.
pub fn fixture(name: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Returns a file that `launch/assets.sh` downloaded, by its path in the cache: photos and face models.
pub fn asset(name: &str) -> PathBuf {
    let cache = std::env::var_os("HYPERLORA_CACHE").map(PathBuf::from);
    cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/hyperlora")).join(name)
}
