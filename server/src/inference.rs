//! `openlora.v1.Inference`: steps one to four and eight of a request.
//!
//! Rendering, tokenizing, reading an adapter and bringing it to the device happen on threads that may block; then tokens
//! flow from the engine's channel straight into the response, with no task and no queue between. What bounds a slow
//! reader is the engine's channel: when it overflows the engine ends the request, and the buffer is all that was held.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use openlora_adapters::Lease;
use openlora_engine::{OutputStream, Submit};
use openlora_ledger::Tokens;
use openlora_model::text::TextError;
use openlora_proto::v1 as wire;
use openlora_proto::v1::inference_server::Inference;
use openlora_types::{Classify as _, Fault, InvalidField, TenantId, Token, Usage};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Extensions, Request, Response, Status};

use crate::ServerError;
use crate::answer::{Answer, Next, Wanted, merge};
use crate::app::{BusyGuard, State};
use crate::auth::Caller;
use crate::charge::{Charge, Closing};
use crate::convert::{self, Checked, Prompt};
use crate::edge::{Deadline, STREAMING_CALL};
use crate::metrics::Meter;

/// The service.
pub(crate) struct InferenceService {
    pub(crate) state: Arc<State>,
}

/// Who asks, and until when.
struct Asker {
    tenant: TenantId,
    deadline: Option<Instant>,
}

/// How the answer is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    OneMessage,
    Stream,
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStreamStream = AnswerStream;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<wire::GenerateResponse>, Status> {
        let mut stream = self.start(request, Shape::OneMessage).await?;
        let samples = 0..stream.samples;
        let mut response = wire::GenerateResponse {
            samples: samples.map(|index| wire::Sample { index, ..Default::default() }).collect(),
            ..Default::default()
        };
        while let Some(message) = stream.next().await {
            merge(&mut response, message?);
        }
        Ok(Response::new(response))
    }

    async fn generate_stream(&self, request: Request<wire::GenerateRequest>) -> Result<Response<AnswerStream>, Status> {
        Ok(Response::new(self.start(request, Shape::Stream).await?))
    }

    async fn count_tokens(
        &self,
        request: Request<wire::CountTokensRequest>,
    ) -> Result<Response<wire::CountTokensResponse>, Status> {
        let request = request.into_inner();
        let want_ids = request.token_ids;
        let prompt = convert::count_tokens(request, &self.state.config.limits).map_err(ServerError::from)?;
        let tokens = self.blocking(move |state| tokenize(state, prompt)).await?;
        Ok(Response::new(wire::CountTokensResponse {
            count: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
            token_ids: if want_ids { tokens } else { Vec::new() },
        }))
    }
}

impl InferenceService {
    async fn start(&self, request: Request<wire::GenerateRequest>, shape: Shape) -> Result<AnswerStream, ServerError> {
        let busy = self.state.begin();
        let mut meter = Meter::new(Arc::clone(&self.state.metrics));
        let asker = asker(request.extensions())?;
        let header_id = header_request_id(&request, self.state.config.limits.request_id_bytes_max);
        let mut checked = convert::generate(request.into_inner(), &self.state.bounds())?;
        if checked.request_id.is_empty() {
            checked.request_id = header_id;
        }
        if !checked.request_id.is_empty() {
            tracing::Span::current().record("request_id", tracing::field::debug(&checked.request_id));
        }
        let samples = checked.sampling.n;
        let adapter = checked.adapter.as_ref().map(|name| Arc::from(name.alias.as_str()));
        let (output, answer, charge) = self.blocking(move |state| submit(state, checked, asker, shape)).await?;
        meter.submitted(adapter, samples);
        Ok(AnswerStream {
            submitted: Instant::now(),
            queued: true,
            span: tracing::Span::current(),
            counted: shape == Shape::Stream,
            code: Code::Cancelled,
            failed: false,
            output: Some(output),
            samples,
            answer,
            charge,
            closing: None,
            meter,
            _busy: busy,
        })
    }

