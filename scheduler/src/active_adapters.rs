//! The adapter generations among the running sequences, bounded by `max_loras`.

use openlora_types::Generation;

/// Running sequences per generation, ascending by generation. A sorted vector: there are at most `max_loras` entries, and
/// the position of a generation is at once its place in a plan.
#[derive(Debug, Default)]
pub(crate) struct ActiveAdapters {
    entries: Vec<(Generation, u32)>,
}

/// What a waiting sequence's adapter has to respect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterLimits {
    /// Places.
    pub(crate) max_loras: usize,
    /// The inactive generation for which one place is kept.
    pub(crate) kept: Option<Generation>,
    /// The active generation that gets no new sequences.
    pub(crate) draining: Option<Generation>,
}

impl ActiveAdapters {
    pub(crate) fn with_capacity(max_loras: usize) -> Self {
        Self { entries: Vec::with_capacity(max_loras.min(1_024)) }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Running sequences of `generation`.
    pub(crate) fn running(&self, generation: &Generation) -> u32 {
        self.find(generation).map_or(0, |at| self.entries[at].1)
    }

    /// Whether one more sequence of `generation` may run: its adapter is active and not being drained, or there is a place for
    /// it beside the one that may be kept for another. The base model needs none.
    pub(crate) fn has_place(&self, generation: Option<&Generation>, limits: &AdapterLimits) -> bool {
        let Some(generation) = generation else { return true };
        if self.find(generation).is_ok() {
            return limits.draining.as_ref() != Some(generation);
        }
        let kept = limits.kept.is_some_and(|kept| kept != *generation);
        self.entries.len() + usize::from(kept) < limits.max_loras
    }

    /// 0 for the base model, then 1, 2, … in ascending order of the active generations.
    pub(crate) fn rank(&self, generation: Option<&Generation>) -> usize {
        generation.map_or(0, |generation| self.find(generation).expect("a running sequence's adapter is active") + 1)
    }

    pub(crate) fn enter(&mut self, generation: &Generation) {
        match self.find(generation) {
            Ok(at) => self.entries[at].1 += 1,
            Err(at) => self.entries.insert(at, (*generation, 1)),
        }
    }

    pub(crate) fn leave(&mut self, generation: &Generation) {
        let at = self.find(generation).expect("a running sequence's adapter is active");
        self.entries[at].1 -= 1;
        if self.entries[at].1 == 0 {
            self.entries.remove(at);
        }
    }

    /// The generation with the fewest running sequences, the smallest of those: the first whose slot can become free.
    pub(crate) fn fewest(&self) -> Option<Generation> {
        self.entries
            .iter()
            .min_by_key(|(generation, running)| (*running, *generation))
            .map(|(generation, _)| *generation)
    }

    fn find(&self, generation: &Generation) -> Result<usize, usize> {
        self.entries.binary_search_by(|(other, _)| other.cmp(generation))
    }
}
