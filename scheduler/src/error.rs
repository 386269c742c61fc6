//! Why a sequence is refused. After [`Scheduler::submit`](crate::Scheduler::submit) has accepted one, nothing can fail.

use openlora_types::{Classify, Fault, InvalidField, SequenceId};

/// Why [`Scheduler::submit`](crate::Scheduler::submit) refused a sequence; the scheduler is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The queue is full.
    #[error("{waiting} sequences wait already, the limit max_waiting is {max}; retry in {retry_after_micros} µs")]
    QueueFull {
        /// Sequences waiting now.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When room is likely, from the pace at which sequences ended of late.
        retry_after_micros: u64,
    },
    /// The sequence could never run, even alone.
    #[error(
        "prompt and max_tokens are {tokens} tokens together and the KV cache holds {max}; send a shorter prompt, ask for \
         fewer tokens or raise kv_cache_bytes"
    )]
    TooLong {
        /// Tokens of the prompt and of the longest answer.
        tokens: usize,
        /// Tokens that the pool holds.
        max: usize,
    },
    /// A field that no limit can make valid.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The caller used an id twice.
    #[error("{0} is live already; sequence ids must not be reused")]
    DuplicateId(SequenceId),
}

impl Classify for SubmitError {
    fn is_retryable(&self) -> bool {
        matches!(self, Self::QueueFull { .. })
    }

    fn fault(&self) -> Fault {
        match self {
            Self::TooLong { .. } | Self::Invalid(_) => Fault::Client,
            Self::QueueFull { .. } | Self::DuplicateId(_) => Fault::Server,
        }
    }
}
