use std::time::Duration;

use openlora_adapters::AdapterError;
use openlora_kernels::KernelError;
use openlora_model::ModelError;
use openlora_types::{Classify, Fault, InvalidField};

/// Why the engine refused or ended a request. Cheap to clone: every sample of a request may be told.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The queue is full.
    #[error("{waiting} requests wait already, the limit waiting_requests_max is {max}; retry in {retry_after:?}")]
    QueueFull {
        /// Requests waiting now.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When room is likely.
        retry_after: Duration,
    },
    /// The request itself is wrong.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The adapter cannot be brought to the device.
    #[error("adapter: {0}")]
    Adapter(String),
    /// The adapter's file cannot be read or is not what was registered.
    #[error(transparent)]
    Load(#[from] AdapterError),
    /// The tenant has as many requests waiting as one may have.
    #[error(
        "{waiting} requests of this tenant wait already, the limit waiting_requests_per_tenant_max is {max}; retry in {retry_after:?}"
    )]
    TenantQueueFull {
        /// Its requests waiting now.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When room is likely.
        retry_after: Duration,
    },
    /// The deadline passed before the answer was complete.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The reader fell behind by more than the buffer.
    #[error("the reader fell {max} events behind, the limit stream_events_max")]
    SlowReader {
        /// The limit.
        max: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is draining and takes no new requests")]
    Draining,
    /// The step thread is gone: every later request fails as well.
    #[error("the engine has stopped: {0}")]
    Dead(String),
    /// The engine could not be started.
    #[error("the engine could not start: {0}")]
    Start(String),
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> Self {
        Self::Start(error.to_string())
    }
}

impl From<KernelError> for EngineError {
    fn from(error: KernelError) -> Self {
        Self::Start(error.to_string())
    }
}

impl Classify for EngineError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::QueueFull { .. }
            | Self::TenantQueueFull { .. }
            | Self::SlowReader { .. }
            | Self::Draining
            | Self::Dead(_) => true,
            Self::Load(error) => error.is_retryable(),
            _ => false,
        }
    }
    fn fault(&self) -> Fault {
        match self {
            Self::Invalid(_) | Self::Adapter(_) | Self::SlowReader { .. } | Self::DeadlineExceeded => Fault::Client,
            Self::Load(error) => error.fault(),
            Self::TenantQueueFull { .. } => Fault::Client,
            _ => Fault::Server,
        }
    }
}
