//! Who owns which KV block.
//!
//! A block is in exactly one of three states:
//!
//! | state  | references | key           | found in |
//! |--------|------------|---------------|----------|
//! | held   | 1 or more  | none or some  | that many block tables |
//! | cached | 0          | some          | the list of cached blocks, least recently used first |
//! | blank  | 0          | none          | the stack of blank blocks |
//!
//! Cached blocks count as free: they keep a prefix until a blank block is wanted and there is none, then the least
//! recently used one is evicted (as in vLLM v1).

use crate::prefix_cache::{BlockKey, PrefixIndex};

/// "No block" in the links of the list of cached blocks.
const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Block {
    references: u32,
    /// What it holds, if it is found in the index.
    key: Option<BlockKey>,
    /// Neighbours in the list of cached blocks.
    older: u32,
    newer: u32,
}

/// Reference-counted blocks with a prefix index over them. No call allocates after [`BlockPool::new`].
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    blank: Vec<u32>,
    index: PrefixIndex,
    oldest: u32,
    newest: u32,
    cached: usize,
}

impl BlockPool {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let count = u32::try_from(num_blocks).expect("a validated number of blocks fits u32");
        Self {
            blocks: vec![Block { references: 0, key: None, older: NONE, newer: NONE }; num_blocks],
            // A stack: block 0 is handed out first.
            blank: (0..count).rev().collect(),
            index: PrefixIndex::with_capacity(num_blocks),
            oldest: NONE,
            newest: NONE,
            cached: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that no sequence holds.
    pub(crate) fn available(&self) -> usize {
        self.blank.len() + self.cached
    }

    /// Of those, blocks that still hold a prefix.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// A block to write to, held once; evicts the least recently used prefix where there is no blank block.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let block = match self.blank.pop() {
            Some(block) => block,
            None => self.evict_oldest()?,
        };
        self.blocks[block as usize].references = 1;
        Some(block)
    }

    /// The block that holds `key`'s content, held or cached.
    pub(crate) fn lookup(&self, key: &BlockKey) -> Option<u32> {
        self.index.get(key)
    }

    /// Whether nobody holds `block`, so that acquiring it makes one block less available.
    pub(crate) fn is_free(&self, block: u32) -> bool {
        self.blocks[block as usize].references == 0
    }

    /// Holds a block that [`BlockPool::lookup`] found once more.
    pub(crate) fn acquire(&mut self, block: u32) {
        if self.is_free(block) {
            self.unlink(block);
        }
        self.blocks[block as usize].references += 1;
    }

    /// Lets others find a held, full and computed block.
    pub(crate) fn publish(&mut self, block: u32, key: BlockKey) {
        debug_assert!(self.blocks[block as usize].key.is_none(), "block {block} is published twice");
        if self.index.insert_if_absent(key, block) {
            self.blocks[block as usize].key = Some(key);
        }
    }

    /// Gives one reference back. The last one makes the block cached (as the most recently used) or blank.
    pub(crate) fn release(&mut self, block: u32) {
        let entry = &mut self.blocks[block as usize];
        assert!(entry.references > 0, "block {block} is released more often than it was held");
        entry.references -= 1;
        if entry.references > 0 {
            return;
        }
        if entry.key.is_some() {
            self.link_newest(block);
        } else {
            self.blank.push(block);
        }
    }

    /// Gives back a whole table, last block first: a prefix is useless without what precedes it, so the end of a chain
    /// must be evicted before its beginning.
    pub(crate) fn release_all(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            self.release(block);
        }
    }

    fn evict_oldest(&mut self) -> Option<u32> {
        let block = self.oldest;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        let key = self.blocks[block as usize].key.take().expect("a cached block has a key");
        self.index.remove(&key);
        Some(block)
    }

    fn link_newest(&mut self, block: u32) {
        let older = self.newest;
        self.blocks[block as usize].older = older;
        self.blocks[block as usize].newer = NONE;
        match older {
            NONE => self.oldest = block,
            older => self.blocks[older as usize].newer = block,
        }
        self.newest = block;
        self.cached += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Panics unless each block's state is the one that its references and key say, given how often the tables of all
    /// running sequences name each block.
    pub(crate) fn check(&self, named: &[u32]) {
        for (block, (entry, named)) in self.blocks.iter().zip(named).enumerate() {
            assert_eq!(entry.references, *named, "references of block {block} differ from the tables that name it");
            if let Some(key) = &entry.key {
                assert_eq!(self.index.get(key), Some(block as u32), "block {block} is not found under its key");
            }
        }
        let mut seen = vec![false; self.blocks.len()];
        let mut visit = |block: u32, list: &str| {
            assert!(!std::mem::replace(&mut seen[block as usize], true), "block {block} is free twice ({list})");
            assert_eq!(self.blocks[block as usize].references, 0, "held block {block} is in the {list} list");
        };
        for &block in &self.blank {
            visit(block, "blank");
            assert!(self.blocks[block as usize].key.is_none(), "blank block {block} has a key");
        }
        let (mut block, mut older, mut cached) = (self.oldest, NONE, 0);
        while block != NONE {
            visit(block, "cached");
            let entry = &self.blocks[block as usize];
            assert!(entry.key.is_some(), "cached block {block} has no key");
            assert_eq!(entry.older, older, "links of cached block {block}");
            (older, block, cached) = (block, entry.newer, cached + 1);
        }
        assert_eq!((self.newest, self.cached), (older, cached), "end and length of the list of cached blocks");
        let held = self.blocks.iter().filter(|entry| entry.references > 0).count();
        assert_eq!(held + self.available(), self.len(), "blocks are neither held nor free");
        let keyed = self.blocks.iter().filter(|entry| entry.key.is_some()).count();
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
    fn the_least_recently_used_prefix_is_evicted_first_and_only_when_nothing_is_blank() {
        let keys = keys(3);
        let mut pool = BlockPool::new(4);
        let mut table: Vec<u32> = (0..3).map(|_| pool.allocate().expect("room")).collect();
        for (&block, &key) in table.iter().zip(&keys) {
            pool.publish(block, key);
        }
        let blocks = table.clone();
        pool.release_all(&mut table);
        assert_eq!((pool.available(), pool.cached()), (4, 3));

        pool.allocate().expect("the blank block");
        assert_eq!(pool.cached(), 3, "a blank block goes before a cached one");
        // Touching the oldest makes it the newest.
        pool.acquire(blocks[2]);
        pool.release(blocks[2]);
        assert_eq!(pool.allocate(), Some(blocks[1]));
        assert_eq!(pool.lookup(&keys[1]), None);
        assert_eq!(pool.allocate(), Some(blocks[0]));
        assert_eq!(pool.lookup(&keys[2]), Some(blocks[2]));
        assert_eq!(pool.allocate(), Some(blocks[2]));
        assert_eq!(pool.allocate(), None);
        pool.check(&[1; 4]);
    }

    #[test]
    fn a_block_computed_twice_is_shared_once() {
        let keys = keys(1);
        let mut pool = BlockPool::new(2);
        let (first, second) = (pool.allocate().expect("room"), pool.allocate().expect("room"));
        pool.publish(first, keys[0]);
        pool.publish(second, keys[0]);
        assert_eq!(pool.lookup(&keys[0]), Some(first));
        pool.release(second);
        pool.release(first);
        assert_eq!((pool.available(), pool.cached()), (2, 1));
        pool.check(&[0; 2]);
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_release_is_caught() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().expect("room");
        pool.release(block);
        pool.release(block);
    }
}
