//! Ranks on GPUs: NCCL on the tensors' own device memory, one process per GPU.
//!
//! The ranks meet over TCP ([`Rendezvous`]), which carries the NCCL id and all small notes. Buckets go over NCCL on a
//! separate stream, so that one is on the wire while the next is prepared. NCCL has no deadlines: a rank that waits for
//! it also watches the TCP connections for lost ranks, and a [`Watchdog`] ends the process if a call does not return.
//! This module contains all the unsafe code of the crate: each block hands memory or a communicator that it owns to
//! NCCL.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{mem, ptr, thread};

use burn::backend::Cube;
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use cubecl_runtime::server::ServerStorage;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};
use cudarc::nccl::result;
use cudarc::nccl::sys::{self, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use hyperlora_core::{Error, Result};

use super::watchdog::{Watch, Watchdog};
use super::{Collective, JoinConfig, Meeting, PEER_LOST, Pending, Placement, Rendezvous, end_process, host_name};

/// Extra time of the watchdog beyond the rank's own deadline, so that the roll call can name the missing rank.
const GRACE: Duration = Duration::from_secs(30);
/// Interval at which a waiting rank checks its connections.
const GLANCE: Duration = Duration::from_millis(10);
/// Oldest supported NCCL, as its version function encodes it: 2.10 added averages.
const OLDEST_NCCL: i32 = 21_000;
/// Lengths of the buckets that connect the GPUs, in numbers: a short one, and one as long as in training.
const WARM_UP: [usize; 2] = [1, 4 << 20];

/// World of GPU ranks.
pub(super) struct Nccl {
    rendezvous: Rendezvous,
    rank: usize,
    size: usize,
    timeout: Duration,
    communicator: ncclComm_t,
    /// Stream of the communicator.
    stream: Arc<CudaStream>,
    watchdog: Watchdog,
}

/// Collective that NCCL is working on. Its memory must live until the event completes: dropped before, it is leaked. So
/// is the watch, because with NCCL at work the GPU may block anything else in the process, including its exit.
struct InFlight {
    done: CudaEvent,
    memory: Option<[DeviceMemory; 2]>,
    watch: Option<Watch>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !matches!(self.done.try_is_complete(), Ok(true)) {
            mem::forget((self.memory.take(), self.watch.take()));
        }
    }
}

/// GPU memory of a tensor, pinned in its place.
struct DeviceMemory {
    pointer: *mut std::ffi::c_void,
    dtype: ncclDataType_t,
    /// Keeps the memory from being reused.
    _tensor: CubeTensor,
    /// Keeps the memory from being moved.
    _resource: ManagedResource<<<Server as ServerStorage>::Storage as ComputeStorage>::Resource>,
}

type Server = <CudaRuntime as Runtime>::Server;

impl Nccl {
    /// Meets the other ranks at `MASTER_ADDR`, one port above `MASTER_PORT`, and opens the communicator on `device`.
    ///
    /// # Errors
    /// Input: there is no address to meet at, no token across machines or no NCCL, or two ranks share a GPU. Peer: not
    /// all ranks come.
    pub(super) fn start(placement: &Placement, device: &Device, config: &JoinConfig) -> Result<Self> {
        let Some((host, port)) = &placement.master else {
            return Err(Error::input(
                format!("{} started {} ranks", placement.launcher, placement.world_size),
                "MASTER_ADDR and MASTER_PORT are not set: GPU ranks meet there",
                "export MASTER_ADDR (the machine of rank 0) and MASTER_PORT (a free port on it, the one after it free too)",
            ));
        };
        find_nccl()?;
        let token = placement.token(|name| std::env::var(name).ok())?;
        let host_name = host_name();
        let Placement { rank, world_size, one_machine, .. } = *placement;
        let address = (host.as_str(), port + 1);
        let meeting = Meeting { rank, world_size, address, one_machine, token: &token, host: &host_name };
        let rendezvous = Rendezvous::meet(&meeting, config.start_timeout, config.timeout)?;
        let context =
            CudaContext::new(gpu_of(device)?).map_err(|problem| broken("the GPU cannot be opened", &problem))?;
        refuse_shared_gpus(&rendezvous, &context)?;
        let stream = context.new_stream().map_err(|problem| broken("the GPU gives no stream", &problem))?;
        let watchdog = Watchdog::start(|line| {
            tracing::error!("{line}");
            end_process(PEER_LOST)
        });
        let communicator = open(&rendezvous, rank, world_size, &watchdog, config.start_timeout)?;
        let mut world =
            Self { rendezvous, rank, size: world_size, timeout: config.start_timeout, communicator, stream, watchdog };
        world.warm_up(device)?;
        world.timeout = config.timeout;
        Ok(world)
    }

