//! One step: what is computed next, for whom, into which blocks.
//!
//! 1. Sequences past their deadline end.
//! 2. Running sequences, best rank first, get rows: all that they miss, within the chunk bound, and always leaving one row
//!    for each sequence behind them. Where pages run out, cached blocks and idle adapters are evicted, and when there are none,
//!    the worst-ranked sequence is preempted: its blocks and its lease on its adapter go together.
//! 3. Waiting sequences are admitted in the queue's order while rows, places, adapters and pages allow.
//! 4. Adapters that waiting sequences want begin to load (`loading.rs`).
//!
//! **Tenants below their share** run fewer sequences than there are places for each tenant. The last `kept_places` of the batch
//! are for them, and their prompts have rows before all others: where `max_num_batched_tokens` is not enough for everybody,
//! others are left out of a step, none more than three times in a row. Whoever sends little waits for the next step, which is no
//! longer than any, and not for the backlog of whoever sends much. That decides when they are served; how much each gets is
//! still the queue's to say.
//!
//! **Adapters are a cost.** The more distinct ones a step has, the more it reads besides the model: `max_loras` bounds how
//! many run at once and `adapter_pages_per_step` how large they are together. Where more wait than can be admitted, a
//! sequence whose adapter is active goes before one of the same tenant and class that would bring another adapter, until
//! that one has aged: steps get fewer adapters, and no tenant and no class gets less than fairness gives it.

use openlora_types::Time;

use crate::queue::Ticket;
use crate::residency::AdapterLimits;
use crate::sequence::{Phase, Sequence, UNKNOWN, rank};
use crate::{ScheduledSequence, Scheduler, SchedulerConfig, StepPlan};

/// Steps in a row in which a running sequence may be left out.
const LEFT_OUT_MAX: u8 = 3;

/// Rows granted to one sequence in the step being planned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    slot: u32,
    rows: usize,
    cached_tokens: usize,
    /// Sorts the plan: the adapter's place among the active ones, then the order of choice.
    adapter: usize,
    order: usize,
}

/// What a step has left to give.
pub(crate) struct Room {
    /// Rows.
    rows: usize,
    /// Rows that one sequence may take.
    chunk: usize,
    /// Of those, rows for the waiting sequence of a tenant below its share, and for running ones of such tenants.
    kept: usize,
    kept_running: usize,
    /// Where rows are kept: running sequences without a row yet that must have one.
    owed: usize,
    /// Blocks that running sequences will want soon: the rest of their prompts, and one more to grow into.
    /// Admission leaves these alone, so that it is not at once undone by preemption.
    pub(crate) promised: usize,
    /// The waiting sequence that had its turn and found too few pages, which ended admission.
    pub(crate) blocked: Option<u32>,
}

/// The cached beginning of a waiting sequence.
struct Prefix {
    /// Leading blocks found.
    blocks: usize,
    /// Of those, blocks that running sequences hold, so that sharing them takes no free block.
    held: usize,
}

impl Scheduler {
    /// [`Scheduler::schedule_into`] a new plan.
    pub fn schedule(&mut self, now: Time) -> StepPlan {
        let mut plan = StepPlan::default();
        self.schedule_into(now, &mut plan);
        plan
    }

    /// Plans the next step into `plan`, whose buffers are reused: once they have grown, a step in which nothing is admitted or
    /// loaded does not allocate. A plan without sequences means that there is nothing to compute before something comes, results
    /// come, a load ends or time passes.
    ///
    /// A plan takes the ones before it as done: whoever runs plans runs them in this order, each whole (rows of sequences aborted since
    /// too, in whose blocks others find them) before what a later one moves or writes. So this may be called when the last plan's
    /// tokens are not known yet, and sequences go on from tokens to come ([`ScheduledSequence::drawn`]).
    ///
    /// # Panics
    /// If the results of the plan before the last one were not given to [`Scheduler::update`].
    pub fn schedule_into(&mut self, now: Time, plan: &mut StepPlan) {
        assert!(
            self.unanswered < self.awaited.len(),
            "schedule() came before update() with results of the plan before the last"
        );
        plan.clear();
        self.chosen.clear();
        self.filling.clear();
        self.queue.refill(now);
        self.expire(now, plan);

        let alone = self.slots.len() == 1;
        let rows = self.config.max_num_batched_tokens;
        let chunk = if alone { rows } else { self.config.long_prefill_chunk };
        let mut room = Room { rows, chunk, kept: 0, kept_running: 0, owed: 0, promised: 0, blocked: None };
        let (slots, starvation) = (&self.slots, self.config.starvation_micros);
        // Already in order but for those that aged since the last step; pattern-defeating sorts notice in one pass.
        self.running.sort_unstable_by_key(|&slot| rank(&slots[slot], now, starvation));
        self.keep_rows(&mut room);
        self.schedule_running(now, &mut room, plan);
        // What was just taken from a running sequence is not given to a waiting one.
        if plan.preempted.is_empty() {
            self.admit(now, &mut room, plan);
            self.start_loads(now, &room, plan);
        }
        self.blocked = room.blocked;
        self.write(plan);
        self.take_as_done(plan);
    }

