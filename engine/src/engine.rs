use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use openlora_adapters::Lease;
use openlora_kernels::{Backend, KernelError};
use openlora_model::{Activations, LoadOptions, Model, ModelError};
use openlora_scheduler::{Scheduler, SchedulerConfig};
use openlora_types::{Generation, InvalidField, SamplingParams};
use tokio::sync::{mpsc, watch};

use crate::handle::{EngineHandle, OutputStream, Submit};
use crate::loader::Loader;
use crate::request::{Command, Control, Incoming, SAMPLES_MAX};
use crate::step::{self, Device, StepThread};
use crate::{EngineConfig, EngineError, EngineStats};

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Gets the device ready, allocates the pool and starts the step thread.
    ///
    /// # Errors
    /// A pool without a page, a limit that cannot work, memory (the key to change is named), or a thread that cannot be started.
    pub fn start<B: Backend>(model: Arc<Model<B>>, config: EngineConfig) -> Result<EngineHandle, EngineError> {
        let backend = model.backend();
        let spec = *model.attention_spec();
        let page_bytes = backend.page_bytes(&spec, model.layers());
        check_start(&config, model.options()).map_err(|error| EngineError::Start(error.to_string()))?;
        let steps = "lower engine.max_num_batched_tokens or engine.max_num_seqs";
        let mut activations = model.new_activations().map_err(no_room(steps))?;
        if backend.is_asynchronous() {
            let entries = table_entries(&config, &model, page_bytes)?;
            model.warm_up(&mut activations, entries).map_err(no_room(steps))?;
        }
        let pool_bytes = pool_bytes(backend, &config)?;
        let pages = pool_bytes / page_bytes;
        if pages == 0 {
            let why = format!(
                "the pool has {pool_bytes} bytes and a page of this model takes {page_bytes}; raise engine.pool_bytes, or \
                 engine.device_memory_percent where that is 0"
            );
            return Err(EngineError::Start(why));
        }
        let scheduler_config = scheduler_config(&config, spec.block_size, (pages, pool_bytes, page_bytes));
        scheduler_config.validate().map_err(|error| EngineError::Start(error.to_string()))?;
        let scheduler = Scheduler::new(scheduler_config);
        let pool = backend.new_pages(&spec, model.layers(), pages).map_err(ModelError::from);
        let mut pool =
            pool.map_err(no_room("lower engine.pool_bytes, or engine.device_memory_percent where that is 0"))?;
        record(&model, &mut activations, config.max_num_seqs, &mut pool)?;
        let stats = EngineStats { pages_total: pages, pages_free: pages, page_bytes, ..EngineStats::default() };
        let board = Arc::new(Board { stats: Mutex::new(stats), ..Board::default() });
        let (commands, incoming) = mpsc::channel(config.waiting_requests_max);
        let (died, death) = watch::channel(None);
        let device = Device { activations, pool, loader: Loader::start(&model, config.max_loading)? };
        let state = StepThread::new(&model, scheduler, device, incoming, Arc::clone(&board), config.tenant_rate);
        let thread = std::thread::Builder::new()
            .name("openlora-step".into())
            .spawn(move || step::run(state, &died))
            .map_err(|error| EngineError::Start(format!("step thread: {error}")))?;
        let common = Common {
            description: backend.describe(),
            draining: AtomicBool::new(false),
            thread: Mutex::new(Some(thread)),
            stream_events_max: config.stream_events_max,
            waiting_requests_max: config.waiting_requests_max,
            sequence_tokens_max: config
                .sequence_tokens_max
                .min(model.options().max_position)
                .min(pages.saturating_mul(spec.block_size)),
            commands,
            board,
            model,
        };
        Ok(EngineHandle { shared: Arc::new(common), death })
    }
}

fn scheduler_config(
    config: &EngineConfig,
    block_size: usize,
    (pages, pool_bytes, page_bytes): (usize, usize, usize),
) -> SchedulerConfig {
    let adapter_bytes = match config.adapter_bytes_per_step {
        0 => pool_bytes / 4,
        bytes => bytes,
    };
    SchedulerConfig {
        block_size,
        num_pages: pages,
        max_num_seqs: config.max_num_seqs,
        kept_places: config.max_num_seqs / 16,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_loras: config.max_loras,
        adapter_pages_per_step: (adapter_bytes / page_bytes).clamp(1, pages),
        max_loading: config.max_loading,
        max_waiting: config.waiting_requests_max,
        max_waiting_per_tenant: config.waiting_requests_per_tenant_max,
        prefix_cache: config.prefix_cache,
        long_prefill_chunk: config.long_prefill_chunk,
        starvation_micros: config.starvation_micros,
        ..SchedulerConfig::default()
    }
}

/// An error of the start; where memory ran out, with what helps.
fn no_room(help: &'static str) -> impl Fn(ModelError) -> EngineError {
    move |error| match error {
        ModelError::Kernel(KernelError::OutOfMemory { .. }) => EngineError::Start(format!("{error}; {help}")),
        error => error.into(),
    }
}

