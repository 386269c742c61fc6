//! A CUDA device on the host, for tests where there is no GPU.
//!
//! The kernels' own sources, compiled by g++ against `include/host.hpp`, run when they are enqueued on [`Stream::Compute`]. What a
//! GPU leaves undefined is made to show: fresh memory is full of NaN, allocations are exactly as large as asked for (so that the
//! address sanitiser sees what goes beyond), threads and blocks run in shuffled orders (see `host.hpp`), and what is enqueued on
//! [`Stream::Copy`] happens as late as it may: when something waits for it. It can be told to fail ([`Emulated::break_after`]).
//!
//! Each file of kernels becomes one shared library in a folder beside the running program, named by a hash of everything that
//! went into it, so that the processes of a test run build it once. What it is built to notice, the environment variable
//! `OPENLORA_SANITISED` says: see [`SANITISED`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use half::{bf16, f16};

use super::device::{Address, Device, Element, Gemm, Launch, Properties, Stream};
use super::sources::{HEADERS, KERNELS, Source};
use crate::KernelError;

/// The environment variable that says what kernels are built to notice: `memory` (accesses out of bounds, shifts too far;
/// the process must have been started with the address sanitiser's runtime preloaded) or `races` (accesses of different threads
/// with no barrier between, addresses that are not aligned). Without it, neither: fastest.
pub const SANITISED: &str = "OPENLORA_SANITISED";

const HOST_HEADER: Source = Source { name: "host.hpp", text: include_str!("../../include/host.hpp") };
const FLAGS: &[&str] = &[
    "-x",
    "c++",
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-ftls-model=initial-exec",
    // As NVRTC is, of numbers read as others.
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-DOPENLORA_HOST",
];
/// Checks are calls, not code in place, which takes the compiler three times as long; whether addresses are aligned, what notices
/// races looks at.
const MEMORY_FLAGS: &[&str] = &[
    "-fsanitize=address,bounds,shift,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "--param=asan-instrumentation-with-call-threshold=0",
];
const RACES_FLAGS: &[&str] = &["-fsanitize=thread"];

/// An H200's.
const SHARED_BYTES_MAX: u32 = 227 << 10;
const MEMORY: usize = 4 << 30;
const ALIGNED: usize = 256;
/// Where an allocation of no bytes begins: no address of one.
const POISON: u8 = 0xff;

/// A CUDA device on the host.
#[derive(Debug)]
pub struct Emulated {
    properties: Properties,
    libraries: Vec<Arc<Library>>,
    memory: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes by address.
    allocations: BTreeMap<u64, usize>,
    taken: usize,
    /// Launches so far: each runs its threads in another order.
    launches: u64,
    capture: Option<Capture>,
    /// On the stream of copies, and not done yet.
    late: VecDeque<Work>,
    /// How much has been done there.
    late_done: u64,
    /// Calls that still succeed, and how the next one fails.
    fault: Option<(u64, Fault)>,
    lost: bool,
}

/// How a device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One call finds no memory.
    OutOfMemory,
    /// The device is lost, as after a kernel's fault: every call fails from then on.
    Lost,
}

#[derive(Debug)]
struct Capture {
    thread: ThreadId,
    work: Vec<Work>,
}

#[derive(Clone, Debug)]
enum Work {
    Launch { kernel: String, grid: [u32; 2], threads: u32, shared_bytes: u32, params: Vec<u8> },
    Gemm(Gemm),
    Zero { at: Address, bytes: usize },
    Write { to: Address, bytes: Vec<u8> },
}

/// A point in a stream: so much had been enqueued on it.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    stream: Stream,
    enqueued: u64,
    at: Instant,
}

/// Bytes as they were when their copy's turn came.
#[derive(Debug)]
pub struct Landing {
    room: usize,
    bytes: Vec<u8>,
}

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Graph(Vec<Work>);

impl Graph {
    /// How many launches, products and fills it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Emulated {
    /// A device with the product's kernels, which says that it has so many multiprocessors.
    ///
    /// # Errors
    /// There is no g++, or it refuses a kernel.
    pub fn new(multiprocessors: u32) -> Result<Arc<Self>, KernelError> {
        Self::with_sources(multiprocessors, KERNELS)
    }

