//! One step: what is computed next, for whom, into which blocks.
//!
//! 1. Sequences past their deadline end.
//! 2. Running sequences, best rank first, get rows: all that they miss, within the chunk bound, and always leaving one row
//!    for each sequence behind them. Where blocks run out, the worst-ranked sequence is preempted.
//! 3. Waiting sequences are admitted in the queue's order while rows, sequences, adapters and blocks allow.

use openlora_types::{Generation, Time};

use crate::active_adapters::AdapterLimits;
use crate::queue::Ticket;
use crate::sequence::{Phase, Sequence, rank};
use crate::{ScheduledSequence, Scheduler, StepPlan};

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
struct Room {
    /// Rows.
    rows: usize,
    /// Rows that one sequence may take.
    chunk: usize,
    /// Blocks that sequences with rows in this step will want soon: the rest of their prompts, and one more to grow into.
    /// Admission leaves these alone, so that it is not at once undone by preemption.
    promised: usize,
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

    /// Plans the next step into `plan`, whose buffers are reused: once they have grown, a step in which nothing is admitted
    /// does not allocate. An empty plan means that there is nothing to compute.
    ///
    /// # Panics
    /// If the last plan's results were not given to [`Scheduler::update`].
    pub fn schedule_into(&mut self, now: Time, plan: &mut StepPlan) {
        assert!(self.in_flight.is_empty(), "schedule() came before update() with the last plan's results");
        plan.clear();
        self.chosen.clear();
        self.filling.clear();
        self.expire(now, plan);

        let alone = self.slots.len() == 1;
        let rows = self.config.max_num_batched_tokens;
        let chunk = if alone { rows } else { self.config.long_prefill_chunk };
        let mut room = Room { rows, chunk, promised: 0 };
        self.schedule_running(now, &mut room, plan);
        // What was just taken from a running sequence is not given to a waiting one.
        if plan.preempted.is_empty() {
            self.admit(now, &mut room);
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
            while self.pool.available() < wanted && self.running.len() > at {
                self.preempt(now, plan);
            }
            if at < self.running.len() {
                self.choose(slot, rows, 0, room);
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
    fn choose(&mut self, slot: u32, rows: usize, cached_tokens: usize, room: &mut Room) {
        let sequence = &mut self.slots[slot];
        let end = sequence.computed + rows;
        while sequence.blocks.len() < self.config.blocks_for(end) {
            sequence.blocks.push(self.pool.allocate().expect("the caller made sure of the blocks"));
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

    /// Admits waiting sequences in the queue's order. One that lacks blocks stops the rest, or a large one would never find
    /// room; one that lacks a place for its adapter, or that is better off a step later, is passed over.
    fn admit(&mut self, now: Time, room: &mut Room) {
        if self.queue.waiting() == 0 || !self.has_room(room) {
            return;
        }
        let mut limits =
            AdapterLimits { max_loras: self.config.max_loras, kept: self.starved_generation(), draining: None };
        if let Some(ticket) = self.reserved.map(|slot| self.slots[slot].ticket)
            && self.adapters.has_place(ticket.generation.as_ref(), &limits)
            && !self.admit_one(&ticket, self.find_prefix(&self.slots[ticket.slot]), now, room)
        {
            return;
        }
        limits.draining = self.draining();
        let mut first = true;
        self.queue.begin(now);
        while self.has_room(room) {
            let Some(ticket) = self.queue.next() else { break };
            limits.kept = self.starved_generation();
            if !self.adapters.has_place(ticket.generation.as_ref(), &limits) {
                if first && self.reserved.is_none() && ticket.is_aged(now, self.config.starvation_micros) {
                    self.reserved = Some(ticket.slot);
                }
                let adapters = &self.adapters;
                self.queue.pass_over(|ticket| !adapters.has_place(ticket.generation.as_ref(), &limits));
            } else {
                let sequence = &self.slots[ticket.slot];
                let prefix = self.find_prefix(sequence);
                if self.is_being_computed(sequence, &prefix) {
                    self.slots[ticket.slot].deferrals += 1;
                    self.queue.pass_over(|_| false);
                } else if !self.admit_one(&ticket, prefix, now, room) {
                    break;
                }
            }
            first = false;
        }
        self.queue.end();
    }

    fn has_room(&self, room: &Room) -> bool {
        room.rows > 0 && self.running.len() < self.config.max_num_seqs
    }

    /// Makes a waiting sequence a running one, unless there are not blocks enough for all its tokens beside what is promised.
    fn admit_one(&mut self, ticket: &Ticket, prefix: Prefix, now: Time, room: &mut Room) -> bool {
        let sequence = &mut self.slots[ticket.slot];
        let taken = self.config.blocks_for(sequence.tokens.len()) - prefix.held;
        if taken + room.promised > self.pool.available() {
            return false;
        }
        for key in &sequence.keys[..prefix.blocks] {
            let block = self.pool.lookup(key).expect("the blocks were found a moment ago");
            self.pool.acquire(block);
            sequence.blocks.push(block);
        }
        let (length, cached_tokens) = (sequence.tokens.len(), prefix.blocks * self.config.block_size);
        sequence.computed = cached_tokens;
        sequence.published = prefix.blocks;
        sequence.phase = Phase::Running;
        // A readmitted sequence's prompt was paid for; losing its blocks was not its tenant's choice.
        let mut charge = 0;
        if sequence.admission.is_none() {
            sequence.admission = Some(self.stats.admissions_total);
            sequence.reserve(&self.config);
            charge = (length - cached_tokens) as u64 * self.config.input_weight;
        }
        if let Some(generation) = &sequence.ticket.generation {
            self.adapters.enter(generation);
        }
        self.stats.admissions_total += 1;
        if self.config.prefix_cache && sequence.use_prefix_cache {
            self.stats.prefix_queries_total += length as u64;
            self.stats.prefix_hits_total += cached_tokens as u64;
        }
        if self.reserved == Some(ticket.slot) {
            self.reserved = None;
        }
        self.queue.admit(ticket, charge, now);
        self.running.push(ticket.slot);
        let rows = (length - cached_tokens).min(room.chunk).min(room.rows);
        self.choose(ticket.slot, rows, cached_tokens, room);
        true
    }

    /// What a waiting sequence would find in the prefix cache.
    fn find_prefix(&self, sequence: &Sequence) -> Prefix {
        let reusable = &sequence.keys[..sequence.reusable_blocks(self.config.block_size)];
        let mut prefix = Prefix { blocks: 0, held: 0 };
        for block in reusable.iter().map_while(|key| self.pool.lookup(key)) {
            prefix.blocks += 1;
            prefix.held += usize::from(!self.pool.is_free(block));
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

    /// The adapter for which a place is kept.
    fn starved_generation(&self) -> Option<Generation> {
        let generation = self.slots[self.reserved?].ticket.generation?;
        (self.adapters.running(&generation) == 0).then_some(generation)
    }

    /// The active generation that gets no new sequences, so that its place becomes free for the starved one. The fewest
    /// running sequences of any generation never become more while one starves, so this ends.
    fn draining(&self) -> Option<Generation> {
        self.starved_generation()?;
        if self.adapters.len() < self.config.max_loras { None } else { self.adapters.fewest() }
    }

    /// Writes what was chosen, ordered by adapter.
    fn write(&mut self, plan: &mut StepPlan) {
        for chosen in &mut self.chosen {
            chosen.adapter = self.adapters.rank(self.slots[chosen.slot].ticket.generation.as_ref());
        }
        self.chosen.sort_unstable_by_key(|chosen| (chosen.adapter, chosen.order));
        for chosen in &self.chosen {
            let sequence = &self.slots[chosen.slot];
            plan.sequences.push(ScheduledSequence {
                id: sequence.id,
                generation: sequence.ticket.generation,
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
