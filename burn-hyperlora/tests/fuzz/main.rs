//! Randomly malformed files: each leads to a result or to one error that names the file, never to a panic or to more
//! memory than the file could need. The cases are bounded and the same on every run.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod configs;
mod json;
mod loras;
mod safetensors;
mod support;
mod targets;
