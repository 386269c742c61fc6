//! Adapters between absent and resident: which are loaded next, what is kept for one that starves, and pins.
//!
//! **Prefetch.** Each step looks at the first `lookahead` waiting sequences in the queue's order and starts to load their
//! absent adapters while fewer than `max_loading` are loading and pages can be had. A load never takes the pages of an idle
//! adapter that a sequence further ahead wants, nor those that sequences of this step will want soon. A sequence whose
//! adapter is not there is passed over by admission; it holds nobody back.
//!
//! **Starvation.** An aged sequence that has its turn and whose adapter is not there, or finds no place among the active
//! ones, is *reserved*, one at a time: its adapter is loaded before others', the pages for that are kept back from
//! admissions and from other loads, and once loaded it is not evicted for anybody but a best-ranked running sequence that
//! is alone. Running sequences end and what they leave is not given away, so it loads; then a place is kept for it.
//!
//! **Loads end, but when is not known**, so what runs must never need their pages: with all loading and pinned adapters, each
//! running sequence has room to its last token if every other one is preempted. That is what keeps the best-ranked
//! running sequence from ever being preempted.

use openlora_types::{Generation, SequenceId, Time};

use crate::prefix_cache::FixedMap;
use crate::residency::State;
use crate::sequence::{Phase, Sequence};
use crate::step::Room;
use crate::{AdapterNeed, Scheduler, StepPlan, SubmitError};

/// What a load has to leave alone.
#[derive(Clone, Copy, Debug)]
struct Spare {
    /// Pages that are to stay available.
    pages: usize,
    /// Pages that one sequence must be able to have beside all loading and pinned adapters.
    alone: usize,
}

impl Scheduler {
    /// An adapter of [`StepPlan::loads`] is on the device; its sequences may run from the next step on.
    ///
    /// # Panics
    /// If it is not loading: the engine ran another plan.
    pub fn adapter_loaded(&mut self, generation: Generation) {
        let at = self.loading(&generation);
        self.memory.change_use(at, |adapter| adapter.state = State::Resident);
    }

    /// An adapter of [`StepPlan::loads`] could not be loaded, and its pages are the backend's again. Ends the sequences that
    /// wait for it, which are returned in the order of their submission, and drops its pin; others go on.
    ///
    /// # Panics
    /// If it is not loading: the engine ran another plan.
    pub fn adapter_failed(&mut self, generation: Generation) -> Vec<SequenceId> {
        let at = self.loading(&generation);
        self.stats.load_failures_total += 1;
        let waiting = self.slots.iter().filter(|(_, sequence)| sequence.ticket.adapter == Some(at));
        let mut slots: Vec<_> = waiting.map(|(slot, sequence)| (sequence.ticket.order, slot, sequence.id)).collect();
        slots.sort_unstable();
        self.memory.adapters.change(at, |adapter| adapter.pinned = false);
        for &(_, slot, _) in &slots {
            self.end(slot);
        }
        self.stats.failed_total += slots.len() as u64;
        self.memory.unload(at);
        slots.into_iter().map(|(_, _, id)| id).collect()
    }

    fn loading(&self, generation: &Generation) -> u32 {
        let at = self.memory.adapters.find(generation);
        let at = at.filter(|&at| self.memory.adapters[at].state == State::Loading);
        at.unwrap_or_else(|| panic!("the load of {generation:?} ended and no plan had started it"))
    }

