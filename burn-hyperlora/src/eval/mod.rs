//! Evaluation of a trained hypernetwork.

pub mod config;
pub mod identity_gap;
pub mod paired;
