//! Reads the shards that `data-prep` wrote, and prints one line per face.
//!
//!     cargo run --release --example read_shards -- runs/quickstart-data

use std::path::PathBuf;

use data_prep::shard::ShardFolder;
use hyperlora_core::{Error, Result};

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).map(PathBuf::from).ok_or_else(|| {
        Error::input("read_shards", "takes a folder of shards", "give one that `data-prep build` wrote")
    })?;
    let shards = ShardFolder::open(&folder)?;
    for group in shards.row_groups() {
        // Rows are checked as they are read. A damaged row group is not an error, so that training can continue.
        match shards.read(group) {
            Ok(faces) => faces.iter().for_each(|face| {
                println!("{}\t{}x{}\t{:.3}\t{}", face.key, face.width, face.height, face.score, face.caption);
            }),
            Err(error) => println!("row group {} of shard {}: {}", group.index, group.shard, error.damage()?),
        }
    }
    Ok(())
}
