//! Which adapters are on the device, on their way there, or wanted there, and who uses them.
//!
//! An adapter is known here from its first sequence (or pin) until it is absent and nobody names it. It is *absent*,
//! *loading* into pages that it has already, or *resident*. A resident one is *idle*, and may be evicted, while no running
//! sequence leases it, it is not pinned and no place is kept for it. This file counts; `memory.rs` decides who is evicted.

use std::collections::BTreeSet;

use openlora_types::Generation;

use crate::prefix_cache::FixedMap;

/// What an adapter needs of the pool. The same for every sequence of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterNeed {
    /// Which.
    pub generation: Generation,
    /// Pages that its factors fill, at least 1.
    pub pages: usize,
    /// About how long it takes to load again, in microseconds: what its eviction may cost.
    pub load_micros: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    Loading,
    Resident,
}

#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) need: AdapterNeed,
    pub(crate) state: State,
    /// Its pages while it is loading or resident.
    pub(crate) pages: Vec<u32>,
    /// Running sequences that lease it.
    pub(crate) running: u32,
    /// Waiting sequences that want it.
    pub(crate) waiting: u32,
    pub(crate) pinned: bool,
    /// Whether it stays for the starved sequence for which a place is kept.
    pub(crate) kept: bool,
    /// Sequences that ran with it since it was loaded.
    pub(crate) uses: u64,
    /// Since it was last used: what keeping it is worth, and the number of that use, which orders equals.
    pub(crate) value: (u64, u64),
}

impl Adapter {
    pub(crate) fn is_idle(&self) -> bool {
        self.state == State::Resident && self.running == 0 && !self.pinned && !self.kept
    }

    fn is_forgotten(&self) -> bool {
        self.state == State::Absent && self.running == 0 && self.waiting == 0 && !self.pinned
    }

    fn totals(&self) -> Totals {
        let pages = self.need.pages;
        let pages_if = |condition: bool| if condition { pages } else { 0 };
        let (absent, loading) = (self.state == State::Absent, self.state == State::Loading);
        let resident = self.state == State::Resident;
        Totals {
            loading: usize::from(loading),
            resident: usize::from(resident),
            pinned: usize::from(self.pinned),
            wanted_absent: usize::from(absent && (self.waiting > 0 || self.pinned)),
            pages: pages_if(!absent),
            idle_pages: pages_if(self.is_idle()),
            fixed_pages: pages_if(loading || resident && self.pinned),
            loading_pages: pages_if(loading && !self.pinned),
            pinned_pages: pages_if(self.pinned),
            pending_pages: pages_if(self.pinned && absent),
        }
    }
}

/// Sums over all adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) loading: usize,
    pub(crate) resident: usize,
    pub(crate) pinned: usize,
    /// Absent adapters that a pin or a waiting sequence wants.
    pub(crate) wanted_absent: usize,
    /// Pages of loading and resident adapters.
    pub(crate) pages: usize,
    /// Of those, pages that eviction can free.
    pub(crate) idle_pages: usize,
    /// Of those, pages that stay even if every sequence is preempted: of loading and of pinned adapters.
    pub(crate) fixed_pages: usize,
    /// Of those, pages that are fixed only until a load ends.
    pub(crate) loading_pages: usize,
    /// Pages of pinned adapters, loaded or not.
    pub(crate) pinned_pages: usize,
    /// Of those, pages that are not taken yet.
    pub(crate) pending_pages: usize,
}

impl Totals {
    fn pairs<'a>(&'a mut self, other: &'a Self) -> [(&'a mut usize, usize); 10] {
        [
            (&mut self.loading, other.loading),
            (&mut self.resident, other.resident),
            (&mut self.pinned, other.pinned),
            (&mut self.wanted_absent, other.wanted_absent),
            (&mut self.pages, other.pages),
            (&mut self.idle_pages, other.idle_pages),
            (&mut self.fixed_pages, other.fixed_pages),
            (&mut self.loading_pages, other.loading_pages),
            (&mut self.pinned_pages, other.pinned_pages),
            (&mut self.pending_pages, other.pending_pages),
        ]
    }

    fn add(&mut self, other: &Self) {
        self.pairs(other).into_iter().for_each(|(sum, part)| *sum += part);
    }

    fn subtract(&mut self, other: &Self) {
        self.pairs(other).into_iter().for_each(|(sum, part)| *sum -= part);
    }
}

