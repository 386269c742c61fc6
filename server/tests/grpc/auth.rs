//! Who may call what, through every door.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use openlora_proto::v1 as wire;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_server::keys::{KeyStore, Role};
use prost::Message as _;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient as AlphaClient;
use tonic_reflection::pb::v1alpha::{self};

use crate::harness::{ROLES, TestServer, request, text};

/// Calls any method with an empty message: how far it gets tells whether the caller was let in.
async fn call(channel: Channel, path: &str, key: Option<&str>) -> Result<(), Status> {
    let mut client = Grpc::new(channel);
    client.ready().await.expect("the channel is ready");
    let mut request = Request::new(tokio_stream::once(()));
    if let Some(key) = key {
        request.metadata_mut().insert("x-api-key", key.parse().expect("a header"));
    }
    let path = PathAndQuery::try_from(path).expect("a path");
    let mut answers = client.streaming(request, path, ProstCodec::<(), ()>::default()).await?.into_inner();
    answers.message().await.map(|_| ())
}

fn methods() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(openlora_proto::FILE_DESCRIPTOR_SET).expect("descriptors");
    let files = set.file.iter().filter(|file| file.package() == "openlora.v1");
    let services = files.flat_map(|file| &file.service);
    let paths = services.flat_map(|service| {
        service.method.iter().map(move |method| format!("/openlora.v1.{}/{}", service.name(), method.name()))
    });
    paths.collect()
}

