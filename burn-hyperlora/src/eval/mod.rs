//! Evaluation of a trained hypernetwork.

pub mod identity_gap;
pub mod paired;
