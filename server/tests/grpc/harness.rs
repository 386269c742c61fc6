//! Starts servers for tests, and talks to them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openlora_adapters::{AdapterStore, StoreConfig};
use openlora_engine::{Engine, EngineConfig, EngineHandle};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::{Backend, Precision};
use openlora_model::text::{ChatOptions, ChatTemplate};
use openlora_model::{LoadOptions, Model, ModelFiles};
use openlora_proto::v1 as wire;
use openlora_proto::v1::adapters_client::AdaptersClient;
use openlora_proto::v1::generate_request::Prompt;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_proto::v1::server_client::ServerClient;
use openlora_proto::v1::settlement_client::SettlementClient;
use openlora_server::keys::{KeyStore, Role};
use openlora_server::{
    App, Auth, Books, BoundAddrs, EngineLimits, Epochs, ModelFacts, ServerConfig, ServerError, Tls, run,
};
use openlora_types::{Limits, Token};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::codegen::http;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// Longer than anything here takes; a test that reaches it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Tokens of the served context: enough for an answer to be still running whenever a test looks.
const CONTEXT: usize = 16_384;

pub(crate) const ROLES: [Role; 5] = [Role::App, Role::Owner, Role::Contributor, Role::Operator, Role::Admin];

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures")).join(path)
}

/// What a test changes before its server starts.
pub(crate) struct Setup {
    pub(crate) server: ServerConfig,
    pub(crate) engine: EngineConfig,
    pub(crate) limits: Limits,
    pub(crate) with_keys: bool,
    pub(crate) with_tls: bool,
    /// Serves in place of the CPU.
    pub(crate) device: Option<Arc<Emulated>>,
    /// A ledger of the test's.
    pub(crate) books: Option<Books>,
    /// What stands for a chain in the test.
    pub(crate) epochs: Option<Arc<dyn Epochs>>,
}

/// A server, its rooms and its keys. Dropping it leaves it to the runtime; [`TestServer::stop`] waits.
pub(crate) struct TestServer {
    pub(crate) addrs: BoundAddrs,
    pub(crate) engine: EngineHandle,
    pub(crate) folder: TempDir,
    pub(crate) keys: HashMap<Role, String>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<(), ServerError>>,
}

