//! Foundations of both programs: errors with exit codes, YAML configuration, files that are whole or absent, untrusted
//! paths and text, hashes, random numbers and signals.
//!
//! Nothing here depends on photos, tensors or ranks.
//!
//! Start with [`Error`], which every fallible call of the library returns. [`config::load`] reads a YAML file,
//! [`files::write_whole`] and [`files::StagedFolder`] write files and folders, [`paths::Root`] opens files that a
//! stranger may have named, and [`random::for_sample`] draws numbers that a resumed run draws again.

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
