//! What lies in the pool's pages, and the loads under way: the engine's and the backend's side of a plan.

use std::collections::{BTreeMap, BTreeSet};

use openlora_scheduler::{AdapterNeed, SchedulerConfig, StepPlan};
use openlora_types::Generation;

use crate::rng::{Rng, mix};

/// An adapter on the device or on its way there.
struct OnDevice {
    pages: Vec<u32>,
    /// The step in which its load ends, while it is loading.
    loading_until: Option<usize>,
}

/// The pages and their owners.
pub(crate) struct Device {
    /// What was written last into each place of each page, by adapters and KV alike.
    pub(crate) words: Vec<u64>,
    page_words: usize,
    owners: Vec<Option<Generation>>,
    adapters: BTreeMap<Generation, OnDevice>,
    /// What the scheduler was told of every adapter.
    pub(crate) needs: BTreeMap<Generation, AdapterNeed>,
    pub(crate) pinned: BTreeSet<Generation>,
    load_steps_max: usize,
    pub(crate) loads: u64,
    pub(crate) evictions: u64,
}

fn word(generation: &Generation, at: usize) -> u64 {
    generation.0.chunks_exact(8).fold(mix(at as u64), |word, bytes| mix(word ^ u64::from(bytes[0])))
}

impl Device {
    pub(crate) fn new(config: &SchedulerConfig, load_steps_max: usize) -> Self {
        Self {
            words: vec![0; config.num_pages * config.block_size],
            page_words: config.block_size,
            owners: vec![None; config.num_pages],
            adapters: BTreeMap::new(),
            needs: BTreeMap::new(),
            pinned: BTreeSet::new(),
            load_steps_max,
            loads: 0,
            evictions: 0,
        }
    }

    pub(crate) fn is_resident(&self, generation: &Generation) -> bool {
        self.adapters.get(generation).is_some_and(|adapter| adapter.loading_until.is_none())
    }

    pub(crate) fn loading(&self) -> usize {
        self.adapters.values().filter(|adapter| adapter.loading_until.is_some()).count()
    }

    pub(crate) fn resident(&self) -> usize {
        self.adapters.len() - self.loading()
    }

    pub(crate) fn pages(&self) -> usize {
        self.owners.iter().flatten().count()
    }

    /// Pages of pinned adapters, loaded or not, but for `own`.
    pub(crate) fn pinned_pages(&self, own: Option<&Generation>) -> usize {
        self.pinned.iter().filter(|generation| Some(*generation) != own).map(|g| self.needs[g].pages).sum()
    }

    /// Carries out what a plan says of adapters: drops first, then loads into pages that nobody has. `leased` are the
    /// adapters of the sequences that ran in the last step and still do.
    pub(crate) fn follow(&mut self, plan: &StepPlan, leased: &BTreeSet<Generation>, step: usize, rng: &mut Rng) {
        for generation in &plan.evicted {
            assert!(self.is_resident(generation), "{generation:?} is evicted and not resident");
            assert!(!self.pinned.contains(generation), "{generation:?} is evicted and pinned");
            assert!(!leased.contains(generation), "{generation:?} is evicted and leased");
            self.drop_adapter(generation);
            self.evictions += 1;
        }
        for load in &plan.loads {
            let (generation, pages) = (load.generation, plan.pages(load));
            assert_eq!(pages.len(), self.needs[&generation].pages, "pages for {generation:?}");
            for &page in pages {
                let owner = self.owners[page as usize].replace(generation);
                assert_eq!(owner, None, "page {page} is given to {generation:?}");
            }
            let loading_until = Some(step + rng.between(0, self.load_steps_max));
            let before = self.adapters.insert(generation, OnDevice { pages: pages.to_vec(), loading_until });
            assert!(before.is_none(), "{generation:?} is loaded over itself");
            self.write(&generation);
            self.loads += 1;
        }
        assert_eq!(plan.load_pages.len(), plan.loads.iter().map(|load| load.pages.len()).sum::<usize>());
        for &page in &plan.block_tables {
            let owner = self.owners[page as usize];
            assert_eq!(owner, None, "page {page} is a KV block and belongs to an adapter");
        }
    }

    /// A load that ends now.
    pub(crate) fn finished_load(&self, step: usize) -> Option<Generation> {
        let due = |adapter: &OnDevice| adapter.loading_until.is_some_and(|until| until <= step);
        self.adapters.iter().find(|(_, adapter)| due(adapter)).map(|(generation, _)| *generation)
    }

    /// Writes the last of an adapter: whatever came into its pages during the load shows, or is shown to others.
    pub(crate) fn arrive(&mut self, generation: &Generation) {
        self.check(generation);
        self.adapters.get_mut(generation).expect("it is loading").loading_until = None;
    }

    pub(crate) fn drop_adapter(&mut self, generation: &Generation) {
        for page in self.adapters.remove(generation).expect("it is on the device").pages {
            self.owners[page as usize] = None;
        }
    }

    fn write(&mut self, generation: &Generation) {
        for (nth, &page) in self.adapters[generation].pages.iter().enumerate() {
            for at in 0..self.page_words {
                self.words[page as usize * self.page_words + at] = word(generation, nth * self.page_words + at);
            }
        }
    }

    /// An adapter that is read must be what was loaded.
    pub(crate) fn check(&self, generation: &Generation) {
        for (nth, &page) in self.adapters[generation].pages.iter().enumerate() {
            for at in 0..self.page_words {
                let read = self.words[page as usize * self.page_words + at];
                assert_eq!(
                    read,
                    word(generation, nth * self.page_words + at),
                    "page {nth} of {generation:?} was written to"
                );
            }
        }
    }
}
