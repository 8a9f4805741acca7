//! Ranks on GPUs: NCCL on the tensors' own device memory, one process per GPU.
//!
//! The ranks meet over TCP ([`Rendezvous`]), which carries the NCCL id and all small notes. Buckets go over NCCL on a stream of
//! their own, so that one is on the wire while the next is packed. This module holds all the unsafe code of the crate: each
//! block hands memory or a communicator that it owns to NCCL.

use std::fmt::Debug;
use std::fs;
use std::mem;
use std::process;
use std::ptr;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use burn::backend::Cube;
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};
use cudarc::nccl::result;
use cudarc::nccl::sys::{self, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use super::{Collective, JoinConfig, Meeting, PEER_LOST, Pending, Placement, Rendezvous};
use crate::error::{Error, Result};

/// How long ranks that wait in vain listen for who else is alive.
const ROLL_TIME: Duration = Duration::from_secs(5);

/// The world of GPU ranks.
pub(super) struct Nccl {
    rendezvous: Rendezvous,
    rank: usize,
    size: usize,
    timeout: Duration,
    communicator: ncclComm_t,
    /// The communicator's own.
    stream: Arc<CudaStream>,
}

/// A collective that NCCL works on. Its memory must stay until the event has come: given up before, it is never freed.
struct InFlight {
    done: CudaEvent,
    memory: Option<[DeviceMemory; 2]>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !matches!(self.done.try_is_complete(), Ok(true)) {
            mem::forget(self.memory.take());
        }
    }
}

/// Memory of a tensor on the GPU, held in its place.
struct DeviceMemory {
    pointer: *mut std::ffi::c_void,
    dtype: ncclDataType_t,
    /// Keeps the memory from being reused.
    _tensor: CubeTensor,
}

impl Nccl {
    /// Meets the other ranks at `MASTER_ADDR`, one port above `MASTER_PORT`, and opens the communicator on `device`.
    ///
    /// # Errors
    /// Input without an address to meet at, a token across machines, or NCCL, and for two ranks on one GPU; Peer when not all ranks come.
    pub(super) fn start(placement: &Placement, device: &Device, config: &JoinConfig) -> Result<Self> {
        let Some((host, port)) = &placement.master else {
            return Err(Error::input(
                format!("{} started {} ranks", placement.launcher, placement.world_size),
                "MASTER_ADDR and MASTER_PORT are not set: GPU ranks meet there",
                "export MASTER_ADDR (the machine of rank 0) and MASTER_PORT (a free port on it, the one after it free too)",
            ));
        };
        #[expect(unsafe_code, reason = "asks the dynamic loader for NCCL")]
        // SAFETY: only loads the library; nothing of it is called.
        let found = unsafe { sys::is_culib_present() };
        if !found {
            return Err(Error::input(
                "libnccl.so",
                "NCCL is not found, which several GPUs need",
                "install NCCL 2.30 or later and put the folder of libnccl.so into LD_LIBRARY_PATH (a plain libnccl.so.2 wants a link of that name)",
            ));
        }
        let token = placement.token(|name| std::env::var(name).ok())?;
        let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let (rank, world_size) = (placement.rank, placement.world_size);
        let meeting = Meeting { rank, world_size, address: (host, port + 1), token: &token, host: name.trim() };
        let rendezvous = Rendezvous::meet(&meeting, config.start_timeout, config.timeout)?;
        let gpu = gpu_of(device)?;
        refuse_shared_gpus(&rendezvous, gpu)?;
        let context = CudaContext::new(gpu).map_err(|problem| broken("the GPU cannot be opened", &problem))?;
        let stream = context.new_stream().map_err(|problem| broken("the GPU gives no stream", &problem))?;
        let communicator = open(&rendezvous, rank, world_size, config.start_timeout)?;
        Ok(Self { rendezvous, rank, size: world_size, timeout: config.timeout, communicator, stream })
    }

    /// Starts `launch` on the memory of `input` and of `output` (the same, where it works in place), which [`Pending`] gives once
    /// it is filled.
    fn begin<'a>(
        &'a self,
        what: &'a str,
        input: Tensor<1>,
        output: Tensor<1>,
        launch: impl FnOnce(&DeviceMemory, &DeviceMemory) -> std::result::Result<result::NcclStatus, result::NcclError>,
    ) -> Result<Pending<'a>> {
        let device = input.device();
        let (from, to) = (DeviceMemory::of(input)?, DeviceMemory::of(output.clone())?);
        // What fills the input runs on a stream of the tensor library: NCCL's own stream must not begin before it is done.
        device.sync().map_err(|problem| broken("the GPU failed", &problem))?;
        // NCCL may connect GPUs only when they are first used, within this call.
        let watch = self.watch(what);
        launch(&from, &to).map_err(|problem| broken("NCCL failed", &problem.0))?;
        drop(watch);
        let done = self.stream.record_event(None).map_err(|problem| broken("the GPU failed", &problem))?;
        let in_flight = InFlight { done, memory: Some([from, to]) };
        Ok(Box::new(move || {
            self.wait(what, &in_flight)?;
            Ok(output)
        }))
    }

    /// Guards a call of NCCL that other ranks can hold up: it has no deadline of its own, and cannot be given up.
    fn watch(&self, what: &str) -> Watchdog {
        let (waiter, seconds) = (self.name_of(self.rank), self.timeout.as_secs());
        Watchdog::new(
            self.timeout,
            format!("{waiter} waited {seconds} s for NCCL to begin {what}: a rank is dead or hangs"),
        )
    }

    fn wait(&self, what: &str, in_flight: &InFlight) -> Result<()> {
        let begun = Instant::now();
        while !in_flight.done.try_is_complete().map_err(|problem| broken("the GPU failed", &problem))? {
            let failed = self.asynchronous_error();
            if failed.is_some() || begun.elapsed() > self.timeout {
                return Err(self.call_the_roll(what, begun.elapsed(), failed));
            }
            thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// What NCCL says of its connections, which the stream does not.
    fn asynchronous_error(&self) -> Option<sys::ncclResult_t> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        #[expect(unsafe_code, reason = "reads the communicator's state")]
        // SAFETY: the communicator is open until `leave`, and `state` outlives the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.communicator, &raw mut state) };
        let well = [sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress];
        [asked, state].into_iter().find(|code| !well.contains(code))
    }

    /// Why a collective did not end: whoever is alive waits as well and answers over TCP.
    fn call_the_roll(&self, what: &str, waited: Duration, failed: Option<sys::ncclResult_t>) -> Error {
        let waited = waited.as_secs();
        let reason = failed.map_or_else(|| format!("no end after {waited} s"), |code| format!("{code:?}"));
        match self.rendezvous.exchange_within("the roll call", &[], ROLL_TIME) {
            Ok(_) => Error::Peer(format!("waiting for {what}: NCCL: {reason}; every rank answers")),
            Err(error) => Error::Peer(format!("waiting for {what}: NCCL: {reason}; {error}")),
        }
    }
}

