//! Ranks on CPUs: MPI through its non-blocking collectives, so that every wait can end.
//!
//! MPI cannot cancel a collective: its buffers belong to the library until it is complete. A rank whose deadline passes
//! therefore calls the roll, reports on one line who did not answer, and aborts the whole job with exit code 75.

use std::cell::{Cell, RefCell};
use std::mem::{self, ManuallyDrop};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use hyperlora_core::{Error, Result};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::request::{Request, Scope, StaticScope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Root, Source};

use super::{Collective, JoinConfig, PEER_LOST, Pending, Placement};

/// Tag of the messages by which waiting ranks tell each other that they are alive.
const ROLL_CALL: i32 = 75;
/// Time that a rank listens for answers to its roll call.
const ROLL_TIME: Duration = Duration::from_secs(2);

/// World of an MPI job.
pub(super) struct Mpi {
    /// Finalized only by [`Collective::leave`]: finalizing waits for the other ranks, which an error must not do.
    universe: Cell<Option<ManuallyDrop<Universe>>>,
    world: SimpleCommunicator,
    rank: usize,
    size: usize,
    hosts: Vec<String>,
    timeout: Duration,
    /// Receives the sums, and is reused from bucket to bucket.
    sums: RefCell<Vec<f32>>,
}

impl Mpi {
    /// Joins the job that mpirun or srun made, and learns the names of its machines.
    ///
    /// # Errors
    /// Input: the launcher's variables and MPI disagree about the world.
    pub(super) fn start(placement: &Placement, config: &JoinConfig) -> Result<Self> {
        let started = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, _) = started.ok_or_else(|| Error::Fault("MPI was started twice".into()))?;
        let universe = ManuallyDrop::new(universe);
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        if (rank, size) != (placement.rank, placement.world_size) {
            return Err(Error::input(
                format!("{}: rank {} of {}", placement.launcher, placement.rank, placement.world_size),
                format!("MPI says rank {rank} of {size}"),
                "on CPUs start the ranks with mpirun, or with srun --mpi=pmix",
            ));
        }
        let timeout = config.start_timeout;
        let (universe, hosts, sums) = (Cell::new(Some(universe)), Vec::new(), RefCell::default());
        let mut entered = Self { universe, world, rank, size, hosts, timeout, sums };
        let host = mpi::environment::processor_name().unwrap_or_default();
        let hosts = entered.exchange("all ranks to start", host.as_bytes())?;
        entered.hosts = hosts.iter().map(|host| String::from_utf8_lossy(host).into_owned()).collect();
        entered.timeout = config.timeout;
        Ok(entered)
    }

    /// Waits for a collective until the deadline, and does not return after it.
    fn wait<'a, D: ?Sized, S: Scope<'a>>(&self, what: &str, deadline: Duration, mut request: Request<'a, D, S>) {
        let begun = Instant::now();
        loop {
            request = match request.test() {
                Ok(_) => return,
                Err(unfinished) => unfinished,
            };
            let waited = begun.elapsed();
            if waited > deadline || self.roll_is_called() {
                self.call_the_roll(what, waited);
            }
            pause(waited);
        }
    }

    fn roll_is_called(&self) -> bool {
        self.world.any_process().immediate_probe_with_tag(ROLL_CALL).is_some()
    }

    /// Tells the others that this rank is alive and still waits, collects the ranks that say the same, and ends the
    /// job. A dead, hung or busy rank does not answer.
    fn call_the_roll(&self, what: &str, waited: Duration) -> ! {
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            let here: &'static [u8] = &[];
            let other = self.world.process_at_rank(rank as i32);
            // Never waited for: a rank that does not receive it is the one that is missing.
            mem::forget(other.immediate_send_with_tag(StaticScope, here, ROLL_CALL));
        }
        let mut silent: Vec<usize> = (0..self.size).filter(|&rank| rank != self.rank).collect();
        let begun = Instant::now();
        while begun.elapsed() < ROLL_TIME && !silent.is_empty() {
            while let Some(status) = self.world.any_process().immediate_probe_with_tag(ROLL_CALL) {
                let source = status.source_rank();
                self.world.process_at_rank(source).receive_vec_with_tag::<u8>(ROLL_CALL);
                silent.retain(|&rank| rank != source as usize);
            }
            thread::sleep(Duration::from_millis(1));
        }
        let names: Vec<String> = silent.iter().map(|&rank| self.name_of(rank)).collect();
        let missing =
            if names.is_empty() { "every rank waits".into() } else { format!("no word from {}", names.join(", ")) };
        let line = format!("{} waited {:.0} s for {what}: {missing}", self.name_of(self.rank), waited.as_secs_f64());
        tracing::error!("{line}");
        // The first abort ends all ranks: give the others time to report the same.
        thread::sleep(Duration::from_millis(300));
        self.world.abort(PEER_LOST.into())
    }

    /// Replaces the numbers `part` of `bucket` by their mean over the ranks. `reduce` gets the whole bucket, and writes
    /// the sums of that part.
    fn mean<'a>(
        &self,
        bucket: Tensor<1>,
        part: Range<usize>,
        reduce: impl FnOnce(&[f32], &mut [f32]),
    ) -> Result<Pending<'a>> {
        let device = bucket.device();
        let mut own = numbers(bucket)?;
        let mut sums = self.sums.borrow_mut();
        if sums.len() < part.len() {
            sums.resize(part.len(), 0.0);
        }
        let sums = &mut sums[..part.len()];
        reduce(&own, sums);
        let share = (1.0 / self.size as f64) as f32;
        own[part].iter_mut().zip(sums).for_each(|(mean, sum)| *mean = *sum * share);
        ready(from_numbers(own, &device))
    }
}

