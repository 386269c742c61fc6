//! CUDA's three libraries, found and loaded when they are needed: the same binary starts where there are none of them.
//!
//! | library | what for | comes with |
//! |---|---|---|
//! | `libcuda` | the driver | the GPU's driver |
//! | `libnvrtc` | compiles the kernels | a CUDA toolkit, or pip's `nvidia-cuda-nvrtc` |
//! | `libcublasLt` | matrix products | a CUDA toolkit, or pip's `nvidia-cublas` |
//!
//! A library is a table of functions taken from it once; a library or a function that is not there is a [`Missing`], never a
//! panic. Signatures are compared with cudarc's, which are made from CUDA's headers, when this is compiled.

use std::env;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys as blas;
use cudarc::driver::sys as cu;
use cudarc::nvrtc::sys as nvrtc;

use crate::KernelError;

/// A library that cannot be used, and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its file names, newest first.
    pub library: String,
    /// Where it was looked for.
    pub looked: Vec<String>,
    /// What was found but could not be used, and why.
    pub refused: Vec<String>,
    /// What to install or set.
    pub advice: &'static str,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.refused.as_slice() {
            [] => write!(f, "{} was not found", self.library)?,
            refused => write!(f, "{} cannot be used: {}", self.library, refused.join("; "))?,
        }
        write!(f, "; {}; looked in {}", self.advice, self.looked.join(", "))
    }
}

impl std::error::Error for Missing {}

impl From<Missing> for KernelError {
    fn from(missing: Missing) -> Self {
        Self::Device {
            device: "cuda".to_owned(),
            what: format!("loading {}", missing.library),
            reason: missing.to_string(),
        }
    }
}

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Driver,
    Nvrtc,
    CublasLt,
}

impl Kind {
    /// Names of its file, with the major version of CUDA it belongs to.
    fn names(self) -> &'static [(&'static str, u32)] {
        match self {
            Self::Driver => &[("libcuda.so.1", 0)],
            Self::Nvrtc => &[("libnvrtc.so.13", 13), ("libnvrtc.so.12", 12)],
            Self::CublasLt => &[("libcublasLt.so.13", 13), ("libcublasLt.so.12", 12)],
        }
    }

    fn variable(self) -> Option<&'static str> {
        match self {
            Self::Driver => None,
            Self::Nvrtc => Some("OPENLORA_NVRTC"),
            Self::CublasLt => Some("OPENLORA_CUBLASLT"),
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Driver => {
                "install NVIDIA's driver for CUDA 12.4 or newer; in a container, start it with the NVIDIA container \
                 toolkit (`--gpus all`)"
            }
            Self::Nvrtc => {
                "install a CUDA toolkit or run `pip install nvidia-cuda-nvrtc` (`nvidia-cuda-nvrtc-cu12` with a driver \
                 for CUDA 12), or set OPENLORA_NVRTC to the file"
            }
            Self::CublasLt => {
                "install a CUDA toolkit or run `pip install nvidia-cublas` (`nvidia-cublas-cu12` with a driver for \
                 CUDA 12), or set OPENLORA_CUBLASLT to the file"
            }
        }
    }
}

/// Where this program keeps things between runs: `$OPENLORA_HOME`, or `~/.cache/openlora`.
pub(crate) fn home() -> Option<PathBuf> {
    variable("OPENLORA_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache/openlora")))
}

/// The path in a variable of the environment that is set to one.
fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where libraries are looked for: first a file or folder that the environment names, then where the dynamic loader looks
/// (`LD_LIBRARY_PATH`, the system's cache), then these folders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// File or folder of NVRTC; nothing else is tried when it is set.
    pub nvrtc: Option<PathBuf>,
    /// File or folder of cuBLASLt; nothing else is tried when it is set.
    pub cublaslt: Option<PathBuf>,
    /// Whether the dynamic loader is asked by name.
    pub loader: bool,
    /// Folders, best first.
    pub folders: Vec<PathBuf>,
}

