//! The error type of both crates: one enum, so that a message and an exit code mean the same everywhere.

pub use data_prep::error::{Error, Result};
