//! Without a driver, a compiler or cuBLASLt nothing panics, and what is missing is named.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use openlora_kernels::KernelError;
use openlora_kernels::cuda::compile::{Compiler, Job};
use openlora_kernels::cuda::driver::{Driver, Options, Products};
use openlora_kernels::cuda::probe::probe;
use openlora_kernels::cuda::{Missing, Places};

fn only(folder: &Path) -> Places {
    Places::only(vec![folder.to_owned()])
}

/// Some library of this process that is none of CUDA's.
fn other_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains("libc.so"));
    PathBuf::from(path.expect("the C library"))
}

#[test]
fn everything_missing_is_reported_with_where_and_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let found = probe(&only(folder.path()));
    assert!(!found.usable() && !found.expected());
    let missing: [Missing; 3] =
        [found.driver.clone().unwrap_err(), found.nvrtc.clone().unwrap_err(), found.cublaslt.clone().unwrap_err()];
    let expected = [
        ("libcuda.so.1", "NVIDIA's driver"),
        ("libnvrtc.so.13 or libnvrtc.so.12", "pip install nvidia-cuda-nvrtc"),
        ("libcublasLt.so.13 or libcublasLt.so.12", "pip install nvidia-cublas"),
    ];
    let report = found.to_string();
    for (missing, (library, advice)) in missing.iter().zip(expected) {
        assert_eq!(missing.library, library);
        assert_eq!(missing.looked, [folder.path().display().to_string()]);
        assert!(missing.refused.is_empty());
        assert!(missing.advice.contains(advice), "{missing}");
        let text = missing.to_string();
        assert!(text.starts_with(&format!("{library} was not found; ")), "{text}");
        assert!(report.contains(&text), "{report}");
    }
}

#[test]
fn this_machine_is_reported_whatever_it_has() {
    let found = probe(&Places::from_environment());
    let report = found.to_string();
    println!("{report}");
    for missing in
        [found.driver.as_ref().err(), found.nvrtc.as_ref().err(), found.cublaslt.as_ref().err()].into_iter().flatten()
    {
        assert!(!missing.looked.is_empty() && report.contains(missing.advice));
    }
    if let Ok(nvrtc) = found.nvrtc {
        assert!(nvrtc.cuda >= (12, 0) && nvrtc.file.exists(), "{nvrtc:?}");
    }
    if let Ok(blas) = found.cublaslt {
        assert!(blas.cuda >= (12, 0) && blas.file.exists(), "{blas:?}");
    }
}

#[test]
fn what_is_found_but_no_library_of_cudas_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("libnvrtc.so.13"), "no library").unwrap();
    symlink(other_library(), folder.path().join("libcuda.so.1")).unwrap();
    let found = probe(&only(folder.path()));
    let nvrtc = found.nvrtc.unwrap_err();
    assert_eq!(nvrtc.refused.len(), 1);
    let path = folder.path().join("libnvrtc.so.13").display().to_string();
    assert!(nvrtc.to_string().contains("cannot be used: ") && nvrtc.refused[0].contains(&path), "{nvrtc}");
    let driver = found.driver.unwrap_err();
    assert!(driver.to_string().contains("has no cuGetErrorName, so it is too old"), "{driver}");
}

#[test]
fn a_file_that_the_environment_names_is_the_only_one_tried() {
    let folder = tempfile::tempdir().unwrap();
    let named = folder.path().join("mine.so");
    let places = Places { nvrtc: Some(named.clone()), ..Places::from_environment() };
    let error = Compiler::new(&places, None, None).unwrap_err().to_string();
    assert!(error.contains(&named.display().to_string()) && error.contains("OPENLORA_NVRTC"), "{error}");
    assert!(!error.contains("LD_LIBRARY_PATH"), "{error}");
}

#[test]
fn opening_a_device_without_a_driver_says_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { ordinal: 0, products: Products::default(), places: only(folder.path()), cache: None };
    let error = Driver::open(&options, &Job::product(), &mut |_| panic!("nothing is compiled")).unwrap_err();
    let KernelError::Device { device, what, reason } = &error else { panic!("{error}") };
    assert_eq!((device.as_str(), what.as_str()), ("cuda", "loading libcuda.so.1"));
    assert!(reason.contains("was not found") && reason.contains("--gpus all"), "{reason}");
}
