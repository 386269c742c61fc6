//! `openlora doctor`: finds a broken set-up faster than a person would. Every line is ok or names what fixes it.

mod money;

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use openlora_adapters::AdapterError;
use openlora_kernels::cpu::Isa;
use openlora_kernels::cuda::Places;
use openlora_kernels::cuda::probe::{Probe, probe};
use openlora_model::ModelFiles;
use openlora_server::keys::KeyStore;
use serde_json::json;

use crate::config::{Config, Precision};
use crate::device::{self, Device};
use crate::{Global, load_config, serve};

#[derive(Args)]
#[command(after_help = "Example:\n  openlora doctor --config openlora.toml")]
pub(crate) struct DoctorArgs {}

struct Finding {
    what: &'static str,
    ok: bool,
    detail: String,
}

pub(crate) fn run(global: &Global, _args: &DoctorArgs) -> Result<ExitCode> {
    let mut findings = Vec::new();
    let mut note = |what, outcome: Result<String>| {
        let ok = outcome.is_ok();
        let detail = outcome.unwrap_or_else(|error| format!("{error:#}"));
        findings.push(Finding { what, ok, detail });
    };
    match load_config(global, &[]) {
        Err(error) => note("settings", Err(error)),
        Ok(loaded) => {
            let config = loaded.config;
            note("settings", Ok("fine; `openlora config show --origin` lists them".into()));
            note("processor", Ok(processor(&config)));
            note("cuda", Ok(cuda(&probe(&Places::from_environment()))));
            note("memory", memory(&config));
            let mut running = false;
            match model(&config) {
                Ok((files, detail)) => {
                    note("model", Ok(detail));
                    let outcome = adapters(&config, &files);
                    running = outcome.as_ref().is_ok_and(|found| found.is_none());
                    for (what, outcome) in adapter_lines(&config, outcome) {
                        note(what, outcome);
                    }
                }
                Err(error) => note("model", Err(error)),
            }
            note("keys", keys(&config));
            note("tls", tls(&config));
            note("gRPC port", port(config.server.grpc_addr, "server.grpc_addr", running));
            note("HTTP port", port(config.server.http_addr, "server.http_addr", running));
            for (what, outcome) in money::lines(&config) {
                note(what, outcome);
            }
        }
    }
    let failed = findings.iter().filter(|finding| !finding.ok).count();
    if global.json {
        let lines = findings.iter().map(|f| json!({"what": f.what, "ok": f.ok, "detail": f.detail}));
        println!("{}", json!({"ok": failed == 0, "findings": lines.collect::<Vec<_>>()}));
    } else {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        for finding in &findings {
            let mark = match (finding.ok, colour) {
                (true, true) => "\x1b[32mok  \x1b[0m",
                (true, false) => "ok  ",
                (false, true) => "\x1b[31mFAIL\x1b[0m",
                (false, false) => "FAIL",
            };
            println!("{mark} {:10} {}", finding.what, finding.detail);
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn processor(config: &Config) -> String {
    format!("{} kernels, {} threads", Isa::detect().name(), config.engine.threads)
}

/// No fault of the set-up, whatever is missing: models are served by the processor then.
fn cuda(found: &Probe) -> String {
    match &found.driver {
        Err(missing) => format!("no GPU: {missing}"),
        Ok(_) if found.usable() => found.to_string(),
        Ok(_) => format!("no GPU can be used: {found}"),
    }
}

fn memory(config: &Config) -> Result<String> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .context("/proc/meminfo has no MemAvailable")?
        * 1024;
    let model = std::fs::metadata(&config.model.path).map_or(0, |meta| meta.len());
    // 4.5 bits and more become 32.
    let exact = model * 7;
    let weights = if config.model.precision == Precision::F32 { exact } else { model };
    let pool = device::engine_config(config, Device::Cpu).pool_bytes as u64;
    let reference = if config.adapters.probe { exact } else { 0 };
    let needed = weights + reference + pool + config.adapters.host_cache_bytes;
    let mib = |bytes: u64| bytes >> 20;
    if needed > available {
        anyhow::bail!(
            "the settings may use {} MiB and {} MiB are available; lower engine.pool_bytes or \
             adapters.host_cache_bytes{}",
            mib(needed),
            mib(available),
            if config.adapters.probe { ", or switch adapters.probe off" } else { "" }
        );
    }
    Ok(format!("up to {} of {} MiB available", mib(needed), mib(available)))
}

fn model(config: &Config) -> Result<(Arc<ModelFiles>, String)> {
    let files = serve::open_model(config)?;
    files.tokenizer().context("tokenizer")?;
    let template = if files.chat_template()?.is_some() { "with" } else { "without" };
    let detail = format!("{} ({}), {template} chat template", files.shape().name, files.config().architecture);
    Ok((files, detail))
}

/// What the store holds; `None` while a server has it.
fn adapters(config: &Config, files: &Arc<ModelFiles>) -> Result<Option<String>> {
    let settings = &config.adapters;
    for root in &settings.allowed_roots {
        std::fs::canonicalize(root).with_context(|| format!("adapters.allowed_roots: {}", root.display()))?;
    }
    match serve::open_store(config, files) {
        Ok(store) => Ok(Some(format!("{} registered", store.stats().registered))),
        Err(AdapterError::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// One line each for the adapters, their database and their store; an error stands on the line of what is broken.
fn adapter_lines(config: &Config, outcome: Result<Option<String>>) -> Vec<(&'static str, Result<String>)> {
    let settings = &config.adapters;
    // The URL itself may hold a password.
    let database = match settings.database_url.split(':').next().unwrap_or_default() {
        "" => format!("SQLite, {}", settings.data_dir.join("registry.db").display()),
        kind => format!("{kind}, by adapters.database_url"),
    };
    let store = match settings.store_url.as_str() {
        "" => format!("folder {}", settings.data_dir.join("adapters").display()),
        url => url.to_owned(),
    };
    let in_use = "in use by a running server; `openlora adapter ls` asks it";
    let error = match outcome {
        Ok(found) => {
            let found = found.unwrap_or_else(|| in_use.to_owned());
            return vec![("database", Ok(database)), ("store", Ok(store)), ("adapters", Ok(found))];
        }
        Err(error) => error,
    };
    let broken = match error.downcast_ref::<AdapterError>() {
        Some(AdapterError::Database { .. }) => "database",
        Some(AdapterError::Io { .. }) => "store",
        Some(AdapterError::Invalid(field)) if field.field == "adapters.database_url" => "database",
        Some(AdapterError::Invalid(field)) if field.field == "adapters.store_url" => "store",
        _ => "adapters",
    };
    vec![(broken, Err(error))]
}

fn keys(config: &Config) -> Result<String> {
    let path = &config.server.keys_file;
    let keys = KeyStore::open(path).with_context(|| path.display().to_string())?.list()?.len();
    if keys == 0 {
        anyhow::bail!("none in {}; make one with `openlora key create --role admin --name admin`", path.display());
    }
    Ok(format!("{keys} in {}", path.display()))
}

fn tls(config: &Config) -> Result<String> {
    let server = &config.server;
    if server.tls_cert.as_os_str().is_empty() {
        return Ok("off; set server.tls_cert and server.tls_key to encrypt".into());
    }
    let readable = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    readable(&server.tls_cert)?;
    readable(&server.tls_key)?;
    Ok(format!("certificate {}", server.tls_cert.display()))
}

fn port(addr: SocketAddr, setting: &str, running: bool) -> Result<String> {
    if running && TcpListener::bind(addr).is_err() {
        return Ok(format!("{addr} is taken, as by the running server"));
    }
    TcpListener::bind(addr).with_context(|| format!("{addr} is taken; stop what listens there or change {setting}"))?;
    Ok(format!("{addr} is free"))
}
