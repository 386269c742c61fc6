//! Kernels compiled for the device at hand by NVRTC, and kept on disk so that only the first start compiles.
//!
//! A file of the cache is `NAME-ARCH-KEY.bin`; KEY is the start of the BLAKE3 of everything the result depends on: the source,
//! the headers, the options, the architecture and NVRTC's version. In it:
//!
//! ```text
//! "OLKERNL1" | length of the image, u64 little-endian | BLAKE3 of the image, 32 bytes | the image
//! ```
//!
//! A file that is cut off or changed is compiled again, never loaded.

use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::SystemTime;

use super::library::{Nvrtc, Places};
use super::sources::{HEADERS, KERNELS, Source, nvrtc_options};
use crate::KernelError;

/// Files the cache keeps beyond those in use.
const KEPT_FILES: usize = 64;
/// Of a compiler's log, what an error carries.
const LOG_BYTES: usize = 4096;
/// A finished image, by NVRTC's own words, is far smaller.
const IMAGE_BYTES_MAX: u64 = 256 << 20;
const MAGIC: &[u8; 8] = b"OLKERNL1";
const HEADER: usize = 8 + 8 + 32;

/// What is compiled.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The `.cu` files.
    pub sources: &'a [Source],
    /// What they include.
    pub headers: &'a [Source],
    /// NVRTC's options for an architecture.
    pub options: fn(&str) -> Vec<String>,
}

impl Job<'static> {
    /// The product's kernels.
    #[must_use]
    pub fn product() -> Self {
        Self { sources: KERNELS, headers: HEADERS, options: nvrtc_options }
    }
}

/// What kernels are compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As NVRTC's option takes it: `sm_90a`, or `compute_90` where the driver is to do the rest.
    pub arch: String,
}

impl Target {
    /// For a compute capability, given what NVRTC compiles for (`supported`, such as 75, 80, 90).
    ///
    /// Machine code runs on the same major version only, and not on a smaller minor one. Where there is none, the newest older
    /// PTX is taken, which the driver compiles.
    ///
    /// # Errors
    /// The capability is below 7.5, or nothing fits.
    pub fn of(compute: (u32, u32), supported: &[u32]) -> Result<Self, KernelError> {
        let (major, minor) = compute;
        let number = major * 10 + minor;
        let unfit = |reason: String| KernelError::Device {
            device: "cuda".to_owned(),
            what: format!("kernels for compute capability {major}.{minor}"),
            reason,
        };
        if number < 75 {
            return Err(unfit("a GPU of compute capability 7.5 (Turing) or newer is needed".to_owned()));
        }
        if supported.contains(&number) {
            // The feature sets of these two are what their tensor cores are programmed through.
            let suffix = if number == 90 || number == 100 { "a" } else { "" };
            return Ok(Self { arch: format!("sm_{number}{suffix}") });
        }
        let older = || supported.iter().copied().filter(|other| *other < number && *other >= 75);
        if let Some(near) = older().filter(|other| other / 10 == major).max() {
            return Ok(Self { arch: format!("sm_{near}") });
        }
        let newest = older().max().ok_or_else(|| unfit(format!("NVRTC compiles for {supported:?} only")))?;
        Ok(Self { arch: format!("compute_{newest}") })
    }

    fn is_ptx(&self) -> bool {
        self.arch.starts_with("compute_")
    }
}

/// One compiled file.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// Its source's name.
    pub name: String,
    /// Machine code, or PTX that ends in NUL.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {} bytes)", self.name, self.bytes.len())
    }
}

/// One file is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Its source's name.
    pub name: &'a str,
    /// Files ready, this one included.
    pub done: usize,
    /// Files.
    pub total: usize,
    /// Compiled just now, as against found in the cache.
    pub compiled: bool,
}

/// Where compiled kernels are kept: `$OPENLORA_HOME/kernels`, or `~/.cache/openlora/kernels`.
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    Some(super::library::home()?.join("kernels"))
}

