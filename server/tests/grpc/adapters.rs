//! Adapters over the wire: registered, uploaded, listed, served, and kept from those they are not for.

use std::time::Duration;

use openlora_proto::v1 as wire;
use openlora_proto::v1::upload_adapter_request::Part;
use openlora_server::keys::Role;
use openlora_types::Generation;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{PATIENCE, TestServer, fixture, name_of, request, text};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn path() -> String {
    fixture("adapters-tiny/llama3/all-linear").display().to_string()
}

fn register(alias: &str) -> wire::RegisterAdapterRequest {
    wire::RegisterAdapterRequest { alias: alias.into(), path: path(), ..Default::default() }
}

fn header(alias: &str) -> Part {
    Part::Header(wire::UploadHeader { alias: alias.into(), ..Default::default() })
}

fn chunks(file: &str) -> Vec<Part> {
    let bytes = std::fs::read(fixture("adapters-tiny/llama3/all-linear").join(file)).expect("fixture");
    bytes.chunks(10_000).map(|data| Part::Chunk(wire::UploadChunk { file: file.into(), data: data.into() })).collect()
}

fn upload(alias: &str) -> Vec<Part> {
    let mut parts = vec![header(alias)];
    parts.extend(chunks(CONFIG));
    parts.extend(chunks(TENSORS));
    parts
}

async fn send(server: &TestServer, role: Role, parts: Vec<Part>) -> Result<wire::Adapter, Status> {
    let messages = parts.into_iter().map(|part| wire::UploadAdapterRequest { part: Some(part) });
    let call = server.adapters(role).await.upload(tokio_stream::iter(messages)).await;
    call.map(tonic::Response::into_inner)
}

fn owned(name: &str) -> String {
    format!("{}/{name}", name_of(Role::Owner))
}

