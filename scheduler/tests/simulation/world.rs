//! Clients, a clock, a model and a loader around one scheduler, with books of their own to check it against.

mod adapters;
mod rates;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use openlora_scheduler::{
    AdapterNeed, NewSequence, Rate, ScheduledSequence, Scheduler, SchedulerConfig, SequenceResult, StepPlan,
    SubmitError,
};
use openlora_types::{Generation, Priority, SequenceId, TenantId, Time, Token};

use crate::device::Device;
use crate::rng::{Rng, mix};

/// Small, so that prompts often coincide by chance as well.
const VOCAB: u64 = 5;
/// Steps in a row in which a running sequence may have no row.
const LEFT_OUT_MAX: usize = 3;
/// How long the world waits where nothing can run: less than a bucket takes to refill, so that it waits several times.
const IDLE_MICROS: u64 = 100_000;

/// What comes in.
#[derive(Clone, Debug)]
pub(crate) struct Traffic {
    /// Steps with arrivals; then everything still live is served to its end.
    pub(crate) steps: usize,
    pub(crate) tenants: usize,
    /// Adapter names that requests use, besides the base model.
    pub(crate) adapters: usize,
    /// Pages of the largest adapter.
    pub(crate) adapter_pages: usize,
    /// Whether the n-th adapter is named 1/n as often as the first one, or all equally often.
    pub(crate) zipf: bool,
    /// Chance that a load fails.
    pub(crate) load_failures: f64,
    /// Steps that a load takes at most.
    pub(crate) load_steps: usize,
    /// Chance per step that a name gets another generation.
    pub(crate) registrations: f64,
    /// Chance per step that an adapter is pinned or unpinned.
    pub(crate) pins: f64,
    /// Of the tenants, those with a rate.
    pub(crate) rated: usize,
    /// Beginnings that prompts share.
    pub(crate) prefixes: usize,
    /// Requests per step, on average.
    pub(crate) arrivals: f64,
    /// Chance per step, at each of three points, that a live request is aborted.
    pub(crate) aborts: f64,
    /// Share of requests with a deadline.
    pub(crate) deadlines: f64,
    /// Chance per step that the next one is planned before its results come.
    pub(crate) ahead: f64,
    pub(crate) prompt_max: usize,
    pub(crate) answer_max: usize,
}

/// What happened, to make sure that the rare things did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) finished: u64,
    pub(crate) expired: u64,
    pub(crate) refused: u64,
    /// Times that a running sequence got no row.
    pub(crate) left_out: u64,
    pub(crate) aborted_waiting: u64,
    pub(crate) aborted_running: u64,
    pub(crate) aborted_in_flight: u64,
    pub(crate) preempted: u64,
    pub(crate) hits: u64,
    pub(crate) failed: u64,
    pub(crate) loads: u64,
    pub(crate) evictions: u64,
    /// Steps in which a tenant with an empty bucket waited.
    pub(crate) throttled: u64,
    /// Sequences that went on from a token to come, those of them that it ended, and those preempted meanwhile.
    pub(crate) drawn: u64,
    pub(crate) ended_ahead: u64,
    pub(crate) preempted_ahead: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: &Self) {
        self.finished += other.finished;
        self.expired += other.expired;
        self.refused += other.refused;
        self.left_out += other.left_out;
        self.aborted_waiting += other.aborted_waiting;
        self.aborted_running += other.aborted_running;
        self.aborted_in_flight += other.aborted_in_flight;
        self.preempted += other.preempted;
        self.hits += other.hits;
        self.failed += other.failed;
        self.loads += other.loads;
        self.evictions += other.evictions;
        self.throttled += other.throttled;
        self.drawn += other.drawn;
        self.ended_ahead += other.ended_ahead;
        self.preempted_ahead += other.preempted_ahead;
    }
}

