//! What `openlora gpu-check` and `openlora bench --device cuda` share: opening the device they are given, and a folder of results.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use openlora_kernels::cuda::Places;
use openlora_kernels::cuda::compile::Job;
use openlora_kernels::cuda::driver::{Driver, Options};
use openlora_kernels::cuda::probe::probe;

use crate::config::DeviceSetting;

/// Opens the GPU, telling what is compiled meanwhile.
pub(crate) fn open(device: &str) -> Result<Arc<Driver>> {
    let Ok(DeviceSetting::Cuda(number)) = DeviceSetting::try_from(device.to_owned()) else {
        bail!("--device {device}: cuda or cuda:N is meant");
    };
    let found = probe(&Places::from_environment());
    let (ordinal, _) = found.device(number).map_err(|why| {
        anyhow!("--device {device} cannot be used: {why}; `openlora doctor` says what is there and what is missing")
    })?;
    let options = Options { ordinal, ..Options::default() };
    let opened = Driver::open(&options, &Job::product(), &mut |progress| {
        if progress.compiled {
            eprintln!("kernels: {} compiled, {} of {}", progress.name, progress.done, progress.total);
        }
    });
    opened.with_context(|| format!("--device {device}"))
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
    fn what_is_no_gpu_is_refused_by_name() {
        for wrong in ["", "cpu", "auto", "cuda:", "cuda3", "cuda:-1", "cuda:x"] {
            let error = open(wrong).expect_err(wrong).to_string();
            assert!(error.contains("cuda:N"), "{error}");
        }
        let error = open("cuda:4096").expect_err("nobody has so many").to_string();
        assert!(
            error.starts_with("--device cuda:4096 cannot be used: ") && error.contains("openlora doctor"),
            "{error}"
        );
    }
}
