//! Every kernel compiles for every generation of GPUs that is served, without a spill and without local memory.
//!
//! NVRTC needs no GPU: `scripts/fetch-nvrtc.sh` fetches it, or `OPENLORA_NVRTC` names the folder of a toolkit's.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use openlora_kernels::cuda::sources::{HEADERS, KERNELS, Source, nvrtc_options};

/// Turing to Blackwell. Turing has no bf16.
const ARCHITECTURES: [&str; 5] = ["sm_75", "sm_80", "sm_89", "sm_90a", "sm_100"];
const VERSION: &str = "13.0.88";
const LIBRARY: &CStr = c"libnvrtc.so.13";
const BUILTINS: &CStr = c"libnvrtc-builtins.so.13.0";

type Program = *mut c_void;
type Text = *const c_char;
type Create = unsafe extern "C" fn(*mut Program, Text, Text, c_int, *const Text, *const Text) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const Text) -> c_int;
type LogSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Log = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// The library, loaded; it stays so until the process ends.
struct Nvrtc {
    create: Create,
    compile: Compile,
    log_size: LogSize,
    log: Log,
    destroy: Destroy,
}

impl Nvrtc {
    fn load() -> Self {
        let folder = match (std::env::var_os("OPENLORA_NVRTC"), std::env::var_os("OPENLORA_HOME")) {
            (Some(folder), _) => PathBuf::from(folder),
            (None, Some(home)) => PathBuf::from(home).join("nvrtc").join(VERSION),
            (None, None) => {
                let home = PathBuf::from(std::env::var_os("HOME").expect("HOME"));
                home.join(".cache/openlora/nvrtc").join(VERSION)
            }
        };
        // It looks for its other half by name alone.
        let open = |name: &CStr| {
            let path = folder.join(name.to_str().expect("a name"));
            assert!(path.exists(), "{} is missing: run scripts/fetch-nvrtc.sh", path.display());
            let path = CString::new(path.to_str().expect("a path")).expect("a path");
            // SAFETY: NVIDIA's library, whose constructors may run here; the path ends in a zero.
            let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            assert!(!handle.is_null(), "{path:?} cannot be loaded");
            handle
        };
        open(BUILTINS);
        let handle = open(LIBRARY);
        let function = |name: &CStr| {
            // SAFETY: the handle is good, the name ends in a zero.
            let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
            assert!(!found.is_null(), "NVRTC has no {name:?}");
            found
        };
        // SAFETY: the types are those of nvrtc.h.
        unsafe {
            Self {
                create: std::mem::transmute::<*mut c_void, Create>(function(c"nvrtcCreateProgram")),
                compile: std::mem::transmute::<*mut c_void, Compile>(function(c"nvrtcCompileProgram")),
                log_size: std::mem::transmute::<*mut c_void, LogSize>(function(c"nvrtcGetProgramLogSize")),
                log: std::mem::transmute::<*mut c_void, Log>(function(c"nvrtcGetProgramLog")),
                destroy: std::mem::transmute::<*mut c_void, Destroy>(function(c"nvrtcDestroyProgram")),
            }
        }
    }

    /// What the compiler and the assembler said; an error when they refuse it.
    fn compile(&self, source: &Source, architecture: &str) -> Result<String, String> {
        let text = |text: &str| CString::new(text).expect("no zeros in sources");
        let (headers, header_names): (Vec<_>, Vec<_>) = HEADERS.iter().map(|h| (text(h.text), text(h.name))).unzip();
        let mut options: Vec<CString> = nvrtc_options(architecture).iter().map(|option| text(option)).collect();
        options.push(text("--ptxas-options=-v"));
        let pointers = |texts: &[CString]| -> Vec<Text> { texts.iter().map(|text| text.as_ptr()).collect() };
        let (code, name) = (text(source.text), text(source.name));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: every pointer is of a text that ends in a zero and lives until the end of this function; the lists are as long
        // as is said; the log has the room that was asked for.
        unsafe {
            let created = (self.create)(
                &raw mut program,
                code.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                pointers(&headers).as_ptr(),
                pointers(&header_names).as_ptr(),
            );
            assert_eq!(created, 0, "nvrtcCreateProgram");
            let status = (self.compile)(program, options.len() as c_int, pointers(&options).as_ptr());
            let mut size = 0;
            assert_eq!((self.log_size)(program, &raw mut size), 0, "nvrtcGetProgramLogSize");
            let mut log = vec![0_u8; size.max(1)];
            assert_eq!((self.log)(program, log.as_mut_ptr().cast()), 0, "nvrtcGetProgramLog");
            (self.destroy)(&raw mut program);
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
            if status == 0 { Ok(log) } else { Err(log) }
        }
    }
}

/// What the assembler says of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: u32,
    /// Static, of which there should be none.
    shared: u32,
    /// Stack frame, spill stores, spill loads, in bytes.
    local: [u32; 3],
}

