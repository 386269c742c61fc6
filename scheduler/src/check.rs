//! The invariants that can be seen from inside, checked all at once.

use crate::Scheduler;
use crate::sequence::Phase;

impl Scheduler {
    /// Panics, saying what is broken, unless every page, queue entry and count agrees with the sequences. Takes time
    /// proportional to the pool and the queue: for simulations, tests and idle moments.
    pub fn check_invariants(&self) {
        let mut named = vec![0; self.memory.pages.len()];
        let (mut running, mut deadlines) = (0, 0);
        for (slot, sequence) in self.slots.iter() {
            let id = sequence.id;
            assert_eq!(self.slots.find(id), Some(slot), "{id} is not found in its slot");
            assert_eq!(sequence.ticket.slot, slot, "the ticket of {id} names another slot");
            for &block in &sequence.blocks {
                named[block as usize] += 1;
            }
            let placed = sequence.computed;
            assert!(placed < sequence.tokens.len(), "{id} has as many rows as tokens");
            assert_eq!(sequence.blocks.len(), self.config.blocks_for(placed), "blocks of {id} for {placed} tokens");
            assert!(
                sequence.published * self.config.block_size <= placed.min(sequence.known()),
                "{id} published what is not computed or not known"
            );
            let listed = self.running.iter().filter(|&&other| other == slot).count();
            match sequence.phase {
                Phase::Waiting => assert_eq!((placed, listed), (0, 0), "{id} waits and holds blocks or runs"),
                Phase::Running => {
                    assert!(sequence.tokens.len() < sequence.tokens_max(), "{id} runs and has no row to come");
                    assert_eq!(listed, 1, "{id} runs as often as it is listed");
                    running += 1;
                }
                Phase::Ending => {
                    assert_eq!(sequence.tokens.len(), sequence.tokens_max(), "{id} has rows to come");
                    assert_eq!((placed, listed), (0, 0), "{id} ends and holds blocks or runs");
                }
            }
            let awaited = self.awaited[..self.unanswered].iter().flatten().filter(|&&other| other == id).count();
            assert_eq!(awaited, sequence.unknown, "tokens of {id} that plans draw");
            if let Some(deadline) = sequence.deadline {
                assert!(self.deadlines.contains(&(deadline, id)), "the deadline of {id} is not watched");
                deadlines += 1;
            }
        }
        assert_eq!((running, deadlines), (self.running.len(), self.deadlines.len()), "running sequences and deadlines");
        assert!(running <= self.config.max_num_seqs, "{running} sequences run, more than max_num_seqs");
        self.memory.check(&named);
        self.queue.check(self.slots.iter().map(|(_, sequence)| (sequence.ticket, sequence.phase == Phase::Waiting)));
        self.check_adapters();
        self.check_loading();
    }

    fn check_adapters(&self) {
        let (active, pages) = (self.memory.adapters.active(), self.memory.adapters.active_pages());
        assert!(active <= self.config.max_loras, "more adapters run than max_loras");
        assert!(active <= 1 || pages <= self.config.adapter_pages_per_step, "adapters exceed adapter_pages_per_step");
        if let Some(slot) = self.reserved {
            let waits = self.slots.is_live(slot) && self.slots[slot].phase == Phase::Waiting;
            assert!(waits, "a place is kept for the adapter of a sequence that does not wait");
        }
    }
}
