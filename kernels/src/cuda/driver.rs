//! A GPU through its driver: the [`Device`] that serves.
//!
//! Calls go to the driver's own functions ([`library`](super::library)), so that every error is here and none is a panic.
//!
//! **Memory** is plain `cuMemAlloc`, not the stream-ordered allocator: there are few allocations, nearly all made at the start and
//! kept, and the driver's count of free memory then says exactly what is left to size the pool of pages with; a pool of the
//! allocator's would hold some back. Giving memory back waits for both streams.
//!
//! **Writes** copy the caller's bytes into a ring of pinned memory, one for each stream, and return; a ring that is full waits
//! for its oldest copy. **Reads** wait for the stream by their nature, or, where the caller brings pinned memory for them, come while
//! it does something else.
//!
//! **A lost device** stays lost. After an error that leaves the context unusable (an illegal address, an ECC error, a GPU that fell
//! off the bus) every later call returns that first error at once, so that the server stops serving instead of answering from
//! memory that nobody computed. Errors not known to be harmless count as such.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use cudarc::driver::sys as cu;

pub use super::blas::Products;
use super::blas::{Blas, WORKSPACE_BYTES};
use super::compile::{Compiler, Job, Progress};
pub use super::context::CudaEvent;
use super::context::{Kernel, Pinned, Shared, Taken, locked};
use super::device::{Address, Device, Gemm, Launch, Properties, Stream};
pub use super::landing::CudaLanding;
use super::library::{CublasLt, Cuda, Places};
use super::staging::Ring;
use crate::KernelError;

/// Pinned memory that writes of one stream go through.
const RING_BYTES: usize = 16 << 20;
/// Pinned memory that reads of one stream go through.
const READ_BYTES: usize = 4 << 20;

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its number, as the driver counts (`CUDA_VISIBLE_DEVICES` included).
    pub ordinal: u32,
    /// How matrix products choose their algorithms.
    pub products: Products,
    /// Where libraries are looked for.
    pub places: Places,
    /// Where compiled kernels are kept.
    pub cache: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ordinal: 0,
            products: Products::default(),
            places: Places::from_environment(),
            cache: super::compile::cache_folder(),
        }
    }
}

/// A GPU.
#[derive(Debug)]
pub struct Driver {
    properties: Properties,
    kernels: HashMap<String, Kernel>,
    blas: Blas,
    /// Of matrix products.
    workspace: Taken,
    /// Compute and Copy.
    lanes: [Lane; 2],
    /// Last: what is above needs the context.
    shared: Arc<Shared>,
}

/// A stream's pinned memory.
#[derive(Debug)]
struct Lane {
    writes: Mutex<(Ring<CudaEvent>, Pinned)>,
    reads: Mutex<Pinned>,
}

// SAFETY: handles of the driver may be used from any thread that has made the context current, which every call does first; what
// of this is changed is behind mutexes.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// A recorded sequence of launches.
pub struct CudaGraph {
    handle: cu::CUgraphExec,
    shared: Arc<Shared>,
}

// SAFETY: as for [`Driver`].
unsafe impl Send for CudaGraph {}

impl fmt::Debug for CudaGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaGraph({:?} of {})", self.handle, self.shared.name)
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        let shared = &self.shared;
        let recording = locked(&shared.recording);
        // While something records nothing may wait: the graph then stays until the context goes, which costs little memory.
        if recording.thread.is_none()
            && shared.enter("giving a graph back").is_ok()
            && shared.wait_for(Stream::Compute).is_ok()
        {
            // SAFETY: it does not run any more and is not used again.
            unsafe { (shared.cuda.cuGraphExecDestroy)(self.handle) };
        }
    }
}

impl Driver {
    /// Opens a device: loads the libraries, compiles the kernels or takes them from the cache, loads them.
    ///
    /// # Errors
    /// What is missing, by name and with what helps; or what the driver says.
    pub fn open(
        options: &Options,
        job: &Job<'_>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Arc<Self>, KernelError> {
        let cuda = Cuda::load(&options.places, None)?;
        let (shared, version) = Shared::open(cuda, options.ordinal)?;
        let properties = shared.properties()?;
        let compiler = Compiler::new(&options.places, Some(version.0), options.cache.clone())?;
        let images = compiler.compile(&compiler.target(properties.compute)?, job, progress)?;
        let library = CublasLt::load(&options.places, Some(version.0))?;

        shared.enter("opening")?;
        let mut kernels = HashMap::new();
        for image in &images {
            shared.load(image, properties.shared_bytes_max, &mut kernels)?;
        }
        let blas = Blas::new(Arc::clone(&shared), library, options.products)?;
        let workspace = shared.allocate("workspace of matrix products", WORKSPACE_BYTES)?;
        let workspace = Taken { address: workspace, shared: Arc::clone(&shared) };
        let lanes = [Lane::new(&shared)?, Lane::new(&shared)?];
        Ok(Arc::new(Self { properties, kernels, blas, workspace, lanes, shared }))
    }