    /// Keeps an adapter on the device until [`Scheduler::unpin`]. If it is absent, the next steps load it before any other.
    ///
    /// # Errors
    /// [`SubmitError::NoRoomForPin`] if a live sequence could then not run to its end, [`SubmitError::Invalid`] for an
    /// adapter of no pages or of other pages than before.
    pub fn pin(&mut self, need: AdapterNeed) -> Result<(), SubmitError> {
        self.check_need(&need)?;
        let known = self.memory.adapters.find(&need.generation).map(|at| (at, &self.memory.adapters[at]));
        if known.is_some_and(|(_, adapter)| adapter.pinned) {
            return Ok(());
        }
        let totals = self.memory.adapters.totals();
        let own_load = known.filter(|(_, adapter)| adapter.state == State::Loading).map_or(0, |_| need.pages);
        let (pinned, loading) = (totals.pinned_pages, totals.loading_pages - own_load);
        // Its own sequences would need less, being counted without it.
        let to_run = self.slots.iter().filter(|(_, sequence)| sequence.phase != Phase::Ending);
        let live = to_run.map(|(_, sequence)| {
            let own = sequence.ticket.adapter.is_some() && sequence.ticket.adapter == known.map(|(at, _)| at);
            self.alone(sequence) - if own { need.pages } else { 0 }
        });
        let (live, max) = (live.max().unwrap_or(0), self.config.num_pages);
        if pinned.saturating_add(loading).saturating_add(need.pages).saturating_add(live) > max {
            let generation = need.generation;
            return Err(SubmitError::NoRoomForPin { generation, pages: need.pages, pinned, loading, live, max });
        }
        let at = self.memory.adapters.know(&need);
        self.memory.adapters.change(at, |adapter| {
            (adapter.pinned, adapter.need.load_micros) = (true, need.load_micros);
        });
        if self.memory.adapters[at].state == State::Absent {
            self.pending_pins.push(at);
        }
        Ok(())
    }

    /// Lets an adapter be evicted again when nobody runs on it. Returns whether it was pinned.
    pub fn unpin(&mut self, generation: Generation) -> bool {
        let Some(at) = self.memory.adapters.find(&generation) else { return false };
        let pinned = self.memory.adapters[at].pinned;
        self.pending_pins.retain(|&other| other != at);
        self.memory.change_use(at, |adapter| adapter.pinned = false);
        pinned
    }

    /// Pages that a sequence needs for its last token, beside all loading and pinned adapters.
    pub(crate) fn alone(&self, sequence: &Sequence) -> usize {
        let adapter = sequence.ticket.adapter.map(|at| &self.memory.adapters[at]).filter(|adapter| !adapter.pinned);
        self.config.blocks_for(sequence.tokens_max()) + adapter.map_or(0, |adapter| adapter.need.pages)
    }

    /// Keeps a place and the pages for a starved sequence's adapter.
    pub(crate) fn reserve(&mut self, slot: u32) {
        self.reserved = Some(slot);
        if let Some(at) = self.slots[slot].ticket.adapter {
            self.memory.change_use(at, |adapter| adapter.kept = true);
        }
    }

    pub(crate) fn release_reservation(&mut self) {
        let Some(slot) = self.reserved.take() else { return };
        if let Some(at) = self.slots[slot].ticket.adapter {
            self.memory.change_use(at, |adapter| adapter.kept = false);
        }
    }

    /// The adapter for which a place is kept: the reserved sequence's, unless it is active anyway.
    pub(crate) fn starved_adapter(&self) -> Option<u32> {
        let at = self.slots[self.reserved?].ticket.adapter?;
        (!self.memory.adapters.is_active(Some(at))).then_some(at)
    }

    /// Pages that pinned and starved adapters wait for.
    pub(crate) fn pages_kept_back(&self) -> usize {
        let starved = self.starved_adapter().map(|at| &self.memory.adapters[at]);
        let absent = starved.filter(|adapter| adapter.state == State::Absent && !adapter.pinned);
        self.memory.adapters.totals().pending_pages + absent.map_or(0, |adapter| adapter.need.pages)
    }

