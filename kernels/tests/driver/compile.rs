//! Kernels are compiled by NVRTC, which needs no GPU (`scripts/fetch-nvrtc.sh`), and kept on disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use openlora_kernels::cuda::Places;
use openlora_kernels::cuda::compile::{Compiler, Image, Job, Target};
use openlora_kernels::cuda::sources::{HEADERS, Source, nvrtc_options};

const KERNEL: Source = Source {
    name: "first.cu",
    text: "#include \"platform.cuh\"\nstruct Params { float* out; };\nKERNEL(first, Params, 32) { p.out[threadIdx.x] = 1.0f; }",
};
const OTHER: Source = Source {
    name: "second.cu",
    text: "#include \"platform.cuh\"\nstruct Params { float* out; };\nKERNEL(second, Params, 32) { p.out[threadIdx.x] = 2.0f; }",
};

fn compiler(cache: Option<&Path>) -> Compiler {
    Compiler::new(&Places::from_environment(), None, cache.map(Path::to_owned))
        .unwrap_or_else(|error| panic!("run scripts/fetch-nvrtc.sh: {error}"))
}

fn job<'a>(sources: &'a [Source], headers: &'a [Source]) -> Job<'a> {
    Job { sources, headers, options: nvrtc_options }
}

fn target(arch: &str) -> Target {
    Target { arch: arch.to_owned() }
}

/// Images, and the names of what was compiled rather than found.
fn compiled(compiler: &Compiler, arch: &str, job: &Job<'_>) -> (Vec<Image>, Vec<String>) {
    let (mut names, mut steps) = (Vec::new(), Vec::new());
    let images = compiler
        .compile(&target(arch), job, &mut |progress| {
            steps.push(progress.done);
            assert_eq!(progress.total, job.sources.len());
            if progress.compiled {
                names.push(progress.name.to_owned());
            }
        })
        .unwrap();
    assert_eq!(steps, (1..=job.sources.len()).collect::<Vec<_>>());
    names.sort();
    (images, names)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_second_start_compiles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("not/there/yet");
    let sources = [KERNEL, OTHER];
    let job = job(&sources, HEADERS);
    let (first, names) = compiled(&compiler(Some(&cache)), "sm_90a", &job);
    assert_eq!(names, ["first.cu", "second.cu"]);
    assert_eq!(first.iter().map(|image| image.name.as_str()).collect::<Vec<_>>(), ["first.cu", "second.cu"]);
    for image in &first {
        assert_eq!(image.bytes[..4], *b"\x7fELF");
    }
    let (second, names) = compiled(&compiler(Some(&cache)), "sm_90a", &job);
    assert_eq!((second, names.len()), (first.clone(), 0));
    // Another architecture is another image; what was there stays.
    let (other, names) = compiled(&compiler(Some(&cache)), "sm_80", &job);
    assert_eq!(names.len(), 2);
    assert_ne!(other[0].bytes, first[0].bytes);
    assert_eq!(files(&cache).len(), 4);
}

#[test]
fn what_changes_the_image_changes_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let compiler = compiler(Some(folder.path()));
    compiled(&compiler, "sm_80", &job(&[KERNEL], HEADERS));
    let header = Source { name: "other.cuh", text: "#define OTHER 1" };
    let headers = [HEADERS[0], HEADERS[1], header];
    let longer = Source {
        name: KERNEL.name,
        text: "// As before.\n#include \"platform.cuh\"\nstruct Params { float* out; };\nKERNEL(first, Params, 32) { p.out[threadIdx.x] = 3.0f; }",
    };
    let more = |arch: &str| [nvrtc_options(arch), vec!["--fmad=false".into()]].concat();
    for job in
        [job(&[KERNEL], &headers), job(&[longer], HEADERS), Job { sources: &[KERNEL], headers: HEADERS, options: more }]
    {
        assert_eq!(compiled(&compiler, "sm_80", &job).1, ["first.cu"]);
        assert!(compiled(&compiler, "sm_80", &job).1.is_empty());
    }
    assert_eq!(files(folder.path()).len(), 4);
}

