//! What readers are told of a step, and the end of requests: each has one channel, and whatever ends it, everything it held is free
//! before its last event is read.

use std::sync::Arc;

use openlora_kernels::Backend;
use openlora_scheduler::SequenceResult;
use openlora_types::{FinishReason, SequenceId, Token, TokenLogprob, TokenOutput};
use tokio::sync::mpsc;

use super::rows::{Buffers, LogitRow};
use super::{Request, RequestKey, StepThread};
use crate::EngineError;
use crate::handle::Event;
use crate::request::{Command, Control, Incoming};

/// What a step has made for a reader.
pub(super) enum Unsent {
    Token {
        key: RequestKey,
        id: SequenceId,
        index: u32,
        output: TokenOutput,
        end: Option<FinishReason>,
    },
    Scored {
        key: RequestKey,
        outputs: Vec<TokenOutput>,
    },
    /// Its deadline has passed: it had what was made before.
    Expired {
        key: RequestKey,
    },
}

impl<B: Backend> StepThread<B> {
    /// Notes what was drawn and scored, for the scheduler and for the readers.
    pub(super) fn conclude(&mut self, rows: &[LogitRow], buffers: &mut Buffers) {
        for (wanted, sampled) in rows.iter().zip(&buffers.sampled) {
            let id = wanted.id;
            // Gone: it was ended while the device worked.
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let (key, index) = (sequence.request, sequence.index);
            let token = sampled.token;
            let chosen = TokenLogprob { token, logprob: sampled.logprob };
            let output = TokenOutput { chosen, top: sampled.top.clone() };
            if wanted.score.is_some() {
                match self.unsent.last_mut() {
                    Some(Unsent::Scored { key: of, outputs }) if *of == key => outputs.push(output),
                    _ => self.unsent.push(Unsent::Scored { key, outputs: vec![output] }),
                }
                continue;
            }
            sequence.generated += 1;
            let generated = sequence.generated;
            let end = end_with(&self.requests[&key], token, generated);
            self.totals.generation_tokens += 1;
            buffers.results.push(SequenceResult { id, token, finished: end.is_some() });
            self.unsent.push(Unsent::Token { key, id, index, output, end });
        }
    }

    /// Tells the readers what steps have made.
    pub(super) fn send_results(&mut self) {
        let mut unsent = std::mem::take(&mut self.unsent);
        for unsent in unsent.drain(..) {
            match unsent {
                Unsent::Scored { key, outputs } => self.send(key, Event::PromptLogprobs(outputs)),
                Unsent::Expired { key } => self.fail(key, EngineError::DeadlineExceeded),
                Unsent::Token { key, id, index, output, end } => {
                    if let Some(request) = self.requests.get_mut(&key) {
                        request.usage.completion_tokens += 1;
                        self.send(key, Event::Token { index, output });
                    }
                    if let Some(reason) = end {
                        self.finish(id, reason);
                    }
                }
            }
        }
        self.unsent = unsent;
    }

    /// One sample is complete; with the last one the request is.
    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let Some(request) = self.requests.get_mut(&sequence.request) else { return };
        request.open_samples -= 1;
        let done = (request.open_samples == 0).then_some(Event::Done { usage: request.usage });
        self.send(sequence.request, Event::Finished { index: sequence.index, reason });
        if let Some(done) = done
            && let Some(request) = self.requests.remove(&sequence.request)
        {
            let (events, control) = request.release();
            if let Err(mpsc::error::TrySendError::Full(_)) = events.try_send(done) {
                let _ = control.failure.set(EngineError::SlowReader { max: events.max_capacity() });
            }
        }
    }

    /// Sends an event; a reader that is gone or too far behind loses its request.
    fn send(&mut self, key: RequestKey, event: Event) {
        let Some(request) = self.requests.get(&key) else { return };
        match request.events.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                let max = request.events.max_capacity();
                let _ = request.control.failure.set(EngineError::SlowReader { max });
                self.remove(key);
            }
            Err(mpsc::error::TrySendError::Closed(_)) => drop(self.remove(key)),
        }
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, key: RequestKey, error: EngineError) {
        if let Some((events, control)) = self.remove(key) {
            fail_reader(&events, &control, error);
        }
    }

    /// Forgets a request: its blocks, adapter and lease are free at once.
    pub(super) fn remove(&mut self, key: RequestKey) -> Option<(mpsc::Sender<Event>, Arc<Control>)> {
        let request = self.requests.remove(&key)?;
        for &id in &request.samples {
            if self.sequences.remove(&id).is_some() {
                self.scheduler.abort(id);
            }
        }
        Some(request.release())
    }

    pub(super) fn fail_everything(&mut self, error: &EngineError) {
        for (_, request) in self.requests.drain() {
            let (events, control) = request.release();
            fail_reader(&events, &control, error.clone());
        }
        self.incoming.close();
        while let Ok(command) = self.incoming.try_recv() {
            if let Command::Submit(incoming) = command {
                let Incoming { submit, events, control, .. } = *incoming;
                drop(submit);
                fail_reader(&events, &control, error.clone());
            }
        }
    }
}

/// Whether a sample ends with a token, its `generated`-th.
fn end_with(request: &Request, token: Token, generated: usize) -> Option<FinishReason> {
    if request.stops.contains(&token) {
        return Some(FinishReason::Stop);
    }
    (generated >= request.params.max_tokens as usize).then_some(FinishReason::Length)
}

/// Tells a reader that its request has failed: in the channel, or where that is full, when it has read all that is there.
pub(super) fn fail_reader(events: &mpsc::Sender<Event>, control: &Control, error: EngineError) {
    let _ = control.failure.set(error.clone());
    let _ = events.try_send(Event::Failed(error));
}