    /// Runs `work` where it may block. Only so many at once: the permit goes with the work, which outlives a caller that
    /// went away.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<State>) -> Result<T, ServerError> + Send + 'static,
    ) -> Result<T, ServerError> {
        let permit = Arc::clone(&self.state.preparing).try_acquire_owned().map_err(|_| ServerError::Busy {
            what: "requests are being prepared",
            limit: "waiting_requests_max",
            max: self.state.config.limits.waiting_requests_max,
            retry_after: Duration::from_secs(1),
        })?;
        let state = Arc::clone(&self.state);
        let span = tracing::Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            span.in_scope(|| work(&state))
        });
        task.await.unwrap_or(Err(ServerError::Internal("preparing a request panicked")))
    }
}

fn asker(extensions: &Extensions) -> Result<Asker, ServerError> {
    let caller = extensions.get::<Caller>().ok_or(ServerError::Internal("a call without a caller"))?;
    Ok(Asker { tenant: caller.tenant(), deadline: extensions.get::<Deadline>().map(|deadline| deadline.0) })
}

/// `x-request-id` for the trace. It comes from proxies as often as from clients, so one that cannot be used is left out
/// and not an error; of several the first counts.
fn header_request_id<T>(request: &Request<T>, bytes_max: usize) -> String {
    let value = request.metadata().get("x-request-id").and_then(|value| value.to_str().ok());
    value.filter(|text| text.len() <= bytes_max).unwrap_or_default().to_owned()
}

/// Steps one to four on a thread that may block.
fn submit(
    state: &Arc<State>,
    mut checked: Checked,
    asker: Asker,
    shape: Shape,
) -> Result<(OutputStream, Answer, Option<Charge>), ServerError> {
    let field = checked.prompt.field();
    let prompt = tokenize(state, std::mem::replace(&mut checked.prompt, Prompt::Tokens(Vec::new())))?;
    checked.fit_prompt(field, prompt.len(), &state.bounds())?;
    if shape == Shape::OneMessage {
        checked.fit_one_message(prompt.len(), &state.config.limits)?;
    }
    let lease: Option<Lease> = match &checked.adapter {
        Some(name) => Some(state.app.store.resolve(&name.to_string())?),
        None => None,
    };
    if asker.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return Err(ServerError::DeadlineExceeded);
    }
    let completion = u64::from(checked.sampling.n) * u64::from(checked.sampling.max_tokens);
    let tokens = Tokens { prompt: prompt.len() as u64, cached: 0, completion };
    let charge = Charge::reserve(state, &asker.tenant.0, checked.adapter.as_ref().zip(lease.as_ref()), tokens)?;
    let wanted = Wanted {
        samples: checked.sampling.n,
        stops: checked.stops,
        include_stop: checked.include_stop,
        token_ids: checked.token_ids,
        logprobs: checked.sampling.logprobs.is_some(),
        generation: lease.as_ref().map(|lease| lease.generation().to_string()).unwrap_or_default(),
        request_id: checked.request_id,
        receipt_id: charge.as_ref().map(|charge| charge.receipt().to_owned()).unwrap_or_default(),
    };
    let answer =
        Answer::new(state.app.tokenizer.clone(), wanted).map_err(|source| text_error("sampling.stop", source))?;
    let output = state.app.engine.submit(Submit {
        tenant: asker.tenant,
        lease,
        prompt,
        sampling: checked.sampling,
        priority: checked.priority,
        deadline: asker.deadline,
        cache_salt: checked.cache_salt,
    })?;
    Ok((output, answer, charge))
}

/// Text → tokens, chats through the model's template.
fn tokenize(state: &State, prompt: Prompt) -> Result<Vec<Token>, ServerError> {
    let field = prompt.field();
    let fail = |source| text_error(field, source);
    let tokenizer = &state.app.tokenizer;
    match prompt {
        Prompt::Tokens(tokens) => Ok(tokens),
        // An application's own prompt: it may spell control tokens, as when it has rendered a template itself.
        Prompt::Text(text) => {
            let mut tokens = tokenizer.prefix().to_vec();
            tokens.extend(tokenizer.encode(&text, true).map_err(fail)?);
            Ok(tokens)
        }
        Prompt::Chat { messages, add_generation_prompt } => {
            let missing =
                || InvalidField::new("chat", "cannot be used: the model has no chat template; send text or token_ids");
            let template = state.app.template.as_ref().ok_or_else(missing)?;
            let text = template.render(&messages, add_generation_prompt, &state.config.limits).map_err(fail)?;
            tokenizer.encode(&text, true).map_err(fail)
        }
    }
}

