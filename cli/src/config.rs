//! Settings: the commented `openlora.toml` beside this file is the default, a file, the environment and flags go over
//! it, unknown keys are refused, and every value remembers where it came from. Read once, at start; rooms get typed
//! values and never look at the environment.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use openlora_types::Limits;
use serde::Deserialize;
use toml::{Table, Value};

/// The default settings, as text: also what `openlora config show --default` prints.
pub(crate) const DEFAULT: &str = include_str!("openlora.toml");

/// All settings, checked.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) model: Model,
    pub(crate) engine: Engine,
    pub(crate) adapters: Adapters,
    pub(crate) server: Server,
    pub(crate) ledger: Ledger,
    pub(crate) settlement: Settlement,
    pub(crate) limits: Limits,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    pub(crate) precision: Precision,
}

/// `auto` is the device's own best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    Auto,
    Quantised,
    F32,
    Bf16,
    F16,
}

impl Precision {
    /// As in the settings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Quantised => "quantised",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// Which device is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum DeviceSetting {
    Auto,
    Cpu,
    /// A GPU by number, or the first that can be used.
    Cuda(Option<u32>),
}

impl TryFrom<String> for DeviceSetting {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text.as_str(), number) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(None)),
            (_, Some(number)) => Ok(Self::Cuda(Some(number))),
            _ => Err(format!("engine.device is {text:?}; it must be auto, cpu, cuda or cuda:N, such as cuda:0")),
        }
    }
}

