//! A server under load, from outside: concurrent gRPC streams, timed token by token.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use openlora_proto::v1::generate_request::Prompt;
use openlora_proto::v1::inference_client::InferenceClient;
use openlora_proto::v1::{GenerateRequest, OutputOptions, SamplingParameters, TokenIds};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::task::JoinSet;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use crate::stats::Percentiles;

/// What to send.
#[derive(Clone, Debug, Serialize)]
pub struct Load {
    /// Requests in flight at any time.
    pub concurrency: usize,
    /// Requests in all.
    pub requests: usize,
    /// Aliases, dealt in turn; empty asks the base model.
    pub adapters: Vec<String>,
    /// Tokens of a prompt, drawn at random.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub answer_tokens: usize,
    /// Token ids are drawn below this.
    pub vocab: u32,
    /// Start of the random sequence.
    pub seed: u64,
}

/// What came back.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Answer tokens per second over the whole run.
    pub tokens_per_s: f64,
    /// Requests per second over the whole run.
    pub requests_per_s: f64,
    /// Time to the first token, milliseconds.
    pub ttft_ms: Percentiles,
    /// Time between messages of one answer, milliseconds.
    pub inter_token_ms: Percentiles,
    /// Time of whole requests, milliseconds.
    pub e2e_ms: Percentiles,
    /// Requests that failed, by message.
    pub errors: Vec<String>,
    /// Length of the run.
    pub seconds: f64,
}

/// One answer's times.
pub(crate) struct Timed {
    pub(crate) tokens: usize,
    pub(crate) ttft: Duration,
    pub(crate) gaps: Vec<Duration>,
    pub(crate) e2e: Duration,
}

/// Runs the load against the server at `url`; `key` is an API key or empty.
///
/// # Errors
/// The server cannot be reached. Requests that fail are counted in [`Measured::errors`].
pub async fn run(url: &str, key: &str, load: &Load) -> Result<Measured> {
    if load.concurrency == 0 || load.requests == 0 {
        bail!("concurrency and requests must be at least 1");
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).context("server address")?;
    let channel = endpoint.connect().await.with_context(|| format!("no server answers at {url}"))?;
    let mut rng = StdRng::seed_from_u64(load.seed);
    let mut pending: Vec<_> = (0..load.requests).map(|i| request(load, i, &mut rng)).rev().collect();
    let began = Instant::now();
    let mut running = JoinSet::new();
    let mut timed = Vec::new();
    let mut errors = Vec::new();
    loop {
        while running.len() < load.concurrency {
            let Some(message) = pending.pop() else { break };
            running.spawn(one(channel.clone(), key.to_owned(), message, Instant::now()));
        }
        match running.join_next().await {
            None => break,
            Some(outcome) => match outcome.context("a request's task")? {
                Ok(one) => timed.push(one),
                Err(error) => errors.push(format!("{error:#}")),
            },
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let millis = |duration: &Duration| duration.as_secs_f64() * 1e3;
    Ok(Measured {
        tokens_per_s: timed.iter().map(|one| one.tokens).sum::<usize>() as f64 / seconds,
        requests_per_s: timed.len() as f64 / seconds,
        ttft_ms: Percentiles::of(timed.iter().map(|one| millis(&one.ttft)).collect()),
        inter_token_ms: Percentiles::of(timed.iter().flat_map(|one| &one.gaps).map(millis).collect()),
        e2e_ms: Percentiles::of(timed.iter().map(|one| millis(&one.e2e)).collect()),
        errors,
        seconds,
    })
}

fn request(load: &Load, index: usize, rng: &mut StdRng) -> GenerateRequest {
    let ids = (0..load.prompt_tokens).map(|_| rng.random_range(5..load.vocab)).collect();
    let adapter = match load.adapters.as_slice() {
        [] => String::new(),
        adapters => adapters[index % adapters.len()].clone(),
    };
    greedy(adapter, ids, load.answer_tokens as u32)
}

/// A request for exactly `tokens` tokens.
pub(crate) fn greedy(adapter: String, prompt: Vec<u32>, tokens: u32) -> GenerateRequest {
    let sampling = SamplingParameters {
        temperature: Some(0.0),
        max_tokens: Some(tokens),
        ignore_eos: Some(true),
        ..SamplingParameters::default()
    };
    GenerateRequest {
        adapter,
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt })),
        sampling: Some(sampling),
        output: Some(OutputOptions { token_ids: Some(true), ..OutputOptions::default() }),
        ..GenerateRequest::default()
    }
}

/// `message` with an API key, if there is one.
pub(crate) fn authorized<T>(message: T, key: &str) -> Result<tonic::Request<T>> {
    let mut request = tonic::Request::new(message);
    if !key.is_empty() {
        let value: MetadataValue<_> = format!("Bearer {key}").parse().context("API key")?;
        request.metadata_mut().insert("authorization", value);
    }
    Ok(request)
}

/// Reads one answer to its end. Times count from `began`, which may lie before the call where a request was due earlier.
pub(crate) async fn one(channel: Channel, key: String, message: GenerateRequest, began: Instant) -> Result<Timed> {
    let request = authorized(message, &key)?;
    let mut stream = InferenceClient::new(channel).generate_stream(request).await?.into_inner();
    let mut timed = Timed { tokens: 0, ttft: Duration::ZERO, gaps: Vec::new(), e2e: Duration::ZERO };
    let mut last = None;
    while let Some(message) = stream.message().await? {
        if message.token_ids.is_empty() {
            continue;
        }
        let now = Instant::now();
        match last {
            None => timed.ttft = now - began,
            Some(before) => timed.gaps.push(now - before),
        }
        last = Some(now);
        timed.tokens += message.token_ids.len();
    }
    timed.e2e = began.elapsed();
    Ok(timed)
}
