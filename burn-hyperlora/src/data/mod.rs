//! The training data: shards to draws to batches.
