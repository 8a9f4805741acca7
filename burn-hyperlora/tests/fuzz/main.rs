//! Files that are not what they should be, made by chance: each leads to a result or to one error that names the file,
//! never to a panic, and to no more memory than the file could ask for. The cases are bounded and the same every time.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod configs;
mod json;
mod loras;
mod safetensors;
mod support;
mod targets;
