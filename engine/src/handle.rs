use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use openlora_adapters::Lease;
use openlora_types::{FinishReason, Generation, Priority, SamplingParams, TenantId, Token, TokenOutput, Usage};
use tokio::sync::{mpsc, watch};

use crate::engine::Shared;
use crate::request::Control;
use crate::{EngineError, EngineStats};

/// One request, checked by the server: token ids in the vocabulary, [`SamplingParams::validate`] passed.
#[derive(Clone, Debug)]
pub struct Submit {
    /// Whom it is accounted to.
    pub tenant: TenantId,
    /// The adapter, held for as long as the request lives; `None` for the base model.
    pub lease: Option<Lease>,
    /// At least one token.
    pub prompt: Vec<Token>,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Which queue.
    pub priority: Priority,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Prefixes are shared only under the same tenant and salt.
    pub cache_salt: String,
}

/// What a request's reader is told. Per sample: `Token`s, then `Finished`; after all samples `Done`. `Failed` ends the
/// stream at any point.
#[derive(Clone, Debug)]
pub enum Event {
    /// Prompt tokens scored, in order, one entry per prompt token but the first; may come in several parts.
    PromptLogprobs(Vec<TokenOutput>),
    /// One more token of a sample.
    Token {
        /// Which sample.
        index: u32,
        /// The token.
        output: TokenOutput,
    },
    /// A sample is complete.
    Finished {
        /// Which sample.
        index: u32,
        /// Why.
        reason: FinishReason,
    },
    /// All samples are complete.
    Done {
        /// What the request consumed.
        usage: Usage,
    },
    /// The request ended early.
    Failed(EngineError),
}

/// How other threads reach the engine. Clones share it.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) shared: Arc<dyn Shared>,
    pub(crate) death: watch::Receiver<Option<String>>,
}

impl EngineHandle {
    /// Puts a request into the queue. Does not block: an adapter that is not on the device is brought there while the
    /// request waits and others run.
    ///
    /// # Errors
    /// A full queue, a draining or dead engine, an adapter that no page can hold. Reasons found later, a file that cannot be
    /// read among them, arrive as [`Event::Failed`].
    pub fn submit(&self, submit: Submit) -> Result<OutputStream, EngineError> {
        if let Some(reason) = self.death_reason() {
            return Err(EngineError::Dead(reason));
        }
        let outcome = self.shared.submit(submit);
        // The step thread may have died while the adapter was loaded, and then nobody reads the queue. It gives notice
        // before it empties the queue for the last time, so one of the two sees the other.
        match self.death_reason() {
            Some(reason) => Err(EngineError::Dead(reason)),
            None => outcome,
        }
    }

    /// Asks for these adapters to be on the device and to stay there, and lets go of others that were pinned: those stay until
    /// their room is needed. Whether there was room shows in [`EngineStats`] and the log.
    ///
    /// # Errors
    /// As for [`EngineHandle::submit`].
    pub fn set_pinned(&self, leases: Vec<Lease>) -> Result<(), EngineError> {
        self.shared.set_pinned(leases)
    }

    /// Whether an adapter is on the device now.
    #[must_use]
    pub fn is_resident(&self, generation: &Generation) -> bool {
        self.shared.is_resident(generation)
    }

    /// The counters as of the last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.shared.stats()
    }

    /// Whether the step thread runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.death.borrow().is_none()
    }

    /// Why the step thread is gone, if it is.
    #[must_use]
    pub fn death_reason(&self) -> Option<String> {
        self.death.borrow().clone()
    }

    /// Resolves, with the reason, when the step thread is gone.
    pub async fn dead(&self) -> String {
        let mut death = self.death.clone();
        match death.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the step thread ended".to_owned(),
        }
    }

    /// The device, such as `cpu avx512-vnni, 2 threads`.
    #[must_use]
    pub fn describe(&self) -> &str {
        self.shared.describe()
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Refuses new requests, ends the running ones within a step and waits for the step thread.
    pub fn shutdown(&self) {
        self.shared.shutdown();
    }
}

/// The answer to one request as it is made. Dropping it ends the request within one step.
#[derive(Debug)]
pub struct OutputStream {
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) control: Arc<Control>,
    pub(crate) complete: bool,
}

impl OutputStream {
    /// The next event; `None` after `Done` or `Failed`.
    pub async fn next(&mut self) -> Option<Event> {
        if self.complete {
            return None;
        }
        let event = self.events.recv().await;
        Some(self.note(event))
    }

    /// [`OutputStream::next`] for hand-written streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.complete {
            return Poll::Ready(None);
        }
        self.events.poll_recv(cx).map(|event| Some(self.note(event)))
    }

    /// When the first step that computes a row of this request began; `None` while it waits.
    #[must_use]
    pub fn scheduled_at(&self) -> Option<Instant> {
        self.control.scheduled.get().map(|scheduled| scheduled.at)
    }

    /// Tokens of the prompt that the prefix cache supplied; 0 while the request waits.
    #[must_use]
    pub fn cached_prompt_tokens(&self) -> u32 {
        self.control.scheduled.get().map_or(0, |scheduled| scheduled.cached_prompt_tokens)
    }

    /// The next event if it is there already: lets a reader take all that has gathered at once.
    pub fn try_next(&mut self) -> Option<Event> {
        if self.complete {
            return None;
        }
        match self.events.try_recv() {
            Ok(event) => Some(self.note(Some(event))),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => Some(self.note(None)),
        }
    }

    /// [`OutputStream::next`] for threads outside the async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        if self.complete {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    /// Ends one sample within a step, as after a stop string: its `Finished` says `Stop`. Nothing happens where it has
    /// ended already or there is none of that index.
    pub fn stop_sample(&self, index: u32) {
        self.control.stopped.fetch_or(1_u64.checked_shl(index).unwrap_or(0), Ordering::Release);
    }

    // A channel closed without a last event means that the engine gave up on this reader, or died.
    fn note(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or_else(|| Event::Failed(self.control.failure()));
        self.complete = matches!(event, Event::Done { .. } | Event::Failed(_));
        event
    }
}

impl Drop for OutputStream {
    fn drop(&mut self) {
        self.control.cancelled.store(true, Ordering::Release);
    }
}
