//! Who has which page.
//!
//! A page is in exactly one of four states:
//!
//! | state   | references | key          | found in |
//! |---------|------------|--------------|----------|
//! | held    | 1 or more  | none or some | that many block tables |
//! | cached  | 0          | some         | the list of cached blocks, least recently used first |
//! | adapter | 0          | none         | the page list of one adapter, loading or resident |
//! | blank   | 0          | none         | the stack of blank pages |
//!
//! Held and cached pages are KV blocks. Which cached block or idle adapter goes when a blank page is wanted and there is
//! none is decided in `memory.rs`; this file only keeps the books.

use crate::prefix_cache::{BlockKey, PrefixIndex};

/// "No page" in the links of the list of cached blocks.
const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Page {
    references: u32,
    /// Whether an adapter has it.
    adapter: bool,
    /// What it holds, if it is found in the index.
    key: Option<BlockKey>,
    /// What keeping it is worth while it is cached; see `memory.rs`.
    value: u64,
    /// Neighbours in the list of cached blocks.
    older: u32,
    newer: u32,
}

/// Reference-counted KV blocks with a prefix index over them, and the pages of adapters. No call allocates after [`PagePool::new`].
#[derive(Debug)]
pub(crate) struct PagePool {
    pages: Vec<Page>,
    blank: Vec<u32>,
    index: PrefixIndex,
    oldest: u32,
    newest: u32,
    cached: usize,
}