    /// A device with so much memory.
    ///
    /// # Errors
    /// There is no g++, or it refuses a kernel.
    pub fn with_memory(multiprocessors: u32, bytes: usize) -> Result<Arc<Self>, KernelError> {
        Ok(Arc::new(Self { memory: bytes, ..Self::made(multiprocessors, KERNELS)? }))
    }

    /// A device with other kernels.
    ///
    /// # Errors
    /// There is no g++, or it refuses a kernel.
    pub fn with_sources(multiprocessors: u32, sources: &[Source]) -> Result<Arc<Self>, KernelError> {
        Self::made(multiprocessors, sources).map(Arc::new)
    }

    fn made(multiprocessors: u32, sources: &[Source]) -> Result<Self, KernelError> {
        let libraries = sources.iter().map(Library::of).collect::<Result<_, _>>()?;
        let properties = Properties {
            name: "emulated".into(),
            compute: (9, 0),
            multiprocessors,
            shared_bytes_max: SHARED_BYTES_MAX,
        };
        Ok(Self { properties, libraries, memory: MEMORY, state: Mutex::default() })
    }

    /// Lets the call after so many more fail.
    pub fn break_after(&self, calls: u64, fault: Fault) {
        self.state().fault = Some((calls, fault));
    }

    /// Counts a call of the [`Device`]'s, which fails if it is its turn to.
    fn enter(&self, what: &str) -> Result<(), KernelError> {
        let mut state = self.state();
        match &mut state.fault {
            Some((calls @ 1.., _)) => *calls -= 1,
            Some((_, Fault::Lost)) => state.lost = true,
            Some((_, Fault::OutOfMemory)) => {
                state.fault = None;
                return Err(KernelError::OutOfMemory { what: "injected", bytes: 0 });
            }
            None => {}
        }
        if state.lost { Err(failure(what, "the device is lost".into())) } else { Ok(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the work, or keeps it: for the recording that is under way, or until something waits for the stream of copies.
    ///
    /// # Safety
    /// As for what is run.
    unsafe fn enqueue(&self, stream: Stream, work: Work) -> Result<(), KernelError> {
        self.enter("enqueue")?;
        let mut state = self.state();
        match (&mut state.capture, stream) {
            (_, Stream::Copy) => state.late.push_back(work),
            (Some(capture), Stream::Compute) if capture.thread == thread::current().id() => capture.work.push(work),
            (_, Stream::Compute) => {
                drop(state);
                // SAFETY: the caller's promise.
                unsafe { self.run(&work)? };
            }
        }
        Ok(())
    }

    /// Does what was enqueued on the stream of copies, up to a point.
    fn catch_up(&self, enqueued: u64) -> Result<(), KernelError> {
        loop {
            let work = {
                let mut state = self.state();
                if state.late_done >= enqueued {
                    return Ok(());
                }
                state.late_done += 1;
                state.late.pop_front()
            };
            let Some(work) = work else { return Ok(()) };
            // SAFETY: whoever enqueued it promised that what it needs lives until it is done, and memory is given back only
            // after a call of this.
            unsafe { self.run(&work)? };
        }
    }

    fn refuse_in_capture(&self, what: &str) -> Result<(), KernelError> {
        match &self.state().capture {
            Some(capture) if capture.thread == thread::current().id() => {
                Err(failure(what, "refused while launches are recorded".into()))
            }
            _ => Ok(()),
        }
    }

    /// Fails unless the bytes are all inside one allocation and this thread may copy now.
    fn check(&self, what: &str, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.refuse_in_capture(what)?;
        self.state().inside(what, at, bytes)
    }

    fn entry(&self, kernel: &str) -> Result<Entry, KernelError> {
        let name = CString::new(format!("openlora_host_{kernel}"))
            .map_err(|_| failure(kernel, "a kernel's name has no zeros".into()))?;
        self.libraries
            .iter()
            .find_map(|library| library.entry(&name))
            .ok_or_else(|| failure(kernel, "no kernel has this name".into()))
    }

    /// # Safety
    /// As for [`Device::launch`].
    unsafe fn run_launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let Launch { kernel, grid, threads, shared_bytes, params } = *launch;
        let entry = self.entry(kernel)?;
        let refuse = |reason: String| Err(failure(&format!("launch of {kernel}"), reason));
        if threads == 0 || threads > 1024 || !threads.is_multiple_of(32) {
            return refuse(format!("{threads} threads in a block"));
        }
        if grid[0] == 0 || grid[1] == 0 || grid[0] > i32::MAX as u32 || grid[1] > 65_535 {
            return refuse(format!("a grid of {grid:?} blocks"));
        }
        if shared_bytes > SHARED_BYTES_MAX {
            return refuse(format!("{shared_bytes} bytes of shared memory, of {SHARED_BYTES_MAX}"));
        }
        // Held until the kernel has run: the device runs one at a time.
        let mut state = self.state();
        state.launches += 1;
        let allocations: Vec<[u64; 2]> =
            state.allocations.iter().map(|(start, bytes)| [*start, start + *bytes as u64]).collect();
        let mut message = [0_u8; 1024];
        let call = HostLaunch {
            params: params.as_ptr().cast(),
            params_bytes: params.len() as u64,
            grid,
            threads,
            shared_bytes,
            seed: state.launches,
            message: message.as_mut_ptr().cast(),
            message_bytes: message.len() as u64,
            allocations: allocations.as_ptr(),
            allocations_count: allocations.len() as u64,
        };
        // SAFETY: the entry is of a library compiled against the same struct; it checks the size of the argument, and the caller
        // answers for the addresses in it.
        match unsafe { entry(&raw const call) } {
            0 => Ok(()),
            _ => refuse(CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy().into_owned()),
        }
    }

    /// # Safety
    /// As for [`Device::gemm`].
    unsafe fn run_gemm(&self, gemm: &Gemm) -> Result<(), KernelError> {
        let Gemm { rows, inputs, outputs, element, out_element, .. } = *gemm;
        let state = self.state();
        state.inside("gemm: x", gemm.x, rows * inputs * element.bytes())?;
        state.inside("gemm: w", gemm.w, outputs * inputs * element.bytes())?;
        state.inside("gemm: out", gemm.out, rows * outputs * out_element.bytes())?;
        // SAFETY: inside allocations of the table, just checked, which are live as long as they are in it.
        let (x, w) = unsafe { (values(gemm.x, rows * inputs, element), values(gemm.w, outputs * inputs, element)) };
        let mut columns = vec![0_f32; inputs * outputs];
        for (o, row) in w.chunks_exact(inputs.max(1)).enumerate() {
            for (k, value) in row.iter().enumerate() {
                columns[k * outputs + o] = *value;
            }
        }
        for row in 0..rows {
            // Each output is a sum of its own over ascending k.
            let mut sums = vec![0_f32; outputs];
            for (x, column) in x[row * inputs..][..inputs].iter().zip(columns.chunks_exact(outputs.max(1))) {
                for (sum, w) in sums.iter_mut().zip(column) {
                    *sum += x * w;
                }
            }
            let at = gemm.out.plus(row * outputs * out_element.bytes());
            // SAFETY: inside an allocation of the table, as above.
            unsafe { store(at, &sums, out_element) };
        }
        Ok(())
    }

    /// # Safety
    /// As for what is run.
    unsafe fn run(&self, work: &Work) -> Result<(), KernelError> {
        match work {
            Work::Launch { kernel, grid, threads, shared_bytes, params } => {
                let launch = Launch { kernel, grid: *grid, threads: *threads, shared_bytes: *shared_bytes, params };
                // SAFETY: the caller's promise.
                unsafe { self.run_launch(&launch) }
            }
            // SAFETY: the caller's promise.
            Work::Gemm(gemm) => unsafe { self.run_gemm(gemm) },
            Work::Write { to, bytes } => {
                let state = self.state();
                state.inside("write", *to, bytes.len())?;
                // SAFETY: inside an allocation of the table, just checked; the bytes are no device memory.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
                Ok(())
            }
            Work::Zero { at, bytes } => {
                let state = self.state();
                state.inside("zero", *at, *bytes)?;
                // SAFETY: inside an allocation of the table, just checked.
                unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, *bytes) };
                Ok(())
            }
        }
    }
}

