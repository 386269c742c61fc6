//! From open doors to closed ones: draining, the grace, a dead engine, TLS.

use std::sync::Arc;
use std::time::Duration;

use openlora_kernels::cuda::emulated::{Emulated, Fault};
use openlora_proto::v1 as wire;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_server::keys::Role;
use openlora_server::{Auth, ServerError};
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, TestServer, long_request, request, text, tls_file};

/// Waits for what health says of a service, as a router would.
async fn until_health(server: &TestServer, service: &str, wanted: ServingStatus) {
    let mut client = HealthClient::new(server.channel().await);
    let mut watch = client.watch(HealthCheckRequest { service: service.into() }).await.expect("watched").into_inner();
    let seen = async {
        while let Some(answer) = watch.next().await {
            if answer.expect("a status").status() == wanted {
                return;
            }
        }
        panic!("the watch ended before {wanted:?}");
    };
    tokio::time::timeout(PATIENCE, seen).await.expect("health changes in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_under_load_lets_running_requests_finish_and_refuses_new_ones() {
    let mut server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(request(text("The river"), 600)).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    // Watches and idle connections must not hold a drain up.
    let mut health = HealthClient::new(server.channel().await);
    let _watch = health.watch(HealthCheckRequest { service: String::new() }).await.expect("watched");
    let info_channel = server.channel().await;

    let key = server.key(Role::App);
    let reading = tokio::spawn(async move {
        let mut last = None;
        while let Some(message) = running.next().await {
            last = Some(message.expect("a running request is not cut"));
        }
        last.expect("messages")
    });
    server.ask_to_stop();
    let not_serving = async {
        let mut client = HealthClient::new(info_channel.clone());
        loop {
            let answer = client.check(HealthCheckRequest { service: "openlora.v1.Inference".into() }).await;
            match answer {
                Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => tokio::task::yield_now().await,
                _ => return,
            }
        }
    };
    tokio::time::timeout(PATIENCE, not_serving).await.expect("health changes in time");
    let refused = InferenceClient::with_interceptor(info_channel, key).generate(request(text("Hi"), 1)).await;
    assert_eq!(refused.expect_err("draining").code(), Code::Unavailable);
    let last = reading.await.expect("read to the end");
    assert_eq!(last.usage.expect("usage").completion_tokens, 600);
    server.ended().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_outlives_the_grace_is_ended_with_unavailable() {
    let mut server = TestServer::start_with(|setup| setup.server.drain_grace = Duration::from_millis(300)).await;
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    let reading = tokio::spawn(async move {
        while let Some(message) = running.next().await {
            if let Err(status) = message {
                return Some(status);
            }
        }
        None
    });
    server.ask_to_stop();
    // While the grace lasts the door still answers, and says what is going on.
    let draining = async {
        while server.http("/readyz", None).await != (503, "draining\n".into()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, draining).await.expect("says so in time");
    assert!(server.info().await.draining);
    let status = reading.await.expect("read").expect("ended early");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let engine = server.engine.clone();
    server.ended().await.expect("a clean end");
    assert!(!engine.is_alive());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_engine_died_never_says_that_it_is_well() {
    let server = TestServer::start().await;
    let engine = server.engine.clone();
    never_well_after(server, move || engine.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_device_was_lost_never_says_that_it_is_well() {
    let device = Emulated::new(3).expect("the emulated device");
    let serving = Arc::clone(&device);
    let server = TestServer::start_with(|setup| setup.device = Some(serving)).await;
    never_well_after(server, move || device.break_after(30, Fault::Lost)).await;
}

/// The engine dies of `death` while a request runs.
async fn never_well_after(server: TestServer, death: impl FnOnce() + Send + 'static) {
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    tokio::task::spawn_blocking(death).await.expect("ended");
    let status = loop {
        match running.next().await.expect("an end") {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    for service in ["", "openlora.v1.Inference"] {
        until_health(&server, service, ServingStatus::NotServing).await;
    }
    assert_eq!(server.http("/healthz", None).await.0, 503);
    assert_eq!(server.http("/readyz", None).await.0, 503);
    let refused = client.generate(request(text("Hi"), 1)).await.expect_err("no engine");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(refused.get_details_error_info().expect("ErrorInfo").reason, "ENGINE_STOPPED");
    assert!(matches!(server.stop().await, Err(ServerError::EngineDied(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_doors_speak_tls_where_they_are_told_to() {
    let server = TestServer::start_with(|setup| setup.with_tls = true).await;
    let ca = std::fs::read_to_string(tls_file("ca.pem")).expect("authority");
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name("localhost");
    let endpoint = Endpoint::from_shared(format!("https://{}", server.addrs.grpc)).expect("an address");
    let channel = endpoint.tls_config(tls).expect("TLS").connect().await.expect("connects");
    let mut client = InferenceClient::with_interceptor(channel, server.key(Role::App));
    let answer = client.generate(request(text("Hi"), 4)).await.expect("answered").into_inner();
    assert_eq!(answer.usage.expect("usage").completion_tokens, 4);
    let plain = Endpoint::from_shared(format!("http://{}", server.addrs.grpc)).expect("an address");
    let refused = match plain.connect().await {
        Err(_) => true,
        Ok(channel) => {
            let mut client = InferenceClient::with_interceptor(channel, server.key(Role::App));
            client.count_tokens(wire::CountTokensRequest::default()).await.is_err()
        }
    };
    assert!(refused, "no plain text on a TLS door");
    server.stop().await.expect("a clean end");
}

#[tokio::test]
async fn a_door_that_cannot_be_opened_safely_is_not_opened() {
    let config = openlora_server::ServerConfig {
        grpc_addr: "0.0.0.0:0".parse().expect("address"),
        auth: Auth::InsecureLoopback,
        ..Default::default()
    };
    let error = config.validate().expect_err("no keys off loopback");
    assert!(error.to_string().contains("grpc_addr = 0.0.0.0:0"), "{error}");
}
