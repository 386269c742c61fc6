//! A real server process on ports of its own, its keys and adapters in a folder that goes with the test.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openlora_proto::v1::adapters_client::AdaptersClient;
use openlora_proto::v1::generate_request::Prompt;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_proto::v1::server_client::ServerClient;
use openlora_proto::v1::settlement_client::SettlementClient;
use openlora_proto::v1::upload_adapter_request::Part;
use openlora_proto::v1::{
    Adapter, GenerateRequest, GenerateResponse, OutputOptions, SamplingParameters, TokenIds, UploadAdapterRequest,
    UploadChunk, UploadHeader,
};
use serde::Deserialize;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

pub(crate) const OPENLORA: &str = env!("CARGO_BIN_EXE_openlora");

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

/// One case of an `expected.json`: an answer of transformers and PEFT.
#[derive(Clone, Deserialize)]
pub(crate) struct Case {
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) prompt_logprobs: Vec<f32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) greedy_margin: Vec<f32>,
}

pub(crate) fn cases(path: &str) -> Vec<Case> {
    let path = fixtures().join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The model file of the tests, as `scripts/fetch-model.sh` leaves it.
fn model() -> String {
    std::env::var("OPENLORA_TEST_MODEL").unwrap_or_else(|_| {
        let home = std::env::var("HOME").expect("HOME is set");
        let home = std::env::var("OPENLORA_HOME").unwrap_or_else(|_| format!("{home}/.cache/openlora"));
        let path = format!("{home}/models/SmolLM2-135M-Instruct.Q4_1.gguf");
        assert!(Path::new(&path).exists(), "{path} is missing; scripts/fetch-model.sh fetches it");
        path
    })
}

pub(crate) struct Server {
    process: Child,
    pub(crate) grpc: String,
    pub(crate) http: String,
    pub(crate) key: String,
    pub(crate) home: tempfile::TempDir,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts `openlora serve` with `settings` as `OPENLORA_*` environment.
    pub(crate) fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder for the server"), settings)
    }

    pub(crate) fn start_in(home: tempfile::TempDir, settings: &[(&str, &str)]) -> Self {
        let key = create_key(home.path(), "admin", "admin");
        let mut command = Command::new(OPENLORA);
        command.args(["serve", "--json", "--grpc-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0"]);
        command.env("OPENLORA_HOME", home.path()).env("OPENLORA_MODEL_PATH", model());
        // Small pools: what a test needs, started in a moment. The CPU, whatever machine this is.
        command.env("OPENLORA_ENGINE_POOL_BYTES", "268435456").env("OPENLORA_ENGINE_DEVICE", "cpu");
        command.envs(settings.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("openlora starts");
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = process.stderr.take().expect("stderr is piped");
        let collected = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = collected.lock().expect("the log");
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut line = String::new();
        let mut stdout = BufReader::new(process.stdout.take().expect("stdout is piped"));
        stdout.read_line(&mut line).expect("the server's first line");
        let Ok(addresses) = serde_json::from_str::<serde_json::Value>(&line) else {
            process.wait().expect("the server ends");
            panic!("the server did not start: {line}{}", log.lock().expect("the log"));
        };
        std::thread::spawn(move || stdout.read_to_string(&mut String::new()));
        let addr = |door: &str| addresses[door].as_str().expect("an address").to_owned();
        let (grpc, http) = (format!("http://{}", addr("grpc")), addr("http"));
        Self { process, grpc, http, key, home, log }
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("the log").clone()
    }

    /// Runs `openlora` as this server's client.
    pub(crate) fn openlora(&self, args: &[&str]) -> Output {
        let mut command = Command::new(OPENLORA);
        command.env("OPENLORA_HOME", self.home.path()).env("OPENLORA_MODEL_PATH", model());
        command.env("OPENLORA_SERVER", &self.grpc).env("OPENLORA_API_KEY", &self.key);
        command.args(args).output().expect("openlora runs")
    }

    pub(crate) async fn client(&self) -> Client {
        self.client_with(&self.key).await
    }

    pub(crate) async fn client_with(&self, key: &str) -> Client {
        let endpoint = Endpoint::from_shared(self.grpc.clone()).expect("an address");
        let channel = endpoint.connect().await.expect("the server answers");
        let value = if key.is_empty() { None } else { Some(format!("Bearer {key}").parse().expect("a key")) };
        Client { channel, key: value }
    }

    /// Body of an HTTP GET, with the key.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        use std::io::Write;
        let mut stream = std::net::TcpStream::connect(&self.http).expect("the HTTP door answers");
        let key = &self.key;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n")
            .expect("a request is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
        (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.process.id().to_string()]).status().expect("kill runs");
        assert!(status.success());
    }

    /// The exit code, once it has ended by itself.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().expect("the server's status") {
                return status.code();
            }
            assert!(began.elapsed() < limit, "the server did not end within {limit:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it without warning and hands over its folder.
    pub(crate) fn kill(mut self) -> tempfile::TempDir {
        self.process.kill().expect("the server is killed");
        self.process.wait().expect("the server ends");
        std::mem::replace(&mut self.home, tempfile::tempdir().expect("a folder"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the server's log\n{}", self.log());
        }
    }
}

pub(crate) fn create_key(home: &Path, role: &str, name: &str) -> String {
    let mut command = Command::new(OPENLORA);
    command.args(["key", "create", "--role", role, "--name", name]).env("OPENLORA_HOME", home);
    let output = command.output().expect("openlora runs");
    if !output.status.success() {
        // Made by an earlier server of the same folder.
        let mut command = Command::new(OPENLORA);
        command.args(["key", "rm", name]).env("OPENLORA_HOME", home);
        assert!(command.status().expect("openlora runs").success());
        return create_key(home, role, name);
    }
    String::from_utf8(output.stdout).expect("a key is text").trim().to_owned()
}

#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    key: Option<MetadataValue<tonic::metadata::Ascii>>,
}