/// Opens the communicator under the id that rank 0 makes.
fn open(rendezvous: &Rendezvous, rank: usize, size: usize, deadline: Duration) -> Result<ncclComm_t> {
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
    // The call has no deadline of its own, and cannot be given up.
    let watch =
        Watchdog::new(deadline, format!("rank {rank} waited {} s for NCCL to connect all GPUs", deadline.as_secs()));
    #[expect(unsafe_code, reason = "NCCL makes a communicator")]
    // SAFETY: the id is rank 0's, `communicator` outlives the call, rank and size are those of the world.
    let opened = unsafe { result::comm_init_rank(&raw mut communicator, size as i32, id, rank as i32) };
    drop(watch);
    opened.map_err(|problem| broken("NCCL cannot connect the GPUs (NCCL_DEBUG=INFO tells more)", &problem.0))?;
    Ok(communicator)
}

/// Ends the process with a line unless it is dropped in time.
struct Watchdog {
    _alive: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn new(deadline: Duration, line: String) -> Self {
        let (alive, watched) = channel();
        thread::spawn(move || {
            if watched.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
                tracing::error!("{line}");
                process::exit(PEER_LOST);
            }
        });
        Self { _alive: alive }
    }
}

/// The number of the GPU that tensors of `device` live on.
fn gpu_of(device: &Device) -> Result<usize> {
    match cube_tensor(Tensor::<1>::zeros([1], device))?.device {
        CubeDevice::Cuda(cuda) => Ok(cuda.index),
        other => Err(Error::Fault(format!("NCCL needs a CUDA device, not {other:?}"))),
    }
}

/// NCCL refuses two ranks on one GPU with a riddle.
fn refuse_shared_gpus(rendezvous: &Rendezvous, gpu: usize) -> Result<()> {
    let gpus = rendezvous.exchange("all ranks to name their GPUs", gpu.to_string().as_bytes())?;
    let places: Vec<_> = rendezvous.hosts().iter().zip(&gpus).collect();
    match (0..places.len()).find(|&rank| places[..rank].contains(&places[rank])) {
        Some(rank) => Err(Error::input(
            format!("rank {rank} ({})", places[rank].0),
            "its GPU is used by another rank too",
            "start one rank per GPU, with --device cuda: each takes the GPU of its local rank",
        )),
        None => Ok(()),
    }
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
        let resource = tensor.client.get_resource::<<CudaRuntime as Runtime>::Server>(tensor.handle.clone());
        let resource = resource.map_err(|problem| broken("a bucket has no memory on the GPU", &problem))?;
        let pointer = ptr::without_provenance_mut(resource.resource().ptr as usize);
        Ok(Self { pointer, dtype, _tensor: tensor })
    }

    /// Where its number `index` lies.
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
        self.begin(what, bucket.clone(), bucket, |from, to| {
            let (stream, mean) = (self.stream.cu_stream().cast(), ncclRedOp_t::ncclAvg);
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `length` numbers of the type and lives until the event that follows on the stream.
            unsafe {
                result::all_reduce(from.pointer, to.pointer, length, from.dtype, mean, self.communicator, stream)
            }
        })
    }

    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        let part = bucket.dims()[0] / self.size;
        self.begin(what, bucket.clone(), bucket, |from, to| {
            let own = to.at(self.rank * part);
            let (stream, mean) = (self.stream.cu_stream().cast(), ncclRedOp_t::ncclAvg);
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `size * part` numbers of the type, at `own` begins the rank's part; it lives until the event.
            unsafe {
                result::reduce_scatter(from.pointer, own, part, from.dtype, mean, self.communicator, stream)
            }
        })
    }

    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        let length = part.dims()[0];
        let all = Tensor::zeros([length * self.size], (&part.device(), part.dtype()));
        self.begin(what, part, all, |from, to| {
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
        self.begin(what, tensor.clone(), tensor, |from, to| {
            let stream = self.stream.cu_stream().cast();
            #[expect(unsafe_code, reason = "NCCL reads and writes device memory")]
            // SAFETY: the buffer holds `length` numbers of the type and lives until the event that follows on the stream.
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
        // SAFETY: the last use of the communicator; every collective on it was waited for.
        let left = unsafe { result::comm_destroy(self.communicator) };
        if let Err(problem) = left {
            tracing::debug!("NCCL: {:?}", problem.0);
        }
    }
}
