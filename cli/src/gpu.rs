//! What `openlora gpu-check` and `openlora bench --device cuda` share: opening the device they are given, and a folder of results.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use openlora_kernels::cuda::compile::Job;
use openlora_kernels::cuda::driver::{Driver, Options};

/// `cuda` or `cuda:N`; N is the number as the driver counts.
pub(crate) fn ordinal(device: &str) -> Result<u32> {
    let number = match device.strip_prefix("cuda") {
        Some("") => Some("0"),
        Some(rest) => rest.strip_prefix(':'),
        None => None,
    };
    number.and_then(|number| number.parse().ok()).with_context(|| format!("--device {device}: cuda or cuda:N is meant"))
}

/// Opens the GPU, telling what is compiled meanwhile.
pub(crate) fn open(device: &str) -> Result<Arc<Driver>> {
    let options = Options { ordinal: ordinal(device)?, ..Options::default() };
    let opened = Driver::open(&options, &Job::product(), &mut |progress| {
        if progress.compiled {
            eprintln!("kernels: {} compiled, {} of {}", progress.name, progress.done, progress.total);
        }
    });
    opened.with_context(|| format!("--device {device}; `openlora doctor` says what is there and what is missing"))
}

/// Writes a file of the results' folder, making the folder where it is missing.
pub(crate) fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(name);
    std::fs::write(&path, text).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_cuda_and_a_number() {
        assert_eq!((ordinal("cuda").ok(), ordinal("cuda:3").ok()), (Some(0), Some(3)));
        for wrong in ["", "cpu", "cuda:", "cuda3", "cuda:-1", "cuda:x"] {
            let error = ordinal(wrong).expect_err(wrong).to_string();
            assert!(error.contains("cuda:N"), "{error}");
        }
    }
}
