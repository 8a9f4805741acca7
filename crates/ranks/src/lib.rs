//! Communication between the processes of one run: one rank per process, and all ranks call every method in the same
//! order.
//!
//! There are three implementations: a world of one, MPI for CPUs (feature `mpi`) and NCCL for GPUs (feature `cuda`).
//! [`join`] chooses by the launcher's [environment variables](Placement). Bulk data are flat f32 tensors and stay on
//! their device; small things (losses, a stop signal, names) travel as byte strings through [`Collective::exchange`].
//!
//! Every wait has a deadline. A rank that exceeds it reports on one line what it waited for and, if known, which rank
//! on which machine is missing. The process then ends with exit code 75.
//!
//! Start with [`Ranks`]: [`Ranks::alone`] is a single process, and [`join`] makes the [`Collective`] of several. Work
//! that can fail runs in [`Ranks::on_main`] or [`Ranks::try_on_all`], so that no rank waits for one that failed.

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

/// Ranks of a run.
///
/// A method fails with [`Error::Peer`] if another rank was lost or did not arrive in time. The world is then unusable,
/// and the process should end. If the underlying library cannot cancel a wait, it ends the process itself.
pub trait Collective {
    /// Rank of this process, from 0.
    fn rank(&self) -> usize {
        0
    }

    /// Processes of the run, at least 1.
    fn world_size(&self) -> usize {
        1
    }

    /// Machine of every rank.
    fn hosts(&self) -> &[String];

    /// Replaces `bucket` (any length, the same on all ranks) by its mean over the ranks.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// Cuts `bucket` into [`world_size`](Self::world_size) equal parts, and replaces part `r` on rank `r` by its mean
    /// over the ranks. The content of the other parts is undefined afterwards.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>>;

    /// Concatenates the parts of all ranks, which have equal length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>>;

    /// Copies rank 0's tensor to every rank; the others pass one of the same length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>>;

    /// Gives every rank the notes of all, by rank. Notes are short, and may differ in length.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until all ranks are here, for at most `deadline`. Meant for waits that are longer than others, such as for
    /// work of one rank alone.
    ///
    /// # Errors
    /// Peer, see [`Collective`].
    fn barrier(&self, what: &str, deadline: Duration) -> Result<()>;

    /// Leaves in order. It is the last call of all ranks: a launcher reports a process that ends without it as failed.
    fn leave(&self) {}

    /// Name of a rank in messages: `rank 3 (node-1)`.
    fn name_of(&self, rank: usize) -> String {
        match self.hosts().get(rank) {
            Some(host) => format!("rank {rank} ({host})"),
            None => format!("rank {rank}"),
        }
    }

    /// Tells whether this is the main rank, which writes the files that a run has once: checkpoints, curves, the log.
    fn is_main(&self) -> bool {
        self.rank() == 0
    }
}

/// Running collective: call it for the result. Several may run at once, and complete in the order of their start.
pub type Pending<'a> = Box<dyn FnOnce() -> Result<Tensor<1>> + 'a>;

/// Timeouts for joining a world.
#[derive(Debug, Clone)]
pub struct JoinConfig {
    /// Longest wait for the other ranks in one collective.
    pub timeout: Duration,
    /// Longest wait for the other ranks at the start, because launchers take time.
    pub start_timeout: Duration,
}

/// Joins the world that the launcher made: a world of one without a launcher, or with one that started a single
/// process.
///
/// # Errors
/// Input: a contradictory environment, or a build that lacks what several ranks need. Peer: the ranks do not meet.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use burn::tensor::Device;
/// use hyperlora_ranks::{JoinConfig, join};
///
/// let timeout = Duration::from_secs(600);
/// // `Placement::of_process` finds the placement in the variables of the launcher.
/// let world = join(None, &Device::flex(), &JoinConfig { timeout, start_timeout: timeout })?;
/// assert_eq!((world.rank(), world.world_size()), (0, 1));
/// world.leave();
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn join(placement: Option<&Placement>, device: &Device, config: &JoinConfig) -> Result<Box<dyn Collective>> {
    match placement {
        Some(placement) if placement.world_size > 1 && *device == Device::flex() => on_cpus(placement, config),
        Some(placement) if placement.world_size > 1 => on_gpus(placement, device, config),
        _ => Ok(Box::new(WorldOfOne::new())),
    }
}

/// Main function of a small program: runs `work` as one of the ranks that the launcher made on CPUs, and waits for all
/// of them at the end. A rank that does not arrive within `timeout` is given up. Prints an error on stderr; the exit
/// code is the error's.
///
/// # Examples
/// ```no_run
/// use std::process::ExitCode;
/// use std::time::Duration;
/// use hyperlora_ranks::run_as_rank;
///
/// fn main() -> ExitCode {
///     run_as_rank(Duration::from_secs(60), |world| {
///         let hosts = world.exchange("the hosts", world.hosts()[world.rank()].as_bytes())?;
///         println!("rank {} of {}", world.rank(), hosts.len());
///         Ok(())
///     })
/// }
/// ```
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