impl Places {
    /// What the environment says, and where toolkits, pip and `scripts/fetch-nvrtc.sh` put their libraries.
    #[must_use]
    pub fn from_environment() -> Self {
        let named = |kind: Kind| kind.variable().and_then(variable);
        let mut folders =
            vec!["/usr/local/nvidia/lib64".into(), "/usr/local/nvidia/lib".into(), "/usr/lib/wsl/lib".into()];
        for root in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable) {
            folders.push(root.join("lib64"));
        }
        folders.push("/usr/local/cuda/lib64".into());
        let newest_first = |mut versions: Vec<PathBuf>| {
            versions.sort();
            versions.into_iter().rev()
        };
        let toolkits = matching(Path::new("/usr/local"), "cuda-");
        folders.extend(newest_first(toolkits).map(|toolkit| toolkit.join("lib64")));
        folders.push("/opt/cuda/lib64".into());

        // Prefixes of Python installations: the environment in use, what `python3` on PATH belongs to, the system, the user.
        let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).collect();
        let search = env::var_os("PATH").unwrap_or_default();
        prefixes.extend(
            env::split_paths(&search)
                .filter(|bin| bin.join("python3").exists())
                .filter_map(|bin| bin.parent().map(Path::to_owned)),
        );
        prefixes.extend(["/usr/local".into(), "/usr".into()]);
        prefixes.extend(variable("HOME").map(|home| home.join(".local")));
        for prefix in prefixes {
            let mut lib = vec![prefix.join("lib")];
            lib.extend(matching(&prefix.join("lib"), "python3"));
            for packages in lib.iter().flat_map(|lib| [lib.join("site-packages"), lib.join("dist-packages")]) {
                let nvidia = packages.join("nvidia");
                if nvidia.is_dir() {
                    let inside = ["cu13/lib", "cu12/lib", "cuda_nvrtc/lib", "cublas/lib"];
                    folders.extend(inside.into_iter().map(|inside| nvidia.join(inside)).filter(|found| found.is_dir()));
                }
            }
        }
        let fetched = home().map(|home| matching(&home.join("nvrtc"), ""));
        folders.extend(newest_first(fetched.unwrap_or_default()));
        let mut seen = std::collections::HashSet::new();
        folders.retain(|folder: &PathBuf| seen.insert(folder.clone()));
        Self { nvrtc: named(Kind::Nvrtc), cublaslt: named(Kind::CublasLt), loader: true, folders }
    }

    /// These folders and nothing else.
    #[must_use]
    pub fn only(folders: Vec<PathBuf>) -> Self {
        Self { folders, ..Self::default() }
    }
}

/// What is in `folder` and starts with `prefix`.
fn matching(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_bytes().starts_with(prefix.as_bytes()))
        .map(|entry| entry.path())
        .collect()
}

/// A library that is never unloaded: CUDA's libraries start threads and register exit handlers.
struct Library {
    handle: *mut c_void,
    name: String,
}

impl Library {
    /// Loads the library, at most of CUDA's major version `newest`.
    fn open(kind: Kind, places: &Places, newest: Option<u32>) -> Result<Self, Missing> {
        let names: Vec<&str> = kind
            .names()
            .iter()
            .filter(|(_, major)| newest.is_none_or(|newest| *major <= newest))
            .map(|(name, _)| *name)
            .collect();
        let mut missing =
            Missing { library: names.join(" or "), looked: Vec::new(), refused: Vec::new(), advice: kind.advice() };
        let named = match kind {
            Kind::Driver => None,
            Kind::Nvrtc => places.nvrtc.as_deref(),
            Kind::CublasLt => places.cublaslt.as_deref(),
        };
        if let Some(named) = named {
            missing.looked.push(format!("{} (by {})", named.display(), kind.variable().unwrap_or_default()));
            if named.is_dir() {
                return missing.in_folders(&names, &[named]);
            }
            return missing.file(named).ok_or(missing);
        }
        if places.loader {
            missing.looked.push("LD_LIBRARY_PATH and the loader's cache".to_owned());
            for name in &names {
                match dlopen(OsStr::new(name)) {
                    Ok(handle) => return Ok(Self { handle, name: (*name).to_owned() }),
                    // Found nowhere, as against found and not loadable.
                    Err(reason) if reason.starts_with(&format!("{name}: cannot open shared object file")) => {}
                    Err(reason) => missing.refused.push(reason),
                }
            }
        }
        let folders: Vec<&Path> = places.folders.iter().map(PathBuf::as_path).collect();
        missing.looked.extend(folders.iter().map(|folder| folder.display().to_string()));
        missing.in_folders(&names, &folders)
    }

