//! Which device serves, in which numbers, and how much it takes at once: here settings that say `auto` or 0 become values, the model is
//! loaded, and commands are spared that there are two kinds of models.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use openlora_engine::{Engine, EngineConfig, EngineHandle, Rate};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::cuda::compile::{Job, Progress};
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::driver::{Driver, Options};
use openlora_kernels::cuda::probe::{Probe, probe};
use openlora_kernels::cuda::{Cuda, Places};
use openlora_kernels::{Backend, KernelError};
use openlora_model::{LoadOptions, Model, ModelError, ModelFiles};

use crate::config::{Config, DeviceSetting, Precision};

/// A device that can be used, as far as could be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    Cuda { number: u32, compute: (u32, u32) },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { number, .. } => write!(f, "cuda:{number}"),
        }
    }
}

/// Sizes that settings of 0 stand for.
struct Sizes {
    pool_bytes: usize,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    long_prefill_chunk: usize,
    max_loras: usize,
    adapter_bytes_per_step: usize,
}

const CPU: Sizes = Sizes {
    pool_bytes: 1 << 30,
    max_num_seqs: 32,
    max_num_batched_tokens: 80,
    long_prefill_chunk: 256,
    max_loras: 64,
    adapter_bytes_per_step: 1 << 29,
};

/// The engine fills the device's memory, with up to a quarter of the pool for the adapters of one step.
const GPU: Sizes = Sizes {
    pool_bytes: 0,
    max_num_seqs: 256,
    max_num_batched_tokens: 2_048,
    long_prefill_chunk: 512,
    max_loras: 256,
    adapter_bytes_per_step: 0,
};

/// The device that the settings ask for, which is said in the log, and the numbers it serves in.
pub(crate) fn choose(config: &Config) -> Result<(Device, Precision)> {
    let (device, why) = chosen(config.engine.device, || probe(&Places::from_environment()))?;
    tracing::info!(%device, why, "device chosen");
    Ok((device, precision(config.model.precision, device)?))
}

fn chosen(setting: DeviceSetting, found: impl FnOnce() -> Probe) -> Result<(Device, String)> {
    let number = match setting {
        DeviceSetting::Cpu => return Ok((Device::Cpu, "engine.device is cpu".to_owned())),
        DeviceSetting::Cuda(Some(number)) => Some(number),
        DeviceSetting::Auto | DeviceSetting::Cuda(None) => None,
    };
    let found = found();
    match found.device(number) {
        Ok((number, device)) => Ok((Device::Cuda { number, compute: device.compute }, device.to_string())),
        Err(why) if setting == DeviceSetting::Auto => Ok((Device::Cpu, format!("no GPU can be used: {why}"))),
        Err(why) => bail!(
            "engine.device is {setting}, which cannot be used: {why}; `openlora doctor` says what was found, and \
             engine.device = \"cpu\" serves without a GPU"
        ),
    }
}

/// What `auto` stands for on a device; or whether the device has what is asked for.
fn precision(setting: Precision, device: Device) -> Result<Precision> {
    let (auto, has): (Precision, &[Precision]) = match device {
        Device::Cpu => (Precision::Quantised, &[Precision::Quantised, Precision::F32]),
        Device::Cuda { compute, .. } if compute < (8, 0) => (Precision::F16, &[Precision::F16, Precision::F32]),
        Device::Cuda { .. } => (Precision::Bf16, &[Precision::Bf16, Precision::F16, Precision::F32]),
    };
    match setting {
        Precision::Auto => Ok(auto),
        setting if has.contains(&setting) => Ok(setting),
        setting => {
            let names: Vec<_> = has.iter().map(|precision| precision.name()).collect();
            bail!("model.precision is {}, which {device} does not have; it has {}", setting.name(), names.join(", "))
        }
    }
}

/// What the engine may use on a device.
pub(crate) fn engine_config(config: &Config, device: Device) -> EngineConfig {
    let (engine, limits) = (&config.engine, &config.limits);
    let auto = match device {
        Device::Cpu => CPU,
        Device::Cuda { .. } => GPU,
    };
    let set = |value: usize| Some(value).filter(|value| *value > 0);
    let rows = set(engine.max_num_batched_tokens);
    // A step has room for all sequences: what is not set follows what is.
    let max_num_seqs = set(engine.max_num_seqs).unwrap_or_else(|| auto.max_num_seqs.min(rows.unwrap_or(usize::MAX)));
    EngineConfig {
        pool_bytes: set(engine.pool_bytes).unwrap_or(auto.pool_bytes),
        device_memory_percent: engine.device_memory_percent,
        max_num_seqs,
        max_num_batched_tokens: rows.unwrap_or_else(|| auto.max_num_batched_tokens.max(max_num_seqs)),
        long_prefill_chunk: set(engine.long_prefill_chunk).unwrap_or(auto.long_prefill_chunk),
        max_loras: set(engine.max_loras).unwrap_or(auto.max_loras),
        adapter_bytes_per_step: set(engine.adapter_bytes_per_step).unwrap_or(auto.adapter_bytes_per_step),
        max_loading: engine.max_loading,
        tenant_rate: (engine.tenant_tokens_per_second > 0)
            .then_some(Rate { tokens_per_second: engine.tenant_tokens_per_second, burst: engine.tenant_burst_tokens }),
        prefix_cache: engine.prefix_cache,
        starvation_micros: engine.starvation_ms * 1_000,
        sequence_tokens_max: limits.sequence_tokens_max,
        waiting_requests_max: limits.waiting_requests_max,
        waiting_requests_per_tenant_max: limits.waiting_requests_per_tenant_max,
        stream_events_max: limits.stream_events_max,
    }
}