impl PagePool {
    pub(crate) fn new(num_pages: usize) -> Self {
        let count = u32::try_from(num_pages).expect("a validated number of pages fits u32");
        let page = Page { references: 0, adapter: false, key: None, value: 0, older: NONE, newer: NONE };
        Self {
            pages: vec![page; num_pages],
            // A stack: page 0 is handed out first.
            blank: (0..count).rev().collect(),
            index: PrefixIndex::with_capacity(num_pages),
            oldest: NONE,
            newest: NONE,
            cached: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Pages that hold nothing.
    pub(crate) fn blank(&self) -> usize {
        self.blank.len()
    }

    /// Blocks that no sequence holds and that still hold a prefix.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// A blank page as a block to write to, held once.
    pub(crate) fn take_block(&mut self) -> Option<u32> {
        let page = self.blank.pop()?;
        self.pages[page as usize].references = 1;
        Some(page)
    }

    /// A blank page for an adapter.
    pub(crate) fn take_for_adapter(&mut self) -> Option<u32> {
        let page = self.blank.pop()?;
        self.pages[page as usize].adapter = true;
        Some(page)
    }

    /// Makes all pages of an adapter blank.
    pub(crate) fn give_back(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            let was = std::mem::replace(&mut self.pages[page as usize].adapter, false);
            assert!(was, "page {page} is given back and no adapter had it");
            self.blank.push(page);
        }
    }

    /// The block that holds `key`'s content, held or cached.
    pub(crate) fn lookup(&self, key: &BlockKey) -> Option<u32> {
        self.index.get(key)
    }

    /// Whether nobody holds `block`, so that acquiring it makes one block less available.
    pub(crate) fn is_free(&self, block: u32) -> bool {
        self.pages[block as usize].references == 0
    }

    /// Holds a block that [`PagePool::lookup`] found once more.
    pub(crate) fn acquire(&mut self, block: u32) {
        if self.is_free(block) {
            self.unlink(block);
        }
        self.pages[block as usize].references += 1;
    }

    /// Lets others find a held, full and computed block.
    pub(crate) fn publish(&mut self, block: u32, key: BlockKey) {
        debug_assert!(self.pages[block as usize].key.is_none(), "block {block} is published twice");
        if self.index.insert_if_absent(key, block) {
            self.pages[block as usize].key = Some(key);
        }
    }

    /// Gives one reference back. The last one makes the block cached (as the most recently used, worth `value` or what the one
    /// before it is worth) or blank.
    pub(crate) fn release(&mut self, block: u32, value: u64) {
        let before = self.pages.get(self.newest as usize).map_or(0, |page| page.value);
        let entry = &mut self.pages[block as usize];
        assert!(entry.references > 0, "block {block} is released more often than it was held");
        entry.references -= 1;
        if entry.references > 0 {
            return;
        }
        if entry.key.is_some() {
            entry.value = value.max(before);
            self.link_newest(block);
        } else {
            self.blank.push(block);
        }
    }

    /// Gives back a whole table, last block first: a prefix is useless without what precedes it, so the end of a chain
    /// must be evicted before its beginning.
    pub(crate) fn release_all(&mut self, table: &mut Vec<u32>, value: u64) {
        while let Some(block) = table.pop() {
            self.release(block, value);
        }
    }

    /// What the least recently used cached block is worth; none of the others is worth less.
    pub(crate) fn oldest_value(&self) -> Option<u64> {
        self.pages.get(self.oldest as usize).map(|page| page.value)
    }

    /// Forgets the least recently used prefix block; its page is blank then.
    pub(crate) fn evict_oldest(&mut self) {
        let block = self.oldest;
        self.unlink(block);
        let key = self.pages[block as usize].key.take().expect("a cached block has a key");
        self.index.remove(&key);
        self.blank.push(block);
    }

    fn link_newest(&mut self, block: u32) {
        let older = self.newest;
        self.pages[block as usize].older = older;
        self.pages[block as usize].newer = NONE;
        match older {
            NONE => self.oldest = block,
            older => self.pages[older as usize].newer = block,
        }
        self.newest = block;
        self.cached += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Page { older, newer, .. } = self.pages[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.pages[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.pages[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Panics unless each page's state is the one that its fields say, given how often the tables of all running sequences
    /// name each page and how often the page lists of adapters do.
    pub(crate) fn check(&self, named: &[u32], of_adapters: &[u32]) {
        for (at, page) in self.pages.iter().enumerate() {
            assert_eq!(page.references, named[at], "references of block {at} differ from the tables that name it");
            assert_eq!(u32::from(page.adapter), of_adapters[at], "adapters that list page {at}");
            if let Some(key) = &page.key {
                assert_eq!(self.index.get(key), Some(at as u32), "block {at} is not found under its key");
            }
        }
        let mut seen = vec![false; self.pages.len()];
        let mut visit = |page: u32, list: &str| {
            assert!(!std::mem::replace(&mut seen[page as usize], true), "page {page} is free twice ({list})");
            let entry = &self.pages[page as usize];
            assert!(entry.references == 0 && !entry.adapter, "page {page} has an owner and is in the {list} list");
        };
        for &page in &self.blank {
            visit(page, "blank");
            assert!(self.pages[page as usize].key.is_none(), "blank page {page} has a key");
        }
        let (mut block, mut older, mut cached, mut value) = (self.oldest, NONE, 0, 0);
        while block != NONE {
            visit(block, "cached");
            let entry = &self.pages[block as usize];
            assert!(entry.key.is_some(), "cached block {block} has no key");
            assert_eq!(entry.older, older, "links of cached block {block}");
            assert!(entry.value >= value, "cached block {block} is worth less than an older one");
            (older, block, cached, value) = (block, entry.newer, cached + 1, entry.value);
        }
        assert_eq!((self.newest, self.cached), (older, cached), "end and length of the list of cached blocks");
        let owned = self.pages.iter().filter(|page| page.references > 0 || page.adapter).count();
        assert_eq!(owned + self.blank() + self.cached, self.len(), "pages have no owner and are not free");
        let keyed = self.pages.iter().filter(|page| page.key.is_some()).count();
        assert_eq!(keyed, self.index.len(), "the prefix index names blocks that do not hold its keys");
    }
}

#[cfg(test)]
mod tests {
    use openlora_types::TenantId;

    use super::*;

    fn keys(count: u32) -> Vec<BlockKey> {
        let root = BlockKey::root(None, &TenantId("t".into()), "");
        (0..count).map(|i| root.child(&[i])).collect()
    }

    #[test]
    fn the_least_recently_used_prefix_is_evicted_first() {
        let keys = keys(3);
        let mut pool = PagePool::new(3);
        let mut table: Vec<u32> = (0..3).map(|_| pool.take_block().expect("room")).collect();
        for (&block, &key) in table.iter().zip(&keys) {
            pool.publish(block, key);
        }
        let blocks = table.clone();
        pool.release_all(&mut table, 1);
        assert_eq!((pool.blank(), pool.cached(), pool.take_block()), (0, 3, None));
        // Touching the oldest makes it the newest.
        pool.acquire(blocks[2]);
        pool.release(blocks[2], 2);
        for (at, value) in [(1, 1), (0, 1), (2, 2)] {
            assert_eq!(pool.oldest_value(), Some(value));
            assert_eq!(pool.lookup(&keys[at]), Some(blocks[at]));
            pool.evict_oldest();
            assert_eq!(pool.lookup(&keys[at]), None);
            assert_eq!(pool.take_block(), Some(blocks[at]));
        }
        assert_eq!(pool.oldest_value(), None);
        pool.check(&[1; 3], &[0; 3]);
    }

    #[test]
    fn a_block_computed_twice_is_shared_once() {
        let keys = keys(1);
        let mut pool = PagePool::new(2);
        let (first, second) = (pool.take_block().expect("room"), pool.take_block().expect("room"));
        pool.publish(first, keys[0]);
        pool.publish(second, keys[0]);
        assert_eq!(pool.lookup(&keys[0]), Some(first));
        pool.release(second, 0);
        pool.release(first, 0);
        assert_eq!((pool.blank(), pool.cached()), (1, 1));
        pool.check(&[0; 2], &[0; 2]);
    }

    #[test]
    fn an_adapter_takes_pages_wherever_they_are() {
        let mut pool = PagePool::new(4);
        let blocks: Vec<_> = (0..4).map(|_| pool.take_block().expect("room")).collect();
        pool.release(blocks[3], 0);
        pool.release(blocks[1], 0);
        let mut pages: Vec<_> = (0..2).map(|_| pool.take_for_adapter().expect("room")).collect();
        assert_eq!((pages.as_slice(), pool.take_for_adapter()), ([1, 3].as_slice(), None));
        pool.check(&[1, 0, 1, 0], &[0, 1, 0, 1]);
        pool.give_back(&mut pages);
        assert_eq!((pages.len(), pool.blank()), (0, 2));
        pool.check(&[1, 0, 1, 0], &[0; 4]);
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_release_is_caught() {
        let mut pool = PagePool::new(1);
        let block = pool.take_block().expect("room");
        pool.release(block, 0);
        pool.release(block, 0);
    }
}
