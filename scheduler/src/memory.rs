//! One pool for KV blocks and adapters, and who is evicted from it.
//!
//! Cached prefix blocks and idle adapters stay until a page is wanted and none is blank. Then the one of least value goes,
//! by **GreedyDual-Size with frequency** (Cao and Irani 1997, "Cost-Aware WWW Proxy Caching Algorithms", section 4; Cherkasova
//! 1998, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy"): at each use an entry is worth
//! `H = L + uses * cost / pages`, and when one is evicted, `L` rises to its `H`. So what costs much to get back for the pages
//! that it fills and what many ask for stays longer, and what is not used grows worthless as `L` passes it by. The cost of an
//! adapter is the time to load it again. That of a block is the time to compute it again, times the share of released blocks
//! that were found again lately: where all prompts differ, blocks are worth next to nothing and leave the pool to adapters. All
//! blocks of a time have one cost, so they go in the order of their last use and only the first of them is ever compared.
//!
//! An idle adapter that waiting sequences want goes only when nothing else is left.

use openlora_types::Generation;

use crate::page_pool::PagePool;
use crate::residency::{Adapter, Residency, State};
use crate::{AdapterLoad, SchedulerConfig, StepPlan};

/// Released blocks over which it is counted how many are found again, and how many are taken for found at first.
const REUSE_WINDOW: u64 = 4_096;
const REUSE_PRIOR: u64 = 64;

/// The pool with all that lives in it.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) pages: PagePool,
    pub(crate) adapters: Residency,
    /// `L`: what the last thing evicted was worth. It never falls.
    floor: u64,
    block_micros: u64,
    /// Blocks that were released and, of all, those that a sequence found again; both halved now and then.
    released: u64,
    found: u64,
    /// Uses of adapters so far.
    uses: u64,
    pub(crate) adapter_evictions: u64,
}

impl Memory {
    pub(crate) fn new(config: &SchedulerConfig) -> Self {
        Self {
            pages: PagePool::new(config.num_pages),
            adapters: Residency::with_capacity(config.max_loras.min(config.max_num_seqs)),
            floor: 0,
            block_micros: config.block_micros,
            released: 0,
            found: 0,
            uses: 0,
            adapter_evictions: 0,
        }
    }

    /// Pages that are blank or that eviction can make blank.
    pub(crate) fn available(&self) -> usize {
        self.pages.blank() + self.pages.cached() + self.adapters.totals().idle_pages
    }

    /// A block to write to. The caller made sure that a page is available.
    pub(crate) fn allocate_block(&mut self, evicted: &mut Vec<Generation>) -> u32 {
        self.make_blank(1, &[], evicted);
        self.pages.take_block().expect("a page was made blank")
    }

    /// Gives a sequence's blocks back.
    pub(crate) fn release_blocks(&mut self, table: &mut Vec<u32>) {
        self.released += table.len() as u64;
        if self.released > REUSE_WINDOW {
            (self.released, self.found) = (self.released / 2, self.found / 2);
        }
        // Until a good part of a window has passed, blocks count as found again.
        let share = (self.found + REUSE_PRIOR).min(self.released + REUSE_PRIOR);
        let value = self.block_micros.saturating_mul(share) / (self.released + REUSE_PRIOR);
        self.pages.release_all(table, self.floor.saturating_add(value));
    }

    /// A sequence found so many of its blocks.
    pub(crate) fn count_found(&mut self, blocks: usize) {
        self.found += blocks as u64;
    }

    /// Starts loading an absent adapter, sparing the `shielded` ones. The caller made sure that the pages are available.
    pub(crate) fn load(&mut self, at: u32, shielded: &[u32], plan: &mut StepPlan) {
        let need = self.adapters[at].need;
        self.make_blank(need.pages, shielded, &mut plan.evicted);
        let pages: Vec<u32> = (0..need.pages).map_while(|_| self.pages.take_for_adapter()).collect();
        let start = plan.load_pages.len();
        plan.load_pages.extend_from_slice(&pages);
        plan.loads.push(AdapterLoad { generation: need.generation, pages: start..plan.load_pages.len() });
        self.adapters.change(at, |adapter| {
            (adapter.state, adapter.pages) = (State::Loading, pages);
        });
    }

    /// Changes who uses an adapter; where it becomes idle, it was used just now.
    pub(crate) fn change_use(&mut self, at: u32, change: impl FnOnce(&mut Adapter)) {
        let Self { adapters, floor, uses, .. } = self;
        adapters.change(at, |adapter| {
            let (was_idle, running) = (adapter.is_idle(), adapter.running);
            change(adapter);
            adapter.uses += u64::from(adapter.running > running);
            if adapter.is_idle() && !was_idle {
                *uses += 1;
                let cost = adapter.need.load_micros.saturating_mul(adapter.uses.max(1)) / adapter.need.pages as u64;
                adapter.value = (floor.saturating_add(cost), *uses);
            }
        });
    }

    /// Takes all pages of an adapter back.
    pub(crate) fn unload(&mut self, at: u32) {
        let mut pages = self.adapters.change(at, |adapter| {
            (adapter.state, adapter.uses) = (State::Absent, 0);
            std::mem::take(&mut adapter.pages)
        });
        self.pages.give_back(&mut pages);
    }

    fn make_blank(&mut self, count: usize, shielded: &[u32], evicted: &mut Vec<Generation>) {
        while self.pages.blank() < count {
            let block = self.pages.oldest_value();
            let unwanted = self.adapters.unwanted();
            match (block, unwanted) {
                (Some(value), adapter) if adapter.is_none_or(|(other, _)| value <= other) => {
                    self.pages.evict_oldest();
                    self.floor = self.floor.max(value);
                }
                (_, Some(adapter)) => self.evict(adapter, evicted),
                _ => self.evict(self.adapters.wanted(shielded).expect("the pages were available"), evicted),
            }
        }
    }

    fn evict(&mut self, (value, at): (u64, u32), evicted: &mut Vec<Generation>) {
        evicted.push(self.adapters[at].need.generation);
        self.unload(at);
        self.adapter_evictions += 1;
        self.floor = self.floor.max(value);
    }

    /// Panics unless every page has the owner that the tables of running sequences and the adapters name.
    pub(crate) fn check(&self, named: &[u32]) {
        let mut of_adapters = vec![0; self.pages.len()];
        for (_, adapter) in self.adapters.iter() {
            adapter.pages.iter().for_each(|&page| of_adapters[page as usize] += 1);
        }
        self.pages.check(named, &of_adapters);
        self.adapters.check();
    }
}