/// A model on a device.
pub(crate) enum LoadedModel {
    Cpu(Arc<Model<Cpu>>),
    Cuda(Arc<Model<Cuda<Driver>>>),
}

impl LoadedModel {
    /// Gets the device ready and starts the step thread.
    pub(crate) fn start_engine(self, config: EngineConfig) -> Result<EngineHandle> {
        Ok(match self {
            Self::Cpu(model) => Engine::start(model, config)?,
            Self::Cuda(model) => Engine::start(model, config)?,
        })
    }
}

/// Loads the weights for the steps of `engine`, with a progress bar; before, on a GPU, its kernels.
pub(crate) fn load(
    config: &Config,
    files: &Arc<ModelFiles>,
    (device, precision): (Device, Precision),
    engine: &EngineConfig,
) -> Result<LoadedModel> {
    let options = LoadOptions {
        max_rows: engine.max_num_batched_tokens,
        max_logit_rows: engine.max_num_seqs,
        max_position: engine.sequence_tokens_max.min(files.shape().context),
        block_size: config.engine.block_size,
    };
    use openlora_kernels::Precision as OnCpu;
    let (on_cpu, element) = match precision {
        Precision::Auto | Precision::Quantised => (OnCpu::Quantised, Element::Bf16),
        Precision::F32 => (OnCpu::F32, Element::F32),
        Precision::Bf16 => (OnCpu::Quantised, Element::Bf16),
        Precision::F16 => (OnCpu::Quantised, Element::F16),
    };
    Ok(match device {
        Device::Cpu => {
            let backend = Cpu::new(config.engine.threads, on_cpu, Isa::detect())?;
            LoadedModel::Cpu(weights(backend, files, &options)?)
        }
        Device::Cuda { number, .. } => {
            let backend = Cuda::new(open(number)?, element)?;
            LoadedModel::Cuda(weights(backend, files, &options).with_context(|| device.to_string())?)
        }
    })
}

/// Opens a GPU: compiles its kernels the first time, which is told, and takes them from the cache later.
fn open(number: u32) -> Result<Arc<Driver>> {
    let bar = bar("preparing kernels {bar:30} {pos}/{len}");
    bar.tick();
    let began = Instant::now();
    let mut compiled = 0;
    let mut show = |progress: Progress<'_>| {
        if progress.compiled {
            if compiled == 0 {
                tracing::info!("compiling kernels for cuda:{number}, this once");
            }
            compiled += 1;
        }
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    };
    let driver = Driver::open(&Options { ordinal: number, ..Options::default() }, &Job::product(), &mut show)?;
    bar.finish_and_clear();
    tracing::info!(compiled, ms = began.elapsed().as_millis() as u64, "kernels ready");
    Ok(driver)
}

