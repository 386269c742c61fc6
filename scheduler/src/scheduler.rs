//! The scheduler's doors but one: sequences come in, results come back, sequences go. The step itself is in `step.rs`.

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasherDefault, DefaultHasher};

use openlora_types::{InvalidField, SequenceId, Time, Token};

use crate::memory::Memory;
use crate::prefix_cache::BlockKey;
use crate::queue::{Queue, Ticket};
use crate::residency::State;
use crate::sequence::{NewSequence, Phase, Sequence, Slots};
use crate::step::Chosen;
use crate::{AdapterNeed, SchedulerConfig, SequenceResult, Stats, SubmitError};

/// Between these [`SubmitError::QueueFull`] tells when to retry, in microseconds.
const RETRY_MICROS: std::ops::RangeInclusive<u64> = 10_000..=30_000_000;

/// Decides what each step computes. One instance per engine; see the crate's page for its invariants.
///
/// The engine's loop is [`Scheduler::schedule_into`], run the plan, [`Scheduler::update`]; the update may come one plan late.
/// [`Scheduler::submit`] and [`Scheduler::abort`] may come at any point of it.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) slots: Slots,
    pub(crate) queue: Queue,
    pub(crate) memory: Memory,
    /// Running sequences; ordered by rank during a step.
    pub(crate) running: Vec<u32>,
    /// Plans whose results are to come, and for each of them, oldest first, the sequences that it samples, in its order.
    pub(crate) unanswered: usize,
    pub(crate) awaited: [Vec<SequenceId>; 2],
    pub(crate) deadlines: BTreeSet<(Time, SequenceId)>,
    /// An aged waiting sequence that had its turn and whose adapter was not there or found no place: place and pages are kept
    /// for it.
    pub(crate) reserved: Option<u32>,
    /// Pinned adapters that are absent, in the order of their pins.
    pub(crate) pending_pins: Vec<u32>,
    /// Wanted idle adapters that a load must not evict; filled anew in each step that loads.
    pub(crate) shielded: Vec<u32>,
    /// The waiting sequence for which the last step had too few pages.
    pub(crate) blocked: Option<u32>,
    /// What the step being planned has chosen so far.
    pub(crate) chosen: Vec<Chosen>,
    /// Blocks that the step being planned will fill.
    pub(crate) filling: HashSet<BlockKey, BuildHasherDefault<DefaultHasher>>,
    pub(crate) stats: Stats,
    submissions: u64,
    pace: Pace,
}

impl Scheduler {
    /// An empty scheduler; every page is free.
    ///
    /// # Panics
    /// If [`SchedulerConfig::validate`] refuses `config`.
    #[must_use]
    pub fn new(config: SchedulerConfig) -> Self {
        if let Err(error) = config.validate() {
            panic!("the scheduler's configuration was not validated: {error}");
        }
        Self {
            slots: Slots::default(),
            queue: Queue::new(config.starvation_micros),
            memory: Memory::new(&config),
            running: Vec::with_capacity(config.max_num_seqs),
            unanswered: 0,
            awaited: [0, 1].map(|_| Vec::with_capacity(config.max_num_seqs)),
            deadlines: BTreeSet::new(),
            reserved: None,
            pending_pins: Vec::new(),
            shielded: Vec::new(),
            blocked: None,
            chosen: Vec::with_capacity(config.max_num_seqs),
            filling: HashSet::default(),
            stats: Stats { pages_total: config.num_pages, ..Stats::default() },
            submissions: 0,
            pace: Pace::default(),
            config,
        }
    }

