//! The probe put together (`adapters.probe`), and `openlora adapter check`: a registration without a server.

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use openlora_adapters::{Actor, AdapterError, AdapterInfo, Probe, inspect_folder};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, Precision};
use openlora_model::{Model, ModelFiles, PROBE_DIVERGENCE_MAX, ProbeDistance, ProbeReport};
use openlora_types::{AdapterWeights, Alias, Classify, Fault, InvalidField};
use serde_json::json;

use crate::adapter::FolderArgs;
use crate::config::Config;
use crate::device::{self, LoadedModel};
use crate::{Global, load_config, serve};

/// Tries adapters on the model that serves, beside its f32 reference.
pub(crate) struct ServingProbe<S: Backend> {
    probe: openlora_model::Probe<S, Cpu>,
    /// Where the last report goes.
    report: Report,
}

/// The last report, for who asked for the probe.
type Report = Arc<Mutex<Option<ProbeReport>>>;

impl<S: Backend> ServingProbe<S> {
    /// Loads the reference: the same file in f32 on the portable kernels of the CPU, which share no arithmetic with the others.
    pub(crate) fn new(serving: &Arc<Model<S>>, threads: usize) -> Result<Self> {
        let reference = Arc::new(Cpu::new(threads, Precision::F32, Isa::Portable)?);
        let probe = openlora_model::Probe::new(Arc::clone(serving), reference).context("the probe's f32 reference")?;
        Ok(Self { probe, report: Report::default() })
    }
}

impl<S: Backend> Probe for ServingProbe<S> {
    fn probe(&mut self, weights: &AdapterWeights) -> Result<(), AdapterError> {
        let refused = |why: String| AdapterError::from(InvalidField::new("adapter_model.safetensors", why));
        let report = self.probe.run(weights).map_err(|error| match error.fault() {
            Fault::Client => refused(format!("cannot be served: {error}")),
            _ => AdapterError::Probe { reason: error.to_string() },
        })?;
        tracing::info!(
            generation = %weights.generation.short(),
            divergence = report.adapter.divergence,
            base_divergence = report.base.divergence,
            effect = report.effect_max,
            "adapter probed"
        );
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
        report.verdict().map_err(refused)
    }
}

/// `openlora adapter check`.
pub(crate) fn run(global: &Global, args: &FolderArgs) -> Result<ExitCode> {
    let mut config = load_config(global, &[])?.config;
    if let Some(path) = &args.model {
        config.model.path.clone_from(path);
    }
    let files = serve::open_model(&config)?;
    // Lists everything that is wrong with the files, before a model is loaded.
    let problems = inspect_folder(&args.folder, &files.shape(), &config.limits)?.problems;
    if !problems.is_empty() {
        return Ok(show(global, None, None, &problems));
    }
    let chosen = device::choose(&config)?;
    let model = device::load(&config, &files, chosen, &device::engine_config(&config, chosen.0))?;
    let (probe, report) = match &model {
        LoadedModel::Cpu(model) => with_report(ServingProbe::new(model, config.engine.threads)?),
        LoadedModel::Cuda(model) => with_report(ServingProbe::new(model, config.engine.threads)?),
    };
    let outcome = register(&config, &files, &args.folder, probe);
    let report = report.lock().unwrap_or_else(PoisonError::into_inner).take();
    match outcome {
        Ok(adapter) => Ok(show(global, Some(&adapter), report.as_ref(), &[])),
        Err(error) if error.fault() == Fault::Client => Ok(show(global, None, report.as_ref(), &[error.to_string()])),
        Err(error) => Err(error.into()),
    }
}

fn with_report<S: Backend>(probe: ServingProbe<S>) -> (Box<dyn Probe>, Report) {
    let report = Arc::clone(&probe.report);
    (Box::new(probe), report)
}

/// Registers the folder in a store that is gone afterwards, so that nothing is checked here that a server would not, nor
/// the other way round.
fn register(
    config: &Config,
    files: &Arc<ModelFiles>,
    folder: &Path,
    probe: Box<dyn Probe>,
) -> Result<AdapterInfo, AdapterError> {
    let failed = |source| AdapterError::Io { action: "make a folder for the check".into(), source: Arc::new(source) };
    let scratch = tempfile::tempdir().map_err(failed)?;
    let folder = folder.canonicalize().map_err(failed)?;
    let mut config = config.clone();
    config.adapters.data_dir = scratch.path().to_owned();
    config.adapters.database_url.clear();
    config.adapters.store_url.clear();
    config.adapters.allowed_roots = vec![folder.clone()];
    let store = serve::open_store(&config, files)?.with_probe(probe);
    let alias = Alias::parse("alias", "check", &config.limits)?;
    let actor = Actor { name: "check".into(), admin: true };
    store.register_folder(&alias, &folder, &actor, false)
}

fn show(global: &Global, adapter: Option<&AdapterInfo>, report: Option<&ProbeReport>, problems: &[String]) -> ExitCode {
    let ok = problems.is_empty();
    if global.json {
        let generation = adapter.map(|adapter| adapter.generation.to_string());
        println!(
            "{}",
            json!({"ok": ok, "generation": generation, "probe": report, "divergence_max": PROBE_DIVERGENCE_MAX, "problems": problems})
        );
    } else {
        if let Some(adapter) = adapter {
            println!("generation {}", adapter.generation);
            println!("{} sites, rank up to {}, {} bytes", adapter.sites, adapter.rank_max, adapter.bytes);
        }
        if let Some(report) = report {
            print_report(report);
        }
        println!("{}", if ok { "would be registered" } else { "would be refused:" });
        for problem in problems {
            println!("  {problem}");
        }
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_report(report: &ProbeReport) {
    let rows = report.tokens;
    println!("served against f32, {rows} tokens   adapter      base alone");
    let line = |what: &str, figure: &dyn Fn(&ProbeDistance) -> String| {
        println!("{what:32}  {:11}  {}", figure(&report.adapter), figure(&report.base));
    };
    line("  largest logit difference", &|distance| format!("{:.4}", distance.logit_difference_max));
    line(&format!("  mean KL, nats (at most {PROBE_DIVERGENCE_MAX})"), &|distance| {
        format!("{:.6}", distance.divergence)
    });
    line("  same most probable token", &|distance| format!("{}/{rows}", distance.same_top));
    let nothing = if report.effect_max == 0.0 { ": the adapter changes nothing" } else { "" };
    println!("largest change of a logit by the adapter, in f32: {:.4}{nothing}", report.effect_max);
}