fn pool_bytes<B: Backend>(backend: &B, config: &EngineConfig) -> Result<usize, EngineError> {
    match (config.pool_bytes, backend.memory_free()?) {
        (0, None) => {
            let why = format!("engine.pool_bytes is 0, and {} has no memory of its own to fill", backend.describe());
            Err(EngineError::Start(why))
        }
        (0, Some(free)) => Ok(free / 100 * config.device_memory_percent),
        (bytes, _) => Ok(bytes),
    }
}

/// Entries of all block tables of the largest step that is likely: of as many sequences as may run, each as long as any, or of as many
/// pages as there is memory for. A step of more, whose sequences share pages, makes the backend grow.
fn table_entries<B: Backend>(config: &EngineConfig, model: &Model<B>, page_bytes: usize) -> Result<usize, EngineError> {
    let longest = config.sequence_tokens_max.min(model.options().max_position);
    let sequences = config.max_num_seqs.saturating_mul(longest.div_ceil(model.options().block_size));
    Ok(sequences.min(pool_bytes(model.backend(), config)? / page_bytes))
}

/// Has the passes of decode steps recorded before anybody waits for one.
fn record<B: Backend>(
    model: &Model<B>,
    activations: &mut Activations<B>,
    rows: usize,
    pool: &mut B::Pages,
) -> Result<(), EngineError> {
    if model.backend().recorded_rows(rows).is_empty() {
        return Ok(());
    }
    tracing::info!("recording decode passes of up to {rows} sequences");
    let began = Instant::now();
    let passes = model.record(activations, rows, pool).map_err(no_room("lower engine.device_memory_percent"))?;
    tracing::info!(passes, ms = began.elapsed().as_millis() as u64, "decode passes recorded");
    Ok(())
}

/// What the scheduler does not check of its configuration.
fn check_start(config: &EngineConfig, options: &LoadOptions) -> Result<(), InvalidField> {
    let (events, max) = (config.stream_events_max, u32::MAX as usize);
    if events == 0 || events > max {
        return Err(InvalidField::new("engine.stream_events_max", format!("is {events}; it must be from 1 to {max}")));
    }
    let percent = config.device_memory_percent;
    if percent == 0 || percent > 100 {
        return Err(InvalidField::new(
            "engine.device_memory_percent",
            format!("is {percent}; it must be from 1 to 100"),
        ));
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
    fn set_pinned(&self, leases: Vec<Lease>) -> Result<(), EngineError>;
    fn is_resident(&self, generation: &Generation) -> bool;
    fn stats(&self) -> EngineStats;
    fn describe(&self) -> &str;
    fn drain(&self);
    fn shutdown(&self);
}

/// What the step thread shows and is shown between steps.
#[derive(Default)]
pub(crate) struct Board {
    pub(crate) stats: Mutex<EngineStats>,
    resident: Mutex<HashSet<Generation>>,
    pub(crate) stopping: AtomicBool,
}

impl Board {
    /// The adapters on the device.
    pub(crate) fn residents(&self) -> MutexGuard<'_, HashSet<Generation>> {
        self.resident.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Common<B: Backend> {
    model: Arc<Model<B>>,
    description: String,
    commands: mpsc::Sender<Command>,
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

    /// A place in the step thread's queue.
    fn place(&self) -> Result<mpsc::Permit<'_, Command>, EngineError> {
        self.commands.try_reserve().map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => {
                let max = self.commands.max_capacity();
                EngineError::QueueFull { waiting: max, max, retry_after: Duration::from_secs(1) }
            }
            mpsc::error::TrySendError::Closed(()) => EngineError::Dead("the step thread ended".into()),
        })
    }
}

impl<B: Backend> Shared for Common<B> {
    fn submit(&self, submit: Submit) -> Result<OutputStream, EngineError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(EngineError::Draining);
        }
        self.check(&submit)?;
        let pages = submit.lease.as_ref().map_or(0, |lease| self.model.adapter_pages(lease.sizes()));
        let place = self.place()?;
        let (sender, events) = mpsc::channel(self.stream_events(&submit.sampling));
        let control = Arc::new(Control::default());
        let incoming = Incoming { submit, pages, events: sender, control: Arc::clone(&control) };
        place.send(Command::Submit(Box::new(incoming)));
        Ok(OutputStream { events, control, complete: false })
    }

    fn set_pinned(&self, leases: Vec<Lease>) -> Result<(), EngineError> {
        let sized = leases.into_iter().map(|lease| {
            let pages = self.model.adapter_pages(lease.sizes());
            (lease, pages)
        });
        self.place()?.send(Command::Pin(sized.collect()));
        Ok(())
    }

    fn is_resident(&self, generation: &Generation) -> bool {
        self.board.residents().contains(generation)
    }

    fn stats(&self) -> EngineStats {
        self.board.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
            // Wakes an idle thread.
            while !thread.is_finished() && self.commands.try_send(Command::Wake).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Its panic, if any, was reported through the death notice.
            let _ = thread.join();
        }
    }
}
