//! Starting, draining, dying, coming back; what stays secret meanwhile.

use std::time::Duration;

use openlora_proto::v1::{GetInfoRequest, ListAdaptersRequest, UnregisterAdapterRequest};
use tonic::Code;

use crate::support::{Server, bits, cases, create_key, greedy};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_finishes_what_runs_and_exits_cleanly() {
    let mut server = Server::start(&[]);
    let client = server.client().await;
    const TOKENS: usize = 400;
    let prompt = &cases("golden/base.json")[0].prompt_ids;
    let mut request = greedy("", prompt, TOKENS);
    if let Some(sampling) = request.sampling.as_mut() {
        sampling.ignore_eos = Some(true);
    }
    let mut stream = client.inference().generate_stream(request).await.expect("a stream").into_inner();
    stream.message().await.expect("the first message").expect("the stream goes on");
    server.signal("-TERM");
    // The answer takes a second, the signal much less; what comes before it is heard is served.
    let late = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Err(status) = client.generate(greedy("", prompt, 1)).await {
                return status;
            }
        }
    });
    assert_eq!(late.await.expect("no new request while draining").code(), Code::Unavailable);
    let mut tokens = 1;
    while let Some(message) = stream.message().await.expect("a running stream is not cut off") {
        tokens += message.token_ids.len();
    }
    assert!(tokens >= TOKENS, "the whole answer came: {tokens}");
    drop(stream);
    drop(client);
    assert_eq!(server.wait(Duration::from_secs(40)), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_with_whole_adapters_only() {
    let server = Server::start(&[]);
    let client = server.client().await;
    let adapter = client.upload("admin/kept", "golden/trained/cwe-r8", false).await.expect("uploaded");
    let prompt = cases("golden/trained/cwe-r8.expected.json")[0].prompt_ids.clone();
    let before = client.generate(greedy("admin/kept", &prompt, 12)).await.expect("an answer");
    // An upload that never ends.
    let half = tokio::spawn({
        let client = client.clone();
        async move {
            let (sender, receiver) = tokio::sync::mpsc::channel(4);
            use openlora_proto::v1::upload_adapter_request::Part;
            use openlora_proto::v1::{UploadAdapterRequest, UploadChunk, UploadHeader};
            let header = UploadHeader { alias: "admin/half".into(), ..Default::default() };
            let chunk = UploadChunk { file: "adapter_config.json".into(), data: b"{".to_vec() };
            for part in [Part::Header(header), Part::Chunk(chunk)] {
                sender.send(UploadAdapterRequest { part: Some(part) }).await.expect("sent");
            }
            let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
            let answer = client.adapters().upload(stream).await;
            drop(sender);
            answer
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let home = server.kill();
    assert!(half.await.expect("the task").is_err(), "the upload did not succeed");

    let server = Server::start_in(home, &[]);
    let client = server.client().await;
    let listed = client.adapters().list(ListAdaptersRequest::default()).await.expect("a list").into_inner().adapters;
    let aliases: Vec<_> = listed.iter().map(|adapter| (adapter.alias.as_str(), adapter.generation.as_str())).collect();
    assert_eq!(aliases, [("admin/kept", adapter.generation.as_str())]);
    let after = client.generate(greedy("admin/kept", &prompt, 12)).await.expect("an answer");
    assert_eq!(bits(&after), bits(&before));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_under_way_finish_on_the_adapter_they_began_with() {
    let server = Server::start(&[]);
    let client = server.client().await;
    let old = client.upload("admin/live", "golden/adapters/qv-r8", false).await.expect("uploaded");
    let mut request = greedy("admin/live", &cases("golden/base.json")[3].prompt_ids, 96);
    if let Some(sampling) = request.sampling.as_mut() {
        sampling.ignore_eos = Some(true);
    }
    let undisturbed = client.generate(request.clone()).await.expect("an answer");
    let mut stream = client.inference().generate_stream(request).await.expect("a stream").into_inner();
    let mut tokens = stream.message().await.expect("the first message").expect("the stream goes on").token_ids;
    client.upload("admin/live", "golden/adapters/r64", true).await.expect("replaced");
    client.adapters().unregister(UnregisterAdapterRequest { alias: "admin/live".into() }).await.expect("removed");
    let mut generation = String::new();
    while let Some(message) = stream.message().await.expect("the stream goes on") {
        tokens.extend(message.token_ids);
        generation.push_str(&message.generation);
    }
    assert_eq!(generation, old.generation);
    assert_eq!(tokens, undisturbed.samples[0].token_ids);
    let gone = client.generate(greedy("admin/live", &[1, 2, 3], 1)).await.expect_err("the alias is gone");
    assert_eq!(gone.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_gives_its_blocks_back() {
    let server = Server::start(&[]);
    let client = server.client().await;
    let mut request = greedy("", &cases("golden/base.json")[0].prompt_ids, 2_000);
    if let Some(sampling) = request.sampling.as_mut() {
        sampling.ignore_eos = Some(true);
    }
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = client.inference().generate_stream(request.clone()).await.expect("a stream").into_inner();
        stream.message().await.expect("the first message").expect("the stream goes on");
        streams.push(stream);
    }
    drop(streams);
    let began = std::time::Instant::now();
    loop {
        let info = client.server().get_info(GetInfoRequest {}).await.expect("info").into_inner();
        if info.running_sequences == 0 && info.pages_free + info.adapter_pages == info.pages_total {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "sequences still run: {info:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_appear_in_no_log_error_metric_or_file() {
    let server = Server::start(&[("OPENLORA_LOG", "trace")]);
    let app = create_key(server.home.path(), "app", "somebody");
    let client = server.client_with(&app).await;
    let wrong = format!("{}x", &app[..app.len() - 1]);
    tokio::time::sleep(Duration::from_millis(1_100)).await; // The keys file is looked at once a second.
    client.generate(greedy("", &[1, 2, 3], 2)).await.expect("an answer");
    let denied = client.upload("somebody/x", "golden/trained/cwe-r8", false).await.expect_err("apps register nothing");
    assert_eq!(denied.code(), Code::PermissionDenied);
    let refused = server.client_with(&wrong).await.generate(greedy("", &[1], 1)).await.expect_err("a wrong key");
    assert_eq!(refused.code(), Code::Unauthenticated);
    let (status, metrics) = server.get("/metrics");
    assert_eq!(status, 200);
    let stored = std::fs::read_to_string(server.home.path().join("keys.json")).expect("the keys file");
    let log = server.log();
    assert!(log.len() > 1_000, "the trace log has content");
    for secret in [&app, &wrong, &server.key] {
        for (place, text) in [
            ("log", log.as_str()),
            ("metrics", metrics.as_str()),
            ("keys file", stored.as_str()),
            ("errors", &format!("{denied:?} {refused:?}")),
        ] {
            assert!(!text.contains(secret.as_str()), "a key is in the {place}");
            assert!(!text.contains(secret.trim_start_matches("olk_")), "a key's secret is in the {place}");
        }
    }
}