impl State {
    fn inside(&self, what: &str, at: Address, bytes: usize) -> Result<(), KernelError> {
        let before = self.allocations.range(..=at.0).next_back();
        match before {
            Some((start, size)) if at.0 - start + bytes as u64 <= *size as u64 => Ok(()),
            _ => Err(failure(what, format!("{bytes} bytes at {:#x} are not inside an allocation", at.0))),
        }
    }
}

impl Device for Emulated {
    type Graph = Graph;
    type Event = Event;
    type Landing = Landing;

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory_free(&self) -> Result<usize, KernelError> {
        Ok(self.memory - self.state().taken)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        self.enter("allocate")?;
        let mut state = self.state();
        let refused = KernelError::OutOfMemory { what: "device memory", bytes };
        if bytes == 0 {
            return Err(failure("allocate", "0 bytes".into()));
        }
        if bytes > self.memory - state.taken {
            return Err(refused);
        }
        let mut memory: *mut c_void = std::ptr::null_mut();
        // SAFETY: the pointer is written when this succeeds. From the C library, whose allocator the sanitiser replaces, and of
        // the exact size, so that it sees every byte beyond.
        if unsafe { libc::posix_memalign(&raw mut memory, ALIGNED, bytes) } != 0 {
            return Err(refused);
        }
        // SAFETY: just allocated.
        unsafe { std::ptr::write_bytes(memory.cast::<u8>(), POISON, bytes) };
        state.allocations.insert(memory as u64, bytes);
        state.taken += bytes;
        Ok(Address(memory as u64))
    }

