use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use openlora_kernels::Backend;
use openlora_model::{LoadOptions, Model};
use openlora_scheduler::{Scheduler, SchedulerConfig};
use openlora_types::{InvalidField, SamplingParams};
use tokio::sync::{mpsc, watch};

use crate::handle::{EngineHandle, OutputStream, Submit};
use crate::request::{Command, Control, Incoming, SAMPLES_MAX};
use crate::residency::{Residency, Resident};
use crate::step::{self, StepThread};
use crate::{EngineConfig, EngineError, EngineStats};

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Allocates the KV cache and starts the step thread.
    ///
    /// # Errors
    /// A KV cache without a block, a limit that cannot work, memory, or a thread that cannot be started.
    pub fn start<B: Backend>(model: Arc<Model<B>>, config: EngineConfig) -> Result<EngineHandle, EngineError> {
        let backend = model.backend();
        let spec = *model.attention_spec();
        let blocks = config.kv_cache_bytes / backend.kv_block_bytes(&spec, model.layers());
        let scheduler_config = SchedulerConfig {
            block_size: spec.block_size,
            num_blocks: blocks,
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_loras: config.max_loras,
            max_waiting: config.waiting_requests_max,
            prefix_cache: config.prefix_cache,
            long_prefill_chunk: config.long_prefill_chunk,
            starvation_micros: config.starvation_micros,
            ..SchedulerConfig::default()
        };
        scheduler_config
            .validate()
            .and_then(|()| check_start(&config, model.options()))
            .map_err(|error| EngineError::Start(error.to_string()))?;
        let scheduler = Scheduler::new(scheduler_config);
        let kv = backend.new_kv(&spec, model.layers(), blocks)?;
        let stats = EngineStats { blocks_total: blocks, blocks_free: blocks, ..EngineStats::default() };
        let board = Arc::new(Board { stats: Mutex::new(stats), stopping: AtomicBool::new(false) });
        let (commands, incoming) = mpsc::channel(config.waiting_requests_max);
        let (died, death) = watch::channel(None);
        let state = StepThread::new(Arc::clone(&model), scheduler, kv, incoming, Arc::clone(&board))?;
        let thread = std::thread::Builder::new()
            .name("openlora-step".into())
            .spawn(move || step::run(state, &died))
            .map_err(|error| EngineError::Start(format!("step thread: {error}")))?;
        let common = Common {
            description: backend.describe(),
            residency: Residency::new(config.adapter_bytes),
            draining: AtomicBool::new(false),
            thread: Mutex::new(Some(thread)),
            stream_events_max: config.stream_events_max,
            waiting_requests_max: config.waiting_requests_max,
            sequence_tokens_max: config
                .sequence_tokens_max
                .min(model.options().max_position)
                .min(blocks.saturating_mul(spec.block_size)),
            commands,
            board,
            model,
        };
        Ok(EngineHandle { shared: Arc::new(common), death })
    }
}

/// What the scheduler does not check of its configuration.
fn check_start(config: &EngineConfig, options: &LoadOptions) -> Result<(), InvalidField> {
    let (events, max) = (config.stream_events_max, u32::MAX as usize);
    if events == 0 || events > max {
        return Err(InvalidField::new("engine.stream_events_max", format!("is {events}; it must be from 1 to {max}")));
    }
    let (rows, max) = (config.max_num_batched_tokens, options.max_rows);
    if rows > max || options.max_logit_rows == 0 {
        let why =
            format!("is {rows}; the model was loaded for steps of {max} rows and {} of logits", options.max_logit_rows);
        return Err(InvalidField::new("engine.max_num_batched_tokens", why));
    }
    Ok(())
}

/// What a handle needs of the engine, whatever its backend: the one place where the backend's type is erased.
pub(crate) trait Shared: Send + Sync {
    fn submit(&self, submit: Submit) -> Result<OutputStream, EngineError>;
    fn stats(&self) -> EngineStats;
    fn describe(&self) -> &str;
    fn drain(&self);
    fn shutdown(&self);
}

/// What the step thread shows and is shown between steps.
pub(crate) struct Board {
    pub(crate) stats: Mutex<EngineStats>,
    pub(crate) stopping: AtomicBool,
}

struct Common<B: Backend> {
    model: Arc<Model<B>>,
    description: String,
    residency: Residency<B::Adapter>,
    commands: mpsc::Sender<Command<B::Adapter>>,
    board: Arc<Board>,
    draining: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    stream_events_max: usize,
    waiting_requests_max: usize,
    /// The smallest of the configured limit, the model's context and what the KV cache holds.
    sequence_tokens_max: usize,
}