    /// The limits it was made with.
    #[must_use]
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Puts a sequence into the queue.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] for an empty prompt, no tokens to generate, a rate of nothing or an adapter of no pages or of
    /// other pages than before; [`SubmitError::TooLong`] and [`SubmitError::TooManyPages`] for a sequence that would not fit the
    /// pool even alone; [`SubmitError::QueueFull`] above `max_waiting`, [`SubmitError::TenantQueueFull`] above
    /// `max_waiting_per_tenant`; [`SubmitError::DuplicateId`].
    pub fn submit(&mut self, now: Time, new: NewSequence) -> Result<(), SubmitError> {
        self.admissible(now, &new)?;
        let tenant = self.queue.join(&new.tenant);
        self.queue.set_rate(tenant, new.rate, now);
        let adapter = new.adapter.as_ref().map(|need| self.want(need));
        let (priority, order) = (new.priority, self.submissions);
        self.submissions += 1;
        if let Some(deadline) = new.deadline {
            self.deadlines.insert((deadline, new.id));
        }
        let slot = self.slots.insert(|slot| {
            let mut sequence = Sequence::new(new, Ticket { slot, tenant, priority, adapter, order, arrival: now });
            if self.config.prefix_cache {
                sequence.extend_keys(self.config.block_size);
            }
            sequence
        });
        self.queue.submit(self.slots[slot].ticket, now);
        Ok(())
    }

    /// Counts one more waiting sequence of an adapter.
    fn want(&mut self, need: &AdapterNeed) -> u32 {
        let at = self.memory.adapters.know(need);
        self.memory.adapters.change(at, |adapter| {
            adapter.need.load_micros = need.load_micros;
            adapter.waiting += 1;
        });
        match self.memory.adapters[at].state {
            State::Resident => self.stats.adapter_hits_total += 1,
            State::Absent | State::Loading => self.stats.adapter_misses_total += 1,
        }
        at
    }

    fn admissible(&self, now: Time, new: &NewSequence) -> Result<(), SubmitError> {
        if new.prompt.is_empty() {
            return Err(InvalidField::new("prompt", "must have at least one token").into());
        }
        if new.max_tokens == 0 {
            return Err(InvalidField::new("sampling.max_tokens", "must be at least 1").into());
        }
        let (tokens, max) = (new.prompt.len().saturating_add(new.max_tokens as usize), self.config.pool_tokens());
        if tokens > max {
            return Err(SubmitError::TooLong { tokens, max });
        }
        self.fits(tokens, new.adapter.as_ref())?;
        if new.rate.is_some_and(|rate| rate.tokens_per_second == 0 || rate.burst == 0) {
            return Err(InvalidField::new("rate", "must give and hold at least one token").into());
        }
        if self.slots.find(new.id).is_some() {
            return Err(SubmitError::DuplicateId(new.id));
        }
        let (waiting, max) = (self.queue.waiting(), self.config.max_waiting);
        if waiting >= max {
            return Err(SubmitError::QueueFull { waiting, max, retry_after_micros: self.pace.retry_after_micros() });
        }
        let ((waiting, refilled), max) = (self.queue.share(&new.tenant), self.config.max_waiting_per_tenant);
        if waiting >= max {
            let refill = refilled.map_or(0, |at| at.since_micros(now).min(*RETRY_MICROS.end()));
            let retry_after_micros = self.pace.retry_after_micros().max(refill);
            return Err(SubmitError::TenantQueueFull { tenant: new.tenant.clone(), waiting, max, retry_after_micros });
        }
        Ok(())
    }

    /// Whether a sequence could run if it were alone with the pinned adapters.
    fn fits(&self, tokens: usize, adapter: Option<&AdapterNeed>) -> Result<(), SubmitError> {
        let (mut pinned, mut pages) = (self.memory.adapters.totals().pinned_pages, 0);
        if let Some(need) = adapter {
            self.check_need(need)?;
            pages = need.pages;
            let own = self.memory.adapters.find(&need.generation).map(|at| &self.memory.adapters[at]);
            pinned -= own.filter(|adapter| adapter.pinned).map_or(0, |adapter| adapter.need.pages);
        }
        let (blocks, max) = (self.config.blocks_for(tokens), self.config.num_pages);
        if blocks.saturating_add(pages).saturating_add(pinned) > max {
            return Err(SubmitError::TooManyPages { blocks, adapter: pages, pinned, max });
        }
        Ok(())
    }

    pub(crate) fn check_need(&self, need: &AdapterNeed) -> Result<(), InvalidField> {
        if need.pages == 0 {
            return Err(InvalidField::new("adapter.pages", "must be at least 1"));
        }
        let known = self.memory.adapters.find(&need.generation).map(|at| self.memory.adapters[at].need.pages);
        match known {
            Some(pages) if pages != need.pages => {
                let why = format!("is {} and was {pages} before; a generation never changes", need.pages);
                Err(InvalidField::new("adapter.pages", why))
            }
            _ => Ok(()),
        }
    }

    /// Ends a sequence and frees its blocks at once, whatever it was doing; a result that is still on its way for it is
    /// dropped by [`Scheduler::update`]. Returns whether the sequence was live.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        let Some(slot) = self.slots.find(id) else { return false };
        self.end(slot);
        self.stats.aborted_total += 1;
        true
    }

    /// Takes the results of the oldest plan that has had none: one for each sequence that it samples, in its order. Sampled tokens take
    /// their places, finished sequences end. A sequence also ends when it has `max_tokens` generated tokens. Results of sequences that
    /// are not live (aborted since, or ended by an earlier plan's results) may be missing and are dropped. A plan without sequences has
    /// no results to be given.
    ///
    /// # Panics
    /// If a live sequence that samples has no result, a result is for one that does not sample, or every plan has had its results: the
    /// engine ran another plan.
    pub fn update(&mut self, now: Time, results: &[SequenceResult]) {
        assert!(self.unanswered > 0, "update() came with results of no plan");
        let awaited = std::mem::take(&mut self.awaited[0]);
        let mut results = results.iter().peekable();
        for &id in &awaited {
            let result = results.next_if(|result| result.id == id);
            if let Some(slot) = self.slots.find(id) {
                let result = result.unwrap_or_else(|| panic!("{id} was to sample a token and has none"));
                self.learn(slot, result, now);
            }
        }
        if let Some(result) = results.next() {
            panic!("{} has a token that its plan did not sample, or out of the plan's order", result.id);
        }
        self.awaited[0] = awaited;
        self.awaited[0].clear();
        self.awaited.rotate_left(1);
        self.unanswered -= 1;
    }

    /// Puts a token in its place.
    fn learn(&mut self, slot: u32, result: &SequenceResult, now: Time) {
        let sequence = &mut self.slots[slot];
        let at = sequence.known();
        sequence.tokens[at] = result.token;
        sequence.unknown -= 1;
        self.queue.charge(sequence.ticket.tenant, 1, self.config.output_weight, now);
        if self.config.prefix_cache {
            sequence.extend_keys(self.config.block_size);
        }
        sequence.publish(&mut self.memory.pages, self.config.block_size);
        if result.finished || sequence.known() == sequence.tokens_max() {
            self.end(slot);
            self.stats.finished_total += 1;
            self.pace.departure(now);
        }
    }

    /// Frees all that a live sequence holds and forgets it.
    pub(crate) fn end(&mut self, slot: u32) {
        if self.reserved == Some(slot) {
            self.release_reservation();
        }
        let Sequence { phase, ticket, .. } = self.slots[slot];
        match phase {
            Phase::Waiting => {
                self.queue.remove(&ticket);
                if let Some(at) = ticket.adapter {
                    self.memory.adapters.change(at, |adapter| adapter.waiting -= 1);
                }
            }
            Phase::Running => self.finish_rows(slot),
            Phase::Ending => {}
        }
        let sequence = self.slots.remove(slot);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, sequence.id));
        }
        self.queue.leave(sequence.ticket.tenant);
    }

    /// Takes a running sequence's blocks, its lease on its adapter and its deadline, since it has no row to come. Whatever gets its
    /// pages is of a later plan.
    pub(crate) fn finish_rows(&mut self, slot: u32) {
        self.running.retain(|&other| other != slot);
        self.take_blocks(slot, Phase::Ending);
        let sequence = &mut self.slots[slot];
        if let Some(deadline) = sequence.deadline.take() {
            self.deadlines.remove(&(deadline, sequence.id));
        }
        if let Some(at) = sequence.ticket.adapter.take() {
            self.memory.change_use(at, |adapter| adapter.running -= 1);
        }
    }

    /// Puts a running sequence back to waiting: it wants its adapter as a waiting one does.
    pub(crate) fn vacate(&mut self, slot: u32) {
        self.take_blocks(slot, Phase::Waiting);
        if let Some(at) = self.slots[slot].ticket.adapter {
            self.memory.change_use(at, |adapter| {
                adapter.running -= 1;
                adapter.waiting += 1;
            });
        }
    }

    fn take_blocks(&mut self, slot: u32, phase: Phase) {
        let sequence = &mut self.slots[slot];
        self.memory.release_blocks(&mut sequence.blocks);
        sequence.computed = 0;
        sequence.left_out = 0;
        sequence.published = 0;
        sequence.phase = phase;
    }

    /// Prompt and generated tokens of a live sequence; 0 for each of the last ones that plans without results draw.
    #[must_use]
    pub fn tokens(&self, id: SequenceId) -> Option<&[Token]> {
        self.slots.find(id).map(|slot| self.slots[slot].tokens.as_slice())
    }

    /// Whether there is nothing to schedule: no live sequence, and no pinned adapter to load.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.slots.len() == 0 && self.pending_pins.is_empty()
    }

    /// The counters as of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let totals = self.memory.adapters.totals();
        Stats {
            running: self.running.len(),
            waiting: self.queue.waiting(),
            adapters_running: self.memory.adapters.active(),
            adapters_loading: totals.loading,
            adapters_resident: totals.resident,
            adapters_pinned: totals.pinned,
            pages_free: self.memory.pages.blank() + self.memory.pages.cached(),
            pages_cached: self.memory.pages.cached(),
            adapter_pages: totals.pages,
            adapter_pages_idle: totals.idle_pages,
            adapter_evictions_total: self.memory.adapter_evictions,
            ..self.stats
        }
    }
}

/// How fast sequences end: a place in a full queue becomes free when one of the running ones ends.
#[derive(Debug, Default)]
struct Pace {
    last: Time,
    /// Moving average of the time between two ends, weight 1/8.
    interval_micros: u64,
}

impl Pace {
    fn departure(&mut self, now: Time) {
        // An interval longer than the longest retry time was idleness, not work.
        let interval = now.since_micros(self.last).min(*RETRY_MICROS.end());
        self.interval_micros = (self.interval_micros * 7 + interval) / 8;
        self.last = now;
    }

    fn retry_after_micros(&self) -> u64 {
        self.interval_micros.clamp(*RETRY_MICROS.start(), *RETRY_MICROS.end())
    }
}