/// Reads the assembler's report: usage by function.
fn usages(log: &str) -> BTreeMap<String, Usage> {
    let mut found: BTreeMap<String, Usage> = BTreeMap::new();
    let mut function = String::new();
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line.split(what).next().filter(|before| before.len() < line.len())?.split_whitespace().next_back()?.parse().ok()
    };
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            function = rest.split('\'').next().unwrap_or_default().into();
            found.entry(function.clone()).or_default();
        } else if let Some(name) = line.split("Function properties for ").nth(1) {
            function = name.trim().into();
        } else if line.contains("bytes stack frame") {
            let local = ["bytes stack frame", "bytes spill stores", "bytes spill loads"];
            let local = local.map(|what| number_before(line, what).unwrap_or_else(|| panic!("{line}")));
            found.entry(function.clone()).or_default().local = local;
        } else if line.contains("Used ") {
            let usage = found.entry(function.clone()).or_default();
            usage.registers = number_before(line, "registers").unwrap_or_else(|| panic!("{line}"));
            usage.shared = number_before(line, "bytes smem").unwrap_or(0);
        }
    }
    found
}

/// By kernel and architecture.
type Local = BTreeMap<(String, String), [u32; 3]>;

/// The committed list of those that may use local memory.
fn allowed(list: &str) -> Local {
    let lines = list.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            assert!(fields.len() > 3, "kernel, architecture, bytes and a reason: {line}");
            let bytes: Vec<u32> = fields[2].split('/').map(|bytes| bytes.parse().expect(line)).collect();
            ((fields[0].into(), fields[1].into()), bytes.try_into().expect("frame/stores/loads"))
        })
        .collect()
}

/// Threads of a block, and how many blocks src/cuda/lora.rs and the head of attention.cu count on side by side.
fn side_by_side(kernel: &str) -> Option<(u32, u32)> {
    if kernel.starts_with("attention_few_") {
        return Some((128, 3));
    }
    ["lora_shrink_", "lora_expand_", "lora_embed_"].iter().any(|name| kernel.starts_with(name)).then_some((256, 2))
}

/// A multiprocessor's registers, and what a thread's are rounded up to.
const REGISTERS: u32 = 65_536;
const REGISTERS_STEP: u32 = 8;

/// What differs between the local memory that is used and what is allowed.
fn differences(used: &Local, allowed: &Local) -> Vec<String> {
    let unlisted = used.iter().filter(|(at, bytes)| allowed.get(at) != Some(bytes)).map(|((kernel, arch), bytes)| {
        let [frame, stores, loads] = bytes;
        format!("{kernel} {arch} uses {frame}/{stores}/{loads} bytes of local memory, which is not allowed")
    });
    let gone = allowed.keys().filter(|at| !used.contains_key(at)).map(|(kernel, arch)| {
        format!("{kernel} {arch} uses no local memory any more: take it off csrc/allowed-local-memory.txt")
    });
    unlisted.chain(gone).collect()
}