/// Pauses between two tests of a request: yields for waits of microseconds, sleeps for longer ones to leave the core to
/// its neighbours.
fn pause(waited: Duration) {
    if waited < Duration::from_millis(2) { thread::yield_now() } else { thread::sleep(Duration::from_micros(50)) }
}

fn numbers(tensor: Tensor<1>) -> Result<Vec<f32>> {
    tensor.into_data().try_into_vec().map_err(|error| Error::Fault(format!("a bucket is not f32: {error:?}")))
}

fn ready<'a>(tensor: Tensor<1>) -> Result<Pending<'a>> {
    Ok(Box::new(|| Ok(tensor)))
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn hosts(&self) -> &[String] {
        &self.hosts
    }

    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        let all = 0..bucket.dims()[0];
        self.mean(bucket, all, |own, sums| {
            mpi::request::scope(|scope| {
                let request = self.world.immediate_all_reduce_into(scope, own, sums, SystemOperation::sum());
                self.wait(what, self.timeout, request);
            });
        })
    }

    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        let length = bucket.dims()[0] / self.size;
        self.mean(bucket, self.rank * length..(self.rank + 1) * length, |own, sums| {
            mpi::request::scope(|scope| {
                let sum = SystemOperation::sum();
                let request = self.world.immediate_reduce_scatter_block_into(scope, own, sums, sum);
                self.wait(what, self.timeout, request);
            });
        })
    }

    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        let device = part.device();
        let own = numbers(part)?;
        let mut all = vec![0_f32; own.len() * self.size];
        mpi::request::scope(|scope| {
            self.wait(what, self.timeout, self.world.immediate_all_gather_into(scope, &own[..], &mut all[..]));
        });
        ready(from_numbers(all, &device))
    }

    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>> {
        let device = tensor.device();
        let mut shared = numbers(tensor)?;
        mpi::request::scope(|scope| {
            let request = self.world.process_at_rank(0).immediate_broadcast_into(scope, &mut shared[..]);
            self.wait(what, self.timeout, request);
        });
        ready(from_numbers(shared, &device))
    }

    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        let length = [note.len() as u64];
        let mut lengths = vec![0_u64; self.size];
        mpi::request::scope(|scope| {
            self.wait(what, self.timeout, self.world.immediate_all_gather_into(scope, &length[..], &mut lengths[..]));
        });
        // An all-gather needs parts of equal length: that of the longest note.
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if longest == 0 {
            return Ok(vec![Vec::new(); self.size]);
        }
        let mut own = note.to_vec();
        own.resize(longest, 0);
        let mut all = vec![0_u8; longest * self.size];
        mpi::request::scope(|scope| {
            self.wait(what, self.timeout, self.world.immediate_all_gather_into(scope, &own[..], &mut all[..]));
        });
        let part = |rank: usize| all[rank * longest..][..lengths[rank] as usize].to_vec();
        Ok((0..self.size).map(part).collect())
    }

    fn barrier(&self, what: &str, deadline: Duration) -> Result<()> {
        self.wait(what, deadline, self.world.immediate_barrier());
        Ok(())
    }

    fn leave(&self) {
        if let Some(universe) = self.universe.take() {
            drop(ManuallyDrop::into_inner(universe));
        }
    }
}

fn from_numbers(numbers: Vec<f32>, device: &burn::tensor::Device) -> Tensor<1> {
    let length = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [length]), device)
}
