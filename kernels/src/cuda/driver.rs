//! A GPU through its driver: the [`Device`] that serves.
//!
//! Calls go to the driver's own functions ([`library`](super::library)), so that every error is here and none is a panic.
//!
//! **Memory** is plain `cuMemAlloc`, not the stream-ordered allocator: there are few allocations, nearly all made at the start and
//! kept, and the driver's count of free memory then says exactly what is left to size the pool of pages with; a pool of the
//! allocator's would hold some back. Giving memory back waits for both streams.
//!
//! **Writes** copy the caller's bytes into a ring of pinned memory, one for each stream, and return; a ring that is full waits
//! for its oldest copy. **Reads** wait for the stream by their nature.
//!
//! **A lost device** stays lost. After an error that leaves the context unusable (an illegal address, an ECC error, a GPU that fell
//! off the bus) every later call returns that first error at once, so that the server stops serving instead of answering from
//! memory that nobody computed. Errors not known to be harmless count as such.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use cudarc::driver::sys as cu;

pub use super::blas::Products;
use super::blas::{Blas, WORKSPACE_BYTES};
use super::compile::{Compiler, Image, Job, Progress};
use super::device::{Address, Device, Gemm, Launch, Properties, Stream};
use super::library::{CublasLt, Cuda, Places};
use super::staging::Ring;
use crate::KernelError;

/// Pinned memory that writes of one stream go through.
const RING_BYTES: usize = 16 << 20;
/// Pinned memory that reads of one stream go through.
const READ_BYTES: usize = 4 << 20;
/// Events kept for the next use.
const SPARE_EVENTS: usize = 256;
/// The oldest driver that has every function that is used, as CUDA's version.
const CUDA_MIN: (u32, u32) = (12, 4);

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

/// A kernel, ready to run.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    function: cu::CUfunction,
    /// Bytes of its argument.
    params: usize,
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

/// The context, for as long as anything of it is left.
pub(super) struct Shared {
    cuda: Cuda,
    name: String,
    device: cu::CUdevice,
    context: cu::CUcontext,
    /// Compute and Copy; null until they are made.
    streams: [cu::CUstream; 2],
    /// What lost the device, and what the driver said.
    lost: OnceLock<(String, String)>,
    spare_events: Mutex<Vec<cu::CUevent>>,
    modules: Mutex<Vec<cu::CUmodule>>,
    recording: Mutex<Recording>,
}

// SAFETY: as for [`Driver`].
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

#[derive(Debug, Default)]
struct Recording {
    /// Who records on Compute.
    thread: Option<ThreadId>,
    /// Memory given back meanwhile: freeing waits, which a recording forbids.
    freed: Vec<u64>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// The lock, also where a thread panicked with it: what it guards is whole between any two calls.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the device still works after this error of the driver's. Any other leaves the context in an undefined state, by the
/// driver's documentation or for all that is known.
fn is_harmless(status: u32) -> bool {
    use cu::cudaError_enum as Error;
    [
        Error::CUDA_ERROR_INVALID_VALUE,
        Error::CUDA_ERROR_OUT_OF_MEMORY,
        Error::CUDA_ERROR_NOT_FOUND,
        Error::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        Error::CUDA_ERROR_INVALID_IMAGE,
        Error::CUDA_ERROR_NO_BINARY_FOR_GPU,
        Error::CUDA_ERROR_INVALID_PTX,
        Error::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    ]
    .iter()
    .any(|harmless| *harmless as u32 == status)
        // Faults of a recording: the recording is lost, the device is not.
        || (Error::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED as u32..=Error::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD as u32)
            .contains(&status)
}

impl Shared {
    /// Makes the context current on this thread, unless the device is lost.
    pub(super) fn enter(&self, what: &str) -> Result<(), KernelError> {
        if let Some((what, reason)) = self.lost.get() {
            return Err(self.failure(what, reason.clone()));
        }
        // SAFETY: the context is retained until this is dropped.
        self.check(what, unsafe { (self.cuda.cuCtxSetCurrent)(self.context) })
    }

