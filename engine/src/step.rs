//! The step thread: steps five to seven of a request.
//!
//! One turn of [`StepThread::step`] asks the scheduler for a plan, runs the model over all its rows, draws or scores,
//! tells the readers and tells the scheduler what came of it. In steady state a step allocates nothing (but for the
//! alternatives of requests that ask for some): its buffers live in [`Buffers`] and keep their capacity.
//!
//! On a device that works by itself the next step is planned and enqueued while it is at this one, so that it never waits for this
//! thread. Rows whose tokens this step draws take them on the device:
//!
//! ```text
//! device          step n                                     | step n + 1
//! step thread   … plan n + 1, enqueue n + 1, wait for n's tokens | attend: send n, take in | plan n + 2, enqueue n + 2, …
//! ```
//!
//! A sample that ends with n's token then has a row in n + 1 for nothing. Where a draw depends on which tokens came before it
//! (penalties), the step behind it is planned when they are known. On the CPU, whose step is over when it is enqueued, tokens go out at
//! once.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use openlora_adapters::Lease;
use openlora_kernels::{Backend, LoraRows, LoraSegment, StepRows};
use openlora_model::{Activations, Model, ModelError};
use openlora_scheduler::{AdapterNeed, NewSequence, Rate, Scheduler, StepPlan, SubmitError};
use openlora_types::{FinishReason, Generation, InvalidField, SamplingParams, SequenceId, Time, Token, Usage};
use tokio::sync::{mpsc, watch};

use self::readers::{Unsent, fail_reader};
use self::rows::{Buffers, LogitRow, adapter, merge, recycle, row_segments};
use crate::engine::Board;
use crate::handle::Event;
use crate::loader::{Loaded, Loader};
use crate::request::{Command, Control, Incoming};
use crate::{EngineError, EngineStats};

/// How long the step thread waits when it can do nothing: what may come (a request, a cancellation, a load) is then looked for.
const PAUSE: Duration = Duration::from_millis(1);
/// What a page is taken to cost to load before any load was timed.
const FIRST_PAGE_MICROS: u64 = 1_000;

/// What of the device the step thread has to itself, but for `loader`'s loads under way.
pub(crate) struct Device<B: Backend> {
    pub(crate) activations: Activations<B>,
    pub(crate) pool: B::Pages,
    pub(crate) loader: Loader<B>,
}

/// What only the step thread touches.
pub(crate) struct StepThread<B: Backend> {
    model: Arc<Model<B>>,
    /// Whether the device works while this thread does something else.
    overlaps: bool,
    scheduler: Scheduler,
    pool: B::Pages,
    /// The adapters on the device, as the scheduler has it.
    resident: HashMap<Generation, B::Adapter>,
    loader: Loader<B>,
    /// Loads under way.
    loading: usize,
    /// Leases of the adapters that are to stay, which no request may hold.
    pinned: HashMap<Generation, Lease>,
    tenant_rate: Option<Rate>,
    activations: Activations<B>,
    incoming: mpsc::Receiver<Command>,
    board: Arc<Board>,
    started: Instant,
    requests: HashMap<RequestKey, Request>,
    sequences: HashMap<SequenceId, Sequence>,
    next_key: u64,
    plan: StepPlan,
    buffers: Buffers,
    /// Steps that are enqueued and whose results are not collected, the older one first: at most two, and one between turns.
    enqueued: VecDeque<Enqueued>,
    /// What steps have made and readers have not been sent yet: at most one step's.
    unsent: Vec<Unsent>,
    totals: Totals,
    /// Why the device cannot be used any more, where a load has found out.
    lost: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RequestKey(u64);

struct Request {
    control: Arc<Control>,
    events: mpsc::Sender<Event>,
    params: SamplingParams,
    /// Held for as long as the request lives: its adapter may have to be loaded again.
    lease: Option<Lease>,
    prompt_tokens: usize,
    /// Prompt positions scored so far; recomputation after preemption does not score them again.
    scored: usize,
    samples: Vec<SequenceId>,
    open_samples: usize,
    usage: Usage,
    /// End-of-sequence (unless ignored) and stop tokens: what ends a sample, and what is banned before `min_tokens`.
    stops: Vec<Token>,
}

impl Request {
    /// Lets go of the lease; what is left to tell the reader goes to the result. In this order, so that who reads the
    /// last event finds everything free.
    fn release(self) -> (mpsc::Sender<Event>, Arc<Control>) {
        (self.events, self.control)
    }
}

struct Sequence {
    request: RequestKey,
    index: u32,
    /// Whether it has had rows; recomputation after preemption finds its own blocks in the prefix cache.
    started: bool,
    /// Tokens that were drawn and collected.
    generated: usize,
    /// Its row in the sampling of the last step in which it drew, where that was not in parts.
    sample_row: u32,
}

/// A step whose results are to be collected.
struct Enqueued {
    /// What they are of.
    rows: Vec<LogitRow>,
    /// Whether the next step can be enqueued before they are known.
    can_be_outrun: bool,
}

#[derive(Default)]
struct Totals {
    steps: u64,
    load_micros: u64,
    loaded_pages: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
    step_micros: u64,
}

/// Runs steps until told to stop. Whatever ends it, panics included, is told to everyone who waits: readers through
/// their channels, the server through the death notice.
pub(crate) fn run<B: Backend>(mut state: StepThread<B>, died: &watch::Sender<Option<String>>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let outcome = state.run().and_then(|()| state.collect_all().map_err(|error| error.to_string()));
        // What was made before is the readers'.
        state.send_results();
        outcome
    }));
    let reason = match outcome {
        Ok(Ok(())) => "it was shut down".to_owned(),
        Ok(Err(reason)) => reason,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            format!("the step thread panicked: {text}")
        }
    };
    tracing::info!(reason, "the engine has stopped");
    // The notice first, so that a reader who is told finds the engine dead.
    died.send_replace(Some(reason.clone()));
    state.fail_everything(&EngineError::Dead(reason));
}