    fn free(&self, address: Address, bytes: usize) {
        // What fails now has been asked for by others, who hear of nothing: as on a GPU.
        let _ = self.catch_up(u64::MAX);
        let mut state = self.state();
        let found = state.allocations.remove(&address.0);
        assert_eq!(found, Some(bytes), "free of {bytes} bytes at {:#x}", address.0);
        state.taken -= bytes;
        // SAFETY: from posix_memalign, and not in the table any more.
        unsafe { libc::free(address.0 as *mut c_void) };
    }

    unsafe fn write(&self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), KernelError> {
        self.check("write", to, bytes.len())?;
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, Work::Write { to, bytes: bytes.to_vec() }) }
    }

    unsafe fn read(&self, stream: Stream, from: Address, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.enter("read")?;
        self.check("read", from, bytes.len())?;
        if stream == Stream::Copy {
            self.catch_up(u64::MAX)?;
        }
        // SAFETY: inside an allocation, just checked; the caller's slice is no device memory.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn landing(&self, bytes: usize) -> Result<Landing, KernelError> {
        self.enter("landing")?;
        Ok(Landing { room: bytes, bytes: Vec::with_capacity(bytes) })
    }

    unsafe fn enqueue_read(
        &self,
        stream: Stream,
        from: Address,
        bytes: usize,
        landing: &mut Landing,
    ) -> Result<(), KernelError> {
        assert!(bytes <= landing.room, "{bytes} bytes where there is room for {}", landing.room);
        landing.bytes.resize(bytes, 0);
        // What the stream has been given is done by then, so this is the copy's turn.
        // SAFETY: the caller's promise.
        unsafe { self.read(stream, from, &mut landing.bytes) }
    }

    fn landed<'a>(&self, landing: &'a mut Landing) -> Result<&'a [u8], KernelError> {
        self.enter("landed")?;
        self.refuse_in_capture("landed")?;
        Ok(&landing.bytes)
    }

    unsafe fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<(), KernelError> {
        self.state().inside("zero", at, bytes)?;
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, Work::Zero { at, bytes }) }
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<(), KernelError> {
        let Launch { kernel, grid, threads, shared_bytes, params } = *launch;
        self.entry(kernel)?;
        let work = Work::Launch { kernel: kernel.into(), grid, threads, shared_bytes, params: params.to_vec() };
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, work) }
    }

    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<(), KernelError> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(stream, Work::Gemm(*gemm)) }
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<Graph, KernelError> {
        {
            let mut state = self.state();
            if state.capture.is_some() {
                return Err(failure("capture", "launches are being recorded already".into()));
            }
            state.capture = Some(Capture { thread: thread::current().id(), work: Vec::new() });
        }
        /// Ends the recording, also when `record` panics.
        struct Recording<'a>(&'a Emulated);
        impl Drop for Recording<'_> {
            fn drop(&mut self) {
                self.0.state().capture = None;
            }
        }
        let recording = Recording(self);
        record()?;
        let work = self.state().capture.take().map(|capture| capture.work);
        drop(recording);
        work.map(Graph).ok_or_else(|| failure("capture", "the recording has ended".into()))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), KernelError> {
        self.enter("replay")?;
        self.refuse_in_capture("replay")?;
        // SAFETY: the caller's promise.
        graph.0.iter().try_for_each(|work| unsafe { self.run(work) })
    }

    fn record(&self, stream: Stream) -> Result<Event, KernelError> {
        self.enter("record")?;
        self.refuse_in_capture("record")?;
        let state = self.state();
        Ok(Event { stream, enqueued: state.late_done + state.late.len() as u64, at: Instant::now() })
    }

    /// By the host's clock: what is on [`Stream::Compute`] is done when it is enqueued.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32, KernelError> {
        self.refuse_in_capture("elapsed")?;
        Ok(to.at.duration_since(from.at).as_secs_f32() * 1e3)
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<(), KernelError> {
        self.enter("wait")?;
        self.refuse_in_capture("wait")?;
        match (stream, event.stream) {
            (Stream::Compute, Stream::Copy) => self.catch_up(event.enqueued),
            // What is on the other stream has been done, and what is on the same is in order.
            _ => Ok(()),
        }
    }

    fn synchronise(&self) -> Result<(), KernelError> {
        self.enter("synchronise")?;
        self.refuse_in_capture("synchronise")?;
        self.catch_up(u64::MAX)
    }
}

