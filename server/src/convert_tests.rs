//! What request conversion promises: every refusal names its field, every default is the one in the .proto, and whatever
//! is let through is within every bound.

use bolero::TypeGenerator;
use prost::Message as _;

use super::*;

const VOCAB: usize = 1_000;
const CONTEXT: usize = 512;

fn bounds(limits: &Limits) -> Bounds<'_> {
    Bounds { limits, vocab: VOCAB, sequence_tokens_max: CONTEXT }
}

fn request() -> wire::GenerateRequest {
    wire::GenerateRequest { prompt: Some(WirePrompt::Text("Hello".into())), ..Default::default() }
}

fn with_sampling(change: impl FnOnce(&mut wire::SamplingParameters)) -> wire::GenerateRequest {
    let mut sampling = wire::SamplingParameters::default();
    change(&mut sampling);
    wire::GenerateRequest { sampling: Some(sampling), ..request() }
}

fn with_prompt(prompt: WirePrompt) -> wire::GenerateRequest {
    wire::GenerateRequest { prompt: Some(prompt), ..request() }
}

fn chat(messages: &[(&str, &str)]) -> wire::Chat {
    let message = |&(role, content): &(&str, &str)| wire::ChatMessage { role: role.into(), content: content.into() };
    wire::Chat { messages: messages.iter().map(message).collect(), add_generation_prompt: None }
}

#[test]
fn an_empty_request_gets_the_defaults_written_in_the_interface() {
    let limits = Limits::default();
    let checked = generate(request(), &bounds(&limits)).expect("valid");
    let expected = SamplingParams { seed: checked.sampling.seed, ..SamplingParams::default() };
    assert_eq!(checked.sampling, expected);
    assert_eq!((checked.adapter, checked.priority, checked.token_ids), (None, Priority::Normal, false));
    let Prompt::Chat { add_generation_prompt, .. } =
        generate(with_prompt(WirePrompt::Chat(chat(&[("user", "Hi")]))), &bounds(&limits)).expect("valid").prompt
    else {
        panic!("a chat stays a chat")
    };
    assert!(add_generation_prompt);
}

#[test]
fn seeds_differ_unless_given() {
    let limits = Limits::default();
    let seed = |request| generate(request, &bounds(&limits)).expect("valid").sampling.seed;
    assert_ne!(seed(request()), seed(request()));
    assert_eq!(seed(with_sampling(|s| s.seed = Some(7))), 7);
}

