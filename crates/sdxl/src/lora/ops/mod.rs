//! LoRA operations: exact sums, rank reduction, and merging into a base model.

mod concat;
mod merge;
mod merge_file;
mod reduce;

pub use concat::concat;
pub use merge::merge;
pub use reduce::{Reduction, reduce};
