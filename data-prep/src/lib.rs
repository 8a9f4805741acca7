//! Turns photos into Parquet shards of filtered, embedded faces.
//!
//! Pipeline of a photo: [`source`] -> [`face`] -> [`filter`] -> [`crop`] -> [`caption`] -> [`shard`]. [`pipeline`] runs
//! it and [`report`] shows the outcome. Training reads the result through [`shard`], generation shares [`face`].

pub mod caption;
pub mod crop;
pub mod face;
pub mod filter;
pub mod notes;
pub mod pipeline;
mod prepared;
pub mod report;
pub mod shard;
pub mod source;