    fn check(&self, what: impl fmt::Display, status: u32) -> Result<(), KernelError> {
        if status == 0 {
            return Ok(());
        }
        let reason = self.cuda.explain(status);
        Err(if is_harmless(status) { self.failure(what, reason) } else { self.lose(what, reason) })
    }

    pub(super) fn failure(&self, what: impl fmt::Display, reason: String) -> KernelError {
        KernelError::Device { device: self.name.clone(), what: what.to_string(), reason }
    }

    /// From now on every call fails as this one did.
    pub(super) fn lose(&self, what: impl fmt::Display, reason: String) -> KernelError {
        let (what, reason) = self.lost.get_or_init(|| (what.to_string(), reason));
        self.failure(what, reason.clone())
    }

    pub(super) fn is_recording(&self) -> bool {
        locked(&self.recording).thread.is_some()
    }

    /// What cannot be recorded is refused while Compute records: anything on Compute, and anything of the thread that records.
    fn refuse_recording(&self, what: &str, stream: Option<Stream>) -> Result<(), KernelError> {
        let Some(thread) = locked(&self.recording).thread else { return Ok(()) };
        if stream != Some(Stream::Copy) || thread == thread::current().id() {
            return Err(self.failure(what, "not while steps are recorded".to_owned()));
        }
        Ok(())
    }

    fn stream(&self, stream: Stream) -> cu::CUstream {
        self.streams[stream as usize]
    }

    fn event(self: &Arc<Self>) -> Result<CudaEvent, KernelError> {
        let spare = locked(&self.spare_events).pop();
        let handle = match spare {
            Some(handle) => handle,
            None => {
                let mut handle = std::ptr::null_mut();
                let flags = cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: a place for an event; the context is current.
                self.check("making an event", unsafe { (self.cuda.cuEventCreate)(&mut handle, flags) })?;
                handle
            }
        };
        Ok(CudaEvent { handle, shared: Arc::clone(self) })
    }

    /// Marks the present end of a stream.
    fn mark(self: &Arc<Self>, stream: Stream) -> Result<CudaEvent, KernelError> {
        let event = self.event()?;
        // SAFETY: both are alive.
        self.check("marking a point in a stream", unsafe {
            (self.cuda.cuEventRecord)(event.handle, self.stream(stream))
        })?;
        Ok(event)
    }

    fn wait_for(&self, stream: Stream) -> Result<(), KernelError> {
        // SAFETY: the stream is alive.
        self.check("waiting for the device", unsafe { (self.cuda.cuStreamSynchronize)(self.stream(stream)) })
    }

    fn free(&self, address: u64) {
        let mut recording = locked(&self.recording);
        if recording.thread.is_some() {
            recording.freed.push(address);
            return;
        }
        // The lock is kept: nothing may begin to record while this waits. On a lost device memory goes with the process.
        if self.enter("giving memory back").is_ok()
            && self.wait_for(Stream::Compute).is_ok()
            && self.wait_for(Stream::Copy).is_ok()
        {
            // SAFETY: `allocate` returned it, it is given back once, and both streams are done with it.
            let status = unsafe { (self.cuda.cuMemFree_v2)(address) };
            let _ = self.check("giving memory back", status);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Whatever of this fails, the process is past using the device.
        // SAFETY: nothing holds the context's streams, events or modules any more, and each is destroyed once; the context is
        // released once, as it was retained.
        unsafe {
            (self.cuda.cuCtxSetCurrent)(self.context);
            for event in locked(&self.spare_events).drain(..) {
                (self.cuda.cuEventDestroy_v2)(event);
            }
            for stream in self.streams.into_iter().filter(|stream| !stream.is_null()) {
                (self.cuda.cuStreamSynchronize)(stream);
                (self.cuda.cuStreamDestroy_v2)(stream);
            }
            for module in locked(&self.modules).drain(..) {
                (self.cuda.cuModuleUnload)(module);
            }
            (self.cuda.cuCtxSetCurrent)(std::ptr::null_mut());
            (self.cuda.cuDevicePrimaryCtxRelease_v2)(self.device);
        }
    }
}

/// A point in a stream.
pub struct CudaEvent {
    handle: cu::CUevent,
    shared: Arc<Shared>,
}

// SAFETY: as for [`Driver`].
unsafe impl Send for CudaEvent {}

impl fmt::Debug for CudaEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaEvent({:?} of {})", self.handle, self.shared.name)
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // It may be recorded again at once: who waits for it waits for the point it marked when the wait was enqueued.
        let mut spare = locked(&self.shared.spare_events);
        if spare.len() < SPARE_EVENTS {
            spare.push(self.handle);
            return;
        }
        drop(spare);
        if self.shared.enter("giving an event back").is_ok() {
            // SAFETY: the event is alive and is not used again; the driver keeps it until enqueued work is past it.
            unsafe { (self.shared.cuda.cuEventDestroy_v2)(self.handle) };
        }
    }
}