    /// Runs every collective of the training once. NCCL connects GPUs only on first use, which takes time, and memory
    /// that the tensor library would otherwise have claimed for itself.
    fn warm_up(&self, device: &Device) -> Result<()> {
        let what = "NCCL to connect all GPUs";
        for length in WARM_UP {
            let part = length.div_ceil(self.size);
            let zeros = |length| Tensor::zeros([length], (device, DType::F32));
            self.all_reduce_mean(what, zeros(self.size * part))?()?;
            self.reduce_scatter_mean(what, zeros(self.size * part))?()?;
            self.all_gather(what, zeros(part))?()?;
        }
        Ok(())
    }

    /// Starts `launch` on the memory of `input` and of `output` (the input itself for a collective in place). The
    /// returned [`Pending`] waits for the output.
    fn begin<'a>(
        &'a self,
        what: &'a str,
        input: Tensor<1>,
        output: Option<Tensor<1>>,
        launch: impl FnOnce(&DeviceMemory, &DeviceMemory) -> std::result::Result<result::NcclStatus, result::NcclError>,
    ) -> Result<Pending<'a>> {
        let device = input.device();
        let input = gapless(input)?;
        let output = output.unwrap_or_else(|| input.clone());
        let (from, to) = (DeviceMemory::of(input)?, DeviceMemory::of(output.clone())?);
        // The kernels that fill the input run on a stream of the tensor library: NCCL's stream must not start before
        // they are done. Only the previous collective could delay this, and it is watched.
        device.sync().map_err(|problem| broken("the GPU failed", &problem))?;
        let watch = Some(self.watch(what));
        launch(&from, &to).map_err(|problem| broken("NCCL failed", &problem.0))?;
        let done = self.stream.record_event(None).map_err(|problem| broken("the GPU failed", &problem))?;
        let mut in_flight = InFlight { done, memory: Some([from, to]), watch };
        Ok(Box::new(move || {
            self.wait(what, &mut in_flight)?;
            Ok(output)
        }))
    }

    /// Guards a wait for NCCL, which cannot be cancelled, and the GPU work that an abandoned wait leaves behind.
    fn watch(&self, what: &str) -> Watch {
        let deadline = self.timeout + GRACE;
        let (waiter, seconds) = (self.name_of(self.rank), deadline.as_secs());
        self.watchdog.watch(deadline, format!("{waiter} waited {seconds} s for {what}: NCCL does not come back"))
    }

    fn wait(&self, what: &str, in_flight: &mut InFlight) -> Result<()> {
        let begun = Instant::now();
        let mut looked = begun;
        // From here on this rank only waits: the deadline starts again.
        in_flight.watch = Some(self.watch(what));
        while !in_flight.done.try_is_complete().map_err(|problem| broken("the GPU failed", &problem))? {
            let mut called = false;
            if looked.elapsed() > GLANCE {
                called = self.rendezvous.glance(what)?;
                looked = Instant::now();
            }
            let failed = self.asynchronous_error();
            if called || failed.is_some() || begun.elapsed() > self.timeout {
                let waited = begun.elapsed().as_secs();
                let reason = failed.map_or_else(|| format!("no end after {waited} s"), |code| format!("{code:?}"));
                tracing::warn!("{} waits for {what}: NCCL: {reason}; the roll is called", self.name_of(self.rank));
                return Err(self.rendezvous.call_the_roll(&format!("waiting for {what}: NCCL: {reason}")));
            }
            thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Returns NCCL's error about its connections, which the stream does not report.
    fn asynchronous_error(&self) -> Option<sys::ncclResult_t> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        #[expect(unsafe_code, reason = "reads the communicator's state")]
        // SAFETY: the communicator is open until `leave`, and `state` outlives the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.communicator, &raw mut state) };
        let well = [sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress];
        [asked, state].into_iter().find(|code| !well.contains(code))
    }
}

