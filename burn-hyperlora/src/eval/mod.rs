//! Does it learn? Figures that a trained hypernetwork is judged by.

pub mod identity_gap;
pub mod paired;