impl fmt::Display for DeviceSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Engine {
    pub(crate) device: DeviceSetting,
    pub(crate) threads: usize,
    /// Like the other sizes that may be 0: what fits the device then (`device.rs`).
    pub(crate) pool_bytes: usize,
    pub(crate) device_memory_percent: usize,
    pub(crate) block_size: usize,
    pub(crate) max_num_seqs: usize,
    pub(crate) max_num_batched_tokens: usize,
    pub(crate) long_prefill_chunk: usize,
    pub(crate) max_loras: usize,
    pub(crate) adapter_bytes_per_step: usize,
    pub(crate) max_loading: usize,
    pub(crate) tenant_tokens_per_second: u64,
    pub(crate) tenant_burst_tokens: u64,
    pub(crate) prefix_cache: bool,
    pub(crate) starvation_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Adapters {
    pub(crate) data_dir: PathBuf,
    pub(crate) database_url: String,
    pub(crate) store_url: String,
    pub(crate) allowed_roots: Vec<PathBuf>,
    pub(crate) host_cache_bytes: u64,
    pub(crate) probe: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ledger {
    pub(crate) database_url: String,
    pub(crate) asset: String,
    pub(crate) charge: bool,
    pub(crate) base_owner: String,
    /// Where the database is when `database_url` is empty.
    #[serde(skip)]
    pub(crate) default_file: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settlement {
    pub(crate) rpc_url: String,
    pub(crate) chain_id: u64,
    pub(crate) contract: String,
    pub(crate) keystore: PathBuf,
    pub(crate) password_file: PathBuf,
    pub(crate) kms_key: String,
    pub(crate) bundles_url: String,
    pub(crate) bundles_dir: PathBuf,
    pub(crate) database_url: String,
    /// Where the database is when `database_url` is empty.
    #[serde(skip)]
    pub(crate) default_file: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Server {
    pub(crate) grpc_addr: SocketAddr,
    pub(crate) http_addr: SocketAddr,
    pub(crate) tls_cert: PathBuf,
    pub(crate) tls_key: PathBuf,
    pub(crate) keys_file: PathBuf,
    pub(crate) metrics_public: bool,
    pub(crate) drain_grace_s: u64,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Default,
    File(PathBuf),
    Environment(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A value given on the command line: `("server.grpc_addr", "--grpc-addr", value)`.
pub(crate) type Flag = (&'static str, &'static str, Value);

/// Settings with their origins, by dotted key.
pub(crate) struct Loaded {
    pub(crate) config: Config,
    pub(crate) values: BTreeMap<String, (Value, Origin)>,
}

/// Where things are kept unless the settings say otherwise: `OPENLORA_HOME`, else `~/.cache/openlora`.
pub(crate) fn home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("OPENLORA_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let home =
        home.context("neither OPENLORA_HOME nor HOME is set; set OPENLORA_HOME to a folder to keep things in")?;
    Ok(Path::new(&home).join(".cache/openlora"))
}

/// Reads and checks the settings.
///
/// `environment` is `std::env::vars()` in the program; `OPENLORA_HOME`, `OPENLORA_SERVER` and `OPENLORA_API_KEY*` belong
/// to the client commands, `OPENLORA_NVRTC` and `OPENLORA_CUBLASLT` to the CUDA backend, and are no settings.
pub(crate) fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[Flag],
    home: &Path,
) -> Result<Loaded> {
    let mut values = BTreeMap::new();
    let default: Table = DEFAULT.parse().expect("the embedded default is valid TOML");
    for (section, table) in &default {
        for (key, value) in table.as_table().expect("the embedded default has only sections") {
            values.insert(format!("{section}.{key}"), (value.clone(), Origin::Default));
        }
    }
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).with_context(|| format!("settings file {}", path.display()))?;
        let table: Table = text.parse().with_context(|| format!("settings file {}", path.display()))?;
        for (section, table) in table {
            let Value::Table(table) = table else { bail!("{}: `{section}` is not a section", path.display()) };
            for (key, value) in table {
                put(&mut values, &format!("{section}.{key}"), value, Origin::File(path.to_owned()))?;
            }
        }
    }
    for (name, text) in environment {
        let Some(rest) = name.strip_prefix("OPENLORA_") else { continue };
        // Of the client commands, and of where libraries are.
        let other = ["HOME", "SERVER", "LOG", "NVRTC", "CUBLASLT"].contains(&rest)
            || ["API_KEY", "TEST_", "SIM_"].iter().any(|prefix| rest.starts_with(prefix));
        if other {
            continue;
        }
        let Some(key) = values.keys().find(|key| key.replace('.', "_").eq_ignore_ascii_case(rest)).cloned() else {
            bail!("environment {name}: no setting has this name; `openlora config show` lists them");
        };
        let value = parse_like(&values[&key].0, &text).with_context(|| format!("environment {name}={text}"))?;
        put(&mut values, &key, value, Origin::Environment(name))?;
    }
    for (key, flag, value) in flags {
        put(&mut values, key, value.clone(), Origin::Flag((*flag).to_owned()))?;
    }
    let config = check(&values, home)?;
    Ok(Loaded { config, values })
}

fn put(values: &mut BTreeMap<String, (Value, Origin)>, key: &str, value: Value, origin: Origin) -> Result<()> {
    let Some(slot) = values.get_mut(key) else {
        bail!("{origin}: unknown setting `{key}`; `openlora config show` lists the known ones");
    };
    if slot.0.type_str() != value.type_str() {
        bail!("{origin}: `{key}` must be of type {}, not {}", slot.0.type_str(), value.type_str());
    }
    *slot = (value, origin);
    Ok(())
}

/// Reads text as the same type as `like`; a list is separated by colons.
fn parse_like(like: &Value, text: &str) -> Result<Value> {
    Ok(match like {
        Value::Integer(_) => Value::Integer(text.parse().context("must be an integer")?),
        Value::Boolean(_) => Value::Boolean(text.parse().context("must be true or false")?),
        Value::Array(_) => {
            let parts = text.split(':').filter(|part| !part.is_empty());
            Value::Array(parts.map(|part| Value::String(part.to_owned())).collect())
        }
        _ => Value::String(text.to_owned()),
    })
}

fn check(values: &BTreeMap<String, (Value, Origin)>, home: &Path) -> Result<Config> {
    let mut table = Table::new();
    for (key, (value, origin)) in values {
        let (section, name) = key.split_once('.').expect("keys are section.name");
        if value.as_integer().is_some_and(|value| value < 0) {
            bail!("{origin}: `{key}` must not be negative");
        }
        let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        section.as_table_mut().expect("made above").insert(name.to_owned(), value.clone());
    }
    let mut config: Config = table.try_into().context("settings")?;
    let or_home = |path: &mut PathBuf, name: &str| {
        if path.as_os_str().is_empty() {
            *path = home.join(name);
        }
    };
    or_home(&mut config.model.path, "models/SmolLM2-135M-Instruct.Q4_1.gguf");
    or_home(&mut config.adapters.data_dir, "adapters");
    or_home(&mut config.server.keys_file, "keys.json");
    or_home(&mut config.settlement.bundles_dir, "bundles");
    config.ledger.default_file = home.join("ledger.db");
    config.settlement.default_file = home.join("settlement.db");
    if config.engine.threads == 0 {
        config.engine.threads = std::thread::available_parallelism().map_or(1, usize::from);
    }
    let engine = &config.engine;
    for (key, value, min, max) in [
        ("engine.block_size", engine.block_size, 1, 256),
        ("engine.max_num_seqs", engine.max_num_seqs, 0, 4_096),
        ("engine.max_num_batched_tokens", engine.max_num_batched_tokens, 0, 65_536),
        ("engine.long_prefill_chunk", engine.long_prefill_chunk, 0, 65_536),
        ("engine.max_loras", engine.max_loras, 0, 4_096),
        ("engine.threads", engine.threads, 1, 1_024),
        ("engine.device_memory_percent", engine.device_memory_percent, 1, 100),
    ] {
        if value < min || value > max {
            bail!("{}: `{key}` is {value}; it must be from {min} to {max}", values[key].1);
        }
    }
    if engine.max_num_batched_tokens > 0 && engine.max_num_batched_tokens < engine.max_num_seqs {
        bail!(
            "`engine.max_num_batched_tokens` is {}; it must be at least `engine.max_num_seqs`, {}",
            engine.max_num_batched_tokens,
            engine.max_num_seqs
        );
    }
    let server = &config.server;
    if server.tls_cert.as_os_str().is_empty() != server.tls_key.as_os_str().is_empty() {
        bail!("`server.tls_cert` and `server.tls_key` must be set together");
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_load(file: Option<&str>, environment: &[(&str, &str)], flags: &[Flag]) -> Result<Loaded> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("openlora.toml");
        if let Some(text) = file {
            std::fs::write(&path, text).unwrap();
        }
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        load(file.map(|_| path.as_path()), environment, flags, Path::new("/home/somebody"))
    }

    #[test]
    fn the_embedded_default_names_every_limit_with_its_default() {
        let loaded = try_load(None, &[], &[]).unwrap();
        assert_eq!(loaded.config.limits, Limits::default());
        let on_cpu = crate::device::engine_config(&loaded.config, crate::device::Device::Cpu);
        assert_eq!(on_cpu, openlora_engine::EngineConfig::default());
        assert_eq!(loaded.config.server.keys_file, Path::new("/home/somebody/keys.json"));
    }

    #[test]
    fn the_last_of_default_file_environment_and_flag_wins_and_is_remembered() {
        let file = "[engine]\nmax_num_seqs = 8\nmax_loras = 8\nblock_size = 8\n";
        let environment = [
            ("OPENLORA_ENGINE_MAX_LORAS", "16"),
            ("OPENLORA_ENGINE_BLOCK_SIZE", "32"),
            ("OPENLORA_NVRTC", "/lib/libnvrtc.so.13"),
            ("OTHER", "x"),
        ];
        let flags = [("engine.block_size", "--block-size", Value::Integer(64))];
        let loaded = try_load(Some(file), &environment, &flags).unwrap();
        let engine = loaded.config.engine;
        assert_eq!((engine.max_num_seqs, engine.max_loras, engine.block_size), (8, 16, 64));
        assert_eq!(loaded.values["engine.block_size"].1, Origin::Flag("--block-size".into()));
        assert_eq!(loaded.values["engine.max_loras"].1, Origin::Environment("OPENLORA_ENGINE_MAX_LORAS".into()));
        assert!(matches!(loaded.values["engine.max_num_seqs"].1, Origin::File(_)));
        assert_eq!(loaded.values["engine.prefix_cache"].1, Origin::Default);
    }

    #[test]
    fn a_device_is_asked_for_by_name() {
        use DeviceSetting::{Auto, Cpu, Cuda};
        assert_eq!(try_load(None, &[], &[]).unwrap().config.engine.device, Auto);
        for (text, device) in [("auto", Auto), ("cpu", Cpu), ("cuda", Cuda(None)), ("cuda:3", Cuda(Some(3)))] {
            let flag = ("engine.device", "--device", Value::String(text.into()));
            let loaded = try_load(None, &[], &[flag]).unwrap();
            assert_eq!(loaded.config.engine.device, device);
            assert_eq!(device.to_string(), text);
            assert_eq!(loaded.values["engine.device"].1, Origin::Flag("--device".into()));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error =
            |file, environment: &[(&str, &str)]| format!("{:#}", try_load(file, environment, &[]).err().unwrap());
        assert!(error(Some("[engine]\nmax_seqs = 1\n"), &[]).contains("engine.max_seqs"));
        assert!(error(Some("[engnie]\nmax_num_seqs = 1\n"), &[]).contains("engnie.max_num_seqs"));
        assert!(error(Some("[engine]\nmax_num_seqs = \"1\"\n"), &[]).contains("must be of type integer"));
        assert!(error(Some("[engine]\nmax_num_seqs = -1\n"), &[]).contains("must not be negative"));
        assert!(error(Some("[engine]\nmax_num_seqs = 5000\n"), &[]).contains("engine.max_num_seqs"));
        assert!(error(Some("[engine]\nblock_size = 0\n"), &[]).contains("engine.block_size"));
        assert!(error(Some("[engine]\ndevice_memory_percent = 0\n"), &[]).contains("engine.device_memory_percent"));
        let few_rows = "[engine]\nmax_num_seqs = 9\nmax_num_batched_tokens = 8\n";
        assert!(error(Some(few_rows), &[]).contains("engine.max_num_seqs"));
        for device in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA"] {
            let error = error(None, &[("OPENLORA_ENGINE_DEVICE", device)]);
            assert!(error.contains("engine.device") && error.contains("cuda:N"), "{error}");
        }
        assert!(error(Some("[model]\nprecision = \"f64\"\n"), &[]).contains("precision"));
        assert!(error(Some("[server]\ntls_cert = \"x\"\n"), &[]).contains("tls_key"));
        assert!(error(None, &[("OPENLORA_ENGINE_THREADS", "two")]).contains("OPENLORA_ENGINE_THREADS"));
        assert!(error(None, &[("OPENLORA_ENGINE_THREAD", "2")]).contains("OPENLORA_ENGINE_THREAD"));
    }
}
