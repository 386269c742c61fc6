//! A GPU's context: its streams, what is taken from it, what is loaded into it, and whether it can still be used.

use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

use cudarc::driver::sys as cu;

use super::compile::Image;
use super::device::{Properties, Stream};
use super::library::Cuda;
use crate::KernelError;

/// Events kept for the next use.
const SPARE_EVENTS: usize = 256;
/// The oldest driver that has every function that is used, as CUDA's version.
pub(super) const CUDA_MIN: (u32, u32) = (12, 4);

/// A kernel, ready to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) function: cu::CUfunction,
    /// Bytes of its argument.
    pub(super) params: usize,
}

/// The context, for as long as anything of it is left.
pub(super) struct Shared {
    pub(super) cuda: Cuda,
    pub(super) name: String,
    device: cu::CUdevice,
    context: cu::CUcontext,
    /// Compute and Copy; null until they are made.
    streams: [cu::CUstream; 2],
    /// What lost the device, and what the driver said.
    lost: OnceLock<(String, String)>,
    spare_events: Mutex<Vec<cu::CUevent>>,
    modules: Mutex<Vec<cu::CUmodule>>,
    pub(super) recording: Mutex<Recording>,
    /// Held for reading by whoever enqueues on Compute, for writing by who records there: what another thread enqueued meanwhile would
    /// become part of the recording.
    turns: RwLock<()>,
}

// SAFETY: handles of the driver may be used from any thread that has made the context current, which every call does first;
// what of this is changed is behind mutexes.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

#[derive(Debug, Default)]
pub(super) struct Recording {
    /// Who records on Compute.
    pub(super) thread: Option<ThreadId>,
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

    pub(super) fn check(&self, what: impl fmt::Display, status: u32) -> Result<(), KernelError> {
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

    /// Whether this thread records on Compute.
    pub(super) fn records(&self) -> bool {
        locked(&self.recording).thread == Some(thread::current().id())
    }

    /// This thread's turn on a stream, for as long as what is returned lives: where another thread records on Compute, it is waited for.
    pub(super) fn turn(&self, stream: Stream) -> Option<RwLockReadGuard<'_, ()>> {
        // The thread that records has the turn.
        let free = stream == Stream::Copy || self.records();
        (!free).then(|| self.turns.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The turn on Compute of a thread that is about to record, alone.
    pub(super) fn turn_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.turns.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Shared::turn`], for what cannot be recorded: refused to the thread that records.
    pub(super) fn unrecorded_turn(
        &self,
        what: &str,
        stream: Stream,
    ) -> Result<Option<RwLockReadGuard<'_, ()>>, KernelError> {
        if self.records() {
            return Err(self.failure(what, "not while steps are recorded".to_owned()));
        }
        Ok(self.turn(stream))
    }

    pub(super) fn stream(&self, stream: Stream) -> cu::CUstream {
        self.streams[stream as usize]
    }

    pub(super) fn event(self: &Arc<Self>) -> Result<CudaEvent, KernelError> {
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
        Ok(CudaEvent { handle, timed: false, shared: Arc::clone(self) })
    }

    /// Marks the present end of a stream and keeps the time when it is reached.
    pub(super) fn mark_time(self: &Arc<Self>, stream: Stream) -> Result<CudaEvent, KernelError> {
        let mut handle = std::ptr::null_mut();
        let flags = cu::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: a place for an event; the context is current.
        self.check("making an event", unsafe { (self.cuda.cuEventCreate)(&mut handle, flags) })?;
        let event = CudaEvent { handle, timed: true, shared: Arc::clone(self) };
        // SAFETY: both are alive.
        let status = unsafe { (self.cuda.cuEventRecord)(event.handle, self.stream(stream)) };
        self.check("marking a point in time", status)?;
        Ok(event)
    }

    /// Marks the present end of a stream.
    pub(super) fn mark(self: &Arc<Self>, stream: Stream) -> Result<CudaEvent, KernelError> {
        let event = self.event()?;
        // SAFETY: both are alive.
        self.check("marking a point in a stream", unsafe {
            (self.cuda.cuEventRecord)(event.handle, self.stream(stream))
        })?;
        Ok(event)
    }

    pub(super) fn wait_for(&self, stream: Stream) -> Result<(), KernelError> {
        // SAFETY: the stream is alive.
        self.check("waiting for the device", unsafe { (self.cuda.cuStreamSynchronize)(self.stream(stream)) })
    }

    pub(super) fn free(&self, address: u64) {
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
    pub(super) handle: cu::CUevent,
    /// Whether the time is kept when it is passed.
    pub(super) timed: bool,
    pub(super) shared: Arc<Shared>,
}

// SAFETY: as for [`Shared`].
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
        if spare.len() < SPARE_EVENTS && !self.timed {
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
pub(super) struct Taken {
    pub(super) address: u64,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shared.free(self.address);
    }
}

/// Host memory that the device copies from and to without help.
pub(super) struct Pinned {
    pub(super) start: *mut u8,
    pub(super) bytes: usize,
    pub(super) shared: Arc<Shared>,
}

// SAFETY: memory of its own; as for [`Shared`].
unsafe impl Send for Pinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Pinned {
    pub(super) fn new(shared: &Arc<Shared>, bytes: usize) -> Result<Self, KernelError> {
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

impl Shared {
    /// The context of a device and its two streams; the driver's version.
    pub(super) fn open(cuda: Cuda, ordinal: u32) -> Result<(Arc<Self>, (u32, u32)), KernelError> {
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
            turns: RwLock::default(),
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

    pub(super) fn properties(&self) -> Result<Properties, KernelError> {
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
    pub(super) fn load(
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
    pub(super) fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, KernelError> {
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
    pub(super) fn stop_recording(&self) {
        let freed = {
            let mut recording = locked(&self.recording);
            recording.thread = None;
            std::mem::take(&mut recording.freed)
        };
        freed.into_iter().for_each(|address| self.free(address));
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