impl<B: Backend> Common<B> {
    /// What can be said of a request before anything is done for it.
    fn check(&self, submit: &Submit) -> Result<(), InvalidField> {
        // Samples wait one by one, so a request of more than the queue holds would be refused for ever.
        let (n, max) = (submit.sampling.n as usize, self.waiting_requests_max.min(SAMPLES_MAX as usize));
        if n == 0 || n > max {
            let why =
                format!("is {n}; it must be from 1 to {max}, the smaller of {SAMPLES_MAX} and waiting_requests_max");
            return Err(InvalidField::new("sampling.n", why));
        }
        if submit.prompt.is_empty() {
            return Err(InvalidField::new("prompt", "must have at least one token"));
        }
        if submit.sampling.max_tokens == 0 {
            return Err(InvalidField::new("sampling.max_tokens", "must be at least 1"));
        }
        let (prompt, max) = (submit.prompt.len(), self.sequence_tokens_max);
        let tokens = prompt.saturating_add(submit.sampling.max_tokens as usize);
        if tokens > max {
            let why = format!(
                "and the prompt's {prompt} tokens are {tokens} together; a sequence has at most {max} (the smallest of \
                 sequence_tokens_max, the model's context and the KV cache)"
            );
            return Err(InvalidField::new("sampling.max_tokens", why));
        }
        Ok(())
    }

    /// Room for a reader's events: the limit, and at least what one step can make, which no reader could take earlier.
    fn stream_events(&self, sampling: &SamplingParams) -> usize {
        // Of each sample a token and its end, then the end of all.
        let answer = 2 * sampling.n as usize + 1;
        // A step's scored rows come in parts of max_logit_rows, not aligned to this request's.
        let options = self.model.options();
        let scored = sampling.prompt_logprobs.map_or(0, |_| options.max_rows.div_ceil(options.max_logit_rows) + 1);
        self.stream_events_max.max(answer + scored)
    }

    fn bring_adapter(&self, submit: &Submit) -> Result<Option<Arc<Resident<B::Adapter>>>, EngineError> {
        let Some(lease) = &submit.lease else { return Ok(None) };
        let load = || {
            let adapter = self.model.load_adapter(&*lease.load()?);
            let adapter = adapter.map_err(|error| EngineError::Adapter(error.to_string()))?;
            let bytes = self.model.backend().adapter_bytes(&adapter);
            Ok((adapter, bytes))
        };
        self.residency.get_or_load(lease.generation(), load).map(Some)
    }
}

impl<B: Backend> Shared for Common<B> {
    fn submit(&self, submit: Submit) -> Result<OutputStream, EngineError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(EngineError::Draining);
        }
        self.check(&submit)?;
        // A place first: a request that the queue has no room for must not cost a load.
        let place = self.commands.try_reserve().map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => {
                let max = self.commands.max_capacity();
                EngineError::QueueFull { waiting: max, max, retry_after: Duration::from_secs(1) }
            }
            mpsc::error::TrySendError::Closed(()) => EngineError::Dead("the step thread ended".into()),
        })?;
        let adapter = self.bring_adapter(&submit)?;
        if self.commands.is_closed() {
            // Sent now, it would hold adapter and lease in a queue that nobody reads.
            return Err(EngineError::Dead("the step thread ended".into()));
        }
        let (sender, events) = mpsc::channel(self.stream_events(&submit.sampling));
        let control = Arc::new(Control::default());
        let incoming = Incoming { submit, adapter, events: sender, control: Arc::clone(&control) };
        place.send(Command::Submit(Box::new(incoming)));
        Ok(OutputStream { events, control, complete: false })
    }

    fn stats(&self) -> EngineStats {
        let mut stats = self.board.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let residency = self.residency.stats();
        stats.adapters_resident = residency.adapters;
        stats.adapter_bytes_resident = residency.bytes;
        stats.adapter_loads_total = residency.loads;
        stats.adapter_evictions_total = residency.evictions;
        stats
    }

    fn describe(&self) -> &str {
        &self.description
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    fn shutdown(&self) {
        self.board.stopping.store(true, Ordering::Release);
        self.drain();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Wakes an idle thread. The queue may be full of places alone, kept for requests whose adapters are being loaded
            // and that may yet fail to send anything.
            while !thread.is_finished() && self.commands.try_send(Command::Wake).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Its panic, if any, was reported through the death notice.
            let _ = thread.join();
        }
    }
}