    /// The address of a function, or the library is refused.
    fn function(&self, kind: Kind, name: &CStr) -> Result<*mut c_void, Missing> {
        // SAFETY: the handle is dlopen's and is never closed; the name ends in NUL.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if address.is_null() {
            return Err(Missing {
                library: self.name.clone(),
                looked: vec![self.name.clone()],
                refused: vec![format!("it has no {}, so it is too old", name.to_string_lossy())],
                advice: kind.advice(),
            });
        }
        Ok(address)
    }
}

impl Missing {
    fn in_folders(mut self, names: &[&str], folders: &[&Path]) -> Result<Library, Self> {
        for name in names {
            for path in folders.iter().map(|folder| folder.join(name)).filter(|path| path.exists()) {
                if let Some(library) = self.file(&path) {
                    return Ok(library);
                }
            }
        }
        Err(self)
    }

    fn file(&mut self, path: &Path) -> Option<Library> {
        // NVRTC loads its built-in functions by name, and a folder of pip's is not where the loader looks for names: loaded
        // from beside it beforehand, they are found.
        for builtins in path.parent().map(|folder| matching(folder, "libnvrtc-builtins.so")).unwrap_or_default() {
            let _ = dlopen(builtins.as_os_str());
        }
        match dlopen(path.as_os_str()) {
            Ok(handle) => Some(Library { handle, name: path.display().to_string() }),
            Err(reason) => {
                self.refused.push(reason);
                None
            }
        }
    }
}

fn dlopen(name: &OsStr) -> Result<*mut c_void, String> {
    let text = CString::new(name.as_bytes()).map_err(|_| format!("{} has a NUL in it", name.to_string_lossy()))?;
    // SAFETY: the name ends in NUL. Initialisers of the library run: it is one of CUDA's by name, or one that the operator named.
    let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: dlerror returns null or a string that ends in NUL and stays until this thread's next call of its kind.
    let reason = unsafe {
        let text = libc::dlerror();
        if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
    };
    Err(reason.unwrap_or_else(|| format!("{}: the loader gave no reason", name.to_string_lossy())))
}

/// The file that holds the code at `address`.
fn file_of(address: *mut c_void) -> Option<PathBuf> {
    // SAFETY: Dl_info is plain data; zero is a value of it.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr takes any address and fills `info` where it returns other than 0.
    let known = unsafe { libc::dladdr(address, &mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: dli_fname is a string that ends in NUL and lives as long as the library, which is never unloaded.
    known.then(|| PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes())))
}

/// cudarc's names of the driver's functions. One of them CUDA 13's headers have under its second name only; drivers have both.
mod driver {
    pub(super) use cudarc::driver::sys::cuEventElapsedTime_v2 as cuEventElapsedTime;
    pub(super) use cudarc::driver::sys::*;
}

