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
    /// The adapter's weights could not be read.
    #[error(transparent)]
    Load(#[from] AdapterError),
    /// The adapter cannot be brought to the device.
    #[error("adapter: {0}")]
    Adapter(String),
    /// Adapters in use leave no room for another.
    #[error(
        "{used} of {max} adapter bytes are in use by requests and this adapter needs {needed}; retry later or raise engine.adapter_bytes"
    )]
    AdapterMemory {
        /// Bytes of the adapter.
        needed: usize,
        /// Bytes in use.
        used: usize,
        /// The limit.
        max: usize,
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
            Self::Load(error) => error.is_retryable(),
            Self::QueueFull { .. }
            | Self::AdapterMemory { .. }
            | Self::SlowReader { .. }
            | Self::Draining
            | Self::Dead(_) => true,
            _ => false,
        }
    }
    fn fault(&self) -> Fault {
        match self {
            Self::Load(error) => error.fault(),
            Self::Invalid(_) | Self::Adapter(_) | Self::SlowReader { .. } | Self::DeadlineExceeded => Fault::Client,
            _ => Fault::Server,
        }
    }
}