/// Compiles files for all architectures, two at a time; what is used by (kernel, architecture).
fn compile_all(sources: &[Source]) -> BTreeMap<(String, String), Usage> {
    let nvrtc = Nvrtc::load();
    let mut work: Vec<(&Source, &str)> =
        sources.iter().flat_map(|source| ARCHITECTURES.map(|architecture| (source, architecture))).collect();
    work.reverse();
    let (work, found) = (Mutex::new(work), Mutex::new(BTreeMap::new()));
    let next = || work.lock().expect("a lock").pop();
    let compile = || {
        while let Some((source, architecture)) = next() {
            match nvrtc.compile(source, architecture) {
                Ok(log) => {
                    assert!(!log.contains("warning"), "{} for {architecture}:\n{log}", source.name);
                    let mut found = found.lock().expect("a lock");
                    for (kernel, usage) in usages(&log) {
                        let twice = found.insert((kernel.clone(), architecture.to_owned()), usage);
                        assert!(twice.is_none(), "two files have a kernel {kernel}");
                    }
                }
                Err(log) => panic!("{} for {architecture}:\n{log}", source.name),
            }
        }
    };
    thread::scope(|scope| {
        for worker in [(); 2].map(|()| scope.spawn(compile)) {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    found.into_inner().expect("a lock")
}

#[test]
fn every_kernel_compiles_and_uses_no_local_memory() {
    let found = compile_all(KERNELS);
    let width = found.keys().map(|(kernel, _)| kernel.len()).max().unwrap_or(0);
    println!("{:width$}  {:7}  registers  shared  local", "kernel", "arch");
    for ((kernel, architecture), Usage { registers, shared, local: [frame, stores, loads] }) in &found {
        println!("{kernel:width$}  {architecture:7}  {registers:9}  {shared:6}  {frame}/{stores}/{loads}");
    }
    for ((kernel, architecture), usage) in &found {
        assert_eq!(usage.shared, 0, "{kernel} {architecture}: shared memory is dynamic only");
        if let Some((threads, blocks)) = side_by_side(kernel) {
            let taken = usage.registers.next_multiple_of(REGISTERS_STEP) * threads * blocks;
            assert!(taken <= REGISTERS, "{kernel} {architecture}: {usage:?} leaves no room for {blocks} blocks");
        }
    }
    // The same kernels everywhere, but that Turing may lack those of bf16.
    let kernels = |architecture: &str| -> BTreeSet<&str> {
        found.keys().filter(|(_, of)| of == architecture).map(|(kernel, _)| kernel.as_str()).collect()
    };
    let all = kernels("sm_90a");
    for architecture in ARCHITECTURES {
        let there = kernels(architecture);
        let may_lack = |kernel: &str| architecture == "sm_75" && kernel.contains("bf16");
        let differing: Vec<&str> = there
            .symmetric_difference(&all)
            .copied()
            .filter(|kernel| there.contains(kernel) || !may_lack(kernel))
            .collect();
        assert!(differing.is_empty(), "{architecture} has, or lacks, what the others do not: {differing:?}");
    }
    let used =
        found.into_iter().filter(|(_, usage)| usage.local != [0; 3]).map(|(at, usage)| (at, usage.local)).collect();
    let differences = differences(&used, &allowed(include_str!("../csrc/allowed-local-memory.txt")));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_file_of_kernels_is_compiled() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("csrc");
    let there: BTreeSet<String> = fs::read_dir(folder)
        .expect("csrc")
        .map(|entry| entry.expect("csrc").file_name().into_string().expect("a name"))
        .filter(|name| name.ends_with(".cu"))
        .collect();
    let listed: BTreeSet<String> = KERNELS.iter().map(|source| source.name.to_owned()).collect();
    assert_eq!(listed, there, "src/cuda/sources.rs and csrc");
}

#[test]
fn local_memory_is_noticed() {
    // Which element is read is not known before: the array cannot be in registers.
    let text = r#"
        #include "platform.cuh"
        struct Params { float* out; u32 at; };
        KERNEL(plain_kernel, Params, 32) { p.out[0] = 1.0f; }
        KERNEL(local_array, Params, 32) {
          float array[8];
          for (u32 i = 0; i < 8; i++) array[i] = p.out[i * 3];
          for (u32 i = 0; i < 8; i++) array[(p.at + i) % 8] += p.out[i];
          p.out[0] = array[p.at];
        }"#;
    let found = compile_all(&[Source { name: "local.cu", text }]);
    let at = |kernel: &str, architecture: &str| (kernel.to_owned(), architecture.to_owned());
    for architecture in ARCHITECTURES {
        let plain = &found[&at("plain_kernel", architecture)];
        assert_eq!(plain.local, [0; 3]);
        assert!((1..=16).contains(&plain.registers), "{plain:?}");
        assert_eq!(found[&at("local_array", architecture)].local, [32, 0, 0], "{architecture}");
    }
    let used = Local::from([(at("a", "sm_80"), [32, 0, 0]), (at("b", "sm_80"), [8, 4, 4])]);
    assert!(differences(&used, &allowed("# why\na sm_80 32/0/0 for a reason\nb sm_80 8/4/4 for another\n")).is_empty());
    for list in [
        "a sm_80 32/0/0 reason",
        "a sm_80 16/0/0 x\nb sm_80 8/4/4 x",
        "a sm_80 32/0/0 x\nb sm_80 8/4/4 x\nc sm_80 1/0/0 x",
    ] {
        assert_eq!(differences(&used, &allowed(list)).len(), 1, "{list}");
    }
}

#[test]
fn the_assemblers_report_is_read() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'one_f32' for 'sm_80'\n\
        ptxas info    : Function properties for one_f32\n    \
        40 bytes stack frame, 36 bytes spill stores, 28 bytes spill loads\n\
        ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 512 bytes smem, 400 bytes cmem[0]\n\
        ptxas info    : Function properties for helper\n    \
        8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
    let one = Usage { registers: 255, shared: 512, local: [40, 36, 28] };
    let helper = Usage { registers: 0, shared: 0, local: [8, 0, 0] };
    assert_eq!(usages(log), BTreeMap::from([("one_f32".into(), one), ("helper".into(), helper)]));
}

#[test]
fn what_the_emulator_is_tested_with_is_cuda() {
    let probe = Source { name: "emulator_probe.cu", text: include_str!("cuda/emulator_probe.cu") };
    let nvrtc = Nvrtc::load();
    for architecture in ["sm_80", "sm_90a"] {
        let log = nvrtc.compile(&probe, architecture).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(usages(&log).len(), 14, "{log}");
    }
}