    /// Starts the loads of a step, after its admissions: pinned adapters, then the starved one, then by the queue's order.
    pub(crate) fn start_loads(&mut self, now: Time, room: &Room, plan: &mut StepPlan) {
        if self.memory.adapters.totals().wanted_absent == 0 || !self.may_load() {
            return;
        }
        self.shielded.clear();
        let running = self.running.iter().map(|&slot| self.alone(&self.slots[slot])).max().unwrap_or(0);
        let mut spare = Spare { pages: room.promised, alone: running };
        let mut first = 0;
        while let Some(&at) = self.pending_pins.get(first) {
            if self.try_load(at, spare, plan) {
                self.pending_pins.remove(first);
            } else {
                first += 1;
            }
        }
        spare.pages += self.memory.adapters.totals().pending_pages;
        if let Some(at) = self.starved_adapter()
            && self.memory.adapters[at].state == State::Absent
            && !self.try_load(at, spare, plan)
        {
            spare.pages += self.memory.adapters[at].need.pages;
        }
        // Whoever waits for pages for its tokens must find them in the end, whatever others load.
        let blocked = room.blocked.filter(|&slot| self.reserved != Some(slot));
        for slot in [self.reserved, blocked].into_iter().flatten() {
            let sequence = &self.slots[slot];
            spare.pages += self.config.blocks_for(sequence.tokens.len());
            spare.alone = spare.alone.max(self.alone(sequence));
        }
        if let Some(slot) = room.blocked {
            self.shield(slot);
        }
        self.load_for_queue(now, spare, plan);
    }

    fn load_for_queue(&mut self, now: Time, spare: Spare, plan: &mut StepPlan) {
        self.queue.begin(now);
        for _ in 0..self.config.lookahead {
            let Some(ticket) = self.queue.next() else { break };
            match ticket.adapter.map(|at| (at, self.memory.adapters[at].state)) {
                Some((at, State::Absent)) => {
                    self.try_load(at, spare, plan);
                    if !self.may_load() {
                        break;
                    }
                }
                Some((_, State::Resident)) => self.shield(ticket.slot),
                Some((_, State::Loading)) | None => {}
            }
            self.queue.pass_over(|_| false);
        }
        self.queue.end();
    }

    fn may_load(&self) -> bool {
        self.memory.adapters.totals().loading < self.config.max_loading
    }

    /// Spares the idle adapter of a waiting sequence in the loads of this step.
    fn shield(&mut self, slot: u32) {
        let at = self.slots[slot].ticket.adapter.filter(|&at| self.memory.adapters[at].is_idle());
        if let Some(at) = at
            && !self.shielded.contains(&at)
        {
            self.shielded.push(at);
        }
    }

    fn try_load(&mut self, at: u32, spare: Spare, plan: &mut StepPlan) -> bool {
        let adapters = &self.memory.adapters;
        let pages = adapters[at].need.pages;
        let shielded: usize = self.shielded.iter().map(|&other| adapters[other].need.pages).sum();
        let available = pages + spare.pages + shielded <= self.memory.available();
        let harmless = adapters.totals().fixed_pages + pages + spare.alone <= self.config.num_pages;
        if !self.may_load() || !available || !harmless {
            return false;
        }
        self.memory.load(at, &self.shielded, plan);
        self.stats.loads_total += 1;
        true
    }

    /// Panics unless pins, the reservation and the room beside loads hold.
    pub(crate) fn check_loading(&self) {
        let adapters = &self.memory.adapters;
        let fixed = adapters.totals().fixed_pages;
        for sequence in self.running.iter().map(|&slot| &self.slots[slot]) {
            let alone = self.alone(sequence);
            assert!(fixed + alone <= self.config.num_pages, "{} may need pages that loads have", sequence.id);
        }
        assert!(adapters.totals().loading <= self.config.max_loading, "more adapters are loading than max_loading");
        let kept = self.reserved.and_then(|slot| self.slots[slot].ticket.adapter);
        let mut users: FixedMap<u32, [u32; 2]> = FixedMap::default();
        for (_, sequence) in self.slots.iter() {
            let counts = sequence.ticket.adapter.map(|at| users.entry(at).or_default());
            counts.into_iter().for_each(|counts| counts[usize::from(sequence.phase == Phase::Running)] += 1);
        }
        for (at, adapter) in adapters.iter() {
            let name = adapter.need.generation;
            let counts = [adapter.waiting, adapter.running];
            assert_eq!(counts, users.get(&at).copied().unwrap_or_default(), "sequences that name {name:?}");
            let listed = self.pending_pins.iter().filter(|&&other| other == at).count();
            assert_eq!(
                listed,
                usize::from(adapter.pinned && adapter.state == State::Absent),
                "pending pins of {name:?}"
            );
            assert_eq!(adapter.kept, kept == Some(at), "whether a place is kept for {name:?}");
        }
    }
}