impl TestServer {
    /// A server as configured by default, with a key for every role.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Setup)) -> Self {
        Self::start_in(tempfile::tempdir().expect("temporary folder"), change).await
    }

    /// Stops, and starts again on the same folder.
    pub(crate) async fn restart(mut self) -> Self {
        self.ask_to_stop();
        let ended = tokio::time::timeout(PATIENCE, &mut self.served).await;
        ended.expect("ends in time").expect("does not panic").expect("a clean end");
        drop(self.engine);
        Self::start_in(self.folder, |_| {}).await
    }

    async fn start_in(folder: TempDir, change: impl FnOnce(&mut Setup)) -> Self {
        let mut setup = Setup {
            server: ServerConfig {
                grpc_addr: "127.0.0.1:0".parse().expect("address"),
                http_addr: "127.0.0.1:0".parse().expect("address"),
                ..ServerConfig::default()
            },
            engine: EngineConfig { pool_bytes: 64 << 20, ..EngineConfig::default() },
            // Room for a whole answer: a test that looks elsewhere for a moment is no slow reader.
            limits: Limits { stream_events_max: 20_000, ..Limits::default() },
            with_keys: true,
            with_tls: false,
            device: None,
            books: None,
            epochs: None,
        };
        change(&mut setup);
        let path = folder.path().join("keys.json");
        let mut keys = HashMap::new();
        if setup.with_keys {
            let store = KeyStore::open(&path).expect("key store");
            for role in ROLES {
                let key = store.create(&name_of(role), role).expect("key");
                keys.insert(role, key.reveal().to_owned());
            }
            setup.server.auth = Auth::Keys { path };
        }
        if setup.with_tls {
            setup.server.tls = Some(Tls { cert_path: tls_file("cert.pem"), key_path: tls_file("key.pem") });
        }
        setup.server.limits = setup.limits.clone();
        setup.engine.waiting_requests_max = setup.limits.waiting_requests_max;
        setup.engine.stream_events_max = setup.limits.stream_events_max;
        let app = app(folder.path(), &setup);
        let engine = app.engine.clone();
        let (stop, stopped) = oneshot::channel();
        let (ready, bound) = oneshot::channel();
        let shutdown = async {
            // Dropped instead of sent: the test is over.
            let _ = stopped.await;
        };
        let served = tokio::spawn(run(setup.server, app, shutdown, |addrs| ready.send(addrs).expect("a test waits")));
        let addrs = match bound.await {
            Ok(addrs) => addrs,
            Err(_) => panic!("the server did not start: {:?}", served.await),
        };
        Self { addrs, engine, folder, keys, stop: Some(stop), served }
    }

    /// Asks the server to shut down.
    pub(crate) fn ask_to_stop(&mut self) {
        self.stop.take().expect("asked once").send(()).expect("the server runs");
    }

    /// Waits for the end of a server that was asked to stop.
    pub(crate) async fn ended(self) -> Result<(), ServerError> {
        tokio::time::timeout(PATIENCE, self.served).await.expect("ends in time").expect("does not panic")
    }

    pub(crate) async fn stop(mut self) -> Result<(), ServerError> {
        self.ask_to_stop();
        self.ended().await
    }

    pub(crate) async fn channel(&self) -> Channel {
        endpoint(self.addrs.grpc).connect().await.expect("connects")
    }

    pub(crate) async fn inference(&self, role: Role) -> InferenceClient<Keyed> {
        InferenceClient::with_interceptor(self.channel().await, self.key(role))
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20)
    }

    pub(crate) async fn adapters(&self, role: Role) -> AdaptersClient<Keyed> {
        AdaptersClient::with_interceptor(self.channel().await, self.key(role))
    }

    pub(crate) async fn settlement(&self, role: Role) -> SettlementClient<Keyed> {
        SettlementClient::with_interceptor(self.channel().await, self.key(role))
    }

    /// A client of another owner, whose key is made now.
    pub(crate) async fn adapters_of(&self, owner: &str) -> AdaptersClient<Keyed> {
        let store = KeyStore::open(self.folder.path().join("keys.json")).expect("key store");
        let key = store.create(owner, Role::Owner).expect("key");
        let key = Key(Some(format!("Bearer {}", key.reveal()).parse().expect("a header")));
        let mut client = AdaptersClient::with_interceptor(self.channel().await, key);
        let known = async {
            while client.get_quota(wire::GetQuotaRequest::default()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, known).await.expect("a running server learns of new keys");
        client
    }

    pub(crate) async fn info(&self) -> wire::ServerInfo {
        let mut client = ServerClient::with_interceptor(self.channel().await, self.key(Role::Operator));
        client.get_info(wire::GetInfoRequest {}).await.expect("info").into_inner()
    }

    pub(crate) fn key(&self, role: Role) -> Key {
        Key(self.keys.get(&role).map(|key| format!("Bearer {key}").parse().expect("a header")))
    }

    /// Waits until no sequence is left and every KV block is free again.
    pub(crate) async fn until_idle(&self) {
        let idle = async {
            loop {
                let info = self.info().await;
                if info.running_sequences == 0 && info.waiting_sequences == 0 {
                    assert_eq!(info.pages_free + info.adapter_pages, info.pages_total, "{info:?}");
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, idle).await.expect("the engine becomes idle");
    }

    /// Waits until so many sequences run.
    pub(crate) async fn until_running(&self, sequences: u32) {
        let running = async {
            while self.info().await.running_sequences < sequences {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, running).await.expect("the sequences run");
    }

    /// One HTTP/1.1 request: status line and body.
    pub(crate) async fn http(&self, path: &str, role: Option<Role>) -> (u16, String) {
        let key = role.map(|role| format!("authorization: Bearer {}\r\n", self.keys[&role])).unwrap_or_default();
        http_get(self.addrs.http, path, &key).await
    }
}

pub(crate) async fn http_get(addr: SocketAddr, path: &str, headers: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(addr).await.expect("connects");
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n{headers}connection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("written");
    let mut answer = String::new();
    let read = tokio::time::timeout(PATIENCE, socket.read_to_string(&mut answer)).await;
    read.expect("answers in time").expect("read");
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    let body = answer.split_once("\r\n\r\n").expect("a body").1.to_owned();
    (status, body)
}

/// The tenant and namespace of a role's key.
pub(crate) fn name_of(role: Role) -> String {
    format!("the-{role}")
}

pub(crate) fn tls_file(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/grpc/tls")).join(name)
}

pub(crate) fn endpoint(addr: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{addr}")).expect("an address").connect_timeout(PATIENCE)
}

pub(crate) type Keyed = InterceptedService<Channel, Key>;

/// Adds a key to every call.
#[derive(Clone)]
pub(crate) struct Key(Option<AsciiMetadataValue>);

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// The fixture with a longer context, so that an answer can take as long as a test needs.
fn long_model(folder: &Path) -> PathBuf {
    let (from, to) = (fixture("models/llama3"), folder.join("tiny"));
    std::fs::create_dir_all(&to).expect("folder");
    for entry in std::fs::read_dir(from).expect("fixture") {
        let entry = entry.expect("entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
    let path = to.join("config.json");
    let text = std::fs::read_to_string(&path).expect("config");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["max_position_embeddings"] = CONTEXT.into();
    std::fs::write(&path, config.to_string()).expect("written");
    to
}

fn engine<B: Backend>(
    backend: B,
    files: &Arc<ModelFiles>,
    options: &LoadOptions,
    config: &EngineConfig,
) -> EngineHandle {
    let model = Model::load(Arc::new(backend), Arc::clone(files), options, &mut |_, _| {}).expect("model");
    Engine::start(Arc::new(model), config.clone()).expect("engine")
}

fn app(folder: &Path, setup: &Setup) -> App {
    let files = Arc::new(ModelFiles::open(&long_model(folder), &setup.limits).expect("model files"));
    let options = LoadOptions {
        max_rows: setup.engine.max_num_batched_tokens,
        max_logit_rows: setup.engine.max_num_seqs,
        max_position: CONTEXT,
        block_size: 16,
    };
    let engine = match &setup.device {
        None => engine(Cpu::new(1, Precision::F32, Isa::detect()).expect("backend"), &files, &options, &setup.engine),
        Some(device) => {
            let backend = Cuda::new(Arc::clone(device), Element::F32).expect("backend");
            engine(backend, &files, &options, &setup.engine)
        }
    };
    let config = StoreConfig {
        data_dir: folder.join("data"),
        allowed_roots: vec![fixture("adapters-tiny")],
        host_cache_bytes: 64 << 20,
        ..StoreConfig::default()
    };
    let store = AdapterStore::open(config, files.shape(), setup.limits.clone()).expect("store");
    let tokenizer = files.tokenizer().expect("tokenizer");
    let source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
                  {% if add_generation_prompt %}[assistant]{% endif %}";
    let template = ChatTemplate::new(source, &tokenizer, ChatOptions::default(), &setup.limits).expect("template");
    App {
        engine,
        store: Arc::new(store),
        books: setup.books.clone(),
        epochs: setup.epochs.clone(),
        tokenizer,
        template: Some(Arc::new(template)),
        model: ModelFacts {
            shape: files.shape(),
            architecture: "llama".into(),
            eos_tokens: files.config().eos_tokens.clone(),
        },
        engine_limits: EngineLimits {
            sequence_tokens_max: CONTEXT,
            max_num_seqs: setup.engine.max_num_seqs,
            max_num_batched_tokens: setup.engine.max_num_batched_tokens,
            max_loras: setup.engine.max_loras,
        },
        precision: "f32".into(),
        version: "test".into(),
    }
}

/// A greedy request that ends by length alone.
pub(crate) fn request(prompt: Prompt, max_tokens: u32) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(prompt),
        sampling: Some(wire::SamplingParameters {
            temperature: Some(0.0),
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(crate) fn text(text: &str) -> Prompt {
    Prompt::Text(text.to_owned())
}

pub(crate) fn tokens(ids: &[Token]) -> Prompt {
    Prompt::TokenIds(wire::TokenIds { ids: ids.to_vec() })
}

/// A request that runs for as long as nothing ends it.
pub(crate) fn long_request() -> wire::GenerateRequest {
    request(text("The river"), 16_000)
}

/// A unary call without tonic's client, which has timers and windows of its own; gives the final status.
pub(crate) async fn raw_call(
    addr: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
    message: &impl prost::Message,
) -> Code {
    let socket = TcpStream::connect(addr).await.expect("connects");
    let (client, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("ready");
    let mut call = http::Request::post(format!("http://{addr}{path}"));
    call = call.header("content-type", "application/grpc").header("te", "trailers");
    for (name, value) in headers {
        call = call.header(*name, *value);
    }
    let (response, mut body) = client.send_request(call.body(()).expect("a request"), false).expect("sent");
    let encoded = message.encode_to_vec();
    let mut framed = vec![0];
    framed.extend((encoded.len() as u32).to_be_bytes());
    framed.extend(encoded);
    // A server that has refused already does not take it.
    let _refused = body.send_data(framed.into(), true);
    let answered = async {
        let (head, mut body) = response.await.expect("a response").into_parts();
        if let Some(status) = head.headers.get("grpc-status") {
            return Code::from_bytes(status.as_bytes());
        }
        while let Some(data) = body.data().await {
            let len = data.expect("data").len();
            body.flow_control().release_capacity(len).expect("a window");
        }
        let trailers = body.trailers().await.expect("trailers").expect("a status");
        Code::from_bytes(trailers["grpc-status"].as_bytes())
    };
    tokio::time::timeout(PATIENCE, answered).await.expect("answers in time")
}
