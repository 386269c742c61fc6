//! Why a sequence or a pin is refused. After [`Scheduler::submit`](crate::Scheduler::submit) has accepted a sequence, only
//! the load of its adapter can fail.

use openlora_types::{Classify, Fault, Generation, InvalidField, SequenceId, TenantId};

/// Why [`Scheduler::submit`](crate::Scheduler::submit) refused a sequence or [`Scheduler::pin`](crate::Scheduler::pin) an
/// adapter; the scheduler is unchanged.
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
    /// The tenant has as many sequences waiting as one may have.
    #[error(
        "{waiting} sequences of {tenant} wait already, the limit max_waiting_per_tenant is {max}; retry in \
         {retry_after_micros} µs"
    )]
    TenantQueueFull {
        /// Whose share is used up.
        tenant: TenantId,
        /// Its sequences waiting now.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When room is likely, from the pace at which sequences ended of late and the tenant's rate.
        retry_after_micros: u64,
    },
    /// The sequence could never run, even alone: its tokens do not fit.
    #[error(
        "prompt and max_tokens are {tokens} tokens together and the KV cache holds {max}; send a shorter prompt, ask for \
         fewer tokens or raise pool_bytes"
    )]
    TooLong {
        /// Tokens of the prompt and of the longest answer.
        tokens: usize,
        /// Tokens that the pool holds.
        max: usize,
    },
    /// The sequence could never run, even alone: its tokens fit, but not beside its adapter and the pinned ones.
    #[error(
        "the sequence needs {blocks} pages for its tokens and {adapter} for its adapter; {pinned} of {max} pages are pinned \
         for other adapters; ask for fewer tokens, unpin an adapter or raise pool_bytes"
    )]
    TooManyPages {
        /// Pages for all tokens of the prompt and of the longest answer.
        blocks: usize,
        /// Pages of its adapter.
        adapter: usize,
        /// Pages of other adapters that are pinned.
        pinned: usize,
        /// Pages of the pool.
        max: usize,
    },
    /// With this adapter pinned as well, a live sequence could not run to its end any more.
    #[error(
        "pinning {} takes {pages} pages; of {max}, {pinned} are pinned, {loading} are being loaded into and a live sequence \
         needs {live}; retry later, unpin another adapter or raise pool_bytes", generation.short()
    )]
    NoRoomForPin {
        /// The adapter to be pinned.
        generation: Generation,
        /// Its pages.
        pages: usize,
        /// Pages pinned already.
        pinned: usize,
        /// Pages of other adapters that are being loaded.
        loading: usize,
        /// The most pages that a live sequence may need beside pinned adapters.
        live: usize,
        /// Pages of the pool.
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
        match self {
            Self::QueueFull { .. } | Self::TenantQueueFull { .. } => true,
            // Loads and sequences end; pins stay.
            Self::NoRoomForPin { pages, pinned, max, .. } => pages.saturating_add(*pinned) <= *max,
            Self::TooLong { .. } | Self::TooManyPages { .. } | Self::Invalid(_) | Self::DuplicateId(_) => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::TooLong { .. } | Self::TooManyPages { .. } | Self::TenantQueueFull { .. } | Self::Invalid(_) => {
                Fault::Client
            }
            Self::QueueFull { .. } | Self::NoRoomForPin { .. } | Self::DuplicateId(_) => Fault::Server,
        }
    }
}
