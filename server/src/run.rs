//! Opening the doors, serving, and closing them again without hanging up on anybody who can still be served.
//!
//! The order of a shutdown: health says NOT_SERVING and `/readyz` 503; new work is refused with UNAVAILABLE while running
//! requests go on for the grace; then the engine ends what is left, connections are asked to end, and at last made to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use openlora_proto::v1::adapters_server::AdaptersServer;
use openlora_proto::v1::inference_server::InferenceServer;
use openlora_proto::v1::server_server::ServerServer;
use openlora_proto::v1::settlement_server::SettlementServer;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::adapters::AdaptersService;
use crate::app::{App, State};
use crate::auth::Authenticator;
use crate::edge::EdgeLayer;
use crate::inference::InferenceService;
use crate::info::ServerService;
use crate::net::{Connection, Door, HttpListener, Protocol, is_true};
use crate::settlement::SettlementService;
use crate::{ServerConfig, ServerError, charge, http};

/// How long connections may take to end once they were asked to.
const GOODBYE: Duration = Duration::from_secs(2);

/// Services whose health is reported, the empty name for all of them.
const HEALTH_NAMES: [&str; 5] =
    ["", "openlora.v1.Inference", "openlora.v1.Adapters", "openlora.v1.Settlement", "openlora.v1.Server"];

/// Where the doors are, ports chosen by the system included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoundAddrs {
    /// gRPC.
    pub grpc: SocketAddr,
    /// `/metrics`, `/healthz`, `/readyz`.
    pub http: SocketAddr,
}

/// Serves `app` until `shutdown` resolves, then drains. `on_ready` is called once both doors are open.
///
/// # Errors
/// Doors that cannot be opened, keys or certificates that cannot be used; after the drain [`ServerError::EngineDied`]
/// where the engine died while serving (health says NOT_SERVING from then on).
pub async fn run(
    config: ServerConfig,
    app: App,
    shutdown: impl Future<Output = ()>,
    on_ready: impl FnOnce(BoundAddrs),
) -> Result<(), ServerError> {
    config.validate()?;
    let authenticator = Authenticator::new(&config.auth)?;
    let limits = config.connections.clone();
    let grpc_door = Door::bind(config.grpc_addr, Protocol::Http2, config.tls.as_ref(), &limits).await?;
    let http_door = Door::bind(config.http_addr, Protocol::Http1, config.tls.as_ref(), &limits).await?;
    let addrs = BoundAddrs { grpc: grpc_door.local_addr()?, http: http_door.local_addr()? };
    let state = State::new(app, config)?;
    state.follow_pins().await;

    let (closing, closed) = watch::channel(false);
    let (ending, over) = watch::channel(false);
    let health = HealthReporter::new();
    report(&health, ServingStatus::Serving).await;
    let http_connections = http_door.open(closed.clone(), over.clone());
    let grpc_connections = grpc_door.open(closed.clone(), over);
    let http = tokio::spawn(serve_http(
        Arc::clone(&state),
        authenticator.clone(),
        http_connections,
        addrs.http,
        closed.clone(),
    ));
    let routes = routes(&state, &health)?;
    let grpc = tokio::spawn(serve_grpc(Arc::clone(&state), authenticator, routes, grpc_connections, closed));
    let mut background = JoinSet::new();
    if let Some(books) = state.app.books.clone().filter(|books| books.charge) {
        background.spawn(charge::sweep(books));
    }
    on_ready(addrs);

    let died = wait_for_shutdown(&state, &health, shutdown).await;

    tracing::info!(grace = ?state.config.drain_grace, "draining");
    report(&health, ServingStatus::NotServing).await;
    state.start_draining();
    if tokio::time::timeout(state.config.drain_grace, state.idle()).await.is_err() {
        tracing::warn!("the grace is over; ending the requests that still run");
    }
    let stopping = Arc::clone(&state);
    let stopped = tokio::task::spawn_blocking(move || stopping.app.engine.shutdown());
    if stopped.await.is_err() {
        tracing::error!("stopping the engine panicked");
    }
    // The receivers live in the tasks below; where those are gone already there is nothing to close.
    let _ = closing.send(true);
    let served = async { (grpc.await, http.await) };
    let served = tokio::time::timeout(GOODBYE, served).await;
    let _ = ending.send(true);
    // What was cut off is still closed in the ledger.
    let _ = tokio::time::timeout(GOODBYE, state.idle()).await;
    if let Ok((Ok(Err(error)), _)) = served {
        return Err(error);
    }
    died.map_or(Ok(()), |reason| Err(ServerError::EngineDied(reason)))
}