/// A table of functions. Each line is a function's signature in CUDA's header, the type of its result in cudarc, and the type
/// it is taken as here: a number where cudarc has an enum, since a newer library may return what the enum does not have.
macro_rules! library {
    ($(#[$meta:meta])* $table:ident, $kind:expr, $module:ident {
        $(fn $function:ident($($type:ty),*) -> $theirs:ty as $ours:ty;)*
    }) => {
        $(#[$meta])*
        #[allow(non_snake_case)]
        pub(crate) struct $table {
            $(pub(crate) $function: unsafe extern "C" fn($($type),*) -> $ours,)*
            /// The file it came from.
            pub(crate) file: PathBuf,
        }

        impl $table {
            /// Loads the library, at most of CUDA's major version `newest`.
            pub(crate) fn load(places: &Places, newest: Option<u32>) -> Result<Self, Missing> {
                let library = Library::open($kind, places, newest)?;
                let mut last;
                Ok(Self {
                    $($function: {
                        const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($function), "\0").as_bytes()) {
                            Ok(name) => name,
                            Err(_) => unreachable!(),
                        };
                        last = library.function($kind, NAME)?;
                        // SAFETY: the function of this name in CUDA's library, whose signature is compared with cudarc's
                        // below; an enum of C is returned as the number it is.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $ours>(last) }
                    },)*
                    file: file_of(last).unwrap_or_else(|| PathBuf::from(&library.name)),
                })
            }
        }

        impl fmt::Debug for $table {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($table)).field("file", &self.file).finish_non_exhaustive()
            }
        }

        const _: () = {
            $(let _: unsafe fn($($type),*) -> $theirs = $module::$function;)*
        };
    };
}