fn weights<B: Backend>(backend: B, files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<Arc<Model<B>>> {
    let bar = bar("loading {bar:30} {bytes}/{total_bytes}");
    let model = Model::load(Arc::new(backend), Arc::clone(files), options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    let model = model.map_err(|error| match error {
        ModelError::Kernel(KernelError::OutOfMemory { .. }) => anyhow::Error::new(error).context(
            "the weights do not fit the device: free memory there, or set engine.device or model.path to another",
        ),
        error => error.into(),
    })?;
    bar.finish_and_clear();
    Ok(Arc::new(model))
}

fn bar(template: &str) -> ProgressBar {
    ProgressBar::new(0).with_style(ProgressStyle::with_template(template).expect("a fixed template"))
}

#[cfg(test)]
mod tests {
    use openlora_kernels::cuda::probe::{DeviceReport, DriverReport, LibraryReport};

    use super::*;

    fn gpu(compute: (u32, u32), memory_free: Option<usize>) -> DeviceReport {
        DeviceReport { name: "GPU".into(), compute, memory_total: 80 << 30, memory_free }
    }

    /// A machine with these GPUs and all libraries.
    fn machine(devices: &[DeviceReport]) -> Probe {
        let library = || Ok(LibraryReport { file: "lib.so".into(), cuda: (12, 8) });
        let driver = DriverReport { file: "libcuda.so.1".into(), cuda: (12, 8), devices: Ok(devices.to_vec()) };
        Probe { driver: Ok(driver), nvrtc: library(), cublaslt: library() }
    }

    fn nothing() -> Probe {
        probe(&Places::only(Vec::new()))
    }

    fn cuda(number: u32, compute: (u32, u32)) -> Device {
        Device::Cuda { number, compute }
    }

    #[test]
    fn auto_takes_the_first_gpu_that_can_be_used_and_else_the_cpu_and_says_why() {
        let auto = |found: Probe| chosen(DeviceSetting::Auto, || found).unwrap();
        let old_busy_good = [gpu((7, 0), Some(1)), gpu((9, 0), None), gpu((8, 9), Some(1)), gpu((9, 0), Some(1))];
        assert_eq!(auto(machine(&old_busy_good)).0, cuda(2, (8, 9)));
        let check = |found: Probe, expected: &str| {
            let (device, why) = auto(found);
            assert_eq!(device, Device::Cpu);
            assert!(why.contains(expected), "{why}");
        };
        check(nothing(), "libcuda.so.1");
        check(machine(&[]), "no GPU");
        check(
            machine(&old_busy_good[..2]),
            "cuda:0 has compute capability 7.0; 7.5 or newer is needed; cuda:1 is in use",
        );
        check(Probe { nvrtc: nothing().nvrtc, ..machine(&old_busy_good) }, "libnvrtc");
        check(Probe { cublaslt: nothing().cublaslt, ..machine(&old_busy_good) }, "libcublasLt");
        let mut old = machine(&old_busy_good);
        old.driver.as_mut().unwrap().cuda = (11, 8);
        check(old, "the driver is for CUDA 11.8");
    }

    #[test]
    fn a_gpu_that_is_asked_for_and_cannot_be_used_is_refused_with_what_is_missing() {
        let gpus = [gpu((9, 0), Some(1)), gpu((9, 0), None)];
        let of = |setting, found: Probe| chosen(setting, || found).map(|(device, _)| device);
        assert_eq!(of(DeviceSetting::Cuda(None), machine(&gpus)).unwrap(), cuda(0, (9, 0)));
        assert_eq!(of(DeviceSetting::Cuda(Some(0)), machine(&gpus)).unwrap(), cuda(0, (9, 0)));
        let check = |setting, found: Probe, expected: &str| {
            let error = of(setting, found).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("openlora doctor"), "{error}");
        };
        check(DeviceSetting::Cuda(Some(1)), machine(&gpus), "cuda:1 is in use by another process");
        check(DeviceSetting::Cuda(Some(2)), machine(&gpus), "there is no cuda:2, of 2 GPUs");
        check(
            DeviceSetting::Cuda(None),
            nothing(),
            "engine.device is cuda, which cannot be used: driver: libcuda.so.1",
        );
        let without = Probe { nvrtc: nothing().nvrtc, ..machine(&gpus) };
        check(DeviceSetting::Cuda(Some(0)), without, "libnvrtc");
        assert_eq!(of(DeviceSetting::Cpu, machine(&gpus)).unwrap(), Device::Cpu);
    }

    #[test]
    fn auto_precision_follows_the_device_and_what_it_does_not_have_is_refused() {
        use Precision::{Auto, Bf16, F16, F32, Quantised};
        let (turing, hopper) = (cuda(0, (7, 5)), cuda(0, (9, 0)));
        for (device, auto, has) in [
            (Device::Cpu, Quantised, [true, true, false, false]),
            (turing, F16, [false, true, false, true]),
            (hopper, Bf16, [false, true, true, true]),
        ] {
            assert_eq!(precision(Auto, device).unwrap(), auto);
            for (asked, has) in [Quantised, F32, Bf16, F16].into_iter().zip(has) {
                match precision(asked, device) {
                    Ok(found) => assert!(has && found == asked, "{device} {asked:?}"),
                    Err(error) => {
                        let error = error.to_string();
                        let named = error.contains("model.precision") && error.contains(asked.name());
                        assert!(!has && named && error.contains(auto.name()), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn sizes_that_are_not_set_fit_the_device_and_those_that_are() {
        let load = |file: &str| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("openlora.toml");
            std::fs::write(&path, file).unwrap();
            crate::config::load(Some(&path), [], &[], folder.path()).unwrap().config
        };
        let sizes = |file: &str, device| {
            let config = engine_config(&load(file), device);
            (config.max_num_seqs, config.max_num_batched_tokens, config.pool_bytes)
        };
        let gpu = cuda(0, (9, 0));
        assert_eq!(sizes("", Device::Cpu), (32, 80, 1 << 30));
        assert_eq!(sizes("", gpu), (256, 2_048, 0));
        assert_eq!(sizes("[engine]\nmax_num_seqs = 100\n", Device::Cpu), (100, 100, 1 << 30));
        assert_eq!(sizes("[engine]\nmax_num_batched_tokens = 8\n", Device::Cpu), (8, 8, 1 << 30));
        assert_eq!(sizes("[engine]\nmax_num_seqs = 4\npool_bytes = 4096\n", gpu), (4, 2_048, 4_096));
    }
}
