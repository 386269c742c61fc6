//! How commands reach a server: address, key and TLS from flags or the environment, errors turned into sentences.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use openlora_proto::v1::adapters_client::AdaptersClient;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_proto::v1::server_client::ServerClient;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

/// Where the server is and who asks.
#[derive(Args, Clone)]
pub(crate) struct ClientArgs {
    /// The server's gRPC address
    #[arg(long, env = "OPENLORA_SERVER", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub(crate) server: String,
    /// File with the API key; the key itself may stand in OPENLORA_API_KEY, never in an argument
    #[arg(long, env = "OPENLORA_API_KEY_FILE", value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Certificate authority to trust for https, in PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
}

/// Puts the key into every call.
#[derive(Clone)]
pub(crate) struct WithKey(Option<MetadataValue<tonic::metadata::Ascii>>);

impl Interceptor for WithKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// An open connection.
pub(crate) struct Client {
    channel: Channel,
    key: WithKey,
}

type Service = InterceptedService<Channel, WithKey>;

impl Client {
    pub(crate) async fn connect(args: &ClientArgs) -> Result<Self> {
        let mut endpoint = Endpoint::from_shared(args.server.clone())
            .with_context(|| format!("server address {}", args.server))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(30));
        if args.server.starts_with("https://") {
            let mut tls = ClientTlsConfig::new();
            if let Some(path) = &args.tls_ca {
                let pem = std::fs::read(path).with_context(|| format!("certificate {}", path.display()))?;
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            endpoint = endpoint.tls_config(tls).context("TLS")?;
        }
        let channel = endpoint
            .connect()
            .await
            .with_context(|| format!("no server answers at {}; start one with `openlora serve`", args.server))?;
        Ok(Self { channel, key: WithKey(read_key(args)?) })
    }

    pub(crate) fn inference(&self) -> InferenceClient<Service> {
        InferenceClient::with_interceptor(self.channel.clone(), self.key.clone()).max_decoding_message_size(64 << 20)
    }

    pub(crate) fn adapters(&self) -> AdaptersClient<Service> {
        AdaptersClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    pub(crate) fn server(&self) -> ServerClient<Service> {
        ServerClient::with_interceptor(self.channel.clone(), self.key.clone())
    }
}

fn read_key(args: &ClientArgs) -> Result<Option<MetadataValue<tonic::metadata::Ascii>>> {
    let key = match &args.api_key_file {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("key file {}", path.display()))?,
        None => std::env::var("OPENLORA_API_KEY").unwrap_or_default(),
    };
    let key = key.trim();
    if key.is_empty() {
        return Ok(None);
    }
    let mut value: MetadataValue<_> =
        format!("Bearer {key}").parse().map_err(|_| anyhow!("the API key has characters that no key has"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// A status as a sentence that names the next step where there is one.
pub(crate) fn explain(status: &Status) -> anyhow::Error {
    let next = match status.code() {
        tonic::Code::Unauthenticated => {
            "; make a key with `openlora key create` on the server and put it into OPENLORA_API_KEY"
        }
        tonic::Code::Unavailable => "; is the server starting or draining?",
        _ => "",
    };
    anyhow!("{} ({}){next}", status.message(), status.code())
}