library! {
    /// The driver, 12.4 or newer (`cuFuncLoad`, `cuModuleEnumerateFunctions`).
    Cuda, Kind::Driver, driver {
        fn cuGetErrorName(cu::CUresult, *mut *const c_char) -> cu::CUresult as u32;
        fn cuGetErrorString(cu::CUresult, *mut *const c_char) -> cu::CUresult as u32;
        fn cuInit(c_uint) -> cu::CUresult as u32;
        fn cuDriverGetVersion(*mut c_int) -> cu::CUresult as u32;
        fn cuDeviceGetCount(*mut c_int) -> cu::CUresult as u32;
        fn cuDeviceGet(*mut cu::CUdevice, c_int) -> cu::CUresult as u32;
        fn cuDeviceGetName(*mut c_char, c_int, cu::CUdevice) -> cu::CUresult as u32;
        fn cuDeviceGetAttribute(*mut c_int, cu::CUdevice_attribute, cu::CUdevice) -> cu::CUresult as u32;
        fn cuDeviceTotalMem_v2(*mut usize, cu::CUdevice) -> cu::CUresult as u32;
        fn cuDevicePrimaryCtxRetain(*mut cu::CUcontext, cu::CUdevice) -> cu::CUresult as u32;
        fn cuDevicePrimaryCtxRelease_v2(cu::CUdevice) -> cu::CUresult as u32;
        fn cuCtxSetCurrent(cu::CUcontext) -> cu::CUresult as u32;
        fn cuStreamCreate(*mut cu::CUstream, c_uint) -> cu::CUresult as u32;
        fn cuStreamDestroy_v2(cu::CUstream) -> cu::CUresult as u32;
        fn cuStreamSynchronize(cu::CUstream) -> cu::CUresult as u32;
        fn cuStreamWaitEvent(cu::CUstream, cu::CUevent, c_uint) -> cu::CUresult as u32;
        fn cuStreamBeginCapture_v2(cu::CUstream, cu::CUstreamCaptureMode) -> cu::CUresult as u32;
        fn cuStreamEndCapture(cu::CUstream, *mut cu::CUgraph) -> cu::CUresult as u32;
        fn cuThreadExchangeStreamCaptureMode(*mut cu::CUstreamCaptureMode) -> cu::CUresult as u32;
        fn cuGraphInstantiateWithFlags(*mut cu::CUgraphExec, cu::CUgraph, u64) -> cu::CUresult as u32;
        fn cuGraphUpload(cu::CUgraphExec, cu::CUstream) -> cu::CUresult as u32;
        fn cuGraphLaunch(cu::CUgraphExec, cu::CUstream) -> cu::CUresult as u32;
        fn cuGraphExecDestroy(cu::CUgraphExec) -> cu::CUresult as u32;
        fn cuGraphDestroy(cu::CUgraph) -> cu::CUresult as u32;
        fn cuEventCreate(*mut cu::CUevent, c_uint) -> cu::CUresult as u32;
        fn cuEventRecord(cu::CUevent, cu::CUstream) -> cu::CUresult as u32;
        fn cuEventSynchronize(cu::CUevent) -> cu::CUresult as u32;
        fn cuEventDestroy_v2(cu::CUevent) -> cu::CUresult as u32;
        fn cuEventElapsedTime(*mut f32, cu::CUevent, cu::CUevent) -> cu::CUresult as u32;
        fn cuMemGetInfo_v2(*mut usize, *mut usize) -> cu::CUresult as u32;
        fn cuMemAlloc_v2(*mut cu::CUdeviceptr, usize) -> cu::CUresult as u32;
        fn cuMemFree_v2(cu::CUdeviceptr) -> cu::CUresult as u32;
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint) -> cu::CUresult as u32;
        fn cuMemFreeHost(*mut c_void) -> cu::CUresult as u32;
        fn cuMemcpyHtoDAsync_v2(cu::CUdeviceptr, *const c_void, usize, cu::CUstream) -> cu::CUresult as u32;
        fn cuMemcpyDtoHAsync_v2(*mut c_void, cu::CUdeviceptr, usize, cu::CUstream) -> cu::CUresult as u32;
        fn cuMemsetD8Async(cu::CUdeviceptr, u8, usize, cu::CUstream) -> cu::CUresult as u32;
        fn cuModuleLoadData(*mut cu::CUmodule, *const c_void) -> cu::CUresult as u32;
        fn cuModuleUnload(cu::CUmodule) -> cu::CUresult as u32;
        fn cuModuleGetFunctionCount(*mut c_uint, cu::CUmodule) -> cu::CUresult as u32;
        fn cuModuleEnumerateFunctions(*mut cu::CUfunction, c_uint, cu::CUmodule) -> cu::CUresult as u32;
        fn cuFuncGetName(*mut *const c_char, cu::CUfunction) -> cu::CUresult as u32;
        fn cuFuncLoad(cu::CUfunction) -> cu::CUresult as u32;
        fn cuFuncGetParamInfo(cu::CUfunction, usize, *mut usize, *mut usize) -> cu::CUresult as u32;
        fn cuFuncGetAttribute(*mut c_int, cu::CUfunction_attribute, cu::CUfunction) -> cu::CUresult as u32;
        fn cuFuncSetAttribute(cu::CUfunction, cu::CUfunction_attribute, c_int) -> cu::CUresult as u32;
        fn cuLaunchKernel(cu::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, cu::CUstream,
            *mut *mut c_void, *mut *mut c_void) -> cu::CUresult as u32;
    }
}

library! {
    /// The compiler of kernels.
    Nvrtc, Kind::Nvrtc, nvrtc {
        fn nvrtcVersion(*mut c_int, *mut c_int) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetNumSupportedArchs(*mut c_int) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetSupportedArchs(*mut c_int) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetErrorString(nvrtc::nvrtcResult) -> *const c_char as *const c_char;
        fn nvrtcCreateProgram(*mut nvrtc::nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char,
            *const *const c_char) -> nvrtc::nvrtcResult as u32;
        fn nvrtcDestroyProgram(*mut nvrtc::nvrtcProgram) -> nvrtc::nvrtcResult as u32;
        fn nvrtcCompileProgram(nvrtc::nvrtcProgram, c_int, *const *const c_char) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetProgramLogSize(nvrtc::nvrtcProgram, *mut usize) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetProgramLog(nvrtc::nvrtcProgram, *mut c_char) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetCUBINSize(nvrtc::nvrtcProgram, *mut usize) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetCUBIN(nvrtc::nvrtcProgram, *mut c_char) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetPTXSize(nvrtc::nvrtcProgram, *mut usize) -> nvrtc::nvrtcResult as u32;
        fn nvrtcGetPTX(nvrtc::nvrtcProgram, *mut c_char) -> nvrtc::nvrtcResult as u32;
    }
}

