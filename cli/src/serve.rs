//! `openlora serve`: the composition root. Opens the model, the adapter store and the keys, starts the engine, opens the
//! doors, and on SIGTERM or Ctrl-C drains and leaves.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use openlora_adapters::{AdapterError, AdapterStore, BaseRows, StoreConfig};
use openlora_model::ModelFiles;
use openlora_server::{App, Auth, Books, EngineLimits, Epochs, ModelFacts, ServerConfig, Tls};
use openlora_types::{Module, Site};
use toml::Value;

use crate::check::ServingProbe;
use crate::config::{Config, Flag};
use crate::desk::Desk;
use crate::device::{self, Device, LoadedModel};
use crate::{Global, ledger, load_config, shutdown_signal};

#[derive(Args)]
#[command(after_help = "Examples:
  openlora serve
  openlora serve --model ./Qwen2.5-0.5B --precision f32
  openlora serve --device cuda:0
  openlora serve --insecure-no-auth --grpc-addr 127.0.0.1:50051")]
pub(crate) struct ServeArgs {
    /// A GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<String>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// `auto`, `quantised`, `bf16`, `f16` or `f32`
    #[arg(long)]
    pub(crate) precision: Option<String>,
    /// Kernel threads of the CPU; one per core when left out
    #[arg(long)]
    pub(crate) threads: Option<u32>,
    /// Where gRPC listens
    #[arg(long, value_name = "ADDR")]
    pub(crate) grpc_addr: Option<SocketAddr>,
    /// Where /metrics, /healthz and /readyz listen
    #[arg(long, value_name = "ADDR")]
    pub(crate) http_addr: Option<SocketAddr>,
    /// Where adapters are kept
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_dir: Option<String>,
    /// Let everyone on this machine in without a key; refused on other addresses
    #[arg(long)]
    pub(crate) insecure_no_auth: bool,
}

impl ServeArgs {
    fn flags(&self) -> Vec<Flag> {
        let text = |value: &Option<String>| value.clone().map(Value::String);
        let addr = |value: Option<SocketAddr>| value.map(|addr| Value::String(addr.to_string()));
        [
            ("model.path", "--model", text(&self.model)),
            ("model.precision", "--precision", text(&self.precision)),
            ("engine.device", "--device", text(&self.device)),
            ("engine.threads", "--threads", self.threads.map(|threads| Value::Integer(threads.into()))),
            ("server.grpc_addr", "--grpc-addr", addr(self.grpc_addr)),
            ("server.http_addr", "--http-addr", addr(self.http_addr)),
            ("adapters.data_dir", "--data-dir", text(&self.data_dir)),
        ]
        .into_iter()
        .filter_map(|(key, flag, value)| Some((key, flag, value?)))
        .collect()
    }
}

pub(crate) fn run(global: &Global, args: &ServeArgs) -> Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("OPENLORA_LOG").unwrap_or_else(|_| "info,h2=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let config = load_config(global, &args.flags())?.config;
    let server_config = server_config(&config, args.insecure_no_auth);
    server_config.validate()?;
    let (device, precision) = device::choose(&config)?;
    if config.adapters.probe && device != Device::Cpu {
        // A GPU's backend keeps one step in its memory, which belongs to the step thread.
        bail!(
            "adapters.probe runs beside requests on the CPU only; set it to false, and try adapters with `openlora adapter check`"
        );
    }
    let files = open_model(&config)?;
    let mut store = open_store(&config, &files)?;
    let engine_config = device::engine_config(&config, device);
    let model = device::load(&config, &files, (device, precision), &engine_config)?;
    if let (true, LoadedModel::Cpu(model)) = (config.adapters.probe, &model) {
        // One thread: the others' time belongs to the requests.
        store = store.with_probe(Box::new(ServingProbe::new(model, 1)?));
    }
    let engine = model.start_engine(engine_config.clone())?;
    let shape = files.shape();
    let name = shape.name.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let books = Books {
        ledger: runtime.block_on(ledger::open(&config))?,
        asset: ledger::asset(&config)?,
        charge: config.ledger.charge,
        base_owner: Some(config.ledger.base_owner.clone()).filter(|name| !name.is_empty()),
    };
    let epochs = Desk::open(&config, &books)?;
    let app = App {
        engine: engine.clone(),
        store: Arc::new(store),
        books: Some(books.clone()),
        epochs: epochs.map(|desk| Arc::new(desk) as Arc<dyn Epochs>),
        tokenizer: files.tokenizer()?,
        template: files.chat_template()?.map(Arc::new),
        engine_limits: EngineLimits {
            sequence_tokens_max: config.limits.sequence_tokens_max.min(shape.context),
            max_num_seqs: engine_config.max_num_seqs,
            max_num_batched_tokens: engine_config.max_num_batched_tokens,
            max_loras: engine_config.max_loras,
        },
        model: ModelFacts {
            shape,
            architecture: files.config().architecture.to_string(),
            eos_tokens: files.config().eos_tokens.clone(),
        },
        precision: precision.name().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let json = global.json;
    runtime.block_on(openlora_server::run(server_config, app, shutdown_signal(), move |addrs| {
        if json {
            println!("{}", serde_json::json!({"grpc": addrs.grpc.to_string(), "http": addrs.http.to_string()}));
        } else {
            println!("serving {name}: gRPC {}, HTTP {}", addrs.grpc, addrs.http);
        }
    }))?;
    runtime.block_on(books.ledger.close());
    engine.shutdown();
    Ok(ExitCode::SUCCESS)
}

/// Lets the store compare an adapter's copies of base weights with the base.
struct Base(Arc<ModelFiles>);

impl BaseRows for Base {
    fn read_row(&self, module: Module, row: usize, out: &mut [f32]) {
        self.0.read_row(Site { layer: 0, module }, row, out);
    }
}

pub(crate) fn open_store(config: &Config, files: &Arc<ModelFiles>) -> Result<AdapterStore, AdapterError> {
    let adapters = StoreConfig {
        data_dir: config.adapters.data_dir.clone(),
        database_url: config.adapters.database_url.clone(),
        store_url: config.adapters.store_url.clone(),
        allowed_roots: config.adapters.allowed_roots.clone(),
        host_cache_bytes: config.adapters.host_cache_bytes,
    };
    let store = AdapterStore::open(adapters, files.shape(), config.limits.clone())?;
    Ok(store.with_base(Arc::new(Base(Arc::clone(files)))))
}

pub(crate) fn open_model(config: &Config) -> Result<Arc<ModelFiles>> {
    let path = &config.model.path;
    let files = ModelFiles::open(path, &config.limits)
        .with_context(|| format!("model {}; scripts/fetch-model.sh fetches the default one", path.display()))?;
    Ok(Arc::new(if config.model.name.is_empty() { files } else { files.named(&config.model.name) }))
}

fn server_config(config: &Config, insecure: bool) -> ServerConfig {
    let server = &config.server;
    let tls = (!server.tls_cert.as_os_str().is_empty())
        .then(|| Tls { cert_path: server.tls_cert.clone(), key_path: server.tls_key.clone() });
    ServerConfig {
        grpc_addr: server.grpc_addr,
        http_addr: server.http_addr,
        tls,
        auth: if insecure { Auth::InsecureLoopback } else { Auth::Keys { path: server.keys_file.clone() } },
        metrics_public: server.metrics_public,
        limits: config.limits.clone(),
        drain_grace: Duration::from_secs(server.drain_grace_s),
        ..ServerConfig::default()
    }
}
