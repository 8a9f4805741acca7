//! Measures the parts of a step on this many ranks: computing, packing a bucket, transfer. The main rank prints one
//! JSON object per line.
//!
//!     mpirun -n 4 target/release/scaling
//!
//! `ci/bench/scaling.sh` runs it on 1, 2 and 4 ranks and fits the alpha-beta model to the results.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor, TensorData};
use hyperlora_core::Result;
use hyperlora_ranks::{Collective, run_as_rank};
use serde_json::json;

const MINUTE: Duration = Duration::from_mins(1);
/// Number of repetitions. Only the fastest counts, because the others were disturbed.
const TIMES: usize = 20;
/// Number of pieces that a bucket is packed from: a hypernetwork's parameters have very different sizes.
const PIECES: usize = 12;

fn main() -> ExitCode {
    run_as_rank(MINUTE, measure)
}

fn measure(world: &dyn Collective) -> Result<()> {
    let device = Device::flex();
    let computing = fastest(world, Tensor::<2>::ones([512, 512], &device), |matrix| {
        matrix.clone().matmul(matrix.clone()).into_data();
        Ok(matrix)
    })?;
    tell(world, &json!({"ranks": world.world_size(), "compute_seconds": computing}));
    for kibibytes in [4, 16, 64, 256, 1024, 4096, 16384] {
        // A multiple of 12 makes pieces and the shares of 1, 2, 3 or 4 ranks even.
        let numbers = (kibibytes * 256_usize).next_multiple_of(PIECES);
        let length = numbers / PIECES;
        let piece = Tensor::<1>::from_data(TensorData::new(vec![1.0_f32; length], [length]), &device);
        // The buffer is reused, as in training.
        let packing = fastest(world, Tensor::zeros([numbers], &device), |bucket| {
            let starts = (0..PIECES).map(|index| index * length);
            Ok(starts.fold(bucket, |bucket, start| bucket.slice_assign(start..start + length, piece.clone())))
        })?;
        let part = numbers / world.world_size();
        let own = world.rank() * part..(world.rank() + 1) * part;
        let wire = fastest(world, Tensor::<1>::ones([numbers], &device), |bucket| {
            let bucket = world.reduce_scatter_mean("a bucket", bucket)?()?;
            world.all_gather("a bucket", bucket.clone().slice(own.clone()))?()?.into_data();
            Ok(bucket)
        })?;
        let line = json!({
            "ranks": world.world_size(),
            "bytes": 4 * numbers,
            "pack_seconds": packing,
            "wire_seconds": wire,
        });
        tell(world, &line);
    }
    Ok(())
}

/// Returns the seconds of `work` on the slowest rank, in the fastest of [`TIMES`] runs. Each run continues from the
/// state of the one before.
fn fastest<T>(world: &dyn Collective, mut state: T, work: impl Fn(T) -> Result<T>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..TIMES {
        world.barrier("the clock", MINUTE)?;
        let clock = Instant::now();
        state = work(state)?;
        let own = clock.elapsed().as_secs_f64();
        let all = world.exchange("the clocks", &own.to_le_bytes())?;
        let seconds = |note: &Vec<u8>| note[..].try_into().map_or(f64::INFINITY, f64::from_le_bytes);
        best = best.min(all.iter().map(seconds).fold(0.0, f64::max));
    }
    Ok(best)
}

fn tell(world: &dyn Collective, line: &serde_json::Value) {
    if world.is_main() {
        println!("{line}");
    }
}
