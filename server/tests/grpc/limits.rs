//! What happens at the bounds: queues, buffers, messages.

use std::time::Duration;

use openlora_proto::v1 as wire;
use openlora_server::keys::Role;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{Key, PATIENCE, TestServer, endpoint, long_request, raw_call, request, text};

/// The first refusal among many requests sent at once; the others wait or run.
async fn first_refusal(server: &TestServer, requests: usize) -> Status {
    let (refusals, mut refused) = tokio::sync::mpsc::channel(requests);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..requests {
        let mut client = server.inference(Role::App).await;
        let refusals = refusals.clone();
        calls.spawn(async move {
            let end = async {
                let mut stream = client.generate_stream(long_request()).await?.into_inner();
                while let Some(message) = stream.next().await {
                    message?;
                }
                Ok::<(), Status>(())
            };
            if let Err(status) = end.await {
                let _ = refusals.send(status).await;
            }
        });
    }
    tokio::time::timeout(PATIENCE, refused.recv()).await.expect("one is refused").expect("a status")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_with_a_time_to_come_back_and_the_others_are_served() {
    let server = TestServer::start_with(|setup| {
        setup.engine.max_num_seqs = 1;
        setup.limits.waiting_requests_max = 2;
    })
    .await;
    let status = first_refusal(&server, 12).await;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let delay = status.get_details_retry_info().expect("RetryInfo").retry_delay.expect("a delay");
    assert!(delay > Duration::ZERO);
    assert_eq!(status.get_details_quota_failure().expect("QuotaFailure").violations[0].subject, "waiting_requests_max");
    // All of the above have gone away with their tasks; whoever comes back finds room.
    let mut client = server.inference(Role::App).await;
    let room = async {
        while client.generate(request(text("Hi"), 2)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, room).await.expect("there is room again");
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_is_ended_and_what_was_buffered_is_bounded() {
    let server = TestServer::start_with(|setup| setup.limits.stream_events_max = 64).await;
    let channel = endpoint(server.addrs.grpc).initial_stream_window_size(1 << 16).connect().await.expect("connects");
    let mut client = wire::inference_client::InferenceClient::with_interceptor(channel, server.key(Role::App));
    let mut asked = long_request();
    // Some hundred bytes for a token: the windows of the connection are soon full.
    asked.output = Some(wire::OutputOptions { logprobs: Some(20), ..Default::default() });
    let mut slow = client.generate_stream(asked).await.expect("started").into_inner();
    slow.next().await.expect("a message").expect("a token");
    // Nobody reads; the engine gives the request up by itself.
    server.until_idle().await;
    let mut fast = server.inference(Role::App).await;
    fast.generate(request(text("Hi"), 8)).await.expect("others are served");
    let (mut tokens, mut end) = (0, None);
    while let Some(message) = slow.next().await {
        match message {
            Ok(message) => tokens += message.logprobs.len(),
            Err(status) => end = Some(status),
        }
    }
    let status = end.expect("ended early");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(status.get_details_error_info().expect("ErrorInfo").reason, "SLOW_READER");
    assert!(tokens < 8_000, "{tokens} tokens were kept for a reader that did not read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_over_the_limit_or_of_broken_text_gets_a_clean_status() {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    let status = client.generate(request(text(&"x".repeat(5 << 20)), 1)).await.expect_err("too large");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let info = status.get_details_error_info().expect("ErrorInfo");
    assert_eq!((info.reason.as_str(), info.metadata["limit"].as_str()), ("MESSAGE_TOO_LARGE", "message_bytes_max"));

    /// A `GenerateRequest` whose text need not be text.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Broken {
        #[prost(bytes = "vec", tag = "2")]
        text: Vec<u8>,
    }
    let key = server.keys[&Role::App].as_str();
    let broken = Broken { text: b"\xff\xfe".to_vec() };
    let path = "/openlora.v1.Inference/Generate";
    assert_eq!(raw_call(server.addrs.grpc, path, &[("x-api-key", key)], &broken).await, Code::InvalidArgument);
    client.generate(request(text("Hi"), 1)).await.expect("the server is well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_would_not_fit_a_message_is_refused_at_once_and_streamed_in_parts() {
    let server = TestServer::start_with(|setup| setup.limits.message_bytes_max = 64 << 10).await;
    let mut client = server.inference(Role::App).await;
    let mut asked = request(text(&"river ".repeat(100)), 200);
    asked.output = Some(wire::OutputOptions { logprobs: Some(20), prompt_logprobs: Some(20), token_ids: None });
    let status = client.generate(asked.clone()).await.expect_err("too large");
    assert_eq!(status.get_details_bad_request().expect("BadRequest").field_violations[0].field, "output.logprobs");
    let mut client =
        wire::inference_client::InferenceClient::with_interceptor(server.channel().await, server.key(Role::App))
            .max_decoding_message_size(512 << 10);
    let mut stream = client.generate_stream(asked).await.expect("started").into_inner();
    let (mut tokens, mut scored) = (0, 0);
    while let Some(message) = stream.next().await {
        let message = message.expect("fits");
        tokens += message.logprobs.len();
        scored += message.prompt_logprobs.len();
    }
    assert_eq!(tokens, 200);
    assert!(scored > 200, "{scored} prompt tokens were scored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_are_closed_and_the_open_ones_served() {
    let server = TestServer::start_with(|setup| setup.server.connections.connections_max = 2).await;
    let channels = [server.channel().await, server.channel().await];
    let mut clients = channels
        .map(|channel| wire::server_client::ServerClient::with_interceptor(channel, server.key(Role::App) as Key));
    for client in &mut clients {
        client.get_model(wire::GetModelRequest {}).await.expect("served");
    }
    let third = endpoint(server.addrs.grpc).connect().await;
    let refused = match third {
        Err(_) => true,
        Ok(channel) => {
            let mut client = wire::server_client::ServerClient::with_interceptor(channel, server.key(Role::App));
            client.get_model(wire::GetModelRequest {}).await.is_err()
        }
    };
    assert!(refused);
    clients[0].get_model(wire::GetModelRequest {}).await.expect("still served");
}