/// NVRTC with a cache.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: Arc<Nvrtc>,
    version: (u32, u32),
    supported: Vec<u32>,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// Loads NVRTC, at most of CUDA's major version `newest`: a driver does not load what a later toolkit made.
    ///
    /// # Errors
    /// It is not there or cannot be used.
    pub fn new(places: &Places, newest: Option<u32>, cache: Option<PathBuf>) -> Result<Self, KernelError> {
        let nvrtc = Nvrtc::load(places, newest)?;
        let version = nvrtc.version();
        let mut count = 0;
        // SAFETY: a place for a number.
        nvrtc.check("asking what it compiles for", unsafe { (nvrtc.nvrtcGetNumSupportedArchs)(&mut count) })?;
        let mut supported = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: room for as many numbers as the library has just said.
        let status = unsafe { (nvrtc.nvrtcGetSupportedArchs)(supported.as_mut_ptr()) };
        nvrtc.check("asking what it compiles for", status)?;
        let supported = supported.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect();
        Ok(Self { nvrtc: Arc::new(nvrtc), version, supported, cache })
    }

    /// CUDA's version that the compiler belongs to.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// What kernels for a compute capability are compiled as.
    ///
    /// # Errors
    /// As [`Target::of`].
    pub fn target(&self, compute: (u32, u32)) -> Result<Target, KernelError> {
        Target::of(compute, &self.supported)
    }

    /// Compiles what the cache does not have, several files at a time; results are in the order of the sources.
    ///
    /// # Errors
    /// A source does not compile; the error has the compiler's log. A cache that cannot be written is none.
    pub fn compile(
        &self,
        target: &Target,
        job: &Job<'_>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Vec<Image>, KernelError> {
        let total = job.sources.len();
        let files: Vec<String> = job.sources.iter().map(|source| self.file_name(target, job, source)).collect();
        let mut images: Vec<Option<Vec<u8>>> = vec![None; total];
        let mut done = 0;
        for (index, Source { name, .. }) in job.sources.iter().enumerate() {
            let found = self.cache.as_ref().and_then(|cache| read_image(&cache.join(&files[index])));
            if let Some(found) = found {
                images[index] = Some(found);
                done += 1;
                progress(Progress { name, done, total, compiled: false });
            }
        }
        let missing: Vec<usize> = (0..total).filter(|index| images[*index].is_none()).collect();
        if !missing.is_empty() {
            let mut failed = None;
            self.compile_missing(target, job, &missing, &mut |index, outcome| match outcome {
                Ok(image) => {
                    if let Some(cache) = &self.cache {
                        // A read-only home costs time at the next start and nothing else.
                        let _ = write_image(cache, &files[index], &image);
                    }
                    images[index] = Some(image);
                    done += 1;
                    progress(Progress { name: job.sources[index].name, done, total, compiled: true });
                }
                Err(error) => failed = failed.take().or(Some(error)),
            });
            if let Some(error) = failed {
                return Err(error);
            }
            if let Some(cache) = &self.cache {
                remove_old(cache, &files);
            }
        }
        let named = images.into_iter().zip(job.sources);
        Ok(named
            .map(|(bytes, source)| Image { name: source.name.to_owned(), bytes: bytes.unwrap_or_default() })
            .collect())
    }

    /// Compiles the sources of these numbers on several threads and hands each outcome to `finished` on this one.
    fn compile_missing(
        &self,
        target: &Target,
        job: &Job<'_>,
        missing: &[usize],
        finished: &mut dyn FnMut(usize, Result<Vec<u8>, KernelError>),
    ) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(missing.len());
        let next = AtomicUsize::new(0);
        let (sender, results) = mpsc::sync_channel(missing.len());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    while let Some(&index) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let outcome = self.compile_one(target, job, &job.sources[index]);
                        if sender.send((index, outcome)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (index, outcome) in results {
                finished(index, outcome);
            }
        });
    }

    fn compile_one(&self, target: &Target, job: &Job<'_>, source: &Source) -> Result<Vec<u8>, KernelError> {
        let what = format!("compiling {} for {}", source.name, target.arch);
        let text = |value: &str| {
            CString::new(value).map_err(|_| self.nvrtc.error(&what, "a text with a NUL in it".to_owned()))
        };
        let (name, body) = (text(source.name)?, text(source.text)?);
        let mut names = Vec::new();
        let mut bodies = Vec::new();
        for header in job.headers {
            names.push(text(header.name)?);
            bodies.push(text(header.text)?);
        }
        let options = (job.options)(&target.arch).iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let program = Program::new(&self.nvrtc, &what, (&name, &body), (&names, &bodies))?;
        program.compile(&what, &options)?;
        program.image(&what, target.is_ptx())
    }

    /// The cache's file for a source: everything the image depends on is in its name.
    fn file_name(&self, target: &Target, job: &Job<'_>, source: &Source) -> String {
        let mut hasher = blake3::Hasher::new();
        // Lengths keep two lists apart whose texts join to the same.
        let mut put = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        let options = (job.options)(&target.arch);
        put(&format!("nvrtc {}.{} {}", self.version.0, self.version.1, options.len()));
        options.iter().for_each(|option| put(option));
        for file in std::iter::once(source).chain(job.headers) {
            put(file.name);
            put(file.text);
        }
        let stem = source.name.trim_end_matches(".cu").replace(['/', '\\'], "_");
        format!("{stem}-{}-{}.bin", target.arch, &hasher.finalize().to_hex()[..32])
    }
}

/// A program of NVRTC's.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: cudarc::nvrtc::sys::nvrtcProgram,
}

impl<'a> Program<'a> {
    fn new(
        nvrtc: &'a Nvrtc,
        what: &str,
        source: (&CStr, &CStr),
        headers: (&[CString], &[CString]),
    ) -> Result<Self, KernelError> {
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
        let (names, bodies) = (pointers(headers.0), pointers(headers.1));
        let mut handle = std::ptr::null_mut();
        // SAFETY: strings end in NUL; the arrays have as many of them as is said; NVRTC copies all of it.
        nvrtc.check(what, unsafe {
            (nvrtc.nvrtcCreateProgram)(
                &mut handle,
                source.1.as_ptr(),
                source.0.as_ptr(),
                names.len() as i32,
                bodies.as_ptr(),
                names.as_ptr(),
            )
        })?;
        Ok(Self { nvrtc, handle })
    }

