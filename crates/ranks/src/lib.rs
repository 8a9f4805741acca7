//! What the processes of one run say to each other: one rank per process, every method called by all ranks in the same order.
//!
//! Three makers: a world of one, MPI for CPUs (feature `mpi`) and NCCL for GPUs (feature `cuda`). [`join`] chooses by what
//! the launcher wrote into the [environment](Placement). Bulk data are flat f32 tensors and stay on their device; small
//! things (losses, a stop signal, names) travel as byte strings through [`Collective::exchange`].
//!
//! Everything has a deadline. A rank that waits longer names on one line what it waited for and, where it can be known,
//! which rank on which machine did not come, and the process ends with exit code 75.

mod agreement;
mod failure;
#[doc(hidden)]
pub mod frames;
mod handshake;
mod launchers;
mod meeting;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod ranks;
mod rendezvous;
mod timed;
mod token;
#[cfg(any(feature = "cuda", test))]
mod watchdog;
mod world_of_one;

use std::process::ExitCode;
use std::time::Duration;

use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result, output};

pub use agreement::{agree, program};
pub use failure::{Failure, end_process};
pub use launchers::{Placement, earlier_life, host_name};
pub use meeting::Meeting;
pub use ranks::Ranks;
pub use rendezvous::Rendezvous;
pub use timed::Timed;
pub use token::Token;
pub use world_of_one::WorldOfOne;

/// Exit code of a rank that lost another one (`EX_TEMPFAIL`).
pub const PEER_LOST: u8 = 75;

/// The ranks of a run.
///
/// A method fails with [`Error::Peer`] when another rank was lost or did not come in time; the world is then of no more use,
/// and the process is expected to end. Where the library underneath cannot give up a wait, it ends the process itself.
pub trait Collective {
    /// This process, from 0.
    fn rank(&self) -> usize {
        0
    }

    /// Processes of the run, at least 1.
    fn world_size(&self) -> usize {
        1
    }

    /// The machine of every rank.
    fn hosts(&self) -> &[String];

    /// Replaces `bucket` (any length, the same on all ranks) by its mean over the ranks.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// Cuts `bucket` into [`world_size`](Self::world_size) equal parts, and replaces part `r` on rank `r` by its mean over the
    /// ranks. What the other parts then hold is not defined.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// The parts of all ranks, of equal length, one after the other.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>>;

    /// Rank 0's tensor on every rank; the others give one of the same length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>>;

    /// Gives every rank the notes of all, by rank. Notes are short, and may differ in length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until all ranks are here, for at most `deadline`: for waits that are longer than the others by their nature,
    /// such as for what one rank does alone.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn barrier(&self, what: &str, deadline: Duration) -> Result<()>;

    /// Leaves in order: the last call of all ranks. A process that ends without it has failed, and its launcher says so.
    fn leave(&self) {}

    /// How other ranks call this one: `rank 3 (node-1)`.
    fn name_of(&self, rank: usize) -> String {
        match self.hosts().get(rank) {
            Some(host) => format!("rank {rank} ({host})"),
            None => format!("rank {rank}"),
        }
    }

    /// Whether this rank writes what a run has once: checkpoints, curves, the log.
    fn is_main(&self) -> bool {
        self.rank() == 0
    }
}

/// A collective on its way: call it for the result. Several may be on their way at once, in the order of their beginning.
pub type Pending<'a> = Box<dyn FnOnce() -> Result<Tensor<1>> + 'a>;

/// How a world is entered.
#[derive(Debug, Clone)]
pub struct JoinConfig {
    /// The longest wait for the other ranks in one collective.
    pub timeout: Duration,
    /// The longest wait for them at the start: launchers take their time.
    pub start_timeout: Duration,
}

/// Enters the world that the launcher made: a world of one where there was no launcher, or one that started a single process.
///
/// # Errors
/// Input for a contradictory environment and for a build that lacks what several ranks need; Peer when they do not meet.
pub fn join(placement: Option<&Placement>, device: &Device, config: &JoinConfig) -> Result<Box<dyn Collective>> {
    match placement {
        Some(placement) if placement.world_size > 1 && *device == Device::flex() => on_cpus(placement, config),
        Some(placement) if placement.world_size > 1 => on_gpus(placement, device, config),
        _ => Ok(Box::new(WorldOfOne::new())),
    }
}

/// A small program's main: `work` as one of the ranks that the launcher made on CPUs, who leave together. Whoever is not there
/// within `timeout` is given up. What went wrong is said on stderr; the exit code is the error's.
pub fn run_as_rank(timeout: Duration, work: impl FnOnce(&dyn Collective) -> Result<()>) -> ExitCode {
    let run = || {
        let placement = Placement::of_process()?;
        let config = JoinConfig { timeout, start_timeout: Duration::from_secs(60) };
        let world = join(placement.as_ref(), &Device::flex(), &config)?;
        work(&*world)?;
        world.barrier("all ranks to end", timeout)?;
        world.leave();
        Ok(())
    };
    run().map_or_else(
        |error: Error| {
            output::note(format_args!("error: {error}"));
            ExitCode::from(error.exit_code())
        },
        |()| ExitCode::SUCCESS,
    )
}

#[cfg(feature = "mpi")]
fn on_cpus(placement: &Placement, config: &JoinConfig) -> Result<Box<dyn Collective>> {
    Ok(Box::new(mpi::Mpi::start(placement, config)?))
}

#[cfg(not(feature = "mpi"))]
fn on_cpus(placement: &Placement, _config: &JoinConfig) -> Result<Box<dyn Collective>> {
    Err(Error::input(
        format!("{} started {} ranks", placement.launcher, placement.world_size),
        "this binary was built without MPI, which several ranks on CPUs need",
        "install Open MPI and libclang (Debian: libopenmpi-dev openmpi-bin libclang-dev), then cargo build --release --features burn-hyperlora/mpi; or start a single process",
    ))
}

#[cfg(feature = "cuda")]
fn on_gpus(placement: &Placement, device: &Device, config: &JoinConfig) -> Result<Box<dyn Collective>> {
    Ok(Box::new(nccl::Nccl::start(placement, device, config)?))
}

#[cfg(not(feature = "cuda"))]
fn on_gpus(placement: &Placement, _device: &Device, _config: &JoinConfig) -> Result<Box<dyn Collective>> {
    Err(Error::input(
        format!("{} started {} ranks", placement.launcher, placement.world_size),
        "this binary was built without CUDA, which several ranks on GPUs need",
        "install the CUDA toolkit and NCCL, then cargo build --release --features burn-hyperlora/cuda",
    ))
}
