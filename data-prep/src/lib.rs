//! Photos in, Parquet shards of filtered, embedded faces out.
//!
//! The way of a photo: [`source`] -> [`face`] -> [`filter`] -> [`crop`] -> [`caption`] -> [`shard`]; [`pipeline`] walks it and
//! [`report`] shows what happened. Training reads the result through [`shard`], generation shares [`face`].

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