    fn compile(&self, what: &str, options: &[CString]) -> Result<(), KernelError> {
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive; the array has as many strings as is said, each ends in NUL.
        let status = unsafe { (self.nvrtc.nvrtcCompileProgram)(self.handle, options.len() as i32, options.as_ptr()) };
        self.nvrtc.check(what, status).map_err(|error| match error {
            KernelError::Device { device, what, reason } => {
                KernelError::Device { device, what, reason: format!("{reason}\n{}", self.log()) }
            }
            other => other,
        })
    }

    /// The start of the compiler's log.
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program is alive, and there is a place for a number.
        let status = unsafe { (self.nvrtc.nvrtcGetProgramLogSize)(self.handle, &mut size) };
        if status != 0 || size == 0 {
            return String::new();
        }
        let mut log = vec![0_u8; size];
        // SAFETY: room for as many bytes as NVRTC has just said.
        if unsafe { (self.nvrtc.nvrtcGetProgramLog)(self.handle, log.as_mut_ptr().cast()) } != 0 {
            return String::new();
        }
        log.truncate(LOG_BYTES.min(log.iter().position(|byte| *byte == 0).unwrap_or(size)));
        String::from_utf8_lossy(&log).trim_end().to_owned()
    }

    fn image(&self, what: &str, ptx: bool) -> Result<Vec<u8>, KernelError> {
        let nvrtc = self.nvrtc;
        let (size_of, get) = if ptx {
            (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        } else {
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        };
        let mut size = 0;
        // SAFETY: the program is alive, and there is a place for a number.
        nvrtc.check(what, unsafe { size_of(self.handle, &mut size) })?;
        let mut image = vec![0_u8; size];
        // SAFETY: room for as many bytes as NVRTC has just said.
        nvrtc.check(what, unsafe { get(self.handle, image.as_mut_ptr().cast()) })?;
        if image.is_empty() {
            return Err(nvrtc.error(what, "NVRTC made nothing".to_owned()));
        }
        Ok(image)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is alive and is not used again.
        unsafe { (self.nvrtc.nvrtcDestroyProgram)(&mut self.handle) };
    }
}

impl Nvrtc {
    fn check(&self, what: &str, status: u32) -> Result<(), KernelError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the same function, with its enum as the number that it is in C: it takes any.
        let text_of = unsafe {
            std::mem::transmute::<
                unsafe extern "C" fn(cudarc::nvrtc::sys::nvrtcResult) -> *const c_char,
                unsafe extern "C" fn(u32) -> *const c_char,
            >(self.nvrtcGetErrorString)
        };
        // SAFETY: any number is answered with a string that ends in NUL and stays, or with null.
        let text = unsafe {
            let text = text_of(status);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        Err(self.error(what, format!("NVRTC: {text} ({status})")))
    }

    fn error(&self, what: &str, reason: String) -> KernelError {
        KernelError::Device { device: "cuda".to_owned(), what: what.to_owned(), reason }
    }
}

/// The image in a file of the cache, if it is whole.
fn read_image(path: &Path) -> Option<Vec<u8>> {
    if fs::metadata(path).ok()?.len() > IMAGE_BYTES_MAX {
        return None;
    }
    let mut bytes = fs::read(path).ok()?;
    let header: [u8; HEADER] = bytes.get(..HEADER)?.try_into().ok()?;
    let image = bytes.split_off(HEADER);
    let length = u64::from_le_bytes(header[8..16].try_into().ok()?);
    let whole =
        header[..8] == *MAGIC && length == image.len() as u64 && header[16..] == *blake3::hash(&image).as_bytes();
    whole.then_some(image)
}

/// Whoever reads the file sees all of it or none: it gets its name when it is complete and on the disk.
fn write_image(folder: &Path, name: &str, image: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let path = folder.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = fs::File::create(&path)?;
        file.write_all(MAGIC)?;
        file.write_all(&(image.len() as u64).to_le_bytes())?;
        file.write_all(blake3::hash(image).as_bytes())?;
        file.write_all(image)?;
        file.sync_all()?;
        fs::rename(&path, folder.join(name))
    })();
    if written.is_err() {
        let _ = fs::remove_file(&path);
    }
    written
}

/// Removes the oldest of other versions' files, so that the folder stays small.
fn remove_old(folder: &Path, current: &[String]) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut others: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Also what a process that was killed left half written.
            name.contains(".bin") && !current.iter().any(|used| *used == name)
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    others.sort_by(|a, b| b.cmp(a));
    for (_, path) in others.into_iter().skip(KEPT_FILES) {
        let _ = fs::remove_file(path);
    }
}