/// What a waiting sequence's adapter has to respect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterLimits {
    /// Distinct adapters among the running sequences.
    pub(crate) max_loras: usize,
    /// Pages of those, except of one alone.
    pub(crate) pages: usize,
    /// The inactive adapter for which a place is kept.
    pub(crate) kept: Option<u32>,
    /// The active adapter that gets no new sequences.
    pub(crate) draining: Option<u32>,
}

/// All known adapters by slot: a small integer that tickets carry in place of the generation, reused when the adapter is
/// forgotten. Bounded by its user: one slot per live sequence, pin and page at most.
#[derive(Debug, Default)]
pub(crate) struct Residency {
    entries: Vec<Option<Adapter>>,
    vacant: Vec<u32>,
    by_generation: FixedMap<Generation, u32>,
    /// Adapters with running sequences, ascending by generation: there are at most `max_loras`, and the position of one is at
    /// once its place in a plan.
    active: Vec<u32>,
    active_pages: usize,
    /// Idle adapters by value: those that nobody waits for, and those that somebody does.
    idle: [BTreeSet<((u64, u64), u32)>; 2],
    totals: Totals,
}

impl Residency {
    pub(crate) fn with_capacity(max_loras: usize) -> Self {
        Self { active: Vec::with_capacity(max_loras.min(1_024)), ..Self::default() }
    }

    pub(crate) fn totals(&self) -> &Totals {
        &self.totals
    }

    pub(crate) fn find(&self, generation: &Generation) -> Option<u32> {
        self.by_generation.get(generation).copied()
    }

