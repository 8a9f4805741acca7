//! Operations on LoRAs: exact sums, reductions of the rank, and merges into a base model.

mod concat;
mod merge;
mod merge_file;
mod reduce;

pub use concat::concat;
pub use merge::merge;
pub use reduce::{Reduction, reduce};
