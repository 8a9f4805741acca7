//! Every reader of a foreign file, on files that began as good ones and were changed: no panic, no hang, bounded memory, and
//! an error of the input that names the file and a remedy. `ci/fuzz.sh` runs each target for long; here it is bounded.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "the folder here is a smaller one")]
#[path = "../shard_folder/mod.rs"]
mod shard_folder;
mod targets;