type Keyed = InterceptedService<Channel, Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send>>;

impl Client {
    fn keyed(&self) -> Keyed {
        let key = self.key.clone();
        InterceptedService::new(
            self.channel.clone(),
            Box::new(move |mut request: Request<()>| {
                if let Some(key) = &key {
                    request.metadata_mut().insert("authorization", key.clone());
                }
                Ok(request)
            }),
        )
    }

    pub(crate) fn inference(&self) -> InferenceClient<Keyed> {
        InferenceClient::new(self.keyed()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn adapters(&self) -> AdaptersClient<Keyed> {
        AdaptersClient::new(self.keyed())
    }

    pub(crate) fn server(&self) -> ServerClient<Keyed> {
        ServerClient::new(self.keyed())
    }

    pub(crate) fn settlement(&self) -> SettlementClient<Keyed> {
        SettlementClient::new(self.keyed())
    }

    /// Uploads a fixture's folder.
    pub(crate) async fn upload(&self, alias: &str, folder: &str, replace: bool) -> Result<Adapter, Status> {
        let mut parts =
            vec![Part::Header(UploadHeader { alias: alias.into(), replace: Some(replace), ..Default::default() })];
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let data = std::fs::read(fixtures().join(folder).join(file)).expect("a fixture");
            for part in data.chunks(100_000) {
                parts.push(Part::Chunk(UploadChunk { file: file.into(), data: part.to_vec() }));
            }
        }
        let parts = parts.into_iter().map(|part| UploadAdapterRequest { part: Some(part) });
        self.adapters().upload(tokio_stream::iter(parts.collect::<Vec<_>>())).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn generate(&self, request: GenerateRequest) -> Result<GenerateResponse, Status> {
        self.inference().generate(request).await.map(tonic::Response::into_inner)
    }
}

/// Greedy tokens for given prompt ids, with every log-probability.
pub(crate) fn greedy(adapter: &str, prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        adapter: adapter.into(),
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt.to_vec() })),
        sampling: Some(SamplingParameters {
            temperature: Some(0.0),
            max_tokens: Some(max_tokens as u32),
            ..SamplingParameters::default()
        }),
        output: Some(OutputOptions { token_ids: Some(true), logprobs: Some(0), prompt_logprobs: None }),
        ..GenerateRequest::default()
    }
}

/// What must be equal bit for bit: tokens and their log-probabilities' bits, the prompt's included.
pub(crate) fn bits(response: &GenerateResponse) -> Vec<(u32, u32)> {
    let of = |entries: &[openlora_proto::v1::TokenLogprobs]| {
        let chosen = entries.iter().filter_map(|entry| entry.chosen.as_ref());
        chosen.map(|chosen| (chosen.token_id, chosen.logprob.to_bits())).collect::<Vec<_>>()
    };
    let mut all = of(&response.prompt_logprobs);
    for sample in &response.samples {
        all.extend(of(&sample.logprobs));
    }
    all
}
