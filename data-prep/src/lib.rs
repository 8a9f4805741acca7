//! Turns photos into Parquet shards of filtered, embedded faces.
//!
//! Pipeline of a photo: [`source`] -> [`face`] -> [`filter`] -> [`crop`] -> [`caption`] -> [`shard`]. [`pipeline`] runs
//! it and [`report`] shows the outcome. Training reads the result through [`shard`], generation shares [`face`].
//!
//! Start with [`pipeline::build`], which makes a shard folder from a YAML file, or with [`shard::ShardFolder`], which
//! reads one. Programs with faces of their own write them with [`shard::ShardWriter`].

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