fn failure(what: &str, reason: String) -> KernelError {
    KernelError::Device { device: "emulated".into(), what: what.into(), reason }
}

/// # Safety
/// `at` is in memory that goes on for `count` numbers.
unsafe fn values(at: Address, count: usize, element: Element) -> Vec<f32> {
    let number = |i: usize| {
        // SAFETY: the caller's promise; device addresses need not be aligned.
        unsafe {
            match element {
                Element::F32 => (at.0 as *const f32).add(i).read_unaligned(),
                Element::Bf16 => bf16::from_bits((at.0 as *const u16).add(i).read_unaligned()).to_f32(),
                Element::F16 => f16::from_bits((at.0 as *const u16).add(i).read_unaligned()).to_f32(),
            }
        }
    };
    (0..count).map(number).collect()
}

/// # Safety
/// `at` is in memory with room for the numbers.
unsafe fn store(at: Address, numbers: &[f32], element: Element) {
    for (i, value) in numbers.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            match element {
                Element::F32 => (at.0 as *mut f32).add(i).write_unaligned(*value),
                Element::Bf16 => (at.0 as *mut u16).add(i).write_unaligned(bf16::from_f32(*value).to_bits()),
                Element::F16 => {
                    let clamped = if value.is_nan() { *value } else { value.clamp(-65504.0, 65504.0) };
                    (at.0 as *mut u16).add(i).write_unaligned(f16::from_f32(clamped).to_bits());
                }
            }
        }
    }
}

/// `HostLaunch` in `host.hpp`.
#[repr(C)]
struct HostLaunch {
    params: *const c_void,
    params_bytes: u64,
    grid: [u32; 2],
    threads: u32,
    shared_bytes: u32,
    seed: u64,
    message: *mut c_char,
    message_bytes: u64,
    allocations: *const [u64; 2],
    allocations_count: u64,
}

type Entry = unsafe extern "C" fn(*const HostLaunch) -> c_int;

/// One file of kernels, compiled and loaded. It stays so until the process ends.
#[derive(Debug)]
struct Library {
    handle: usize,
}

impl Library {
    fn of(source: &Source) -> Result<Arc<Self>, KernelError> {
        static LOADED: Mutex<Option<HashMap<PathBuf, Arc<Library>>>> = Mutex::new(None);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let build = Build::of(source)?;
        if let Some(library) = loaded.get(&build.library) {
            return Ok(Arc::clone(library));
        }
        build.make()?;
        let library = Arc::new(Self::open(&build.library)?);
        loaded.insert(build.library, Arc::clone(&library));
        Ok(library)
    }