#[test]
fn every_field_out_of_range_is_named_as_on_the_wire() {
    let long = |len: usize| "x".repeat(len);
    let with_output = |output| wire::GenerateRequest { output: Some(output), ..request() };
    let cases: Vec<(&str, wire::GenerateRequest)> = vec![
        ("prompt", wire::GenerateRequest::default()),
        ("text", with_prompt(WirePrompt::Text(long((1 << 20) + 1)))),
        ("token_ids.ids", with_prompt(WirePrompt::TokenIds(wire::TokenIds { ids: vec![0; CONTEXT + 1] }))),
        ("token_ids.ids[1]", with_prompt(WirePrompt::TokenIds(wire::TokenIds { ids: vec![0, 1_000] }))),
        ("chat.messages", with_prompt(WirePrompt::Chat(chat(&[])))),
        ("chat.messages", with_prompt(WirePrompt::Chat(chat(&vec![("user", "x"); 1_025])))),
        ("chat.messages", with_prompt(WirePrompt::Chat(chat(&[("user", &long(1 << 20))])))),
        ("chat.messages[1].role", with_prompt(WirePrompt::Chat(chat(&[("user", "x"), ("", "x")])))),
        ("adapter", wire::GenerateRequest { adapter: "../x".into(), ..request() }),
        ("adapter", wire::GenerateRequest { adapter: "a@b".into(), ..request() }),
        ("adapter", wire::GenerateRequest { adapter: format!("@{}", "0".repeat(64)), ..request() }),
        ("adapter", wire::GenerateRequest { adapter: long(10_000), ..request() }),
        ("priority", wire::GenerateRequest { priority: 9, ..request() }),
        ("request_id", wire::GenerateRequest { request_id: long(129), ..request() }),
        ("request_id", wire::GenerateRequest { request_id: "a\nb".into(), ..request() }),
        ("cache_salt", wire::GenerateRequest { cache_salt: long(129), ..request() }),
        ("output.logprobs", with_output(wire::OutputOptions { logprobs: Some(1_000_000), ..Default::default() })),
        (
            "output.prompt_logprobs",
            with_output(wire::OutputOptions { prompt_logprobs: Some(21), ..Default::default() }),
        ),
        ("sampling.temperature", with_sampling(|s| s.temperature = Some(f32::NAN))),
        ("sampling.top_p", with_sampling(|s| s.top_p = Some(0.0))),
        ("sampling.min_p", with_sampling(|s| s.min_p = Some(-1.0))),
        ("sampling.repetition_penalty", with_sampling(|s| s.repetition_penalty = Some(0.0))),
        ("sampling.presence_penalty", with_sampling(|s| s.presence_penalty = Some(3.0))),
        ("sampling.frequency_penalty", with_sampling(|s| s.frequency_penalty = Some(f32::INFINITY))),
        ("sampling.logit_bias", with_sampling(|s| s.logit_bias = (0..1_025).map(|i| (i, 0.0)).collect())),
        ("sampling.logit_bias[1000]", with_sampling(|s| s.logit_bias = [(1_000, 0.0)].into())),
        ("sampling.stop", with_sampling(|s| s.stop = vec!["x".into(); 17])),
        ("sampling.stop[1]", with_sampling(|s| s.stop = vec!["x".into(), String::new()])),
        ("sampling.stop[0]", with_sampling(|s| s.stop = vec![long(257)])),
        ("sampling.stop_token_ids", with_sampling(|s| s.stop_token_ids = vec![0; 17])),
        ("sampling.stop_token_ids[0]", with_sampling(|s| s.stop_token_ids = vec![1_000])),
        ("sampling.max_tokens", with_sampling(|s| s.max_tokens = Some(0))),
        ("sampling.min_tokens", with_sampling(|s| (s.min_tokens, s.max_tokens) = (Some(6), Some(5)))),
        ("sampling.min_tokens", with_sampling(|s| s.min_tokens = Some(257))),
        ("sampling.n", with_sampling(|s| s.n = Some(0))),
        ("sampling.n", with_sampling(|s| s.n = Some(1_000_000_000))),
    ];
    let limits = Limits::default();
    for (field, request) in cases {
        let error = generate(request, &bounds(&limits)).expect_err(field);
        assert_eq!(error.field, field, "{error}");
    }
}

#[test]
fn counting_tokens_needs_exactly_one_prompt_within_the_limits() {
    use wire::count_tokens_request::Prompt as CountPrompt;
    let limits = Limits { prompt_bytes_max: 4, ..Limits::default() };
    let count = |prompt| count_tokens(wire::CountTokensRequest { prompt, token_ids: false }, &limits);
    assert_eq!(count(None).expect_err("no prompt").field, "prompt");
    assert_eq!(count(Some(CountPrompt::Text("12345".into()))).expect_err("long").field, "text");
    assert_eq!(count(Some(CountPrompt::Chat(chat(&[])))).expect_err("empty").field, "chat.messages");
    assert_eq!(count(Some(CountPrompt::Text("1234".into()))), Ok(Prompt::Text("1234".into())));
}

#[test]
fn max_tokens_defaults_to_what_fits_and_is_refused_where_it_does_not() {
    let limits = Limits::default();
    let fit = |request: wire::GenerateRequest, prompt: usize| {
        let mut checked = generate(request, &bounds(&limits)).expect("valid");
        checked.fit_prompt("text", prompt, &bounds(&limits)).map(|()| checked.sampling.max_tokens)
    };
    assert_eq!(fit(request(), 10), Ok(256));
    assert_eq!(fit(request(), CONTEXT - 7), Ok(7));
    assert_eq!(fit(with_sampling(|s| s.max_tokens = Some(502)), 10), Ok(502));
    let field = |result: Result<u32, InvalidField>| result.expect_err("refused").field;
    assert_eq!(field(fit(with_sampling(|s| s.max_tokens = Some(503)), 10)), "sampling.max_tokens");
    assert_eq!(field(fit(with_sampling(|s| s.min_tokens = Some(8)), CONTEXT - 7)), "sampling.min_tokens");
    assert_eq!(field(fit(request(), 0)), "text");
    assert_eq!(field(fit(request(), CONTEXT)), "text");
}

