//! Checks that the ranks of this cluster can communicate, and measures how fast. Start it the way training will be
//! started:
//!
//!     mpirun -n 4 collective-check
//!
//! Every rank checks every collective against values that it can compute alone. `--silent R` makes rank R fall silent,
//! `--differ R` makes it claim another configuration: the other ranks must then report it within the deadline
//! (`--timeout S`).

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result, output};
use hyperlora_ranks::{Collective, agree, run_as_rank};

/// Length of the timed bucket in numbers: 10 MiB.
const BUCKET: usize = 10 << 18;

fn main() -> ExitCode {
    let log = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::stderr);
    log.without_time().with_target(false).with_ansi(false).init();
    run_as_rank(Duration::from_secs(option("--timeout").unwrap_or(60)), run)
}

/// Returns the number after `name` on the command line.
fn option(name: &str) -> Option<u64> {
    std::env::args().skip_while(|argument| argument != name).nth(1)?.parse().ok()
}

fn run(world: &dyn Collective) -> Result<()> {
    let device = Device::flex();
    let here = |name: &str| option(name) == Some(world.rank() as u64);
    agree(world, &[("version", "1".into()), ("configuration", here("--differ").to_string())])?;
    if here("--silent") {
        thread::sleep(Duration::from_mins(10));
    }
    check(world, &device)?;
    let took = time(world, &device)?;
    if world.is_main() {
        let hosts = world.hosts().join(" ");
        let (ranks, took) = (world.world_size(), took * 1e3);
        output::line(format_args!("{ranks} ranks on {hosts}: all right; all-reduce of 10 MiB in {took:.1} ms"))?;
    }
    Ok(())
}

/// Runs every collective once, on numbers that are exact in f32.
fn check(world: &dyn Collective, device: &Device) -> Result<()> {
    let (rank, size) = (world.rank(), world.world_size());
    let ramp = |start: usize, step: usize| -> Vec<f32> { (0..6 * size).map(|i| (start + step * i) as f32).collect() };
    let tensor = |numbers: &[f32]| Tensor::<1>::from_floats(numbers, device);
    // Rank r holds i (r + 1): the mean over the ranks is i (size + 1) / 2.
    let own = ramp(0, rank + 1);
    let mean: Vec<f32> = ramp(0, 1).iter().map(|i| i * (size + 1) as f32 / 2.0).collect();
    let part = &mean[6 * rank..][..6];
    expect(world, "all-reduce", world.all_reduce_mean("the check", tensor(&own))?()?, &mean)?;
    let scattered = world.reduce_scatter_mean("the check", tensor(&own))?()?.slice(6 * rank..6 * rank + 6);
    expect(world, "reduce-scatter", scattered.clone(), part)?;
    expect(world, "all-gather", world.all_gather("the check", scattered)?()?, &mean)?;
    expect(world, "broadcast", world.broadcast("the check", tensor(&ramp(rank, 1)))?()?, &ramp(0, 1))?;
    let silence = world.exchange("the check", &[])?;
    let notes = world.exchange("the check", &vec![rank as u8; 2 * rank])?;
    if silence != vec![Vec::<u8>::new(); size]
        || notes.iter().enumerate().any(|(other, note)| *note != vec![other as u8; 2 * other])
    {
        return Err(Error::Fault(format!("{}: exchange gave {notes:?}", world.name_of(rank))));
    }
    Ok(())
}

fn expect(world: &dyn Collective, what: &str, found: Tensor<1>, expected: &[f32]) -> Result<()> {
    let found: Vec<f32> = found.into_data().iter().collect();
    if found == expected {
        return Ok(());
    }
    Err(Error::Fault(format!("{}: {what} gave {found:?} instead of {expected:?}", world.name_of(world.rank()))))
}

/// Returns the seconds of an all-reduce, the best of ten.
fn time(world: &dyn Collective, device: &Device) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let bucket = Tensor::<1>::ones([BUCKET], device);
        world.barrier("the clock", Duration::from_mins(1))?;
        let clock = Instant::now();
        world.all_reduce_mean("the clock", bucket)?()?;
        best = best.min(clock.elapsed().as_secs_f64());
    }
    Ok(best)
}