    fn open(path: &Path) -> Result<Self, KernelError> {
        let what = path.display().to_string();
        let name = CString::new(what.as_str()).map_err(|_| failure(&what, "a path has no zeros".into()))?;
        // SAFETY: a library just built from the kernels' sources, whose constructors do nothing; the name ends in a zero.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failure this is a string that ends in a zero, good until the next call of this thread.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
            return Err(failure(&what, reason));
        }
        Ok(Self { handle: handle as usize })
    }

    fn entry(&self, name: &CStr) -> Option<Entry> {
        // SAFETY: the handle is of a library that is never closed; the name ends in a zero.
        let address = unsafe { libc::dlsym(self.handle as *mut c_void, name.as_ptr()) };
        // SAFETY: what the library exports by such a name is a function of this type, by the macro KERNEL.
        (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Entry>(address) })
    }
}

/// How a file of kernels becomes a library.
struct Build<'a> {
    source: &'a Source,
    flags: Vec<&'static str>,
    link_flags: &'static [&'static str],
    folder: PathBuf,
    library: PathBuf,
}

impl<'a> Build<'a> {
    fn of(source: &'a Source) -> Result<Self, KernelError> {
        let kind = std::env::var(SANITISED).unwrap_or_else(|_| "nothing".into());
        // What notices races brings its own functions instead of a sanitiser's library.
        let (more, link_flags): (&[&str], &[&str]) = match kind.as_str() {
            "nothing" => (&[], &[]),
            "memory" => (MEMORY_FLAGS, MEMORY_FLAGS),
            "races" => (RACES_FLAGS, &[]),
            _ => return Err(failure(SANITISED, format!("{kind}; memory or races"))),
        };
        let flags = [FLAGS, more].concat();
        let mut hasher = DefaultHasher::new();
        for file in HEADERS.iter().chain([&HOST_HEADER, source]) {
            (file.name, file.text).hash(&mut hasher);
        }
        flags.hash(&mut hasher);
        let program = std::env::current_exe().map_err(|error| failure("the running program", error.to_string()))?;
        // In the build folder, which is the caller's own and goes with it.
        let folder = program.with_file_name("emulated-kernels");
        let library = folder.join(format!("{}.{kind}.{:016x}.so", source.name, hasher.finish()));
        Ok(Self { source, flags, link_flags, folder, library })
    }

    /// Builds the library unless it is there. Another process that builds it is waited for.
    fn make(&self) -> Result<(), KernelError> {
        if self.library.exists() {
            return Ok(());
        }
        let what = format!("build of {}", self.source.name);
        self.make_locked().map_err(|error| failure(&what, error.to_string()))
    }

    fn make_locked(&self) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let lock = File::create(self.library.with_extension("lock"))?;
        lock.lock()?;
        if self.library.exists() {
            return Ok(());
        }
        self.remove_old()?;
        let work = self.library.with_extension("work");
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir(&work)?;
        let written = HEADERS.iter().chain([&HOST_HEADER, self.source]);
        for file in written {
            fs::write(work.join(file.name), file.text)?;
        }
        // Its messages and those of the sanitisers name the files as they are named here.
        let compiler = |flags: &[&str], files: &[&str]| -> std::io::Result<()> {
            let ran = Command::new("g++")
                .args(flags)
                .args(files)
                .current_dir(&work)
                .env_remove("LD_PRELOAD")
                .env_remove("ASAN_OPTIONS")
                .output()
                .map_err(|error| std::io::Error::other(format!("g++: {error}; run scripts/prerequisites.sh")))?;
            let messages = String::from_utf8_lossy(&ran.stderr);
            if !ran.status.success() {
                return Err(std::io::Error::other(format!("g++ refuses it\n{messages}")));
            }
            eprint!("{messages}");
            Ok(())
        };
        compiler(&self.flags, &["-c", self.source.name, "-o", "kernels.o"])?;
        compiler(self.link_flags, &["-shared", "kernels.o", "-o", "kernels.so"])?;
        fs::rename(work.join("kernels.so"), &self.library)?;
        fs::remove_dir_all(&work)
    }

    /// Removes this file's libraries that nobody has needed for a day.
    fn remove_old(&self) -> std::io::Result<()> {
        let prefix = format!("{}.", self.source.name);
        for entry in fs::read_dir(&self.folder)?.flatten() {
            let old = entry
                .metadata()
                .and_then(|of| of.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > Duration::from_secs(24 * 3600)));
            if old && entry.file_name().to_string_lossy().starts_with(&prefix) && entry.path().is_file() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}