#[test]
fn log_probabilities_that_may_not_fit_one_message_are_sent_to_the_stream() {
    let limits = Limits::default();
    let checked = |logprobs, prompt_logprobs| {
        let output = wire::OutputOptions { logprobs, prompt_logprobs, token_ids: None };
        generate(wire::GenerateRequest { output: Some(output), ..request() }, &bounds(&limits)).expect("valid")
    };
    assert!(checked(Some(20), Some(20)).fit_one_message(512, &limits).is_ok());
    let small = Limits { message_bytes_max: 64 << 10, ..Limits::default() };
    let field = |checked: Checked| checked.fit_one_message(512, &small).expect_err("too large").field;
    assert_eq!(field(checked(Some(20), None)), "output.logprobs");
    assert_eq!(field(checked(None, Some(20))), "output.prompt_logprobs");
}

#[test]
fn adapter_names_keep_their_generation() {
    let limits = Limits::default();
    let hex = "0123456789abcdef".repeat(4);
    for text in ["cwe".to_owned(), format!("acme/cwe@{hex}")] {
        let checked =
            generate(wire::GenerateRequest { adapter: text.clone(), ..request() }, &bounds(&limits)).expect("valid");
        assert_eq!(checked.adapter.expect("an adapter").to_string(), text);
    }
}

/// Numbers and lists that random bytes would hardly ever form into a message.
#[derive(Debug, Clone, TypeGenerator)]
struct Arbitrary {
    adapter: String,
    text: Option<String>,
    ids: Option<Vec<u32>>,
    roles: Vec<(String, String)>,
    floats: [Option<f32>; 6],
    counts: [Option<u32>; 6],
    bias: Vec<(u32, f32)>,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    priority: i32,
    request_id: String,
    prompt_tokens: u16,
}

impl Arbitrary {
    fn request(self) -> wire::GenerateRequest {
        let chat = wire::Chat {
            messages: self.roles.into_iter().map(|(role, content)| wire::ChatMessage { role, content }).collect(),
            add_generation_prompt: None,
        };
        let ids = self.ids.map(|ids| WirePrompt::TokenIds(wire::TokenIds { ids }));
        let [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] = self.floats;
        let [max_tokens, min_tokens, n, logprobs, prompt_logprobs, top_k] = self.counts;
        wire::GenerateRequest {
            adapter: self.adapter,
            prompt: self.text.map(WirePrompt::Text).or(ids).or(Some(WirePrompt::Chat(chat))),
            sampling: Some(wire::SamplingParameters {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: self.bias.into_iter().collect(),
                stop: self.stop,
                stop_token_ids: self.stop_token_ids,
                max_tokens,
                min_tokens,
                n,
                ..Default::default()
            }),
            output: Some(wire::OutputOptions { logprobs, prompt_logprobs, token_ids: None }),
            priority: self.priority,
            request_id: self.request_id,
            ..Default::default()
        }
    }
}

fn whatever_passes_is_within_bounds(request: wire::GenerateRequest, prompt_tokens: usize) {
    let limits = Limits::default();
    let bounds = bounds(&limits);
    match generate(request, &bounds) {
        Err(error) => assert!(!error.field.is_empty() && !error.reason.is_empty()),
        Ok(mut checked) => {
            checked.sampling.validate(&limits, VOCAB).expect("sampling parameters within their ranges");
            assert!(checked.stops.len() <= limits.stops_max && checked.request_id.len() <= limits.request_id_bytes_max);
            if let Prompt::Tokens(tokens) = &checked.prompt {
                assert!(tokens.iter().all(|&token| (token as usize) < VOCAB));
            }
            if checked.fit_prompt("text", prompt_tokens, &bounds).is_ok() {
                assert!(prompt_tokens + checked.sampling.max_tokens as usize <= CONTEXT);
                assert!(checked.sampling.min_tokens <= checked.sampling.max_tokens);
            }
        }
    }
}

#[test]
fn fuzz_structured_requests() {
    bolero::check!().with_type::<Arbitrary>().cloned().for_each(|arbitrary| {
        let prompt_tokens = usize::from(arbitrary.prompt_tokens);
        whatever_passes_is_within_bounds(arbitrary.request(), prompt_tokens);
    });
}

#[test]
fn fuzz_bytes_as_requests() {
    bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| {
        if let Ok(request) = wire::GenerateRequest::decode(bytes.as_slice()) {
            whatever_passes_is_within_bounds(request, bytes.len());
        }
    });
}