    /// Names of the kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    fn lane(&self, stream: Stream) -> &Lane {
        &self.lanes[stream as usize]
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.shared.enter("closing").is_ok() {
            let _ = self.shared.wait_for(Stream::Compute).and_then(|()| self.shared.wait_for(Stream::Copy));
        }
        // Nothing reads pinned memory any more, or the device is lost and keeps it.
        for lane in &self.lanes {
            locked(&lane.writes).0.drain().for_each(drop);
        }
    }
}

impl Lane {
    fn new(shared: &Arc<Shared>) -> Result<Self, KernelError> {
        Ok(Self {
            writes: Mutex::new((Ring::new(RING_BYTES), Pinned::new(shared, RING_BYTES)?)),
            reads: Mutex::new(Pinned::new(shared, READ_BYTES)?),
        })
    }
}

/// While it lives this thread may do what a recording forbids by default: cuBLASLt loads its kernels when they are first used.
struct Relaxed<'a>(Option<(&'a Shared, cu::CUstreamCaptureMode)>);

impl<'a> Relaxed<'a> {
    fn new(shared: &'a Shared) -> Result<Self, KernelError> {
        if !shared.records() {
            return Ok(Self(None));
        }
        let mut mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a place that holds a mode and gets the one before it.
        let status = unsafe { (shared.cuda.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        shared.check("recording a product", status)?;
        Ok(Self(Some((shared, mode))))
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        if let Some((shared, mode)) = &mut self.0 {
            // SAFETY: as in `new`.
            let status = unsafe { (shared.cuda.cuThreadExchangeStreamCaptureMode)(mode) };
            let _ = shared.check("recording a product", status);
        }
    }
}

/// Ends the recording when `record` fails or panics.
struct Recorder<'a> {
    shared: &'a Shared,
    begun: bool,
}

impl Recorder<'_> {
    fn end(&mut self) -> (cu::CUgraph, u32) {
        self.begun = false;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is alive and records; there is a place for the graph, which stays null where there is none.
        let status = unsafe { (self.shared.cuda.cuStreamEndCapture)(self.shared.stream(Stream::Compute), &mut graph) };
        (graph, status)
    }
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        if self.begun {
            let (graph, _) = self.end();
            if !graph.is_null() {
                // SAFETY: the driver's graph, which nothing else has.
                unsafe { (self.shared.cuda.cuGraphDestroy)(graph) };
            }
        }
        self.shared.stop_recording();
    }
}

impl Device for Driver {
    type Graph = CudaGraph;
    type Event = CudaEvent;
    type Landing = CudaLanding;

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory_free(&self) -> Result<usize, KernelError> {
        let what = "asking for free memory";
        self.shared.enter(what)?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two places for numbers; the context is current.
        self.shared.check(what, unsafe { (self.shared.cuda.cuMemGetInfo_v2)(&mut free, &mut total) })?;
        Ok(free)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        self.shared.enter("taking memory")?;
        let _turn = self.shared.unrecorded_turn("taking memory", Stream::Copy)?;
        self.shared.allocate("device memory", bytes).map(Address)
    }

    fn free(&self, address: Address, _bytes: usize) {
        self.shared.free(address.0);
    }

