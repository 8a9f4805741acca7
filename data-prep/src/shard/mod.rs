//! The contract between preparation and training: Parquet shards and their manifest.