impl<B: Backend> StepThread<B> {
    pub(crate) fn new(
        model: &Arc<Model<B>>,
        scheduler: Scheduler,
        Device { activations, pool, loader }: Device<B>,
        incoming: mpsc::Receiver<Command>,
        board: Arc<Board>,
        tenant_rate: Option<Rate>,
    ) -> Self {
        Self {
            activations,
            model: Arc::clone(model),
            overlaps: model.backend().is_asynchronous(),
            scheduler,
            pool,
            resident: HashMap::new(),
            loader,
            loading: 0,
            pinned: HashMap::new(),
            tenant_rate,
            incoming,
            board,
            started: Instant::now(),
            requests: HashMap::new(),
            sequences: HashMap::new(),
            next_key: 0,
            plan: StepPlan::default(),
            buffers: Buffers::default(),
            enqueued: VecDeque::with_capacity(2),
            unsent: Vec::new(),
            totals: Totals::default(),
            lost: None,
        }
    }

    fn run(&mut self) -> Result<(), String> {
        loop {
            if let Some(reason) = self.lost.take() {
                return Err(reason);
            }
            // Where a step's tokens are not sent yet, the next step comes first: they are sent while the device is at it.
            if self.unsent.is_empty() {
                if !self.receive() {
                    return Ok(());
                }
                self.attend();
            }
            if self.board.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            let began = Instant::now();
            let worked = self.step().map_err(|error| error.to_string())?;
            self.totals.step_micros += began.elapsed().as_micros() as u64;
            if !worked || !self.overlaps {
                self.send_results();
                self.publish();
            }
            if !worked && !self.has_nothing_to_do() {
                // Nothing could be scheduled though there is something to do: it waits for a load, for time to pass (a
                // deadline, a tenant's rate) or for another request.
                if let Some(loaded) = self.loader.wait(PAUSE) {
                    self.settle(loaded);
                    self.publish();
                }
            }
        }
    }

    fn has_nothing_to_do(&self) -> bool {
        self.loading == 0 && self.scheduler.is_idle() && self.enqueued.is_empty()
    }

    /// Waits for a command where there is nothing else to do. False when all handles are gone.
    fn receive(&mut self) -> bool {
        if self.has_nothing_to_do() {
            match self.incoming.blocking_recv() {
                Some(command) => self.obey(command),
                None => return false,
            }
        }
        true
    }

