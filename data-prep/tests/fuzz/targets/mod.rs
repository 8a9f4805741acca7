//! One target for every reader of a foreign file: `ci/fuzz.sh` runs each of them for long.

mod faces;
mod models;
mod names;
mod photos;
mod shards;
mod sources;
mod yaml;
