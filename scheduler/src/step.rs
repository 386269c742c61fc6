//! One step: what is computed next, for whom, into which blocks.
//!
//! 1. Sequences past their deadline end.
//! 2. Running sequences, best rank first, get rows: all that they miss, within the chunk bound, and always leaving one row
//!    for each sequence behind them. Where pages run out, cached blocks and idle adapters are evicted, and when there are none,
//!    the worst-ranked sequence is preempted: its blocks and its lease on its adapter go together.
//! 3. Waiting sequences are admitted in the queue's order while rows, sequences, adapters and pages allow.
//! 4. Adapters that waiting sequences want begin to load (`loading.rs`).
//!
//! **Adapters are a cost.** The more distinct ones a step has, the more it reads besides the model: `max_loras` bounds how
//! many run at once and `adapter_pages_per_step` how large they are together. Where more wait than can be admitted, a
//! sequence whose adapter is active goes before one of the same tenant and class that would bring another adapter, until
//! that one has aged: steps get fewer adapters, and no tenant and no class gets less than fairness gives it.

use openlora_types::Time;

use crate::queue::Ticket;
use crate::residency::AdapterLimits;
use crate::sequence::{Phase, Sequence, rank};
use crate::{ScheduledSequence, Scheduler, SchedulerConfig, StepPlan};

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
    /// Blocks that sequences with rows in this step will want soon: the rest of their prompts, and one more to grow into.
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
    /// loaded does not allocate. A plan without sequences means that there is nothing to compute before something comes, a load
    /// ends or time passes.
    ///
    /// # Panics
    /// If the last plan's results were not given to [`Scheduler::update`].
    pub fn schedule_into(&mut self, now: Time, plan: &mut StepPlan) {
        assert!(self.in_flight.is_empty(), "schedule() came before update() with the last plan's results");
        plan.clear();
        self.chosen.clear();
        self.filling.clear();
        self.queue.refill(now);
        self.expire(now, plan);

        let alone = self.slots.len() == 1;
        let rows = self.config.max_num_batched_tokens;
        let chunk = if alone { rows } else { self.config.long_prefill_chunk };
        let mut room = Room { rows, chunk, promised: 0, blocked: None };
        self.schedule_running(now, &mut room, plan);
        // What was just taken from a running sequence is not given to a waiting one.
        if plan.preempted.is_empty() {
            self.admit(now, &mut room, plan);
            self.start_loads(now, &room, plan);
        }
        self.write(plan);
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
        let (slots, starvation) = (&self.slots, self.config.starvation_micros);
        // Already in order but for those that aged since the last step; pattern-defeating sorts notice in one pass.
        self.running.sort_unstable_by_key(|&slot| rank(&slots[slot], now, starvation));
        let mut at = 0;
        while at < self.running.len() {
            let slot = self.running[at];
            let behind = self.running.len() - at - 1;
            let sequence = &self.slots[slot];
            // max_num_batched_tokens >= max_num_seqs, so there is at least one row.
            let rows = (sequence.tokens.len() - sequence.computed).min(room.chunk).min(room.rows - behind);
            let wanted = self.config.blocks_for(sequence.computed + rows) - sequence.blocks.len();
            // Whoever is preempted stands behind this one and has no rows yet, or is this one itself.
            while self.memory.available() < wanted && self.running.len() > at {
                if self.running.len() == 1 && self.reserved.is_some() {
                    // The best-ranked sequence, alone: only the starved one's adapter can be in its way.
                    self.release_reservation();
                } else {
                    self.preempt(now, plan);
                }
            }
            if at < self.running.len() {
                self.choose(slot, rows, 0, room, plan);
                at += 1;
            }
        }
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
        sequence.in_flight = rows;
        room.rows -= rows;
        room.promised += self.config.blocks_for(sequence.tokens.len()) - sequence.blocks.len();
        room.promised +=
            usize::from(self.config.blocks_for(sequence.tokens_max()) > self.config.blocks_for(sequence.tokens.len()));
        if self.queue.waiting() > 0 {
            let full = self.config.block_size;
            let filled = sequence.published..sequence.keys.len().min(end / full);
            self.filling.extend(sequence.keys[filled].iter().copied());
        }
        let order = self.chosen.len();
        self.chosen.push(Chosen { slot, rows, cached_tokens, adapter: 0, order });
        self.in_flight.push(slot);
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
            if !self.can_run(&ticket, &limits) {
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
        self.queue.admit(ticket, now);
        self.running.push(ticket.slot);
        let rows = (length - cached_tokens).min(room.chunk).min(room.rows);
        self.choose(ticket.slot, rows, cached_tokens, room, plan);
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
                cached_tokens: chosen.cached_tokens,
            });
            plan.block_tables.extend_from_slice(&sequence.blocks);
            plan.total_rows += chosen.rows;
        }
    }
}