    /// The slot of an adapter, known from now on.
    pub(crate) fn know(&mut self, need: &AdapterNeed) -> u32 {
        if let Some(at) = self.find(&need.generation) {
            return at;
        }
        let (state, value) = (State::Absent, (0, 0));
        let adapter = Adapter {
            need: *need,
            state,
            pages: Vec::new(),
            running: 0,
            waiting: 0,
            pinned: false,
            kept: false,
            uses: 0,
            value,
        };
        let at = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            u32::try_from(self.entries.len() - 1).expect("adapters are bounded by validated u32 limits")
        });
        self.entries[at as usize] = Some(adapter);
        self.by_generation.insert(need.generation, at);
        at
    }

    /// The only way to change an adapter: keeps all sums and orders, and forgets it where nothing is left to know.
    pub(crate) fn change<R>(&mut self, at: u32, change: impl FnOnce(&mut Adapter) -> R) -> R {
        let adapter = self.entries[at as usize].as_mut().expect("a named adapter is known");
        let (was_active, need) = (adapter.running > 0, adapter.need);
        self.totals.subtract(&adapter.totals());
        if adapter.is_idle() {
            self.idle[usize::from(adapter.waiting > 0)].remove(&(adapter.value, at));
        }
        let result = change(adapter);
        self.totals.add(&adapter.totals());
        if adapter.is_idle() {
            self.idle[usize::from(adapter.waiting > 0)].insert((adapter.value, at));
        }
        let (is_active, forgotten) = (adapter.running > 0, adapter.is_forgotten());
        match (was_active, is_active) {
            (false, true) => {
                let place = self.place(&need.generation).expect_err("it was not active");
                self.active.insert(place, at);
                self.active_pages += need.pages;
            }
            (true, false) => {
                let place = self.place(&need.generation).expect("it was active");
                self.active.remove(place);
                self.active_pages -= need.pages;
            }
            _ => {}
        }
        if forgotten {
            self.entries[at as usize] = None;
            self.by_generation.remove(&need.generation);
            self.vacant.push(at);
        }
        result
    }

    /// Distinct adapters among the running sequences.
    pub(crate) fn active(&self) -> usize {
        self.active.len()
    }

    /// Their pages.
    pub(crate) fn active_pages(&self) -> usize {
        self.active_pages
    }

    /// Whether a sequence of this adapter could run, were there room for it: the adapter is there.
    pub(crate) fn is_ready(&self, at: Option<u32>) -> bool {
        at.is_none_or(|at| self[at].state == State::Resident)
    }

    /// Whether running sequences lease it, so that one more costs no adapter; the base model never costs one.
    pub(crate) fn is_active(&self, at: Option<u32>) -> bool {
        at.is_none_or(|at| self[at].running > 0)
    }

    /// Whether one more sequence of an adapter may run: the adapter is active and not being drained, or there is a place for it
    /// beside the one that may be kept for another. The base model needs none.
    pub(crate) fn has_place(&self, at: Option<u32>, limits: &AdapterLimits) -> bool {
        let Some(at) = at else { return true };
        if self[at].running > 0 {
            return limits.draining != Some(at);
        }
        let kept = limits.kept.filter(|&kept| kept != at);
        let places = self.active.len() + usize::from(kept.is_some());
        let pages = self.active_pages + kept.map_or(0, |kept| self[kept].need.pages) + self[at].need.pages;
        places < limits.max_loras && (places == 0 || pages <= limits.pages)
    }

    /// 0 for the base model, then 1, 2, … in ascending order of the active generations.
    pub(crate) fn rank(&self, at: Option<u32>) -> usize {
        at.map_or(0, |at| self.place(&self[at].need.generation).expect("a running sequence's adapter is active") + 1)
    }

    /// The active adapter with the fewest running sequences, the smallest of those: the first whose place can become free.
    pub(crate) fn fewest(&self) -> Option<u32> {
        self.active.iter().copied().min_by_key(|&at| (self[at].running, self[at].need.generation))
    }

    /// The idle adapter of least value that nobody waits for.
    pub(crate) fn unwanted(&self) -> Option<(u64, u32)> {
        self.idle[0].first().map(|&((value, _), at)| (value, at))
    }

    /// The idle adapter of least value that somebody waits for and that is not among `shielded`.
    pub(crate) fn wanted(&self, shielded: &[u32]) -> Option<(u64, u32)> {
        let mut wanted = self.idle[1].iter().filter(|(_, at)| !shielded.contains(at));
        wanted.next().map(|&((value, _), at)| (value, at))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Adapter)> {
        self.entries.iter().enumerate().filter_map(|(at, entry)| entry.as_ref().map(|entry| (at as u32, entry)))
    }

    fn place(&self, generation: &Generation) -> Result<usize, usize> {
        self.active.binary_search_by(|&at| self[at].need.generation.cmp(generation))
    }

    /// Panics unless all sums and orders agree with the adapters.
    pub(crate) fn check(&self) {
        let (mut totals, mut idle, mut active) = (Totals::default(), [0; 2], 0);
        for (at, adapter) in self.iter() {
            let name = adapter.need.generation;
            assert_eq!(self.find(&name), Some(at), "{name:?} is not found in its slot");
            assert!(!adapter.is_forgotten(), "{name:?} is known and nobody names it");
            let pages = if adapter.state == State::Absent { 0 } else { adapter.need.pages };
            assert_eq!(adapter.pages.len(), pages, "pages of {name:?}, which is {:?}", adapter.state);
            assert!(adapter.running == 0 || adapter.state == State::Resident, "{name:?} is leased and not resident");
            totals.add(&adapter.totals());
            if adapter.is_idle() {
                let order = usize::from(adapter.waiting > 0);
                assert!(self.idle[order].contains(&(adapter.value, at)), "idle {name:?} is not found by its value");
                idle[order] += 1;
            }
            if adapter.running > 0 {
                assert_eq!(self.place(&name).map(|place| self.active[place]), Ok(at), "place of active {name:?}");
                active += adapter.need.pages;
            }
        }
        assert_eq!(self.totals, totals, "sums over adapters");
        assert_eq!([self.idle[0].len(), self.idle[1].len()], idle, "idle adapters");
        assert_eq!(self.active_pages, active, "pages of active adapters");
        assert!(self.active.is_sorted_by_key(|&at| self[at].need.generation), "order of active adapters");
        assert_eq!(self.by_generation.len(), self.iter().count(), "known adapters");
    }
}

impl std::ops::Index<u32> for Residency {
    type Output = Adapter;

    fn index(&self, at: u32) -> &Adapter {
        self.entries[at as usize].as_ref().expect("a named adapter is known")
    }
}