/// Device memory of the device's own.
#[derive(Debug)]
struct Taken {
    address: u64,
    shared: Arc<Shared>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shared.free(self.address);
    }
}

/// Host memory that the device copies from and to without help.
struct Pinned {
    start: *mut u8,
    bytes: usize,
    shared: Arc<Shared>,
}

// SAFETY: memory of its own; as for [`Driver`].
unsafe impl Send for Pinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Pinned {
    fn new(shared: &Arc<Shared>, bytes: usize) -> Result<Self, KernelError> {
        let mut start = std::ptr::null_mut();
        // SAFETY: a place for an address; the context is current.
        let status = unsafe { (shared.cuda.cuMemHostAlloc)(&mut start, bytes, 0) };
        shared.check(format_args!("taking {bytes} bytes of pinned memory"), status)?;
        Ok(Self { start: start.cast(), bytes, shared: Arc::clone(shared) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // On a lost device a copy may be under way still: the memory goes with the process.
        if self.shared.enter("giving pinned memory back").is_ok() {
            // SAFETY: cuMemHostAlloc returned it, and the streams have been waited for.
            unsafe { (self.shared.cuda.cuMemFreeHost)(self.start.cast()) };
        }
    }
}

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

impl Shared {
    /// The context of a device and its two streams; the driver's version.
    fn open(cuda: Cuda, ordinal: u32) -> Result<(Arc<Self>, (u32, u32)), KernelError> {
        let name = format!("cuda:{ordinal}");
        let checked = |what: &str, status: u32| {
            let failure =
                || KernelError::Device { device: name.clone(), what: what.to_owned(), reason: cuda.explain(status) };
            if status == 0 { Ok(()) } else { Err(failure()) }
        };
        // SAFETY: 0 is the only flag there is.
        checked("starting the driver", unsafe { (cuda.cuInit)(0) })?;
        let mut version = 0;
        // SAFETY: a place for a number.
        checked("asking the driver's version", unsafe { (cuda.cuDriverGetVersion)(&mut version) })?;
        let version = (version.max(0).cast_unsigned() / 1000, version.max(0).cast_unsigned() % 1000 / 10);
        if version < CUDA_MIN {
            let reason =
                format!("it is for CUDA {}.{}; {}.{} or newer is needed", version.0, version.1, CUDA_MIN.0, CUDA_MIN.1);
            return Err(KernelError::Device { device: name, what: "asking the driver's version".to_owned(), reason });
        }
        let device = cuda.device(ordinal.min(i32::MAX as u32) as c_int);
        let device = device.or_else(|status| checked("looking for the device", status).map(|()| 0))?;
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the context of a device that the driver gave.
        checked("making a context", unsafe { (cuda.cuDevicePrimaryCtxRetain)(&mut context, device) })?;
        let mut shared = Self {
            cuda,
            name,
            device,
            context,
            streams: [std::ptr::null_mut(); 2],
            lost: OnceLock::new(),
            spare_events: Mutex::default(),
            modules: Mutex::default(),
            recording: Mutex::default(),
        };
        shared.enter("making a context")?;
        for number in 0..2 {
            let mut stream = std::ptr::null_mut();
            let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: a place for a stream; the context is current.
            shared.check("making a stream", unsafe { (shared.cuda.cuStreamCreate)(&mut stream, flags) })?;
            shared.streams[number] = stream;
        }
        Ok((Arc::new(shared), version))
    }

    fn properties(&self) -> Result<Properties, KernelError> {
        use cu::CUdevice_attribute as Attribute;
        let ask = || {
            Ok(Properties {
                name: self.cuda.device_name(self.device)?,
                compute: self.cuda.compute(self.device)?,
                multiprocessors: self
                    .cuda
                    .attribute(self.device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                shared_bytes_max: self
                    .cuda
                    .attribute(self.device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            })
        };
        ask().map_err(|status: u32| self.failure("asking what the device is", self.cuda.explain(status)))
    }

    /// Loads an image and makes every kernel in it ready: nothing is left to be loaded while a step is recorded.
    fn load(
        &self,
        image: &Image,
        shared_bytes_max: u32,
        kernels: &mut HashMap<String, Kernel>,
    ) -> Result<(), KernelError> {
        let cuda = &self.cuda;
        let what = format!("loading the kernels of {}", image.name);
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole image of NVRTC's: machine code, which says its own length, or PTX that ends in NUL.
        self.check(&what, unsafe { (cuda.cuModuleLoadData)(&mut module, image.bytes.as_ptr().cast()) })?;
        locked(&self.modules).push(module);
        let mut count = 0;
        // SAFETY: the module is alive.
        self.check(&what, unsafe { (cuda.cuModuleGetFunctionCount)(&mut count, module) })?;
        let mut functions = vec![std::ptr::null_mut(); count as usize];
        // SAFETY: room for as many functions as the driver has just said.
        self.check(&what, unsafe { (cuda.cuModuleEnumerateFunctions)(functions.as_mut_ptr(), count, module) })?;
        for function in functions {
            let (name, kernel) = self.ready(&what, function, shared_bytes_max)?;
            if kernels.insert(name.clone(), kernel).is_some() {
                return Err(self.failure(&what, format!("there are two kernels named {name}")));
            }
        }
        Ok(())
    }

    fn ready(
        &self,
        what: &str,
        function: cu::CUfunction,
        shared_bytes_max: u32,
    ) -> Result<(String, Kernel), KernelError> {
        use cu::CUfunction_attribute as Attribute;
        let cuda = &self.cuda;
        let mut name = std::ptr::null();
        // SAFETY: the function is the driver's, and there is a place for an address.
        self.check(what, unsafe { (cuda.cuFuncGetName)(&mut name, function) })?;
        // SAFETY: the driver's name of it, which ends in NUL and lives as long as the module.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        // SAFETY: the function is the driver's.
        self.check(what, unsafe { (cuda.cuFuncLoad)(function) })?;
        let (mut offset, mut params) = (0, 0);
        // SAFETY: the function is the driver's, and there are places for two numbers.
        self.check(what, unsafe { (cuda.cuFuncGetParamInfo)(function, 0, &mut offset, &mut params) })?;
        let (mut other_offset, mut other) = (0, 0);
        // SAFETY: as above; a kernel with one argument has no second, which is an error of the value asked for.
        if unsafe { (cuda.cuFuncGetParamInfo)(function, 1, &mut other_offset, &mut other) } == 0 {
            return Err(self.failure(what, format!("{name} has more than one argument")));
        }
        let mut fixed = 0;
        // SAFETY: the function is the driver's, and there is a place for a number.
        self.check(what, unsafe {
            (cuda.cuFuncGetAttribute)(&mut fixed, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        })?;
        let most = c_int::try_from(shared_bytes_max).unwrap_or(c_int::MAX) - fixed;
        // SAFETY: the function is the driver's.
        self.check(what, unsafe {
            (cuda.cuFuncSetAttribute)(function, Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
        })?;
        Ok((name, Kernel { function, params }))
    }

    /// With the context current.
    fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, KernelError> {
        let mut address = 0;
        // SAFETY: a place for an address.
        let status = unsafe { (self.cuda.cuMemAlloc_v2)(&mut address, bytes) };
        if status == cu::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY as u32 {
            return Err(KernelError::OutOfMemory { what, bytes });
        }
        self.check(format_args!("taking {bytes} bytes"), status)?;
        Ok(address)
    }

    /// Ends a recording, however it went.
    fn stop_recording(&self) {
        let freed = {
            let mut recording = locked(&self.recording);
            recording.thread = None;
            std::mem::take(&mut recording.freed)
        };
        freed.into_iter().for_each(|address| self.free(address));
    }
}

/// While it lives this thread may do what a recording forbids by default: cuBLASLt loads its kernels when they are first used.
struct Relaxed<'a>(Option<(&'a Shared, cu::CUstreamCaptureMode)>);

impl<'a> Relaxed<'a> {
    fn new(shared: &'a Shared) -> Result<Self, KernelError> {
        if !shared.is_recording() {
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
        // Of another thread's recording it is no part.
        self.shared.refuse_recording("taking memory", Some(Stream::Copy))?;
        self.shared.allocate("device memory", bytes).map(Address)
    }

    fn free(&self, address: Address, _bytes: usize) {
        self.shared.free(address.0);
    }

    unsafe fn write(&self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "writing to the device");
        shared.enter(what)?;
        shared.refuse_recording(what, Some(stream))?;
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
        shared.refuse_recording(what, Some(stream))?;
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

    unsafe fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<(), KernelError> {
        let what = "zeroing memory";
        self.shared.enter(what)?;
        if bytes == 0 {
            return Ok(());
        }
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
        let _relaxed = Relaxed::new(&self.shared)?;
        // SAFETY: the caller vouches for the matrices; the context is current; the workspace is Compute's.
        unsafe { self.blas.multiply(self.shared.stream(stream), self.workspace.address, gemm) }
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<Self::Graph, KernelError> {
        let (shared, what) = (&*self.shared, "recording steps");
        let cuda = &shared.cuda;
        shared.enter(what)?;
        {
            let mut recording = locked(&shared.recording);
            if recording.thread.is_some() {
                return Err(shared.failure(what, "steps are being recorded already".to_owned()));
            }
            recording.thread = Some(thread::current().id());
        }
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
        shared.refuse_recording(what, Some(Stream::Compute))?;
        // SAFETY: both are alive; the caller vouches for the launches.
        shared.check(what, unsafe { (shared.cuda.cuGraphLaunch)(graph.handle, shared.stream(Stream::Compute)) })
    }

    fn record(&self, stream: Stream) -> Result<Self::Event, KernelError> {
        let what = "marking a point in a stream";
        self.shared.enter(what)?;
        self.shared.refuse_recording(what, Some(stream))?;
        self.shared.mark(stream)
    }

    fn wait(&self, stream: Stream, event: &Self::Event) -> Result<(), KernelError> {
        let (shared, what) = (&self.shared, "ordering two streams");
        shared.enter(what)?;
        shared.refuse_recording(what, Some(stream))?;
        // SAFETY: both are alive; 0 is the only flag there is for a plain wait.
        shared.check(what, unsafe { (shared.cuda.cuStreamWaitEvent)(shared.stream(stream), event.handle, 0) })
    }

    fn synchronise(&self) -> Result<(), KernelError> {
        let what = "waiting for the device";
        self.shared.enter(what)?;
        self.shared.refuse_recording(what, None)?;
        self.shared.wait_for(Stream::Compute)?;
        self.shared.wait_for(Stream::Copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_are_not_known_to_be_harmless_lose_the_device() {
        for harmless in [1, 2, 500, 701, 900, 901, 908] {
            assert!(is_harmless(harmless), "{harmless}");
        }
        // An ECC error, an illegal address, a launch that failed, a GPU that is gone, one of a later driver.
        for fatal in [3, 46, 100, 101, 201, 214, 220, 304, 400, 700, 702, 710, 716, 719, 721, 909, 911, 999, 12345] {
            assert!(!is_harmless(fatal), "{fatal}");
        }
    }
}
