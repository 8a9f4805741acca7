//! Tests of the library's modules, each by itself.
#![expect(clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoint;
mod checkpoint_writer;
mod hyper_fixture;
mod hypernet;
mod hypernet_files;
mod layering;
mod optim;
mod single_file;
