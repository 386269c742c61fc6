//! Engine events → wire messages: incremental text, stop strings, log-probabilities. Step eight of a request, and pure: it
//! knows no stream and no clock.
//!
//! Tokens of one sample that have gathered are sent as one message, so a reader that is slower than the engine costs fewer
//! messages and not more memory.

use openlora_engine::{EngineError, Event};
use openlora_model::text::{DecodeOptions, Detokenizer, StopMatcher, TextError, Tokenizer};
use openlora_proto::v1 as wire;
use openlora_types::{FinishReason, TokenLogprob, TokenOutput, Usage};

/// Tokens gathered into one message at most.
const TOKENS_PER_MESSAGE_MAX: usize = 64;
/// Prompt tokens scored in one message at most.
const PROMPT_LOGPROBS_PER_MESSAGE_MAX: usize = 256;

/// What a request wants to see.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) samples: u32,
    pub(crate) stops: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) token_ids: bool,
    pub(crate) logprobs: bool,
    /// Content hash of the adapter; empty for the base model.
    pub(crate) generation: String,
    pub(crate) request_id: String,
    /// Empty where requests are not charged.
    pub(crate) receipt_id: String,
}

/// What the reader of the events must do after one.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing.
    GoOn,
    /// A stop string was completed: tell the engine to end the sample.
    StopSample(u32),
    /// All samples are complete.
    Complete(Usage),
    /// The request ended early.
    Failed(EngineError),
}

/// One request's answer in the making.
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    wanted: Wanted,
    samples: Vec<SampleState>,
    prompt_logprobs: Vec<wire::TokenLogprobs>,
    usage: Option<Usage>,
    closed: bool,
}

struct SampleState {
    detokenizer: Detokenizer,
    stops: Option<StopMatcher>,
    /// Characters that the latest token completed; kept for its capacity.
    characters: String,
    /// What has not been sent.
    message: wire::GenerateStreamResponse,
    tokens: usize,
    finished: bool,
}

impl SampleState {
    fn is_dirty(&self) -> bool {
        let message = &self.message;
        !message.text.is_empty()
            || !message.token_ids.is_empty()
            || !message.logprobs.is_empty()
            || message.finish_reason != wire::FinishReason::Unspecified as i32
    }

    /// Adds the characters in `self.characters`; true where they complete a stop string.
    fn add_characters(&mut self) -> bool {
        let Self { stops, characters, message, .. } = self;
        match stops {
            None => {
                message.text.push_str(characters);
                false
            }
            Some(stops) => stops.push(characters, &mut message.text).is_some(),
        }
    }

    fn finish(&mut self, reason: wire::FinishReason) {
        self.finished = true;
        self.message.set_finish_reason(reason);
    }

    /// The text is over; what was held back comes out, and may complete a stop string at the very end.
    fn end_text(&mut self) {
        self.characters = self.detokenizer.finish();
        if !self.add_characters()
            && let Some(stops) = &mut self.stops
        {
            self.message.text.push_str(&stops.finish());
        }
    }
}

impl Answer {
    /// # Errors
    /// An empty stop string, which conversion refuses first.
    pub(crate) fn new(tokenizer: Tokenizer, wanted: Wanted) -> Result<Self, TextError> {
        let options = DecodeOptions { skip_special: true, continues: true };
        let samples: Result<Vec<_>, TextError> = (0..wanted.samples)
            .map(|index| {
                let stops = (!wanted.stops.is_empty())
                    .then(|| StopMatcher::new(&wanted.stops, wanted.include_stop))
                    .transpose()?;
                Ok(SampleState {
                    detokenizer: Detokenizer::new(&tokenizer, options),
                    stops,
                    characters: String::new(),
                    message: wire::GenerateStreamResponse { index, ..Default::default() },
                    tokens: 0,
                    finished: false,
                })
            })
            .collect();
        Ok(Self { samples: samples?, tokenizer, wanted, prompt_logprobs: Vec::new(), usage: None, closed: false })
    }

    /// Takes one event in.
    pub(crate) fn take(&mut self, event: Event) -> Next {
        match event {
            Event::PromptLogprobs(tokens) => {
                let tokens = tokens.iter().map(|token| logprobs(&self.tokenizer, token));
                self.prompt_logprobs.extend(tokens);
                Next::GoOn
            }
            Event::Token { index, output } => self.token(index, &output),
            Event::Finished { index, reason } => self.sample_finished(index, reason),
            Event::Done { usage } => {
                self.usage = Some(usage);
                Next::Complete(usage)
            }
            Event::Failed(error) => Next::Failed(error),
        }
    }