/// The text room names fields within a prompt; on the wire they are below the prompt's own.
fn text_error(field: &'static str, source: TextError) -> ServerError {
    ServerError::Text { field, source }
}

/// A response as tonic polls it. Dropping it drops the engine's stream, which ends the request within one step.
pub(crate) struct AnswerStream {
    output: Option<OutputStream>,
    answer: Answer,
    /// Where requests are charged.
    charge: Option<Charge>,
    /// The answer is complete, and what is left of it goes out when the ledger has it.
    closing: Option<Closing>,
    samples: u32,
    meter: Meter,
    submitted: Instant,
    /// No event has come yet.
    queued: bool,
    /// Whether this stream's end is the call's.
    counted: bool,
    /// How the call ends if it ended now: until it is complete, with the reader going away.
    code: Code,
    failed: bool,
    span: tracing::Span,
    _busy: BusyGuard,
}

impl AnswerStream {
    /// Takes events in until there are no more for now, or a message should go first.
    fn take_events(&mut self, cx: &mut Context<'_>) -> Result<(), ServerError> {
        while !self.answer.is_full() {
            let Some(output) = &mut self.output else { return Ok(()) };
            let Poll::Ready(Some(event)) = output.poll_next(cx) else { return Ok(()) };
            if self.queued {
                self.queued = false;
                if let Some(at) = output.scheduled_at() {
                    self.meter.scheduled(at.saturating_duration_since(self.submitted));
                }
                if let Some(charge) = &mut self.charge {
                    charge.started(output.cached_prompt_tokens());
                }
            }
            match &event {
                openlora_engine::Event::Token { index, .. } => {
                    self.meter.token(*index);
                    if let Some(charge) = &mut self.charge {
                        charge.token();
                    }
                }
                openlora_engine::Event::Finished { reason, .. } => self.meter.finished(*reason),
                _ => {}
            }
            match self.answer.take(event) {
                Next::GoOn => {}
                Next::StopSample(index) => output.stop_sample(index),
                Next::Complete(usage) => self.complete(&usage),
                Next::Failed(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn complete(&mut self, usage: &Usage) {
        self.output = None;
        self.code = Code::Ok;
        self.meter.completed(usage);
        self.closing = self.charge.as_mut().map(|charge| charge.complete(usage));
        self.span.in_scope(|| {
            tracing::info!(
                prompt_tokens = usage.prompt_tokens,
                cached_prompt_tokens = usage.cached_prompt_tokens,
                completion_tokens = usage.completion_tokens,
                elapsed_ms = self.meter.elapsed().as_millis() as u64,
                "answered"
            );
        });
    }

    fn fail(&mut self, error: ServerError) -> Status {
        self.output = None;
        if let Some(mut charge) = self.charge.take()
            && error.fault() != Fault::Client
        {
            charge.waive();
        }
        let status = self.span.in_scope(|| {
            tracing::info!(%error, elapsed_ms = self.meter.elapsed().as_millis() as u64, "ended early");
            Status::from(error)
        });
        self.code = status.code();
        self.failed = true;
        status
    }
}

impl Stream for AnswerStream {
    type Item = Result<wire::GenerateStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.failed {
            return Poll::Ready(None);
        }
        if let Err(error) = this.take_events(cx) {
            return Poll::Ready(Some(Err(this.fail(error))));
        }
        if let Some(closing) = &mut this.closing {
            std::task::ready!(closing.as_mut().poll(cx));
            this.closing = None;
        }
        match this.answer.message() {
            Some(message) => Poll::Ready(Some(Ok(message))),
            None if this.output.is_none() => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

impl Drop for AnswerStream {
    fn drop(&mut self) {
        if self.counted {
            self.meter.call(STREAMING_CALL, self.code);
        }
    }
}