/// The roles that README and .proto promise for a call.
fn promised(path: &str) -> &'static [Role] {
    match path.rsplit('/').next().unwrap_or_default() {
        "Generate" | "GenerateStream" | "CountTokens" | "Get" | "List" => &[Role::App, Role::Owner, Role::Admin],
        "Register" | "Upload" | "Unregister" | "SetAlias" | "Pin" | "GetQuota" => &[Role::Owner, Role::Admin],
        "SetQuota" => &[Role::Admin],
        "GetInfo" | "GetModel" => &ROLES,
        "GetBalance" | "ListEntries" | "GetClaimProof" | "GetEpoch" | "ListEpochs" | "WatchEpochs" => &ROLES,
        "SealEpoch" | "ProposeEpoch" => &[Role::Operator, Role::Admin],
        _ => &[],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_lets_in_exactly_the_roles_it_promises() {
    let server = TestServer::start().await;
    let channel = server.channel().await;
    let methods = methods();
    assert_eq!(methods.len(), 22);
    for path in &methods {
        for role in ROLES {
            let code =
                call(channel.clone(), path, Some(&server.keys[&role])).await.map_or_else(|s| s.code(), |()| Code::Ok);
            let refused = matches!(code, Code::PermissionDenied | Code::Unauthenticated);
            assert_eq!(refused, !promised(path).contains(&role), "{role} at {path}: {code:?}");
        }
        for stranger in [None, Some("olk_0000"), Some("")] {
            let status = call(channel.clone(), path, stranger).await.expect_err("refused");
            assert_eq!(status.code(), Code::Unauthenticated, "{path}: {status}");
        }
    }
    let unknown = "/openlora.v1.Inference/Unheard";
    let status = call(channel.clone(), unknown, Some(&server.keys[&Role::Admin])).await.expect_err("no such call");
    assert_eq!(status.code(), Code::Unimplemented);
    let status = call(channel, unknown, Some(&server.keys[&Role::App])).await.expect_err("refused");
    assert_eq!(status.code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_open_and_reflection_lists_the_services_to_key_holders() {
    let server = TestServer::start().await;
    let channel = server.channel().await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "openlora.v1.Inference", "openlora.v1.Adapters", "openlora.v1.Settlement", "openlora.v1.Server"]
    {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.expect("open").into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let ask = || {
        let message_request = Some(MessageRequest::ListServices(String::new()));
        tokio_stream::once(ServerReflectionRequest { host: String::new(), message_request })
    };
    let refused = ServerReflectionClient::new(channel.clone()).server_reflection_info(ask()).await;
    assert_eq!(refused.expect_err("no key").code(), Code::Unauthenticated);

    let mut client = ServerReflectionClient::with_interceptor(channel.clone(), server.key(Role::App));
    let answer: ServerReflectionResponse = client
        .server_reflection_info(ask())
        .await
        .expect("let in")
        .into_inner()
        .message()
        .await
        .expect("answered")
        .expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in [
        "openlora.v1.Inference",
        "openlora.v1.Adapters",
        "openlora.v1.Settlement",
        "openlora.v1.Server",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }

    let message_request = Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
        "openlora.v1.Inference.GenerateStream".into(),
    ));
    let ask = tokio_stream::once(v1alpha::ServerReflectionRequest { host: String::new(), message_request });
    let mut client = AlphaClient::with_interceptor(channel, server.key(Role::Operator));
    let answer = client.server_reflection_info(ask).await.expect("let in").into_inner().message().await;
    let answer = answer.expect("answered").expect("an answer").message_response;
    let Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(files)) = answer else {
        panic!("{answer:?}")
    };
    assert!(!files.file_descriptor_proto.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_made_while_the_server_runs_works_and_a_revoked_one_soon_does_not() {
    let server = TestServer::start().await;
    let channel = server.channel().await;
    let path = "/openlora.v1.Server/GetModel";
    // Another process: `openlora key create`.
    let store = KeyStore::open(server.folder.path().join("keys.json")).expect("key store");
    let key = store.create("late", Role::App).expect("key");
    tokio::time::sleep(std::time::Duration::from_millis(60)).await;
    call(channel.clone(), path, Some(key.reveal())).await.expect("works at once");
    store.revoke("late").expect("revoked");
    let gone = async {
        while call(channel.clone(), path, Some(key.reveal())).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, gone).await.expect("stops working");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_need_an_operator_and_health_pages_nobody() {
    let server = TestServer::start().await;
    let (status, body) = server.http("/metrics", Some(Role::Operator)).await;
    assert_eq!(status, 200);
    for name in ["vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:lora_requests_info{", "openlora_pages"]
    {
        assert!(body.contains(name), "{name} in {body}");
    }
    assert_eq!(server.http("/metrics", None).await.0, 401);
    assert_eq!(server.http("/metrics", Some(Role::App)).await.0, 403);
    assert_eq!(server.http("/healthz", None).await, (200, "ok\n".into()));
    assert_eq!(server.http("/readyz", None).await, (200, "ready\n".into()));
    assert_eq!(server.http("/other", None).await.0, 404);
    let public = TestServer::start_with(|setup| setup.server.metrics_public = true).await;
    assert_eq!(public.http("/metrics", None).await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_everybody_on_this_machine_is_an_administrator() {
    let server = TestServer::start_with(|setup| setup.with_keys = false).await;
    call(server.channel().await, "/openlora.v1.Adapters/List", None).await.expect("let in");
    assert_eq!(server.http("/metrics", None).await.0, 200);
}

/// Everything logged in this process, at the most talkative level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_prompts_and_answers_are_in_no_log_error_or_metric() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("the only subscriber of this binary");

    let server = TestServer::start().await;
    let key = server.keys[&Role::App].clone();
    let secret = "xylophonequartz";
    let mut client = server.inference(Role::App).await;
    let mut asked = request(text(secret), 8);
    asked.cache_salt = "saltysecret".into();
    asked.request_id = "visible-request-id".into();
    let answer = client.generate(asked).await.expect("answered").into_inner();
    let refused =
        client.generate(wire::GenerateRequest { adapter: "no/such".into(), ..request(text(secret), 1) }).await;
    let refused = refused.expect_err("no such adapter");
    let wrong = format!("{key}0");
    let stranger =
        call(server.channel().await, "/openlora.v1.Server/GetModel", Some(&wrong)).await.expect_err("unknown");
    let bearer = format!("Basic {key}");
    let mut odd = InferenceClient::new(server.channel().await);
    let mut odd_request = Request::new(request(text(secret), 1));
    odd_request.metadata_mut().insert("authorization", bearer.parse().expect("a header"));
    let odd = odd.generate(odd_request).await.expect_err("no bearer");
    let (_, metrics) = server.http("/metrics", Some(Role::Admin)).await;
    server.stop().await.expect("stopped");

    let log = String::from_utf8_lossy(&log.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    assert!(log.contains("visible-request-id") && log.contains("the-app"), "the log is the server's");
    let key_digits = &key["olk_".len()..];
    let texts = [log, metrics, format!("{refused:?}"), format!("{stranger:?}"), format!("{odd:?}")];
    for text in &texts {
        assert!(!text.contains(key_digits), "a key is in {}", excerpt(text, key_digits));
        assert!(!text.contains(secret), "a prompt is in {}", excerpt(text, secret));
        assert!(!text.contains("saltysecret"));
    }
    assert!(!texts[0].contains(&answer.samples[0].text), "an answer is in the log");
}

fn excerpt(text: &str, what: &str) -> String {
    let at = text.find(what).unwrap_or(0);
    text.chars().skip(text[..at].chars().count().saturating_sub(300)).take(300).collect()
}