    fn token(&mut self, index: u32, output: &TokenOutput) -> Next {
        let Some(sample) = self.samples.get_mut(index as usize) else { return Next::GoOn };
        // The engine may be a step ahead of a stop string.
        if sample.finished {
            return Next::GoOn;
        }
        sample.tokens += 1;
        if self.wanted.token_ids {
            sample.message.token_ids.push(output.chosen.token);
        }
        if self.wanted.logprobs {
            sample.message.logprobs.push(logprobs(&self.tokenizer, output));
        }
        sample.characters.clear();
        sample.detokenizer.push_into(output.chosen.token, &mut sample.characters);
        if sample.add_characters() {
            sample.finish(wire::FinishReason::Stop);
            return Next::StopSample(index);
        }
        Next::GoOn
    }

    fn sample_finished(&mut self, index: u32, reason: FinishReason) -> Next {
        let Some(sample) = self.samples.get_mut(index as usize).filter(|sample| !sample.finished) else {
            return Next::GoOn;
        };
        match reason {
            FinishReason::Stop | FinishReason::Length => {
                sample.end_text();
                let length = reason == FinishReason::Length;
                sample.finish(if length { wire::FinishReason::Length } else { wire::FinishReason::Stop });
                Next::GoOn
            }
            FinishReason::DeadlineExceeded => Next::Failed(EngineError::DeadlineExceeded),
            FinishReason::Cancelled => Next::Failed(EngineError::Draining),
        }
    }

    /// Whether so much has gathered that a message should go before more is taken in.
    pub(crate) fn is_full(&self) -> bool {
        self.prompt_logprobs.len() >= PROMPT_LOGPROBS_PER_MESSAGE_MAX
            || self.samples.iter().any(|sample| sample.tokens >= TOKENS_PER_MESSAGE_MAX)
    }

    /// The next message, where there is anything to say. After the last event: the rest, message by message, the last of
    /// them with the usage.
    pub(crate) fn message(&mut self) -> Option<wire::GenerateStreamResponse> {
        let mut message = if !self.prompt_logprobs.is_empty() {
            let part = self.prompt_logprobs.len().min(PROMPT_LOGPROBS_PER_MESSAGE_MAX);
            let prompt_logprobs = self.prompt_logprobs.drain(..part).collect();
            wire::GenerateStreamResponse { prompt_logprobs, ..Default::default() }
        } else if let Some(sample) = self.samples.iter_mut().find(|sample| sample.is_dirty()) {
            sample.tokens = 0;
            let empty = wire::GenerateStreamResponse { index: sample.message.index, ..Default::default() };
            std::mem::replace(&mut sample.message, empty)
        } else if self.usage.is_some() && !self.closed {
            wire::GenerateStreamResponse::default()
        } else {
            return None;
        };
        let more = !self.prompt_logprobs.is_empty() || self.samples.iter().any(SampleState::is_dirty);
        if let Some(usage) = self.usage.filter(|_| !more) {
            self.closed = true;
            message.usage = Some(usage_message(&usage));
            message.generation.clone_from(&self.wanted.generation);
            message.request_id.clone_from(&self.wanted.request_id);
            message.receipt_id.clone_from(&self.wanted.receipt_id);
        }
        Some(message)
    }
}

/// Adds a message of the stream to the answer that `Generate` gives at once.
pub(crate) fn merge(response: &mut wire::GenerateResponse, message: wire::GenerateStreamResponse) {
    response.prompt_logprobs.extend(message.prompt_logprobs);
    if let Some(sample) = response.samples.get_mut(message.index as usize) {
        sample.text.push_str(&message.text);
        sample.token_ids.extend(message.token_ids);
        sample.logprobs.extend(message.logprobs);
        if message.finish_reason != wire::FinishReason::Unspecified as i32 {
            sample.finish_reason = message.finish_reason;
        }
    }
    if message.usage.is_some() {
        response.usage = message.usage;
        response.generation = message.generation;
        response.request_id = message.request_id;
        response.receipt_id = message.receipt_id;
    }
}

fn usage_message(usage: &Usage) -> wire::Usage {
    wire::Usage {
        prompt_tokens: usage.prompt_tokens,
        cached_prompt_tokens: usage.cached_prompt_tokens,
        completion_tokens: usage.completion_tokens,
    }
}

fn logprobs(tokenizer: &Tokenizer, output: &TokenOutput) -> wire::TokenLogprobs {
    let one = |candidate: &TokenLogprob| wire::TokenLogprob {
        token_id: candidate.token,
        logprob: candidate.logprob,
        text: tokenizer.token_text(candidate.token),
    };
    wire::TokenLogprobs { chosen: Some(one(&output.chosen)), top: output.top.iter().map(one).collect() }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
