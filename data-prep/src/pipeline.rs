//! Source -> face -> filter -> caption -> shard.
