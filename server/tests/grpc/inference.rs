//! Generation over the wire: the model's own answers, whole and streamed.

use std::time::Duration;

use openlora_proto::v1 as wire;
use openlora_server::keys::Role;
use serde_json::Value;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::harness::{TestServer, fixture, long_request, raw_call, request, text, tokens};

fn json(path: &str) -> Value {
    let text = std::fs::read_to_string(fixture(path)).expect(path);
    serde_json::from_str(&text).expect(path)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The stream put together again.
async fn stream(
    server: &TestServer,
    request: wire::GenerateRequest,
) -> Result<(Vec<wire::GenerateStreamResponse>, String), tonic::Status> {
    let mut client = server.inference(Role::App).await;
    let mut stream = client.generate_stream(request).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.next().await {
        messages.push(message?);
    }
    let text = messages.iter().map(|message| message.text.as_str()).collect();
    Ok((messages, text))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_models_own_streamed_or_at_once() {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    for case in json("models/llama3/expected.json").as_array().expect("cases") {
        let (prompt, greedy) = (ids(&case["prompt_ids"]), ids(&case["greedy"]));
        let mut asked = request(tokens(&prompt), greedy.len() as u32);
        asked.output = Some(wire::OutputOptions { token_ids: Some(true), logprobs: Some(2), prompt_logprobs: Some(0) });
        let (messages, streamed) = stream(&server, asked.clone()).await.expect("streamed");
        let whole = client.generate(asked).await.expect("answered").into_inner();

        let sample = &whole.samples[0];
        assert_eq!(sample.token_ids, greedy);
        assert_eq!(sample.text, streamed);
        assert_eq!(sample.finish_reason(), wire::FinishReason::Length);
        assert_eq!(sample.logprobs.len(), greedy.len());
        assert!(sample.logprobs.iter().all(|token| token.top.len() == 2 && token.chosen.is_some()));
        let scored: Vec<_> = whole.prompt_logprobs.iter().map(|token| token.chosen.clone().expect("chosen")).collect();
        assert_eq!(scored.iter().map(|chosen| chosen.token_id).collect::<Vec<_>>(), prompt[1..]);
        let expected = case["prompt_logprobs"].as_array().expect("log-probabilities");
        for (chosen, expected) in scored.iter().zip(expected) {
            assert!((f64::from(chosen.logprob) - expected.as_f64().expect("a number")).abs() < 2e-3);
        }
        let usage = whole.usage.expect("usage");
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (prompt.len() as u32, greedy.len() as u32));
        let (last, before) = messages.split_last().expect("messages");
        assert!(last.usage.is_some() && before.iter().all(|message| message.usage.is_none()));
        assert_eq!(messages.iter().flat_map(|message| message.token_ids.clone()).collect::<Vec<_>>(), greedy);
    }
    server.stop().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_counted_as_they_are_used() {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    for case in json("models/llama3/tokenizer.expected.json").as_array().expect("cases").iter().take(4) {
        let text = case["text"].as_str().expect("text").to_owned();
        let prompt = Some(wire::count_tokens_request::Prompt::Text(text.clone()));
        let counted = client.count_tokens(wire::CountTokensRequest { prompt, token_ids: true }).await;
        let counted = counted.expect("counted").into_inner();
        assert_eq!(counted.token_ids, ids(&case["ids_with_special"]), "{text}");
        assert_eq!(counted.count as usize, counted.token_ids.len());
        let usage =
            client.generate(request(crate::harness::text(&text), 1)).await.expect("answered").into_inner().usage;
        assert_eq!(usage.expect("usage").prompt_tokens, counted.count);
    }
    let message = wire::ChatMessage { role: "user".into(), content: "Hi".into() };
    let chat = wire::Chat { messages: vec![message], add_generation_prompt: None };
    let prompt = Some(wire::count_tokens_request::Prompt::Chat(chat));
    let chat = client.count_tokens(wire::CountTokensRequest { prompt, token_ids: false }).await.expect("counted");
    assert!(chat.get_ref().count > 5 && chat.get_ref().token_ids.is_empty(), "the template is counted: {chat:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_string_ends_its_sample_and_the_others_go_on() {
    let server = TestServer::start().await;
    let (_, free) = stream(&server, request(text("The river"), 40)).await.expect("streamed");
    // A string from the middle of what greedy decoding says.
    let middle = free.char_indices().nth(free.chars().count() / 2).expect("a middle").0;
    let stop: String = free[middle..].chars().take(3).collect();
    let mut asked = request(text("The river"), 40);
    asked.sampling.as_mut().expect("sampling").stop = vec![stop.clone()];
    let (messages, stopped) = stream(&server, asked.clone()).await.expect("streamed");
    assert_eq!(stopped, free[..free.find(&stop).expect("it is there")]);
    let finish = messages.iter().map(wire::GenerateStreamResponse::finish_reason).max().expect("messages");
    assert_eq!(finish, wire::FinishReason::Stop);

    let sampling = asked.sampling.as_mut().expect("sampling");
    (sampling.n, sampling.temperature, sampling.seed) = (Some(4), Some(2.0), Some(7));
    let whole = server.inference(Role::App).await.generate(asked).await.expect("answered").into_inner();
    assert_eq!(whole.samples.len(), 4);
    for sample in &whole.samples {
        assert!(!sample.text.contains(&stop));
        assert_ne!(sample.finish_reason(), wire::FinishReason::Unspecified);
    }
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_seed_gives_the_same_answer_and_no_seed_another() {
    let server = TestServer::start().await;
    let asked = |seed| {
        let mut asked = request(text("The river"), 24);
        let sampling = asked.sampling.as_mut().expect("sampling");
        (sampling.temperature, sampling.seed) = (Some(1.5), seed);
        asked
    };
    let mut texts = Vec::new();
    for seed in [Some(1), Some(1), None, None] {
        texts.push(stream(&server, asked(seed)).await.expect("streamed").1);
    }
    assert_eq!(texts[0], texts[1]);
    assert_ne!(texts[2], texts[3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_fields_are_named_over_the_wire_and_nothing_runs() {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    let sampled = |change: fn(&mut wire::SamplingParameters)| {
        let mut asked = request(text("Hi"), 1);
        change(asked.sampling.as_mut().expect("sampling"));
        asked
    };
    let long = request(tokens(&vec![5; 16_383]), 2);
    let chat = |role: &str, content: &str| {
        let message = wire::ChatMessage { role: role.into(), content: content.into() };
        let chat = wire::Chat { messages: vec![message], add_generation_prompt: None };
        request(wire::generate_request::Prompt::Chat(chat), 1)
    };
    for (field, asked) in [
        ("prompt", wire::GenerateRequest::default()),
        ("text", wire::GenerateRequest { ..request(text(&"x".repeat((1 << 20) + 1)), 1) }),
        ("token_ids.ids[1]", request(tokens(&[5, 288]), 1)),
        ("token_ids.ids", request(tokens(&[]), 1)),
        ("sampling.max_tokens", long),
        ("sampling.n", sampled(|s| s.n = Some(1_000_000_000))),
        ("sampling.min_tokens", sampled(|s| s.min_tokens = Some(2))),
        ("sampling.temperature", sampled(|s| s.temperature = Some(f32::NAN))),
        ("sampling.stop_token_ids[0]", sampled(|s| s.stop_token_ids = vec![288])),
        ("chat.messages[0].role", chat("", "Hi")),
        ("adapter", wire::GenerateRequest { adapter: "../../etc/passwd".into(), ..request(text("Hi"), 1) }),
        ("adapter", wire::GenerateRequest { adapter: "a,b".into(), ..request(text("Hi"), 1) }),
    ] {
        let whole = client.generate(asked.clone()).await.expect_err(field);
        let streamed = client.generate_stream(asked).await.expect_err(field);
        for status in [whole, streamed] {
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            let details = status.get_details_bad_request().expect("BadRequest");
            assert_eq!(details.field_violations[0].field, field, "{status}");
            assert_eq!(status.get_details_error_info().expect("ErrorInfo").domain, "openlora");
        }
    }
    let unknown = wire::GenerateRequest { adapter: "nobody/nothing".into(), ..request(text("Hi"), 1) };
    let status = client.generate(unknown).await.expect_err("no such adapter");
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(status.get_details_resource_info().expect("ResourceInfo").resource_name, "nobody/nothing");
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_ids_are_echoed_and_repeated_headers_harm_nothing() {
    let server = TestServer::start().await;
    let mut client = server.inference(Role::App).await;
    let mut asked = Request::new(request(text("Hi"), 2));
    for id in ["first", "second", "third"] {
        asked.metadata_mut().append("x-request-id", id.parse().expect("a header"));
    }
    let answer = client.generate(asked).await.expect("answered").into_inner();
    assert_eq!(answer.request_id, "first");
    let mut asked = Request::new(wire::GenerateRequest { request_id: "body".into(), ..request(text("Hi"), 2) });
    asked.metadata_mut().append("x-request-id", "x".repeat(4_000).parse().expect("a header"));
    let answer = client.generate(asked).await.expect("an unusable header is left out").into_inner();
    assert_eq!(answer.request_id, "body");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_frees_its_blocks_in_every_phase() {
    let server = TestServer::start_with(|setup| setup.engine.max_num_seqs = 1).await;
    let mut client = server.inference(Role::App).await;
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    let waiting = client.generate_stream(long_request()).await.expect("queued").into_inner();
    server.until_running(1).await;
    let info = server.info().await;
    assert!(info.pages_free < info.pages_total, "{info:?}");
    drop(waiting);
    drop(running);
    server.until_idle().await;
    // The whole answer at once is cancelled the same way.
    let call = tokio::spawn(async move { client.generate(long_request()).await });
    server.until_running(1).await;
    call.abort();
    server.until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_a_request_wherever_it_is() {
    let server = TestServer::start_with(|setup| setup.engine.max_num_seqs = 1).await;
    let mut client = server.inference(Role::App).await;
    let ended = async |timeout: &str| {
        let key = server.keys[&Role::App].clone();
        let headers = [("grpc-timeout", timeout), ("x-api-key", key.as_str())];
        raw_call(server.addrs.grpc, "/openlora.v1.Inference/Generate", &headers, &long_request()).await
    };
    assert_eq!(ended("150m").await, Code::DeadlineExceeded);
    let mut running = client.generate_stream(long_request()).await.expect("started").into_inner();
    running.next().await.expect("a message").expect("a token");
    // Behind the one that runs: it ends in the queue.
    let mut timed = Request::new(long_request());
    timed.set_timeout(Duration::from_millis(150));
    let mut waiting = client.generate_stream(timed).await.expect("queued").into_inner();
    let status = waiting.next().await.expect("an end").expect_err("never ran");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    drop(running);
    server.until_idle().await;
    assert_eq!(ended("0n").await, Code::DeadlineExceeded);
    assert_eq!(ended("soon").await, Code::InvalidArgument);
}