/// One request as the world knows it.
struct Request {
    new: NewSequence,
    arrival: Time,
    /// Prompt and what was sampled so far.
    tokens: Vec<Token>,
    /// Leading tokens that the scheduler was told.
    told: usize,
    /// What a correct KV cache holds at each of `tokens`.
    kv: Vec<u64>,
    /// `None` while it waits.
    computed: Option<usize>,
    /// The step in which it was first admitted.
    admission: Option<usize>,
    /// Steps in a row in which it ran and had no row.
    left_out: usize,
}

impl Request {
    fn generation(&self) -> Option<Generation> {
        self.new.adapter.map(|need| need.generation)
    }

    fn tokens_max(&self) -> usize {
        self.new.prompt.len() + self.new.max_tokens as usize
    }

    /// Whether it has rows to come and had some.
    fn runs(&self) -> bool {
        self.computed.is_some() && !self.ends()
    }

    /// Whether its last token is sampled.
    fn ends(&self) -> bool {
        self.tokens.len() == self.tokens_max()
    }

    fn push(&mut self, token: Token) {
        let before = self.kv.last().copied().unwrap_or_else(|| kv_root(&self.new));
        self.tokens.push(token);
        self.kv.push(mix(before ^ mix(u64::from(token) + 1)));
    }

    /// How well it is guarded against preemption.
    fn standing(&self, now: Time, starvation_micros: u64) -> Priority {
        if now.since_micros(self.arrival) >= starvation_micros { Priority::High } else { self.new.priority }
    }
}

/// Keys and values depend on the adapter and on all tokens up to theirs. Tenant and salt are mixed in although a model
/// would not, so that sharing across them shows as well.
fn kv_root(new: &NewSequence) -> u64 {
    let mut hasher = DefaultHasher::new();
    (new.adapter.map(|need| need.generation), &new.tenant, &new.cache_salt).hash(&mut hasher);
    hasher.finish()
}

pub(crate) struct World {
    scheduler: Scheduler,
    config: SchedulerConfig,
    traffic: Traffic,
    rng: Rng,
    now: Time,
    step: usize,
    plan: StepPlan,
    /// What plans have sampled and the scheduler was not told: the device runs each plan at once.
    withheld: VecDeque<Vec<SequenceResult>>,
    live: BTreeMap<SequenceId, Request>,
    device: Device,
    /// What each adapter name means now.
    names: Vec<AdapterNeed>,
    registrations: u64,
    /// Millionths of a token in the bucket of each tenant, and its rate.
    buckets: BTreeMap<TenantId, (Rate, i128)>,
    /// By priority: when a sequence of it was last admitted, or began to wait where none had.
    served: [Time; 3],
    submitted: u64,
    trace: DefaultHasher,
    pub(crate) totals: Totals,
}