    unsafe fn write(&self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "writing to the device");
        shared.enter(what)?;
        let _turn = shared.unrecorded_turn(what, stream)?;
        let mut writes = locked(&self.lane(stream).writes);
        let (ring, pinned) = &mut *writes;
        for (number, chunk) in bytes.chunks(ring.run_max()).enumerate() {
            let run = ring.room(chunk.len(), |event| {
                // SAFETY: the event is alive.
                shared.check("waiting for a copy", unsafe { (shared.cuda.cuEventSynchronize)(event.handle) })
            })?;
            let event = shared.event()?;
            // SAFETY: the run lies within the pinned memory, and no copy reads it: the ring has waited for those that did. The
            // caller vouches for where the bytes go.
            let status = unsafe {
                let from = pinned.start.add(run.start);
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), from, chunk.len());
                let to = to.plus(number * ring.run_max()).0;
                (shared.cuda.cuMemcpyHtoDAsync_v2)(to, from.cast(), chunk.len(), shared.stream(stream))
            };
            shared.check(what, status)?;
            // SAFETY: both are alive.
            let status = unsafe { (shared.cuda.cuEventRecord)(event.handle, shared.stream(stream)) };
            if status != 0 {
                // Nobody would know when the run may be written again.
                return Err(shared.lose(what, shared.cuda.explain(status)));
            }
            ring.put(run, event);
        }
        Ok(())
    }

    unsafe fn read(&self, stream: Stream, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "reading from the device");
        shared.enter(what)?;
        let _turn = shared.unrecorded_turn(what, stream)?;
        let pinned = locked(&self.lane(stream).reads);
        for (number, chunk) in bytes.chunks_mut(pinned.bytes).enumerate() {
            let from = from.plus(number * pinned.bytes).0;
            // SAFETY: the chunk fits the pinned memory; the caller vouches for where it is read from.
            let status = unsafe {
                (shared.cuda.cuMemcpyDtoHAsync_v2)(pinned.start.cast(), from, chunk.len(), shared.stream(stream))
            };
            shared.check(what, status)?;
            shared.wait_for(stream)?;
            // SAFETY: the copy is done, it filled as much of the pinned memory as the chunk has, and the lock is held.
            unsafe { std::ptr::copy_nonoverlapping(pinned.start, chunk.as_mut_ptr(), chunk.len()) };
        }
        Ok(())
    }

    fn landing(&self, bytes: usize) -> Result<Self::Landing, KernelError> {
        let what = "taking pinned memory";
        self.shared.enter(what)?;
        let _turn = self.shared.unrecorded_turn(what, Stream::Copy)?;
        CudaLanding::new(&self.shared, bytes)
    }

    unsafe fn enqueue_read(
        &self,
        stream: Stream,
        from: Address,
        bytes: usize,
        landing: &mut Self::Landing,
    ) -> Result<(), KernelError> {
        let what = "reading from the device";
        self.shared.enter(what)?;
        let _turn = self.shared.unrecorded_turn(what, stream)?;
        // SAFETY: the caller vouches for the bytes.
        unsafe { landing.enqueue(stream, from, bytes) }
    }

    fn landed<'a>(&self, landing: &'a mut Self::Landing) -> Result<&'a [u8], KernelError> {
        let what = "waiting for results";
        self.shared.enter(what)?;
        // Nothing is enqueued: another thread may record meanwhile.
        let _turn = self.shared.unrecorded_turn(what, Stream::Copy)?;
        landing.wait()
    }

    unsafe fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<(), KernelError> {
        let what = "zeroing memory";
        self.shared.enter(what)?;
        if bytes == 0 {
            return Ok(());
        }
        let _turn = self.shared.turn(stream);
        // SAFETY: the caller vouches for the memory; the stream is alive.
        let status = unsafe { (self.shared.cuda.cuMemsetD8Async)(at.0, 0, bytes, self.shared.stream(stream)) };
        self.shared.check(what, status)
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<(), KernelError> {
        let shared = &self.shared;
        shared.enter("launching a kernel")?;
        let what = || format!("launching {}", launch.kernel);
        let kernel = self
            .kernels
            .get(launch.kernel)
            .ok_or_else(|| shared.failure(what(), "no kernel of this name was compiled".to_owned()))?;
        if launch.params.len() != kernel.params {
            let reason = format!("its argument has {} bytes, not {}", kernel.params, launch.params.len());
            return Err(shared.failure(what(), reason));
        }
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        let [x, y] = launch.grid;
        let _turn = shared.turn(stream);
        // SAFETY: the kernel is loaded; its one argument has the size that the kernel declares and is copied before this returns;
        // the caller vouches for what it says.
        let status = unsafe {
            (shared.cuda.cuLaunchKernel)(
                kernel.function,
                x,
                y,
                1,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                shared.stream(stream),
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        let size = format!("{} x {x} x {y} threads, {} bytes shared", launch.threads, launch.shared_bytes);
        shared.check(format_args!("launching {} ({size})", launch.kernel), status)
    }

    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<(), KernelError> {
        let what = "a matrix product";
        self.shared.enter(what)?;
        if stream != Stream::Compute {
            // There is one workspace.
            return Err(self.shared.failure(what, "products run on the compute stream only".to_owned()));
        }
        if gemm.rows == 0 || gemm.outputs == 0 {
            return Ok(());
        }
        let _turn = self.shared.turn(stream);
        let _relaxed = Relaxed::new(&self.shared)?;
        // SAFETY: the caller vouches for the matrices; the context is current; the workspace is Compute's.
        unsafe { self.blas.multiply(self.shared.stream(stream), self.workspace.address, gemm) }
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<Self::Graph, KernelError> {
        let (shared, what) = (&*self.shared, "recording steps");
        let cuda = &shared.cuda;
        shared.enter(what)?;
        if shared.records() {
            return Err(shared.failure(what, "steps are being recorded already".to_owned()));
        }
        let _turn = shared.turn_alone();
        locked(&shared.recording).thread = Some(thread::current().id());
        let mut recorder = Recorder { shared, begun: false };
        // Thread-local: what other threads do meanwhile is checked against their own recordings, of which they have none.
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        shared.check(what, unsafe { (cuda.cuStreamBeginCapture_v2)(shared.stream(Stream::Compute), mode) })?;
        recorder.begun = true;
        record()?;
        let (graph, status) = recorder.end();
        shared.check(what, status)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the graph that was just recorded and a place for its executable form, which does not need it any more.
        let status = unsafe {
            let status = (cuda.cuGraphInstantiateWithFlags)(&mut handle, graph, 0);
            (cuda.cuGraphDestroy)(graph);
            status
        };
        shared.check("making a graph of recorded steps", status)?;
        drop(recorder);
        let graph = CudaGraph { handle, shared: Arc::clone(&self.shared) };
        // SAFETY: both are alive. The first replay then costs what the others do.
        shared.check("uploading a graph", unsafe { (cuda.cuGraphUpload)(handle, shared.stream(Stream::Compute)) })?;
        Ok(graph)
    }

    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "replaying recorded steps");
        shared.enter(what)?;
        let _turn = shared.unrecorded_turn(what, Stream::Compute)?;
        // SAFETY: both are alive; the caller vouches for the launches.
        shared.check(what, unsafe { (shared.cuda.cuGraphLaunch)(graph.handle, shared.stream(Stream::Compute)) })
    }

    fn record(&self, stream: Stream) -> Result<Self::Event, KernelError> {
        let what = "marking a point in a stream";
        self.shared.enter(what)?;
        let _turn = self.shared.unrecorded_turn(what, stream)?;
        self.shared.mark(stream)
    }

    fn record_timed(&self, stream: Stream) -> Result<Self::Event, KernelError> {
        let what = "marking a point in time";
        self.shared.enter(what)?;
        let _turn = self.shared.unrecorded_turn(what, stream)?;
        self.shared.mark_time(stream)
    }

    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, KernelError> {
        let (shared, what) = (&self.shared, "asking the time between two points");
        shared.enter(what)?;
        // Nothing is enqueued: another thread may record meanwhile.
        let _turn = shared.unrecorded_turn(what, Stream::Copy)?;
        if !(from.timed && to.timed) {
            return Err(shared.failure(what, "their time was not kept".to_owned()));
        }
        let mut milliseconds = 0.0;
        // SAFETY: both are alive; there is a place for a number.
        shared.check(what, unsafe { (shared.cuda.cuEventSynchronize)(to.handle) })?;
        // SAFETY: as above.
        let status = unsafe { (shared.cuda.cuEventElapsedTime)(&mut milliseconds, from.handle, to.handle) };
        shared.check(what, status)?;
        Ok(milliseconds)
    }

    fn wait(&self, stream: Stream, event: &Self::Event) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "ordering two streams");
        shared.enter(what)?;
        let _turn = shared.unrecorded_turn(what, stream)?;
        // SAFETY: both are alive; 0 is the only flag there is for a plain wait.
        shared.check(what, unsafe { (shared.cuda.cuStreamWaitEvent)(shared.stream(stream), event.handle, 0) })
    }

    fn synchronise(&self) -> Result<(), KernelError> {
        let what = "waiting for the device";
        self.shared.enter(what)?;
        let _turn = self.shared.unrecorded_turn(what, Stream::Compute)?;
        self.shared.wait_for(Stream::Compute)?;
        self.shared.wait_for(Stream::Copy)
    }
}
