//! Fuzz tests of every reader of foreign files, on valid files that are mutated: no panic, no hang, bounded memory, and
//! an input error that names the file and a remedy. `ci/fuzz.sh` runs each target for long; here the number of cases is
//! small.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "the folder here is a smaller one")]
#[path = "../shard_folder/mod.rs"]
mod shard_folder;
mod targets;
