//! `data-prep`: photos to Parquet shards.

fn main() {}