fn violation(status: &Status) -> String {
    status.get_details_bad_request().map(|details| details.field_violations[0].field.clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adapter_lives_from_its_registration_to_its_end() {
    let server = TestServer::start().await;
    let mut owner = server.adapters(Role::Owner).await;
    let registered = owner.register(register(&owned("a"))).await.expect("registered").into_inner();
    assert_eq!((registered.alias.as_str(), registered.owner), (owned("a").as_str(), name_of(Role::Owner)));
    let uploaded = send(&server, Role::Owner, upload(&owned("b"))).await.expect("uploaded");
    assert_eq!(uploaded.generation, registered.generation, "the same content is the same generation");
    assert!(!uploaded.on_device, "nobody has asked for it yet");

    let mut app = server.inference(Role::App).await;
    let base = app.generate(request(text("The river"), 12)).await.expect("answered").into_inner();
    assert_eq!(base.generation, "");
    let pinned = format!("{}@{}", owned("b"), uploaded.generation);
    let mut answers = Vec::new();
    for adapter in [owned("a"), owned("b"), pinned] {
        let asked = wire::GenerateRequest { adapter, ..request(text("The river"), 12) };
        let answer = app.generate(asked).await.expect("answered").into_inner();
        assert_eq!(answer.generation, registered.generation);
        answers.push(answer.samples[0].text.clone());
    }
    assert!(answers.iter().all(|answer| *answer == answers[0] && *answer != base.samples[0].text), "{answers:?}");

    let found = owner.get(wire::GetAdapterRequest { alias: owned("b") }).await.expect("found").into_inner();
    assert!(found.on_device && found.in_host_cache);
    server.until_idle().await;
    let info = server.info().await;
    assert_eq!((info.adapters_on_device, info.adapter_loads, info.adapter_evictions), (1, 1, 0), "{info:?}");
    assert_eq!((info.adapter_hits, info.adapter_misses), (2, 1), "{info:?}");
    let pin = wire::PinAdapterRequest { alias: owned("a"), pinned: true };
    assert!(owner.pin(pin).await.expect("pinned").into_inner().pinned);
    let aliased = wire::SetAliasRequest {
        alias: owned("c"),
        generation: registered.generation.clone(),
        expected_generation: String::new(),
    };
    assert_eq!(owner.set_alias(aliased).await.expect("pointed").into_inner().generation, registered.generation);
    let stale = wire::SetAliasRequest {
        alias: owned("c"),
        generation: registered.generation.clone(),
        expected_generation: "0".repeat(64),
    };
    assert_eq!(owner.set_alias(stale).await.expect_err("stale").code(), Code::FailedPrecondition);

    let mut listed = Vec::new();
    let mut page_token = String::new();
    loop {
        let page = wire::ListAdaptersRequest { page_size: Some(2), page_token };
        let page = owner.list(page).await.expect("a page").into_inner();
        listed.extend(page.adapters.into_iter().map(|adapter| adapter.alias));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, ["a", "b", "c"].map(owned));

    let gone = owner.unregister(wire::UnregisterAdapterRequest { alias: owned("a") }).await.expect("gone");
    assert_eq!(gone.into_inner().generation, registered.generation);
    let get = wire::GetAdapterRequest { alias: owned("a") };
    assert_eq!(owner.get(get).await.expect_err("gone").code(), Code::NotFound);
    let asked = wire::GenerateRequest { adapter: owned("a"), ..request(text("The river"), 1) };
    assert_eq!(app.generate(asked).await.expect_err("gone").code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_paths_that_reach_too_far_are_refused() {
    let server = TestServer::start().await;
    let mut owner = server.adapters(Role::Owner).await;
    let long = "a".repeat(10_000);
    for alias in ["../x", "/etc", "~", "a\0b", "a,b", "", &long] {
        let status = owner.register(register(alias)).await.expect_err(alias);
        assert_eq!((status.code(), violation(&status).as_str()), (Code::InvalidArgument, "alias"), "{status}");
    }
    let mut admin = server.adapters(Role::Admin).await;
    let status = admin.register(register("tiny")).await.expect_err("the base model's name");
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    for path in ["/etc", "../../..", "", "a\0b"] {
        let status = admin.register(wire::RegisterAdapterRequest { path: path.into(), ..register("x") }).await;
        let status = status.expect_err(path);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(violation(&status), "path", "{status}");
    }
    // Another's namespace, by an owner; anybody's, by an administrator.
    let status = owner.register(register("acme/cwe")).await.expect_err("not the owner's");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = send(&server, Role::Owner, upload("acme/cwe")).await.expect_err("not the owner's");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    admin.register(register("acme/cwe")).await.expect("an administrator may");
    let status = admin.register(register("acme/cwe")).await.expect_err("taken");
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    let again = wire::RegisterAdapterRequest { replace: Some(true), ..register("acme/cwe") };
    admin.register(again).await.expect("replaced");
    let status = owner.unregister(wire::UnregisterAdapterRequest { alias: "acme/cwe".into() }).await;
    assert_eq!(status.expect_err("not the owner's").code(), Code::PermissionDenied);
    let page = wire::ListAdaptersRequest { page_size: Some(1_001), page_token: String::new() };
    assert_eq!(violation(&owner.list(page).await.expect_err("too many")), "page_size");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_out_of_order_or_of_the_wrong_bytes_leave_nothing() {
    let server = TestServer::start().await;
    let interleaved = || {
        let mut parts = vec![header(&owned("x"))];
        parts.extend(chunks(CONFIG));
        parts.push(chunks(TENSORS).remove(0));
        parts.extend(chunks(CONFIG));
        parts
    };
    let other_file = Part::Chunk(wire::UploadChunk { file: "../escape".into(), data: vec![1] });
    let mut damaged = upload(&owned("x"));
    if let Some(Part::Chunk(chunk)) = damaged.last_mut() {
        chunk.data.pop();
    }
    let mut headless = upload(&owned("x"));
    headless.remove(0);
    for (parts, field) in [
        (interleaved(), "chunk.file"),
        (vec![header(&owned("x")), other_file], "chunk.file"),
        (vec![header(&owned("x")), header(&owned("x"))], "header"),
        (vec![header("../x")], "header.alias"),
        (headless, "header"),
        (vec![], "header"),
        (vec![header(&owned("x"))], "chunk.file"),
    ] {
        let status = send(&server, Role::Owner, parts).await.expect_err(field);
        assert_eq!((status.code(), violation(&status).as_str()), (Code::InvalidArgument, field), "{status}");
    }
    let status = send(&server, Role::Owner, damaged).await.expect_err("truncated");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let get = wire::GetAdapterRequest { alias: owned("x") };
    assert_eq!(server.adapters(Role::App).await.get(get).await.expect_err("not there").code(), Code::NotFound);
    assert_eq!(staged(&server), 0, "nothing is left of them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_files_fail_the_requests_for_that_adapter_alone_until_it_is_registered_again() {
    let server = TestServer::start().await;
    let mut owner = server.adapters(Role::Owner).await;
    let damaged = owner.register(register(&owned("damaged"))).await.expect("registered").into_inner();
    let other = fixture("adapters-tiny/llama3/embed-head").display().to_string();
    let whole = wire::RegisterAdapterRequest { path: other, ..register(&owned("whole")) };
    let whole = owner.register(whole).await.expect("registered").into_inner();
    let locations =
        std::fs::read_dir(server.folder.path().join("data/adapters")).expect("the store's folder").flatten();
    let location =
        locations.map(|entry| entry.path()).find(|path| path.display().to_string().contains(&damaged.generation));
    let tensors = location.expect("its files").join(TENSORS);
    let mut bytes = std::fs::read(&tensors).expect("read");
    *bytes.last_mut().expect("bytes") ^= 1;
    std::fs::write(&tensors, bytes).expect("damaged");

    let ask = async |adapter: String| {
        let asked = wire::GenerateRequest { adapter, ..request(text("The river"), 4) };
        server.inference(Role::App).await.generate(asked).await.map(|answer| answer.into_inner().generation)
    };
    let (failed, served, base) = tokio::join!(ask(owned("damaged")), ask(owned("whole")), ask(String::new()));
    let failed = failed.expect_err("damaged");
    assert_eq!(failed.code(), Code::Internal, "{failed}");
    assert_eq!(failed.get_details_error_info().expect("ErrorInfo").reason, "ADAPTER_DAMAGED");
    assert!(failed.message().contains("register the adapter again"), "{failed}");
    assert_eq!((served.expect("served"), base.expect("served")), (whole.generation, String::new()));
    ask(owned("damaged")).await.expect_err("remembered");

    let again = wire::RegisterAdapterRequest { replace: Some(true), ..register(&owned("damaged")) };
    owner.register(again).await.expect("registered again");
    assert_eq!(ask(owned("damaged")).await.expect("served"), damaged.generation);
    server.until_idle().await;
}

/// Entries of the store's staging folder.
fn staged(server: &TestServer) -> usize {
    let folder = server.folder.path().join("data");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).expect("the store's folder").flatten() {
        if entry.file_name().to_string_lossy().contains("staging") {
            count += std::fs::read_dir(entry.path()).map_or(0, Iterator::count);
        }
    }
    count
}

/// An upload that has begun and waits for more.
async fn begun(
    server: &TestServer,
    alias: String,
) -> (mpsc::Sender<wire::UploadAdapterRequest>, tokio::task::JoinHandle<Status>) {
    let (parts, stream) = mpsc::channel(4);
    let mut client = server.adapters(Role::Owner).await;
    let call =
        tokio::spawn(async move { client.upload(ReceiverStream::new(stream)).await.expect_err("never finished") });
    for part in [header(&alias), chunks(CONFIG).remove(0)] {
        parts.send(wire::UploadAdapterRequest { part: Some(part) }).await.expect("the call goes on");
    }
    let begun = async {
        while staged(server) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, begun).await.expect("the upload begins");
    (parts, call)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_are_bounded_in_number_and_one_given_up_makes_room() {
    let server = TestServer::start_with(|setup| setup.limits.uploads_max = 1).await;
    let (parts, call) = begun(&server, owned("x")).await;
    let status = send(&server, Role::Owner, upload(&owned("y"))).await.expect_err("one at a time");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.get_details_retry_info().is_some());
    assert_eq!(status.get_details_quota_failure().expect("QuotaFailure").violations[0].subject, "uploads_max");
    // The client goes away.
    call.abort();
    drop(parts);
    let again = async {
        while send(&server, Role::Owner, upload(&owned("y"))).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("room again");
    assert_eq!(staged(&server), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_falls_silent_is_given_up() {
    let server = TestServer::start_with(|setup| setup.server.upload_idle_timeout = Duration::from_millis(300)).await;
    let (_parts, call) = begun(&server, owned("x")).await;
    let status = tokio::time::timeout(PATIENCE, call).await.expect("given up in time").expect("a status");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert_eq!(staged(&server), 0);
}

/// Waits until so many adapters are pinned to the device.
async fn until_pinned(server: &TestServer, count: usize) {
    let pinned = async {
        while server.engine.stats().adapters_pinned != count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, pinned).await.expect("the device follows the pins");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_holds_on_the_device_as_long_as_an_alias_has_it_and_across_restarts() {
    let server = TestServer::start().await;
    let mut owner = server.adapters(Role::Owner).await;
    for name in ["a", "b", "c"] {
        owner.register(register(&owned(name))).await.expect("registered");
    }
    for name in ["a", "b"] {
        owner.pin(wire::PinAdapterRequest { alias: owned(name), pinned: true }).await.expect("pinned");
    }
    until_pinned(&server, 1).await;
    let on_device = async {
        while !owner.get(wire::GetAdapterRequest { alias: owned("c") }).await.expect("found").into_inner().on_device {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, on_device).await.expect("it is loaded for nobody");

    // Another pinned alias stands for the same content.
    owner.unregister(wire::UnregisterAdapterRequest { alias: owned("a") }).await.expect("gone");
    owner.unregister(wire::UnregisterAdapterRequest { alias: owned("c") }).await.expect("gone");
    let server = server.restart().await;
    until_pinned(&server, 1).await;
    let mut owner = server.adapters(Role::Owner).await;
    assert!(owner.get(wire::GetAdapterRequest { alias: owned("b") }).await.expect("found").into_inner().pinned);

    // Pointed at other content, the pinned alias takes its pin along.
    let other = fixture("adapters-tiny/llama3").join("embed-head").display().to_string();
    let replaced = wire::RegisterAdapterRequest { path: other, replace: Some(true), ..register(&owned("b")) };
    let replaced = owner.register(replaced).await.expect("replaced").into_inner();
    let generation = Generation::from_hex(&replaced.generation).expect("a generation");
    let moved = async {
        while !server.engine.is_resident(&generation) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, moved).await.expect("the pin moves");
    until_pinned(&server, 1).await;

    owner.unregister(wire::UnregisterAdapterRequest { alias: owned("b") }).await.expect("gone");
    until_pinned(&server, 0).await;
}
