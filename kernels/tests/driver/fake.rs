//! Builds and steers the stand-in for the driver and cuBLASLt (`fake.cpp`).

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use openlora_kernels::KernelError;
use openlora_kernels::cuda::Places;
use openlora_kernels::cuda::compile::Job;
use openlora_kernels::cuda::device::Address;
use openlora_kernels::cuda::driver::{Driver, Options, Products};
use openlora_kernels::cuda::sources::{HEADERS, Source, nvrtc_options};

/// Adds `value` to `count` numbers; the stand-in does the same.
pub(crate) const ADD: Source = Source {
    name: "add.cu",
    text: r#"
        #include "platform.cuh"
        struct Params { u32* out; u32 count; u32 value; };
        KERNEL(add, Params, 128) {
          u32 i = blockIdx.x * 128 + threadIdx.x;
          if (i < p.count) p.out[i] += p.value;
        }"#,
};

/// What the stand-in counts.
const COUNTED: [&str; 10] = [
    "contexts",
    "streams",
    "events",
    "memory",
    "pinned",
    "modules",
    "graphs",
    "ready graphs",
    "handles",
    "descriptors",
];

/// A stand-in of this test's own.
pub(crate) struct Fake {
    folder: tempfile::TempDir,
    handle: *mut c_void,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let built = built();
        let folder = tempfile::tempdir().unwrap();
        // A copy is a library of its own, with counts of its own; under both names it is one.
        let driver = folder.path().join("libcuda.so.1");
        fs::copy(built, &driver).unwrap();
        fs::hard_link(&driver, folder.path().join("libcublasLt.so.13")).unwrap();
        let path = CString::new(driver.to_str().unwrap()).unwrap();
        // SAFETY: a library whose initialisers make a few empty maps.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null());
        Self { folder, handle }
    }

    pub(crate) fn options(&self) -> Options {
        let environment = Places::from_environment();
        let mut folders = vec![self.folder.path().to_owned()];
        folders.extend(environment.folders);
        Options {
            ordinal: 0,
            products: Products::default(),
            places: Places { nvrtc: environment.nvrtc, cublaslt: None, loader: false, folders },
            cache: Some(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels")),
        }
    }

    pub(crate) fn open(&self) -> Result<Arc<Driver>, KernelError> {
        open(&self.options())
    }

    fn function(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the handle is good, the name ends in a zero.
        let found = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    }

    fn count(&self, function: &CStr, what: &str) -> i64 {
        let what = CString::new(what).unwrap();
        // SAFETY: the signature that fake.cpp has.
        unsafe {
            let function = std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_long>(
                self.function(function),
            );
            function(what.as_ptr())
        }
    }

    /// How often a function was called.
    pub(crate) fn calls(&self, function: &str) -> i64 {
        self.count(c"fake_calls", function)
    }

    /// What there is at present of everything that is counted.
    pub(crate) fn live(&self) -> Vec<(&'static str, i64)> {
        COUNTED
            .map(|what| (what, self.count(c"fake_live", what)))
            .into_iter()
            .filter(|(_, count)| *count != 0)
            .collect()
    }

    /// Lets a function fail once, after so many calls more.
    pub(crate) fn fail(&self, function: &str, status: u32, after: i64) {
        let name = CString::new(function).unwrap();
        // SAFETY: the signature that fake.cpp has.
        unsafe {
            let function = std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, c_uint, c_long)>(
                self.function(c"fake_fail"),
            );
            function(name.as_ptr(), status, after);
        }
    }

    /// The driver's version, as it says it.
    pub(crate) fn set_version(&self, version: i32) {
        // SAFETY: the signature that fake.cpp has.
        unsafe {
            let function = self.function(c"fake_version");
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(function)(version);
        }
    }

    /// What a place in device memory holds by now, whatever is enqueued.
    pub(crate) fn number(&self, at: Address) -> u32 {
        // SAFETY: the signature that fake.cpp has; tests name places within their own allocations, of host memory.
        unsafe {
            let function = self.function(c"fake_number");
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(u64) -> c_uint>(function)(at.0)
        }
    }

    /// The algorithm of the last product, by its place among cuBLASLt's answers.
    pub(crate) fn algorithm(&self) -> i32 {
        // SAFETY: the signature that fake.cpp has.
        unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(self.function(c"fake_algorithm"))()
        }
    }

    /// The number of rows that algorithms were last asked for.
    pub(crate) fn asked_rows(&self) -> i32 {
        // SAFETY: the signature that fake.cpp has.
        unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(self.function(c"fake_asked_rows"))()
        }
    }
}

pub(crate) fn open(options: &Options) -> Result<Arc<Driver>, KernelError> {
    let job = Job { sources: &[ADD], headers: HEADERS, options: nvrtc_options };
    Driver::open(options, &job, &mut |_| ())
}

/// The library, built once for each text of it.
fn built() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/fake.cpp");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let hash = blake3::hash(&fs::read(&source).unwrap()).to_hex();
    let library = folder.join(format!("fake-cuda-{}.so", &hash[..16]));
    if !library.exists() {
        fs::create_dir_all(folder).unwrap();
        let unfinished = folder.join(format!("fake-cuda-{}.{}", &hash[..16], std::process::id()));
        let status = Command::new("g++")
            .args(["-std=c++17", "-O1", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", "-o"])
            .args([&unfinished, &source])
            .status()
            .expect("g++: run scripts/prerequisites.sh");
        assert!(status.success());
        fs::rename(unfinished, &library).unwrap();
    }
    library
}