    fn expire(&mut self, now: Time, plan: &mut StepPlan) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            let slot = self.slots.find(id).expect("only live sequences have deadlines");
            self.end(slot);
            self.stats.expired_total += 1;
            plan.expired.push(id);
        }
    }

    fn schedule_running(&mut self, now: Time, room: &mut Room, plan: &mut StepPlan) {
        let mut at = 0;
        while at < self.running.len() {
            let slot = self.running[at];
            let rows = self.rows_of(at, room);
            let sequence = &self.slots[slot];
            let wanted = self.config.blocks_for(sequence.computed + rows) - sequence.blocks.len();
            // Whoever is preempted stands behind this one and has no rows yet, or is this one itself.
            while self.memory.available() < wanted && self.running.len() > at {
                if self.running.len() == 1 && self.reserved.is_some() {
                    // The best-ranked sequence, alone: only the starved one's adapter can be in its way.
                    self.release_reservation();
                } else {
                    self.preempt(now, plan);
                    room.owed = room.owed.min(self.owed(self.running.len().min(at + 1)));
                }
            }
            if at < self.running.len() {
                let left_out = &mut self.slots[slot].left_out;
                *left_out = if rows == 0 { *left_out + 1 } else { 0 };
                if rows > 0 {
                    self.choose(slot, rows, 0, room, plan);
                }
                self.promise(slot, room);
                at += 1;
            }
        }
    }

    /// Rows of a running sequence: what it misses, within the chunk, leaving one for each behind it. Where rows are kept, those
    /// that are owed some have at least one, and of others the last may get none.
    fn rows_of(&self, at: usize, room: &mut Room) -> usize {
        let sequence = &self.slots[self.running[at]];
        let missing = (sequence.tokens.len() - sequence.computed).min(room.chunk);
        let behind = self.running.len() - at - 1;
        if room.kept + room.kept_running + room.owed == 0 && room.rows > behind {
            return missing.min(room.rows - behind);
        }
        room.owed -= usize::from(sequence.owed);
        let left = room.rows.saturating_sub(room.owed + room.kept);
        if sequence.below_share {
            let rows = missing.min(left.max(1));
            room.kept_running = room.kept_running.saturating_sub(rows - 1);
            return rows;
        }
        let left = left.saturating_sub(room.kept_running);
        missing.min(left.saturating_sub(behind - room.owed).max(1)).min(left.max(usize::from(sequence.owed)))
    }

    /// Keeps rows for prompts of tenants below their share: the next one that waits and could run, and those that run. All these
    /// must have a row, the best-ranked one, and whoever was left out often enough.
    fn keep_rows(&mut self, room: &mut Room) {
        let places = self.config.max_num_seqs;
        if !self.queue.is_shared() {
            return;
        }
        for (at, &slot) in self.running.iter().enumerate() {
            let sequence = &mut self.slots[slot];
            sequence.below_share = self.queue.is_below_share(sequence.ticket.tenant, places);
            sequence.owed = at == 0 || sequence.below_share || sequence.left_out == LEFT_OUT_MAX;
            if sequence.below_share {
                room.kept_running += (sequence.tokens.len() - sequence.computed).min(room.chunk) - 1;
            }
        }
        if self.running.len() < places {
            let limits = self.adapter_limits();
            let could_run = |ticket: &Ticket| self.blocked != Some(ticket.slot) && self.can_run(ticket, &limits);
            let next = self.queue.first_below_share(places, could_run);
            room.kept = next.map_or(0, |ticket| self.slots[ticket.slot].tokens.len().min(room.chunk));
        }
        if room.kept + room.kept_running > 0 {
            room.owed = self.owed(0);
            let most = self.config.max_num_batched_tokens - room.owed.max(1);
            room.kept = room.kept.min(most);
            room.kept_running = room.kept_running.min(most - room.kept);
        }
    }

    /// Running sequences from a place on that must have a row.
    fn owed(&self, at: usize) -> usize {
        self.running[at..].iter().filter(|&&slot| self.slots[slot].owed).count()
    }

    /// Puts the worst-ranked running sequence back to waiting. It keeps its tokens; its full blocks stay in the prefix cache
    /// until somebody needs the room, so that it may find them again.
    fn preempt(&mut self, now: Time, plan: &mut StepPlan) {
        let slot = self.running.pop().expect("preemption stops at the sequence that wants blocks");
        self.vacate(slot);
        let sequence = &self.slots[slot];
        self.queue.insert(sequence.ticket, now);
        self.stats.preemptions_total += 1;
        plan.preempted.push(sequence.id);
    }

    /// Gives a running sequence its rows and the blocks for them.
    fn choose(&mut self, slot: u32, rows: usize, cached_tokens: usize, room: &mut Room, plan: &mut StepPlan) {
        let sequence = &mut self.slots[slot];
        let end = sequence.computed + rows;
        while sequence.blocks.len() < self.config.blocks_for(end) {
            sequence.blocks.push(self.memory.allocate_block(&mut plan.evicted));
        }
        room.rows -= rows;
        if self.queue.waiting() > 0 {
            let full = self.config.block_size;
            let filled = sequence.published..sequence.keys.len().min(end / full);
            self.filling.extend(sequence.keys[filled].iter().copied());
        }
        let order = self.chosen.len();
        self.chosen.push(Chosen { slot, rows, cached_tokens, adapter: 0, order });
    }

    /// Promises a running sequence, rows given, the blocks that it will want soon.
    fn promise(&self, slot: u32, room: &mut Room) {
        let sequence = &self.slots[slot];
        room.promised += self.config.blocks_for(sequence.tokens.len()) - sequence.blocks.len();
        room.promised +=
            usize::from(self.config.blocks_for(sequence.tokens_max()) > self.config.blocks_for(sequence.tokens.len()));
    }

    /// Admits waiting sequences in the queue's order. One that lacks pages for its tokens stops the rest, or a large one would
    /// never find room; one whose adapter is not there or finds no place, or that is better off a step later, is passed over.
    fn admit(&mut self, now: Time, room: &mut Room, plan: &mut StepPlan) {
        if self.reserved.is_some_and(|slot| !self.queue.has_turns(self.slots[slot].ticket.tenant)) {
            self.release_reservation();
        }
        if self.queue.waiting() == 0 || !self.has_room(room) {
            return;
        }
        let mut limits = self.adapter_limits();
        if let Some(ticket) = self.reserved.map(|slot| self.slots[slot].ticket)
            && self.has_place(&ticket, room)
            && self.can_run(&ticket, &limits)
            && !self.admit_one(&ticket, self.find_prefix(&self.slots[ticket.slot]), now, room, plan)
        {
            room.blocked = Some(ticket.slot);
            return;
        }
        limits.draining = self.draining();
        let mut first = true;
        self.queue.begin(now);
        while self.has_room(room) {
            let Some(ticket) = self.queue.next() else { break };
            limits.kept = self.starved_adapter();
            if !self.has_place(&ticket, room) {
                self.queue.pass_over(|_| true);
            } else if !self.can_run(&ticket, &limits) {
                if first && self.reserved.is_none() && ticket.is_aged(now, self.config.starvation_micros) {
                    self.reserve(ticket.slot);
                }
                let adapters = &self.memory.adapters;
                let can_run = |at| adapters.is_ready(at) && adapters.has_place(at, &limits);
                self.queue.pass_over(|ticket| !can_run(ticket.adapter));
            } else if !self.admit_preferred(&ticket, &limits, now, room, plan) {
                let sequence = &self.slots[ticket.slot];
                let prefix = self.find_prefix(sequence);
                if self.is_being_computed(sequence, &prefix) {
                    self.slots[ticket.slot].deferrals += 1;
                    self.queue.pass_over(|_| false);
                } else if !self.admit_one(&ticket, prefix, now, room, plan) {
                    room.blocked = Some(ticket.slot);
                    break;
                }
            }
            first = false;
        }
        self.queue.end();
    }

    fn adapter_limits(&self) -> AdapterLimits {
        let SchedulerConfig { max_loras, adapter_pages_per_step: pages, .. } = self.config;
        AdapterLimits { max_loras, pages, kept: self.starved_adapter(), draining: None }
    }

    /// Whether the sequence's adapter is there and has a place.
    fn can_run(&self, ticket: &Ticket, limits: &AdapterLimits) -> bool {
        self.memory.adapters.is_ready(ticket.adapter) && self.memory.adapters.has_place(ticket.adapter, limits)
    }

    /// Admits another sequence of the same tenant and class instead of one that would bring another adapter into a step that
    /// cannot take all who wait; whether there was such a one.
    fn admit_preferred(
        &mut self,
        ticket: &Ticket,
        limits: &AdapterLimits,
        now: Time,
        room: &mut Room,
        plan: &mut StepPlan,
    ) -> bool {
        let adapters = &self.memory.adapters;
        let scarce = self.queue.waiting() > room.rows.min(self.config.max_num_seqs - self.running.len());
        if !scarce || adapters.is_active(ticket.adapter) || ticket.is_aged(now, self.config.starvation_micros) {
            return false;
        }
        let joins = |other: &Ticket| {
            adapters.is_active(other.adapter) && other.adapter.is_some() && adapters.has_place(other.adapter, limits)
        };
        let Some(other) = self.queue.prefer(self.config.lookahead, joins) else { return false };
        let sequence = &self.slots[other.slot];
        let prefix = self.find_prefix(sequence);
        !self.is_being_computed(sequence, &prefix) && self.admit_one(&other, prefix, now, room, plan)
    }

    /// Whether places and rows are left that are not kept for others.
    fn has_place(&self, ticket: &Ticket, room: &Room) -> bool {
        let held = self.queue.is_shared() && !self.queue.is_favoured(ticket.tenant, self.config.max_num_seqs);
        let (places, rows) = if held { (self.config.kept_places, room.kept) } else { (0, 0) };
        self.running.len() + places < self.config.max_num_seqs && room.rows > rows
    }

    fn has_room(&self, room: &Room) -> bool {
        room.rows > 0 && self.running.len() < self.config.max_num_seqs
    }

    /// Makes a waiting sequence a running one, unless there are not pages enough for all its tokens beside what is promised and
    /// kept back, or, once others are preempted, for all that it may ever need beside the adapters that stay.
    fn admit_one(&mut self, ticket: &Ticket, prefix: Prefix, now: Time, room: &mut Room, plan: &mut StepPlan) -> bool {
        let sequence = &self.slots[ticket.slot];
        // Its own adapter stops being idle.
        let own = ticket.adapter.map(|at| &self.memory.adapters[at]).filter(|adapter| adapter.is_idle());
        let own = own.map_or(0, |adapter| adapter.need.pages);
        let taken = self.config.blocks_for(sequence.tokens.len()) - prefix.held + own;
        let kept = self.pages_kept_back();
        let fixed = self.memory.adapters.totals().fixed_pages;
        if taken + room.promised + kept > self.memory.available()
            || fixed + kept + self.alone(sequence) > self.config.num_pages
        {
            return false;
        }
        if let Some(at) = ticket.adapter {
            self.memory.change_use(at, |adapter| {
                adapter.running += 1;
                adapter.waiting -= 1;
            });
        }
        self.memory.count_found(prefix.blocks);
        let sequence = &mut self.slots[ticket.slot];
        for key in &sequence.keys[..prefix.blocks] {
            let block = self.memory.pages.lookup(key).expect("the blocks were found a moment ago");
            self.memory.pages.acquire(block);
            sequence.blocks.push(block);
        }
        let (length, cached_tokens) = (sequence.tokens.len(), prefix.blocks * self.config.block_size);
        sequence.computed = cached_tokens;
        sequence.published = prefix.blocks;
        sequence.phase = Phase::Running;
        // A readmitted sequence's prompt was paid for; losing its blocks was not its tenant's choice.
        if sequence.admission.is_none() {
            sequence.admission = Some(self.stats.admissions_total);
            sequence.reserve(&self.config);
            self.queue.charge(ticket.tenant, (length - cached_tokens) as u64, self.config.input_weight, now);
        }
        self.stats.admissions_total += 1;
        if self.config.prefix_cache && sequence.use_prefix_cache {
            self.stats.prefix_queries_total += length as u64;
            self.stats.prefix_hits_total += cached_tokens as u64;
        }
        if self.reserved == Some(ticket.slot) {
            self.release_reservation();
        }
        if self.queue.is_favoured(ticket.tenant, self.config.max_num_seqs) {
            room.kept = 0;
        }
        self.queue.admit(ticket, now);
        self.running.push(ticket.slot);
        let rows = (length - cached_tokens).min(room.chunk).min(room.rows - room.kept);
        self.choose(ticket.slot, rows, cached_tokens, room, plan);
        self.promise(ticket.slot, room);
        true
    }

    /// What a waiting sequence would find in the prefix cache.
    fn find_prefix(&self, sequence: &Sequence) -> Prefix {
        let reusable = &sequence.keys[..sequence.reusable_blocks(self.config.block_size)];
        let mut prefix = Prefix { blocks: 0, held: 0 };
        for block in reusable.iter().map_while(|key| self.memory.pages.lookup(key)) {
            prefix.blocks += 1;
            prefix.held += usize::from(!self.memory.pages.is_free(block));
        }
        prefix
    }

    /// Whether this very step computes, for somebody else, the first block that the sequence does not find: a step later
    /// it will. This is what lets the samples of one prompt, or a burst of requests with one system prompt, compute it once.
    /// Each step waited for is to bring a block, so there are never more of them than blocks to find.
    fn is_being_computed(&self, sequence: &Sequence, prefix: &Prefix) -> bool {
        let reusable = sequence.reusable_blocks(self.config.block_size);
        prefix.blocks < reusable
            && sequence.deferrals < reusable
            && self.filling.contains(&sequence.keys[prefix.blocks])
    }

    /// The active adapter that gets no new sequences, so that its place becomes free for the starved one. The fewest running
    /// sequences of any adapter never become more while one starves, so this ends.
    fn draining(&self) -> Option<u32> {
        let starved = self.starved_adapter()?;
        let adapters = &self.memory.adapters;
        if adapters.has_place(Some(starved), &self.adapter_limits()) { None } else { adapters.fewest() }
    }

    /// Writes what was chosen, ordered by adapter.
    fn write(&mut self, plan: &mut StepPlan) {
        for chosen in &mut self.chosen {
            chosen.adapter = self.memory.adapters.rank(self.slots[chosen.slot].ticket.adapter);
        }
        self.chosen.sort_unstable_by_key(|chosen| (chosen.adapter, chosen.order));
        // Room for the tables at their longest: nothing is allocated while sequences lengthen.
        let blocks_max = |chosen: &Chosen| self.config.blocks_for(self.slots[chosen.slot].tokens_max());
        plan.block_tables.reserve(self.chosen.iter().map(blocks_max).sum());
        for chosen in &self.chosen {
            let sequence = &self.slots[chosen.slot];
            plan.sequences.push(ScheduledSequence {
                id: sequence.id,
                generation: sequence.ticket.adapter.map(|at| self.memory.adapters[at].need.generation),
                start: sequence.computed,
                rows: chosen.rows,
                table: plan.block_tables.len(),
                blocks: sequence.blocks.len(),
                samples: sequence.computed + chosen.rows == sequence.tokens.len(),
                drawn: sequence.computed + chosen.rows > sequence.known(),
                cached_tokens: chosen.cached_tokens,
            });
            plan.block_tables.extend_from_slice(&sequence.blocks);
            plan.total_rows += chosen.rows;
        }
    }

    /// Advances every sequence by its rows. Whoever samples has one more token, not known yet; where that is its last one, it gives
    /// back what it holds.
    fn take_as_done(&mut self, plan: &StepPlan) {
        if plan.sequences.is_empty() {
            return;
        }
        let block_size = self.config.block_size;
        for at in 0..self.chosen.len() {
            let Chosen { slot, rows, .. } = self.chosen[at];
            let sequence = &mut self.slots[slot];
            sequence.computed += rows;
            let samples = sequence.computed == sequence.tokens.len();
            if samples {
                sequence.tokens.push(UNKNOWN);
                sequence.unknown += 1;
                self.awaited[self.unanswered].push(sequence.id);
            }
            sequence.publish(&mut self.memory.pages, block_size);
            if samples && sequence.tokens.len() == sequence.tokens_max() {
                self.finish_rows(slot);
            }
        }
        self.unanswered += 1;
    }
}