/// Finds the library, before any of its functions is called.
///
/// # Errors
/// Input: it is not found, or too old.
fn find_nccl() -> Result<()> {
    let missing = |problem: String| {
        let remedy = "install NCCL 2.10 or later for this version of CUDA (Debian and Ubuntu: libnccl-dev); where there is only libnccl.so.2, `ln -s /path/to/libnccl.so.2 libnccl.so` in a folder of LD_LIBRARY_PATH";
        Err(Error::input("libnccl.so", problem, remedy))
    };
    #[expect(unsafe_code, reason = "asks the dynamic loader for NCCL")]
    // SAFETY: only loads the library and calls none of its functions.
    let found = unsafe { sys::is_culib_present() };
    if !found {
        return missing("is not found, and several GPUs need NCCL".into());
    }
    let version = result::get_nccl_version().map_err(|problem| broken("NCCL reports no version", &problem.0))?;
    if version < OLDEST_NCCL {
        return missing(format!("is of version {version}, which cannot average"));
    }
    tracing::debug!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
    Ok(())
}

/// Opens the communicator with the id that rank 0 makes.
fn open(
    rendezvous: &Rendezvous,
    rank: usize,
    size: usize,
    watchdog: &Watchdog,
    deadline: Duration,
) -> Result<ncclComm_t> {
    let own = if rank == 0 {
        let id = result::get_uniqueid().map_err(|problem| broken("NCCL gives no id", &problem.0))?;
        id.internal.map(|byte| byte as u8).to_vec()
    } else {
        Vec::new()
    };
    let notes = rendezvous.exchange("rank 0 to make the NCCL id", &own)?;
    let id: Option<[u8; 128]> = notes.first().and_then(|id| id.as_slice().try_into().ok());
    let Some(id) = id else { return Err(Error::Fault("rank 0 sent no NCCL id".into())) };
    let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
    let mut communicator = ptr::null_mut();
    // The call has no deadline of its own, and cannot be cancelled.
    let line = format!("rank {rank} waited {} s for NCCL to open its communicator", deadline.as_secs());
    let watch = watchdog.watch(deadline, line);
    #[expect(unsafe_code, reason = "NCCL makes a communicator")]
    // SAFETY: the id is rank 0's, `communicator` outlives the call, rank and size are those of the world.
    let opened = unsafe { result::comm_init_rank(&raw mut communicator, size as i32, id, rank as i32) };
    drop(watch);
    opened.map_err(|problem| broken("NCCL cannot connect the GPUs (NCCL_DEBUG=INFO tells more)", &problem.0))?;
    Ok(communicator)
}

/// Returns the number of the GPU that holds the tensors of `device`.
fn gpu_of(device: &Device) -> Result<usize> {
    match cube_tensor(Tensor::<1>::zeros([1], device))?.device {
        CubeDevice::Cuda(cuda) => Ok(cuda.index),
        other => Err(Error::Fault(format!("NCCL needs a CUDA device, not {other:?}"))),
    }
}

/// Refuses two ranks on one GPU, which NCCL reports in cryptic words. Compares UUIDs, because a rank numbers only the
/// GPUs that are visible to it.
fn refuse_shared_gpus(rendezvous: &Rendezvous, context: &CudaContext) -> Result<()> {
    let uuid = context.uuid().map_err(|problem| broken("the GPU reports no UUID", &problem))?;
    let gpus = rendezvous.exchange("all ranks to name their GPUs", &uuid.bytes.map(|byte| byte as u8))?;
    match (0..gpus.len()).find(|&rank| gpus[..rank].contains(&gpus[rank])) {
        Some(rank) => Err(Error::input(
            format!("rank {rank} ({})", rendezvous.hosts()[rank]),
            "its GPU is used by another rank too",
            "start one rank per GPU, with --device cuda: each takes the GPU of its local rank, or the only one it sees",
        )),
        None => Ok(()),
    }
}

/// Returns the tensor, or a contiguous copy if it has gaps in memory: one that is expanded from a single number has no
/// memory of its own.
fn gapless(tensor: Tensor<1>) -> Result<Tensor<1>> {
    let contiguous = cube_tensor(tensor.clone())?.is_contiguous();
    Ok(if contiguous { tensor } else { tensor.mul_scalar(1.0) })
}

