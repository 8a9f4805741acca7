//! Foundations of both programs: errors with exit codes, YAML configuration, files that are whole or absent, untrusted
//! paths and text, hashes, random numbers and signals.
//!
//! Nothing here depends on photos, tensors or ranks.

pub mod config;
pub mod error;
pub mod files;
pub mod hash;
pub mod output;
pub mod paths;
pub mod random;
pub mod signals;
pub mod text;

pub use error::{Error, ErrorKind, Result};