#[test]
fn a_damaged_file_is_compiled_again_and_never_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let compiler = compiler(Some(folder.path()));
    let sources = [KERNEL];
    let job = job(&sources, HEADERS);
    let (whole, _) = compiled(&compiler, "sm_80", &job);
    let [path] = files(folder.path()).try_into().unwrap();
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut longer = good.clone();
    longer.push(0);
    let mut other_magic = good.clone();
    other_magic[0] ^= 1;
    let cut = good[..good.len() - 1].to_vec();
    for damaged in [flipped, longer, other_magic, cut, good[..20].to_vec(), Vec::new()] {
        fs::write(&path, damaged).unwrap();
        let (images, names) = compiled(&compiler, "sm_80", &job);
        assert_eq!((images, names.len()), (whole.clone(), 1));
        assert_eq!(fs::read(&path).unwrap(), good);
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for cache in [Some(file.join("below")), None] {
        let compiler = compiler(cache.as_deref());
        for _ in 0..2 {
            assert_eq!(compiled(&compiler, "sm_80", &job(&[KERNEL], HEADERS)).1.len(), 1);
        }
    }
}

#[test]
fn old_files_go_and_those_in_use_stay() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..100 {
        let path = folder.path().join(format!("old-sm_80-{number:03}.bin"));
        fs::write(&path, "old").unwrap();
        let then = SystemTime::now() - Duration::from_secs(1000 - number);
        fs::File::options().write(true).open(&path).unwrap().set_modified(then).unwrap();
    }
    fs::write(folder.path().join("mine.txt"), "").unwrap();
    let compiler = compiler(Some(folder.path()));
    assert_eq!(compiled(&compiler, "sm_80", &job(&[KERNEL, OTHER], HEADERS)).1.len(), 2);
    let left = files(folder.path());
    // 64 old ones, two in use, and what is not the cache's.
    assert_eq!(left.len(), 64 + 2 + 1);
    assert!(!folder.path().join("old-sm_80-035.bin").exists() && folder.path().join("old-sm_80-036.bin").exists());
    assert!(compiled(&compiler, "sm_80", &job(&[KERNEL, OTHER], HEADERS)).1.is_empty());
}

#[test]
fn errors_carry_the_compilers_words() {
    let compiler = compiler(None);
    let broken = Source { name: "broken.cu", text: "#include \"platform.cuh\"\nint broken = nothing_of_this_name;" };
    let error =
        compiler.compile(&target("sm_80"), &job(&[KERNEL, broken], HEADERS), &mut |_| ()).unwrap_err().to_string();
    for part in ["compiling broken.cu for sm_80", "NVRTC_ERROR_COMPILATION", "nothing_of_this_name", "broken.cu(2)"] {
        assert!(error.contains(part), "{error}");
    }
    let endless: &'static str = Box::leak("int nothing = missing;\n".repeat(2000).into_boxed_str());
    let endless = Source { name: "endless.cu", text: endless };
    let error = compiler.compile(&target("sm_80"), &job(&[endless], &[]), &mut |_| ()).unwrap_err().to_string();
    assert!((1000..5000).contains(&error.len()), "{} bytes", error.len());

    let error = compiler.compile(&target("sm_1"), &job(&[KERNEL], HEADERS), &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("compiling first.cu for sm_1") && error.contains("architecture"), "{error}");
}

#[test]
fn ptx_is_made_for_the_driver_to_compile() {
    let (images, _) = compiled(&compiler(None), "compute_90", &job(&[KERNEL], HEADERS));
    let text = String::from_utf8(images[0].bytes.clone()).unwrap();
    assert!(text.contains(".target sm_90") && text.contains(".entry first(") && text.ends_with('\0'), "{text}");
}

#[test]
fn every_architecture_chosen_for_a_device_compiles() {
    let compiler = compiler(None);
    assert!(compiler.version() >= (12, 0));
    for (compute, arch) in
        [((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")]
    {
        let target = compiler.target(compute).unwrap();
        assert_eq!(target.arch, arch);
        compiled(&compiler, arch, &job(&[KERNEL], HEADERS));
    }
}

#[test]
fn a_device_newer_than_the_compiler_gets_the_nearest_older_code() {
    let supported = [50, 75, 80, 86, 90, 100];
    let arch = |compute| Target::of(compute, &supported).map(|target| target.arch).map_err(|error| error.to_string());
    assert_eq!(arch((8, 6)).unwrap(), "sm_86");
    // Machine code of the same major version runs.
    assert_eq!(arch((8, 9)).unwrap(), "sm_86");
    assert_eq!(arch((10, 3)).unwrap(), "sm_100");
    // Of another it does not.
    assert_eq!(arch((12, 0)).unwrap(), "compute_100");
    assert_eq!(Target::of((9, 0), &[75, 80]).unwrap().arch, "compute_80");
    assert!(arch((7, 0)).unwrap_err().contains("7.5 (Turing) or newer"));
    assert!(Target::of((9, 0), &[52]).is_err());
}
