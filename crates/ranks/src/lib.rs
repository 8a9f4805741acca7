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
mod collective;
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

use burn::tensor::Device;
use hyperlora_core::{Error, Result, output};

pub use agreement::{agree, program};
pub use collective::{Collective, JoinConfig, PEER_LOST, Pending};
pub use failure::{Failure, end_process};
pub use launchers::{Placement, earlier_life, host_name};
pub use meeting::Meeting;
pub use ranks::Ranks;
pub use rendezvous::Rendezvous;
pub use timed::Timed;
pub use token::Token;
pub use world_of_one::WorldOfOne;

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
        let config = JoinConfig { timeout, start_timeout: Duration::from_mins(1) };
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
