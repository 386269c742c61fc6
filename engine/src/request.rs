use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use openlora_adapters::Lease;
use tokio::sync::mpsc;

use crate::handle::Submit;
use crate::{EngineError, Event};

/// What a reader and the step thread share of one request. Flags instead of a queue of messages: a reader can always
/// raise one, from `Drop` as well, and the step thread looks at each once a step.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// The reader is gone.
    pub(crate) cancelled: AtomicBool,
    /// Bit i: sample i was stopped by its reader. The engine refuses `n` above [`SAMPLES_MAX`].
    pub(crate) stopped: AtomicU64,
    /// Why the engine gave up where the channel had no room to say so.
    pub(crate) failure: OnceLock<EngineError>,
    /// Of its first step.
    pub(crate) scheduled: OnceLock<Scheduled>,
}

/// The step that computes a request's first row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scheduled {
    /// When it began.
    pub(crate) at: Instant,
    /// Tokens of the prompt that the prefix cache supplied.
    pub(crate) cached_prompt_tokens: u32,
}

impl Control {
    pub(crate) fn failure(&self) -> EngineError {
        self.failure.get().cloned().unwrap_or_else(|| EngineError::Dead("the step thread ended".into()))
    }
}

/// Samples a request can have, by the width of [`Control::stopped`].
pub(crate) const SAMPLES_MAX: u32 = 64;

/// A request on its way to the step thread.
pub(crate) struct Incoming {
    pub(crate) submit: Submit,
    /// What its adapter takes, if it has one.
    pub(crate) pages: usize,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) control: Arc<Control>,
}

/// What the step thread is told between steps.
pub(crate) enum Command {
    Submit(Box<Incoming>),
    /// Keep these adapters, each of so many pages, on the device, and no others.
    Pin(Vec<(Lease, usize)>),
    /// Look around: the stop flag is up.
    Wake,
}
