//! What the server serves, put together by the composition root, and what all its calls share.

use std::sync::Arc;
use std::time::Instant;

use openlora_adapters::AdapterStore;
use openlora_engine::EngineHandle;
use openlora_ledger::{Asset, Ledger};
use openlora_model::text::{ChatTemplate, Tokenizer};
use openlora_types::{Generation, ModelShape, Token};
use tokio::sync::{Mutex, Semaphore, watch};

use crate::convert::Bounds;
use crate::epochs::Epochs;
use crate::metrics::Metrics;
use crate::{ServerConfig, ServerError};

/// The rooms behind the doors.
pub struct App {
    /// Runs requests.
    pub engine: EngineHandle,
    /// Adapters by alias.
    pub store: Arc<AdapterStore>,
    /// Who pays for requests and who is owed for them; without it nobody is charged.
    pub books: Option<Books>,
    /// What brings epochs of the ledger to a chain; without it they are sealed by others, and stay in the ledger.
    pub epochs: Option<Arc<dyn Epochs>>,
    /// Of the base model.
    pub tokenizer: Tokenizer,
    /// Of the base model, where it has one; chat requests are refused without.
    pub template: Option<Arc<ChatTemplate>>,
    /// What is served.
    pub model: ModelFacts,
    /// Bounds the engine was started with.
    pub engine_limits: EngineLimits,
    /// `quantised` or `f32`.
    pub precision: String,
    /// Of the program.
    pub version: String,
}

/// The ledger and how requests are charged in it.
#[derive(Clone)]
pub struct Books {
    /// Where it is written.
    pub ledger: Ledger,
    /// What fees are in.
    pub asset: Asset,
    /// Whether requests are charged to their callers, who must have prepaid.
    pub charge: bool,
    /// Whom the base model's part of a fee goes to; the pool where nobody is named.
    pub base_owner: Option<String>,
}

/// What `Server.GetModel` tells.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// Sizes and name.
    pub shape: ModelShape,
    /// Such as `llama`.
    pub architecture: String,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<Token>,
}

/// Bounds of the engine that requests meet.
#[derive(Clone, Debug)]
pub struct EngineLimits {
    /// Longest sequence, prompt and answer together; the model's context where that is shorter.
    pub sequence_tokens_max: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Rows of one step.
    pub max_num_batched_tokens: usize,
    /// Distinct adapters among running sequences.
    pub max_loras: usize,
}

/// What all calls share.
pub(crate) struct State {
    pub(crate) app: App,
    pub(crate) config: ServerConfig,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) started: Instant,
    /// Requests being tokenized or waiting for their adapter.
    pub(crate) preparing: Arc<Semaphore>,
    pub(crate) uploads: Arc<Semaphore>,
    /// The adapters that the engine was last told to keep on the device.
    pub(crate) pinned: Mutex<Vec<Generation>>,
    draining: watch::Sender<bool>,
    /// Calls that shutdown waits for.
    busy: watch::Sender<usize>,
}

impl State {
    pub(crate) fn new(app: App, config: ServerConfig) -> Result<Arc<Self>, ServerError> {
        let metrics = Metrics::new(app.engine_limits.max_loras)?;
        Ok(Arc::new(Self {
            metrics: Arc::new(metrics),
            started: Instant::now(),
            preparing: Arc::new(Semaphore::new(config.limits.waiting_requests_max)),
            uploads: Arc::new(Semaphore::new(config.limits.uploads_max)),
            pinned: Mutex::default(),
            draining: watch::Sender::new(false),
            busy: watch::Sender::new(0),
            app,
            config,
        }))
    }

    /// What requests are measured against.
    pub(crate) fn bounds(&self) -> Bounds<'_> {
        let limits = &self.config.limits;
        let model = &self.app.model.shape;
        let sequence_tokens_max = self.app.engine_limits.sequence_tokens_max;
        Bounds {
            limits,
            vocab: model.vocab,
            sequence_tokens_max: sequence_tokens_max.min(model.context).min(limits.sequence_tokens_max),
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn start_draining(&self) {
        self.draining.send_replace(true);
        self.app.engine.drain();
    }

    /// Resolves when draining begins.
    pub(crate) async fn drained(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.draining.subscribe().wait_for(|draining| *draining).await;
    }

    /// Whether new requests are likely to be served.
    pub(crate) fn is_ready(&self) -> bool {
        self.app.engine.is_alive() && !self.is_draining()
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> BusyGuard {
        self.busy.send_modify(|busy| *busy += 1);
        BusyGuard(Arc::clone(self))
    }

    /// Resolves when no call is left.
    pub(crate) async fn idle(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.busy.subscribe().wait_for(|busy| *busy == 0).await;
    }
}

/// One call that shutdown waits for.
pub(crate) struct BusyGuard(Arc<State>);

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}