/// Waits; should the engine die meanwhile, says so at every door and goes on waiting. Returns why it died.
async fn wait_for_shutdown(
    state: &State,
    health: &HealthReporter,
    shutdown: impl Future<Output = ()>,
) -> Option<String> {
    let mut shutdown = std::pin::pin!(shutdown);
    let reason = tokio::select! {
        () = &mut shutdown => return None,
        reason = state.app.engine.dead() => reason,
    };
    tracing::error!(%reason, "the engine died; serving UNAVAILABLE until restarted");
    report(health, ServingStatus::NotServing).await;
    shutdown.await;
    Some(reason)
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
}

fn routes(state: &Arc<State>, health: &HealthReporter) -> Result<Routes, ServerError> {
    let message_bytes_max = state.config.limits.message_bytes_max;
    let start = |error: tonic_reflection::server::Error| ServerError::Start(format!("reflection: {error}"));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(openlora_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let inference = InferenceServer::new(InferenceService { state: Arc::clone(state) });
    let adapters = AdaptersServer::new(AdaptersService { state: Arc::clone(state) });
    let settlement = SettlementServer::new(SettlementService::new(Arc::clone(state)));
    let server = ServerServer::new(ServerService { state: Arc::clone(state) });
    let health = tonic_health::server::HealthService::from_health_reporter(health.clone());
    Ok(Routes::new(inference.max_decoding_message_size(message_bytes_max))
        .add_service(adapters.max_decoding_message_size(message_bytes_max))
        .add_service(settlement.max_decoding_message_size(message_bytes_max))
        .add_service(server.max_decoding_message_size(message_bytes_max))
        .add_service(tonic_health::pb::health_server::HealthServer::new(health).max_decoding_message_size(1 << 10))
        .add_service(reflection().build_v1().map_err(start)?.max_decoding_message_size(1 << 14))
        .add_service(reflection().build_v1alpha().map_err(start)?.max_decoding_message_size(1 << 14)))
}

async fn serve_grpc(
    state: Arc<State>,
    authenticator: Authenticator,
    routes: Routes,
    connections: mpsc::Receiver<Connection>,
    closed: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let limits = &state.config.connections;
    let mut server = Server::builder()
        .layer(EdgeLayer { state: Arc::clone(&state), authenticator })
        // Not tonic's `concurrency_limit_per_connection` and `load_shed`: a shed call would be a stream reset without a
        // status. Streams bound the calls of a connection, and the engine's queue those of all.
        .max_concurrent_streams(limits.streams_per_connection_max)
        .max_connection_age(limits.age_max)
        .http2_keepalive_interval(Some(limits.keepalive_interval))
        .http2_keepalive_timeout(Some(limits.keepalive_timeout))
        .http2_max_pending_accept_reset_streams(Some(limits.pending_resets_max))
        .http2_max_local_error_reset_streams(Some(limits.local_error_resets_max))
        .http2_max_header_list_size(limits.header_list_bytes_max);
    let incoming = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
    Ok(server.add_routes(routes).serve_with_incoming_shutdown(incoming, is_true(closed)).await?)
}

async fn serve_http(
    state: Arc<State>,
    authenticator: Authenticator,
    connections: mpsc::Receiver<Connection>,
    addr: SocketAddr,
    closed: watch::Receiver<bool>,
) {
    let listener = HttpListener { connections, addr };
    let router = http::router(state, authenticator);
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(is_true(closed)).await {
        tracing::error!(%error, "the HTTP door failed");
    }
}