impl World {
    pub(crate) fn new(config: SchedulerConfig, traffic: Traffic, rng: Rng) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()),
            device: Device::new(&config, traffic.load_steps),
            names: Vec::new(),
            registrations: 0,
            buckets: BTreeMap::new(),
            config,
            traffic,
            rng,
            now: Time(0),
            step: 0,
            plan: StepPlan::default(),
            withheld: VecDeque::new(),
            live: BTreeMap::new(),
            served: [Time(0); 3],
            submitted: 0,
            trace: DefaultHasher::new(),
            totals: Totals::default(),
        }
    }

    /// A hash of every plan so far.
    pub(crate) fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// Traffic, then silence until all is served. At the end every block is free.
    pub(crate) fn run(&mut self) {
        for _ in 0..self.traffic.adapters {
            let need = self.any_need();
            self.names.push(need);
        }
        for _ in 0..self.traffic.steps {
            let arrivals = self.traffic.arrivals;
            let burst = arrivals as usize + usize::from(self.rng.chance(arrivals.fract()));
            for _ in 0..burst {
                self.submit_any();
            }
            self.one_step();
        }
        // Every step gives a row to the best-ranked sequence, which is never preempted, or waits for a load that brings one
        // nearer to its first, or for a bucket.
        let work: usize = self.live.values().map(Request::tokens_max).sum();
        let bound = 2 * work * (self.traffic.load_steps + 2);
        let last = self.step + bound;
        while !self.live.is_empty() {
            assert!(
                self.step <= last,
                "{} requests are not served {bound} steps after the last arrival",
                self.live.len()
            );
            self.one_step();
        }
        while !self.scheduler.is_idle() || self.device.loading() > 0 {
            assert!(
                self.step <= last + 100 + 2 * self.traffic.load_steps * self.device.pinned.len(),
                "a pin never loads"
            );
            self.one_step();
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.pages_free + stats.adapter_pages, stats.pages_total, "pages leaked");
        let moved = (stats.loads_total, stats.adapter_evictions_total, stats.failed_total);
        assert_eq!(moved, (self.device.loads, self.device.evictions, self.totals.failed), "adapter totals");
        (self.totals.loads, self.totals.evictions) = (self.device.loads, self.device.evictions);
        let counted = (stats.finished_total, stats.expired_total, stats.aborted_total, stats.preemptions_total);
        let Totals { finished, expired, aborted_waiting, aborted_running, aborted_in_flight, preempted, .. } =
            self.totals;
        let aborted = aborted_waiting + aborted_running + aborted_in_flight;
        assert_eq!(counted, (finished, expired, aborted, preempted), "totals");
        assert_eq!(stats.prefix_hits_total, self.totals.hits, "prefix hits");
    }

    fn one_step(&mut self) {
        self.step += 1;
        let micros = self.rng.between(0, 20) as u64;
        self.pass_time(self.now.after_micros(micros));
        self.maybe_abort(false);
        self.maybe_register();
        self.end_loads();

        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.schedule_into(self.now, &mut plan);
        self.check_plan(&plan);
        plan.sequences.iter().for_each(|s| (s.id, s.start, s.rows, s.cached_tokens).hash(&mut self.trace));
        (&plan.block_tables, &plan.preempted, &plan.expired).hash(&mut self.trace);
        (&plan.evicted, &plan.load_pages).hash(&mut self.trace);
        self.scheduler.check_invariants();
        let results = self.compute(&plan);

        // Cancels and arrivals do not wait for the model.
        self.maybe_abort(true);
        if self.step <= self.traffic.steps && self.rng.chance(0.1) {
            self.submit_any();
        }
        self.end_loads();
        self.maybe_abort(true);
        let ran = !plan.sequences.is_empty();
        if ran {
            self.withheld.push_back(results);
        }
        let ahead = usize::from(ran && self.rng.chance(self.traffic.ahead));
        while self.withheld.len() > ahead {
            let mut results = self.withheld.pop_front().expect("there are some");
            // What was drawn for who is gone may be told or not.
            results.retain(|result| self.live.contains_key(&result.id) || self.rng.chance(0.5));
            self.scheduler.update(self.now, &results);
            self.apply(&results);
            self.scheduler.check_invariants();
        }
        self.check_books();
        if plan.sequences.is_empty() && self.device.loading() == 0 && self.step > self.traffic.steps {
            self.pass_time(self.now.after_micros(IDLE_MICROS));
        }
        self.plan = plan;
    }

    // ---- what comes in

    fn submit_any(&mut self) {
        let new = self.any_request();
        let tokens = new.prompt.len() + new.max_tokens as usize;
        let waiting = self.live.values().filter(|request| request.computed.is_none()).count();
        let (pool, max) = (self.config.num_pages * self.config.block_size, self.config.max_waiting);
        let own = new.adapter.map(|need| need.generation);
        let pages = tokens.div_ceil(self.config.block_size)
            + new.adapter.map_or(0, |need| need.pages)
            + self.device.pinned_pages(own.as_ref());
        let fits = pages <= self.config.num_pages;
        let of_tenant = |request: &&Request| request.computed.is_none() && request.new.tenant == new.tenant;
        let share = self.live.values().filter(of_tenant).count();
        let share_left = share < self.config.max_waiting_per_tenant;
        match self.scheduler.submit(self.now, new.clone()) {
            Ok(()) => {
                assert!(fits && waiting < max && share_left, "accepted what must be refused");
                if let Some(rate) = new.rate {
                    let full = (rate, i128::from(rate.burst) * 1_000_000);
                    self.buckets.entry(new.tenant.clone()).or_insert(full);
                }
                let mut request = Request {
                    new,
                    arrival: self.now,
                    tokens: Vec::new(),
                    told: 0,
                    kv: Vec::new(),
                    computed: None,
                    admission: None,
                    left_out: 0,
                };
                request.new.prompt.clone().into_iter().for_each(|token| request.push(token));
                request.told = request.tokens.len();
                self.note_waiting(request.new.priority);
                self.live.insert(request.new.id, request);
            }
            Err(SubmitError::TooLong { .. }) => assert!(tokens > pool, "{tokens} tokens fit a pool of {pool}"),
            Err(SubmitError::TooManyPages { .. }) => assert!(tokens <= pool && !fits, "{pages} pages fit the pool"),
            Err(SubmitError::TenantQueueFull { waiting, .. }) => assert!(waiting == share && !share_left),
            Err(SubmitError::QueueFull { .. }) => assert!(waiting >= max, "the queue has room: {waiting} of {max}"),
            Err(error) => panic!("{error}"),
        }
        self.totals.refused += u64::from(!fits || waiting >= max || !share_left);
    }

    fn any_request(&mut self) -> NewSequence {
        let named = !self.names.is_empty() && self.rng.chance(0.8);
        let adapter = named.then(|| self.any_adapter());
        let rng = &mut self.rng;
        self.submitted += 1;
        let prefix = rng.between(1, self.traffic.prefixes) as u64;
        let shared = rng.between(0, self.traffic.prompt_max);
        let own = rng.between(usize::from(shared == 0), (self.traffic.prompt_max / 4).max(1));
        let shared = (0..shared as u64).map(|i| (mix(mix(prefix) ^ i) % VOCAB) as Token);
        let mut prompt: Vec<_> = shared.collect();
        prompt.extend((0..own).map(|_| (rng.next() % VOCAB) as Token));
        let tenant = rng.between(1, self.traffic.tenants);
        let rate = Rate { tokens_per_second: 200_000 / tenant as u64, burst: 100 };
        NewSequence {
            id: SequenceId(self.submitted),
            tenant: TenantId(format!("tenant {tenant}")),
            rate: (tenant <= self.traffic.rated).then_some(rate),
            adapter,
            cache_salt: if rng.chance(0.1) { "salt".into() } else { String::new() },
            priority: rng.pick(&[Priority::Low, Priority::Normal, Priority::Normal, Priority::High]),
            deadline: rng.chance(self.traffic.deadlines).then(|| self.now.after_micros(rng.between(0, 1_500) as u64)),
            prompt,
            max_tokens: rng.between(1, self.traffic.answer_max) as u32,
            use_prefix_cache: !rng.chance(0.1),
        }
    }

    fn maybe_abort(&mut self, planned: bool) {
        if self.live.is_empty() || !self.rng.chance(self.traffic.aborts) {
            return;
        }
        let nth = self.rng.between(0, self.live.len() - 1);
        let id = *self.live.keys().nth(nth).expect("the index is below the length");
        let request = self.live.remove(&id).expect("it is live");
        match (request.computed, planned) {
            (None, _) => self.totals.aborted_waiting += 1,
            (Some(_), false) => self.totals.aborted_running += 1,
            (Some(_), true) => self.totals.aborted_in_flight += 1,
        }
        assert!(self.scheduler.abort(id), "{id} is not known");
        assert!(!self.scheduler.abort(id), "{id} outlived its abort");
        assert_eq!(self.scheduler.tokens(id), None);
        self.scheduler.check_invariants();
    }

    // ---- what a plan must be

    fn check_plan(&mut self, plan: &StepPlan) {
        self.check_ended(plan);
        self.check_turns(plan);
        self.check_rates(plan);
        let running = self.live.values().filter(|request| request.runs());
        let leased = running.filter_map(Request::generation).collect();
        self.device.follow(plan, &leased, self.step, &mut self.rng);
        assert!(self.device.loading() <= self.config.max_loading, "more adapters are loading than max_loading");
        let mut scheduled = BTreeSet::new();
        let (mut table_end, mut rows) = (0, 0);
        for sequence in &plan.sequences {
            assert!(scheduled.insert(sequence.id), "{} is scheduled twice", sequence.id);
            assert_eq!(sequence.table, table_end, "tables are not back to back");
            table_end += sequence.blocks;
            rows += sequence.rows;
            self.check_rows(sequence, plan.table(sequence));
        }
        assert_eq!((table_end, rows), (plan.block_tables.len(), plan.total_rows), "tables and rows do not add up");
        assert!(rows <= self.config.max_num_batched_tokens, "{rows} rows are more than max_num_batched_tokens");
        assert!(
            plan.sequences.is_sorted_by_key(|sequence| sequence.generation),
            "rows of an adapter are not neighbours"
        );
        let running = self.live.values().filter(|request| request.runs()).count();
        for (id, request) in self.live.iter_mut().filter(|(_, request)| request.runs()) {
            let left_out = !scheduled.contains(id);
            request.left_out = if left_out { request.left_out + 1 } else { 0 };
            assert!(request.left_out <= LEFT_OUT_MAX, "{id} was left out of {} steps in a row", request.left_out);
            self.totals.left_out += u64::from(left_out);
        }
        assert!(running <= self.config.max_num_seqs, "{running} sequences are more than max_num_seqs");
        let generations: BTreeSet<_> = plan.sequences.iter().filter_map(|sequence| sequence.generation).collect();
        assert!(generations.len() <= self.config.max_loras, "{} adapters are more than max_loras", generations.len());
        let pages: usize = generations.iter().map(|generation| self.device.needs[generation].pages).sum();
        let fits = generations.len() <= 1 || pages <= self.config.adapter_pages_per_step;
        assert!(fits, "{pages} pages of adapters are more than adapter_pages_per_step");
        assert!(
            (rows > 0 || self.device.loading() > 0 || !self.withheld.is_empty())
                || self.live.values().all(|request| self.is_throttled(&request.new)),
            "requests are live and nothing is computed or loaded"
        );
    }

    /// Expired and preempted sequences.
    fn check_ended(&mut self, plan: &StepPlan) {
        // What has no row to come is not late.
        let due = |request: &Request| request.new.deadline.is_some_and(|at| at <= self.now) && !request.ends();
        let due: BTreeSet<_> = self.live.iter().filter(|(_, request)| due(request)).map(|(id, _)| *id).collect();
        assert_eq!(due, plan.expired.iter().copied().collect(), "expired are those whose deadline passed");
        for id in due {
            self.live.remove(&id);
            self.totals.expired += 1;
        }
        let (now, starvation) = (self.now, self.config.starvation_micros);
        // Whoever was admitted first of the highest class; a plan does not tell who of one step was first.
        let rank = |request: &Request| {
            let admission = request.admission.filter(|_| request.runs())?;
            request.computed.map(|_| (std::cmp::Reverse(request.standing(now, starvation)), admission))
        };
        let best = self.live.values().filter_map(rank).min();
        let mut kept = self.live.iter().filter(|(id, _)| !plan.preempted.contains(id));
        assert!(
            best.is_none() || kept.any(|(_, request)| rank(request) == best),
            "the best-ranked sequence was preempted"
        );
        for id in &plan.preempted {
            self.note_waiting(self.live.get(id).expect("a preempted sequence is live").new.priority);
            let request = self.live.get_mut(id).expect("a preempted sequence is live");
            assert!(request.runs(), "a preempted sequence runs");
            request.computed = None;
            self.totals.preempted += 1;
            self.totals.preempted_ahead += u64::from(request.told < request.tokens.len());
        }
    }

    /// A priority comes into the queue: where none of it waited, its time until it starves begins.
    fn note_waiting(&mut self, priority: Priority) {
        let waits = |request: &Request| request.computed.is_none() && request.new.priority == priority;
        if !self.live.values().any(waits) {
            self.served[priority as usize] = self.now;
        }
    }

    /// A starved priority has the next turn: nothing of another one is admitted while something of it could be. What could
    /// be for certain is a request that waits for no adapter and no prefix; what must not be is one without an adapter (a
    /// place for an adapter may have been promised in an earlier step).
    fn check_turns(&mut self, plan: &StepPlan) {
        let admitted = |request: &Request| plan.sequences.iter().any(|sequence| sequence.id == request.new.id);
        let waiting: Vec<_> = self.live.values().filter(|request| request.computed.is_none()).collect();
        let starved = |class: usize| self.now.since_micros(self.served[class]) >= self.config.starvation_micros;
        for class in 0..3 {
            let mut of_class = waiting.iter().filter(|request| request.new.priority as usize == class);
            if !starved(class) || of_class.clone().any(|request| admitted(request)) {
                continue;
            }
            let free = |request: &Request| {
                request.new.adapter.is_none() && !request.new.use_prefix_cache && request.new.rate.is_none()
            };
            let passed = of_class.find(|request| free(request));
            let other = waiting.iter().find(|request| {
                admitted(request) && request.new.adapter.is_none() && !starved(request.new.priority as usize)
            });
            if let (Some(passed), Some(other)) = (passed, other) {
                panic!("{} was admitted before {}, whose priority starves", other.new.id, passed.new.id);
            }
        }
        let served: Vec<_> =
            waiting.iter().filter(|request| admitted(request)).map(|request| request.new.priority).collect();
        served.into_iter().for_each(|priority| self.served[priority as usize] = self.now);
    }

    fn check_rows(&mut self, sequence: &ScheduledSequence, table: &[u32]) {
        let (id, alone) = (sequence.id, self.live.len() == 1);
        let request = self.live.get_mut(&id).expect("a scheduled sequence is live");
        let block_size = self.config.block_size;
        if request.computed.is_none() {
            assert_eq!(sequence.cached_tokens % block_size, 0, "{id} found part of a block");
            assert!(sequence.cached_tokens < request.tokens.len(), "{id} has no row to sample from");
            let may_find = self.config.prefix_cache && request.new.use_prefix_cache;
            assert!(may_find || sequence.cached_tokens == 0, "{id} found what it must not use");
            self.totals.hits += sequence.cached_tokens as u64;
            request.computed = Some(sequence.cached_tokens);
            request.admission.get_or_insert(self.step);
        } else {
            assert_eq!(sequence.cached_tokens, 0, "{id} found a prefix while it ran");
        }
        assert_eq!(Some(sequence.start), request.computed, "{id} starts where it stopped");
        assert_eq!(sequence.generation, request.generation(), "{id} runs under its adapter");
        let there = sequence.generation.is_none_or(|generation| self.device.is_resident(&generation));
        assert!(there, "{id} runs without its adapter");
        let end = sequence.start + sequence.rows;
        assert!(sequence.rows > 0 && end <= request.tokens.len(), "{id} has rows {}..{end}", sequence.start);
        assert_eq!(sequence.samples, end == request.tokens.len(), "{id} samples from its last token alone");
        assert_eq!(sequence.drawn, end > request.told, "{id} goes on from a token to come");
        assert!(end <= request.told + 1, "{id} has rows of two tokens to come");
        self.totals.drawn += u64::from(sequence.drawn);
        assert!(alone || sequence.rows <= self.config.long_prefill_chunk, "{id} takes more than long_prefill_chunk");
        assert_eq!(table.len(), end.div_ceil(block_size), "{id} has blocks for {end} tokens");
        let distinct: BTreeSet<_> = table.iter().collect();
        assert_eq!(distinct.len(), table.len(), "{id} lists a block twice");
        assert!(
            table.iter().all(|&block| (block as usize) < self.config.num_pages),
            "{id} lists a block outside the pool"
        );
    }

    // ---- the model

    /// Writes all rows, as a layer does, then reads: each row's whole past must be what its own adapter and tokens wrote.
    fn compute(&mut self, plan: &StepPlan) -> Vec<SequenceResult> {
        let block_size = self.config.block_size;
        let slot = |table: &[u32], at: usize| table[at / block_size] as usize * block_size + at % block_size;
        let mut holders = vec![0_u32; self.config.num_pages];
        plan.block_tables.iter().for_each(|&block| holders[block as usize] += 1);
        for sequence in &plan.sequences {
            let table = plan.table(sequence);
            for at in sequence.start..sequence.start + sequence.rows {
                let block = table[at / block_size] as usize;
                assert_eq!(holders[block], 1, "{} writes into block {block}, which others read", sequence.id);
                self.device.words[slot(table, at)] = self.live[&sequence.id].kv[at];
            }
        }
        let generations: BTreeSet<_> = plan.sequences.iter().filter_map(|sequence| sequence.generation).collect();
        generations.iter().for_each(|generation| self.device.check(generation));
        let mut results = Vec::new();
        for sequence in &plan.sequences {
            let request = self.live.get_mut(&sequence.id).expect("a scheduled sequence is live");
            let table = plan.table(sequence);
            let end = sequence.start + sequence.rows;
            for at in 0..end {
                let read = self.device.words[slot(table, at)];
                assert_eq!(read, request.kv[at], "{} reads foreign or missing KV at position {at}", sequence.id);
            }
            request.computed = Some(end);
            if sequence.samples {
                let draw = mix(request.kv[end - 1]);
                let token = (draw % VOCAB) as Token;
                results.push(SequenceResult { id: sequence.id, token, finished: mix(draw).is_multiple_of(16) });
                request.push(token);
            }
        }
        results
    }

    /// What the scheduler was told.
    fn apply(&mut self, results: &[SequenceResult]) {
        for result in results {
            let Some(request) = self.live.get_mut(&result.id) else { continue };
            request.told += 1;
            if let Some((_, balance)) = self.buckets.get_mut(&request.new.tenant) {
                *balance -= 1_000_000;
            }
            if result.finished || request.told == request.tokens_max() {
                self.totals.ended_ahead += u64::from(request.told < request.tokens.len());
                self.live.remove(&result.id);
                self.totals.finished += 1;
            }
        }
    }

    // ---- the books

    fn check_books(&mut self) {
        let stats = self.scheduler.stats();
        let running = self.live.values().filter(|request| request.runs()).count();
        let waiting = self.live.values().filter(|request| request.computed.is_none()).count();
        assert_eq!((stats.running, stats.waiting), (running, waiting), "running and waiting");
        let adapters = (stats.adapters_loading, stats.adapters_resident, stats.adapters_pinned, stats.adapter_pages);
        let Device { pinned, .. } = &self.device;
        let expected = (self.device.loading(), self.device.resident(), pinned.len(), self.device.pages());
        assert_eq!(adapters, expected, "adapters loading, resident and pinned, and their pages");
        for (id, request) in &self.live {
            let mut tokens = request.tokens.clone();
            tokens[request.told..].fill(0);
            assert_eq!(self.scheduler.tokens(*id), Some(tokens.as_slice()), "tokens of {id}");
        }
    }
}