library! {
    /// Matrix products.
    CublasLt, Kind::CublasLt, blas {
        fn cublasLtGetVersion() -> usize as usize;
        fn cublasLtCreate(*mut blas::cublasLtHandle_t) -> blas::cublasStatus_t as u32;
        fn cublasLtDestroy(blas::cublasLtHandle_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulDescCreate(*mut blas::cublasLtMatmulDesc_t, blas::cublasComputeType_t, blas::cudaDataType)
            -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulDescDestroy(blas::cublasLtMatmulDesc_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulDescSetAttribute(blas::cublasLtMatmulDesc_t, blas::cublasLtMatmulDescAttributes_t, *const c_void,
            usize) -> blas::cublasStatus_t as u32;
        fn cublasLtMatrixLayoutCreate(*mut blas::cublasLtMatrixLayout_t, blas::cudaDataType, u64, u64, c_longlong)
            -> blas::cublasStatus_t as u32;
        fn cublasLtMatrixLayoutDestroy(blas::cublasLtMatrixLayout_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulPreferenceCreate(*mut blas::cublasLtMatmulPreference_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulPreferenceDestroy(blas::cublasLtMatmulPreference_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulPreferenceSetAttribute(blas::cublasLtMatmulPreference_t,
            blas::cublasLtMatmulPreferenceAttributes_t, *const c_void, usize) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulAlgoGetHeuristic(blas::cublasLtHandle_t, blas::cublasLtMatmulDesc_t,
            blas::cublasLtMatrixLayout_t, blas::cublasLtMatrixLayout_t, blas::cublasLtMatrixLayout_t,
            blas::cublasLtMatrixLayout_t, blas::cublasLtMatmulPreference_t, c_int,
            *mut blas::cublasLtMatmulHeuristicResult_t, *mut c_int) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulAlgoCheck(blas::cublasLtHandle_t, blas::cublasLtMatmulDesc_t, blas::cublasLtMatrixLayout_t,
            blas::cublasLtMatrixLayout_t, blas::cublasLtMatrixLayout_t, blas::cublasLtMatrixLayout_t,
            *const blas::cublasLtMatmulAlgo_t, *mut blas::cublasLtMatmulHeuristicResult_t) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmulAlgoConfigGetAttribute(*const blas::cublasLtMatmulAlgo_t,
            blas::cublasLtMatmulAlgoConfigAttributes_t, *mut c_void, usize, *mut usize) -> blas::cublasStatus_t as u32;
        fn cublasLtMatmul(blas::cublasLtHandle_t, blas::cublasLtMatmulDesc_t, *const c_void, *const c_void,
            blas::cublasLtMatrixLayout_t, *const c_void, blas::cublasLtMatrixLayout_t, *const c_void, *const c_void,
            blas::cublasLtMatrixLayout_t, *mut c_void, blas::cublasLtMatrixLayout_t, *const blas::cublasLtMatmulAlgo_t,
            *mut c_void, usize, blas::cudaStream_t) -> blas::cublasStatus_t as u32;
    }
}

impl Nvrtc {
    /// Its version, as CUDA's.
    pub(crate) fn version(&self) -> (u32, u32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two places for numbers, as the function's header asks.
        unsafe { (self.nvrtcVersion)(&mut major, &mut minor) };
        (major.max(0).cast_unsigned(), minor.max(0).cast_unsigned())
    }
}

impl CublasLt {
    /// Its version: major, minor, patch.
    pub(crate) fn version(&self) -> (u32, u32, u32) {
        // SAFETY: a function without arguments.
        let number = unsafe { (self.cublasLtGetVersion)() } as u32;
        // 130100 is 13.1.0, 120804 is 12.8.4.
        (number / 10_000, number / 100 % 100, number % 100)
    }
}