    /// Everything that depends on no step under way: tells readers what was made before, takes in commands, loads that have ended and
    /// cancellations.
    fn attend(&mut self) {
        self.send_results();
        while let Ok(command) = self.incoming.try_recv() {
            self.obey(command);
        }
        while let Some(loaded) = self.loader.poll() {
            self.settle(loaded);
        }
        self.reap();
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(incoming) => self.admit(*incoming),
            Command::Pin(wanted) => self.pin(wanted),
            Command::Wake => {}
        }
    }

    fn pin(&mut self, wanted: Vec<(Lease, usize)>) {
        // Loads under way have leases of their own.
        for (generation, _) in std::mem::take(&mut self.pinned) {
            if wanted.iter().all(|(lease, _)| lease.generation() != generation) {
                self.scheduler.unpin(generation);
            }
        }
        for (lease, pages) in wanted {
            let generation = lease.generation();
            match self.scheduler.pin(self.need(generation, pages)) {
                Ok(()) => drop(self.pinned.insert(generation, lease)),
                Err(error) => tracing::warn!(%generation, %error, "an adapter is not pinned to the device"),
            }
        }
    }

    /// What the scheduler is told of an adapter: its pages, and how long the loads so far took for as many.
    fn need(&self, generation: Generation, pages: usize) -> AdapterNeed {
        let page_micros = self.totals.load_micros.checked_div(self.totals.loaded_pages).unwrap_or(FIRST_PAGE_MICROS);
        AdapterNeed { generation, pages, load_micros: page_micros.saturating_mul(pages as u64).max(1) }
    }

    /// Drops the adapters that the plan evicts and begins its loads.
    fn move_adapters(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        for generation in &plan.evicted {
            self.resident.remove(generation);
            self.board.residents().remove(generation);
        }
        for load in &plan.loads {
            let pages = self.model.backend().take_pages(&mut self.pool, plan.pages(load))?;
            let is_for = |lease: &&Lease| lease.generation() == load.generation;
            let mut leases = self.requests.values().filter_map(|request| request.lease.as_ref());
            let lease = leases.find(is_for).or_else(|| self.pinned.get(&load.generation));
            let lease = lease.expect("a load is for a waiting request or a pin").clone();
            self.loader.begin(lease, pages, load.pages.len());
            self.loading += 1;
        }
        Ok(())
    }

    /// A load has ended.
    fn settle(&mut self, loaded: Loaded<B::Adapter>) {
        let Loaded { generation, result, pages, micros } = loaded;
        self.loading -= 1;
        self.totals.load_micros += micros;
        self.totals.loaded_pages += pages as u64;
        match result {
            Ok(adapter) => {
                self.resident.insert(generation, adapter);
                self.board.residents().insert(generation);
                self.scheduler.adapter_loaded(generation);
            }
            Err(EngineError::Dead(reason)) => self.lost = Some(reason),
            Err(error) => {
                tracing::warn!(%generation, %error, "an adapter could not be loaded");
                self.pinned.remove(&generation);
                for id in self.scheduler.adapter_failed(generation) {
                    if let Some(sequence) = self.sequences.get(&id) {
                        self.fail(sequence.request, error.clone());
                    }
                }
            }
        }
    }

    fn now(&self) -> Time {
        self.time(Instant::now())
    }

    fn time(&self, instant: Instant) -> Time {
        Time(instant.saturating_duration_since(self.started).as_micros() as u64)
    }

    /// Hands a request to the scheduler: one sequence per sample. All of them or none.
    fn admit(&mut self, incoming: Incoming) {
        let Incoming { submit, pages, events, control } = incoming;
        let now = self.now();
        let key = RequestKey(self.next_key);
        let params = submit.sampling;
        let adapter = submit.lease.as_ref().map(|lease| self.need(lease.generation(), pages));
        let mut samples = Vec::with_capacity(params.n as usize);
        for index in 0..params.n {
            let id = SequenceId(self.next_key);
            self.next_key += 1;
            let new = NewSequence {
                id,
                tenant: submit.tenant.clone(),
                rate: self.tenant_rate,
                adapter,
                cache_salt: submit.cache_salt.clone(),
                priority: submit.priority,
                deadline: submit.deadline.map(|deadline| self.time(deadline)),
                prompt: submit.prompt.clone(),
                max_tokens: params.max_tokens,
                // A prompt to be scored must be computed, not found.
                use_prefix_cache: params.prompt_logprobs.is_none() || index > 0,
            };
            if let Err(error) = self.scheduler.submit(now, new) {
                for id in samples {
                    self.scheduler.abort(id);
                    self.sequences.remove(&id);
                }
                drop(submit.lease);
                fail_reader(&events, &control, refusal(error));
                return;
            }
            samples.push(id);
            let sequence = Sequence { request: key, index, started: false, generated: 0, sample_row: 0 };
            self.sequences.insert(id, sequence);
        }
        let mut stops = params.stop_tokens.clone();
        if !params.ignore_eos {
            stops.extend_from_slice(&self.model.config().eos_tokens);
        }
        let prompt_tokens = submit.prompt.len();
        let request = Request {
            control,
            events,
            lease: submit.lease,
            prompt_tokens,
            scored: 0,
            open_samples: samples.len(),
            samples,
            usage: Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() },
            stops,
            params,
        };
        self.requests.insert(key, request);
    }

    /// Ends what readers no longer want.
    fn reap(&mut self) {
        let mut gone = std::mem::take(&mut self.buffers.gone);
        for (&key, request) in &self.requests {
            let control = &request.control;
            if control.cancelled.load(Ordering::Acquire) || control.stopped.load(Ordering::Acquire) != 0 {
                gone.push(key);
            }
        }
        for key in gone.drain(..) {
            let control = Arc::clone(&self.requests[&key].control);
            if control.cancelled.load(Ordering::Acquire) {
                self.remove(key);
                continue;
            }
            let stopped = control.stopped.swap(0, Ordering::AcqRel);
            let samples = self.requests[&key].samples.clone();
            for (index, id) in samples.into_iter().enumerate() {
                if stopped & (1 << index) != 0 && self.sequences.contains_key(&id) {
                    self.scheduler.abort(id);
                    self.finish(id, FinishReason::Stop);
                }
            }
        }
        self.buffers.gone = gone;
    }

    /// One turn: enqueues the next step and collects the one before it. False when there was neither.
    fn step(&mut self) -> Result<bool, ModelError> {
        if self.enqueued.iter().any(|step| !step.can_be_outrun) {
            self.collect_all()?;
        }
        let now = self.now();
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.schedule_into(now, &mut plan);
        for id in plan.expired.drain(..) {
            if let Some(sequence) = self.sequences.get(&id) {
                self.unsent.push(Unsent::Expired { key: sequence.request });
            }
        }
        self.move_adapters(&plan)?;
        let worked = !plan.sequences.is_empty();
        if worked {
            self.enqueue(&plan)?;
            self.totals.steps += 1;
        }
        self.plan = plan;
        if !worked || !self.overlaps {
            let collected = !self.enqueued.is_empty();
            self.collect_all()?;
            return Ok(worked || collected);
        }
        while self.enqueued.len() > 1 {
            self.collect()?;
        }
        self.attend();
        self.publish();
        Ok(true)
    }

    /// Step six: rows, forward, head, sampler.
    fn enqueue(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        let mut buffers = std::mem::take(&mut self.buffers);
        self.lay_out(plan, &mut buffers);
        let rows = StepRows {
            tokens: &buffers.tokens,
            drawn: &buffers.drawn,
            positions: &buffers.positions,
            sequences: &buffers.rows,
            block_tables: &plan.block_tables,
        };
        let mut segments = recycle(std::mem::take(&mut buffers.segments));
        segments.extend(plan.sequences.iter().zip(&buffers.rows).map(|(planned, rows)| LoraSegment {
            row: rows.row,
            rows: rows.rows,
            adapter: adapter(&self.resident, planned),
        }));
        merge(&mut segments);
        let mut wanted_segments = recycle(std::mem::take(&mut buffers.wanted_segments));
        let of = |planned: usize| adapter(&self.resident, &plan.sequences[planned]);
        row_segments(&buffers.logits, of, &mut wanted_segments);
        let (lora, wanted_lora) = (LoraRows { segments: &segments }, LoraRows { segments: &wanted_segments });
        let wanted = (buffers.wanted.as_slice(), &wanted_lora);
        self.model.forward(&mut self.activations, &rows, &lora, wanted, &mut self.pool)?;
        buffers.segments = recycle(segments);
        buffers.wanted_segments = recycle(wanted_segments);

        let rows = std::mem::take(&mut buffers.logits);
        if rows.len() > self.model.options().max_logit_rows {
            self.buffers = buffers;
            return self.sample_in_parts(plan, rows);
        }
        // Also where nothing is drawn (parts of long prompts), so that there is something to wait for: who comes meanwhile is to have a
        // row in the step after the next, not behind all that is left of a prompt.
        self.sample(plan, &rows, &mut buffers)?;
        self.buffers = buffers;
        let looks_back = |row: &LogitRow| {
            row.score.is_none() && self.requests[&self.sequences[&row.id].request].params.has_penalties()
        };
        let can_be_outrun = self.overlaps && !rows.iter().any(looks_back);
        self.enqueued.push_back(Enqueued { rows, can_be_outrun });
        Ok(())
    }

    /// Logits of more rows than there is room for at once (scored prompts): part by part, each collected before the next.
    fn sample_in_parts(&mut self, plan: &StepPlan, rows: Vec<LogitRow>) -> Result<(), ModelError> {
        let mut part = std::mem::take(&mut self.buffers.part);
        let mut results = Vec::new();
        for some in rows.chunks(self.model.options().max_logit_rows) {
            // A request may be gone since an earlier part: its reader fell behind.
            part.clear();
            part.extend(some.iter().filter(|wanted| self.sequences.contains_key(&wanted.id)));
            if part.is_empty() {
                continue;
            }
            let mut buffers = std::mem::take(&mut self.buffers);
            self.sample(plan, &part, &mut buffers)?;
            self.buffers = buffers;
            self.collect_all()?;
            if self.overlaps {
                self.attend();
                self.publish();
            }
            self.take_samples(&part)?;
            results.append(&mut self.buffers.results);
            if !self.overlaps {
                self.send_results();
            }
        }
        self.scheduler.update(self.now(), &results);
        (self.buffers.part, self.buffers.logits) = (part, rows);
        Ok(())
    }

    /// Collects all steps that are enqueued.
    fn collect_all(&mut self) -> Result<(), ModelError> {
        while !self.enqueued.is_empty() {
            self.collect()?;
        }
        Ok(())
    }

    /// Waits for the older of the steps that are enqueued, and tells the scheduler what came of it.
    fn collect(&mut self) -> Result<(), ModelError> {
        let Some(Enqueued { rows, .. }) = self.enqueued.pop_front() else { return Ok(()) };
        self.take_samples(&rows)?;
        self.scheduler.update(self.now(), &self.buffers.results);
        self.buffers.logits = rows;
        Ok(())
    }

    /// Waits for the oldest sampling, which was of `rows`: step seven but for the sending.
    fn take_samples(&mut self, rows: &[LogitRow]) -> Result<(), ModelError> {
        let mut buffers = std::mem::take(&mut self.buffers);
        buffers.results.clear();
        self.model.backend().collect_sample(&mut buffers.sampled)?;
        self.conclude(rows, &mut buffers);
        self.buffers = buffers;
        Ok(())
    }

    fn publish(&self) {
        let stats = self.scheduler.stats();
        let mut board = self.board.stats.lock().unwrap_or_else(PoisonError::into_inner);
        *board = EngineStats {
            running: stats.running,
            waiting: stats.waiting,
            pages_total: stats.pages_total,
            pages_free: stats.pages_free,
            pages_cached: stats.pages_cached,
            page_bytes: board.page_bytes,
            adapters_resident: stats.adapters_resident,
            adapters_loading: stats.adapters_loading,
            adapters_pinned: stats.adapters_pinned,
            adapter_pages: stats.adapter_pages,
            adapter_loads_total: stats.loads_total,
            adapter_load_failures_total: stats.load_failures_total,
            adapter_load_micros_total: self.totals.load_micros,
            adapter_evictions_total: stats.adapter_evictions_total,
            adapter_hits_total: stats.adapter_hits_total,
            adapter_misses_total: stats.adapter_misses_total,
            steps_total: self.totals.steps,
            prompt_tokens_total: self.totals.prompt_tokens,
            generation_tokens_total: self.totals.generation_tokens,
            preemptions_total: stats.preemptions_total,
            prefix_queries_total: stats.prefix_queries_total,
            prefix_hits_total: stats.prefix_hits_total,
            step_micros_total: self.totals.step_micros,
        };
    }
}

fn refusal(error: SubmitError) -> EngineError {
    match error {
        SubmitError::QueueFull { waiting, max, retry_after_micros } => {
            EngineError::QueueFull { waiting, max, retry_after: Duration::from_micros(retry_after_micros) }
        }
        SubmitError::Invalid(field) => EngineError::Invalid(field),
        SubmitError::TenantQueueFull { waiting, max, retry_after_micros, .. } => {
            EngineError::TenantQueueFull { waiting, max, retry_after: Duration::from_micros(retry_after_micros) }
        }
        other => EngineError::Invalid(InvalidField::new("sampling.max_tokens", format!("cannot be served: {other}"))),
    }
}

#[cfg(test)]
mod allocation_tests;
mod readers;
mod rows;