fn cube_tensor(tensor: Tensor<1>) -> Result<CubeTensor> {
    let fused =
        tensor.try_into_primitive::<Cube>().map_err(|problem| broken("a tensor is not on the GPU", &problem))?;
    let client = fused.client.clone();
    Ok(client.resolve_tensor_float::<CubeBackend>(fused))
}

impl DeviceMemory {
    fn of(tensor: Tensor<1>) -> Result<Self> {
        let dtype = match tensor.dtype() {
            DType::F32 => ncclDataType_t::ncclFloat32,
            DType::BF16 => ncclDataType_t::ncclBfloat16,
            other => return Err(Error::Fault(format!("a bucket of {other:?} cannot be sent"))),
        };
        let tensor = cube_tensor(tensor)?;
        if !tensor.is_contiguous() {
            return Err(Error::Fault("a bucket has gaps in memory".into()));
        }
        let resource = tensor.client.get_resource::<Server>(tensor.handle.clone());
        let resource = resource.map_err(|problem| broken("a bucket has no memory on the GPU", &problem))?;
        let pointer = ptr::without_provenance_mut(resource.resource().ptr as usize);
        Ok(Self { pointer, dtype, _tensor: tensor, _resource: resource })
    }

    /// Returns the address of its number `index`.
    fn at(&self, index: usize) -> *mut std::ffi::c_void {
        let size = if self.dtype == ncclDataType_t::ncclBfloat16 { 2 } else { 4 };
        self.pointer.wrapping_byte_add(index * size)
    }
}

fn broken(what: &str, problem: &dyn Debug) -> Error {
    Error::Fault(format!("{what}: {problem:?}"))
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn hosts(&self) -> &[String] {
        self.rendezvous.hosts()
    }

    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        let length = bucket.dims()[0];
        self.begin(what, bucket, None, |from, to| {
            let (stream, mean) = (self.stream.cu_stream().cast(), ncclRedOp_t::ncclAvg);
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `length` numbers of the type and lives until the event that follows on the
            // stream.
            unsafe {
                result::all_reduce(from.pointer, to.pointer, length, from.dtype, mean, self.communicator, stream)
            }
        })
    }

    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        let part = bucket.dims()[0] / self.size;
        self.begin(what, bucket, None, |from, to| {
            let own = to.at(self.rank * part);
            let (stream, mean) = (self.stream.cu_stream().cast(), ncclRedOp_t::ncclAvg);
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `size * part` numbers of the type, the rank's part begins at `own`, and it lives
            // until the event.
            unsafe {
                result::reduce_scatter(from.pointer, own, part, from.dtype, mean, self.communicator, stream)
            }
        })
    }

    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        let length = part.dims()[0];
        let all = Tensor::empty([length * self.size], (&part.device(), part.dtype()));
        self.begin(what, part, Some(all), |from, to| {
            let stream = self.stream.cu_stream().cast();
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: `from` holds `length` numbers of the type, `to` holds `size * length`; both live until the event.
            unsafe {
                result::all_gather(from.pointer, to.pointer, length, from.dtype, self.communicator, stream)
            }
        })
    }

    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>> {
        let length = tensor.dims()[0];
        self.begin(what, tensor, None, |from, to| {
            let stream = self.stream.cu_stream().cast();
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `length` numbers of the type and lives until the event that follows on the
            // stream.
            unsafe {
                result::broadcast(from.pointer, to.pointer, length, from.dtype, 0, self.communicator, stream)
            }
        })
    }

    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.rendezvous.exchange(what, note)
    }

    fn barrier(&self, what: &str, deadline: Duration) -> Result<()> {
        self.rendezvous.exchange_within(what, &[], deadline).map(|_| ())
    }

    fn leave(&self) {
        let _watch = self.watch("the end of the run");
        #[expect(unsafe_code, reason = "NCCL frees its communicator")]
        // SAFETY: this is the last use of the communicator, and every collective on it was waited for.
        let left = unsafe { result::comm_destroy(self.communicator) };
        if let Err(problem) = left {
            tracing::debug!("NCCL: {:?}", problem.0);
        }
    }
}

#[cfg(test)]
mod tests;
