//! The page pool: one arena of equal pages, each of which is a KV block over all layers or a piece of one adapter.
//!
//! Every page has an epoch, counted up whenever it changes owner: odd while an adapter owns it, even while it is KV or
//! free. Which KV block belongs to which sequence is the scheduler's affair; the pool only keeps the two kinds apart.
//!
//! **Why sharing the arena is sound.** Memory is reached by three ways, and each page by one of them at a time:
//!
//! - KV is written through [`KvWriter`], which borrows the pool mutably, and read through [`CpuPages::page`], which borrows
//!   it. Both refuse a page with an odd epoch.
//! - A page's epoch becomes odd in [`CpuPages::take`] alone, which borrows the pool mutably: no [`KvWriter`] and nothing
//!   that [`CpuPages::page`] lent exists then. So a page that a KV operation found even stays even while it runs.
//! - A page with an odd epoch belongs to the one [`CpuPageSet`] that took it. It is written through `&mut` of the set, before
//!   the set becomes part of an adapter, and read through `&`. Dropping the set, on whatever thread, makes the epoch even
//!   with release ordering, and whoever finds it even has loaded it with acquire ordering: what the adapter's readers did
//!   is over when KV is written there.
//!
//! A pool is one value and cannot be cloned, so there is one `&mut` of it. The arena lives until the pool and all sets are gone.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use half::f16;
use memmap2::MmapRaw;

use super::kv::{self, KvLayout};
use super::pool::Disjoint;
use super::tensor::mapped;
use crate::pages::{Epochs, Taken};
use crate::{AttentionSpec, KernelError, Precision};

/// Every page starts on a cache line.
pub(super) const LINE: usize = 64;

/// A pool of pages that hold KV blocks, f16 with [`Precision::Quantised`] and f32 with [`Precision::F32`], or adapters.
#[derive(Debug)]
pub struct CpuPages {
    arena: Arc<Arena>,
    pub(super) layout: KvLayout,
    pub(super) precision: Precision,
}

/// Pages that belong to one adapter, in the order they were asked for. Dropping it gives them back.
#[derive(Debug)]
pub struct CpuPageSet {
    arena: Arc<Arena>,
    pages: Vec<Taken>,
}

/// The memory of all pages, and who owns them.
#[derive(Debug)]
struct Arena {
    memory: MmapRaw,
    /// Of the first page in `memory`.
    start: usize,
    page_bytes: usize,
    epochs: Epochs,
}

impl Arena {
    fn new(pages: usize, page_bytes: usize) -> Result<Self, KernelError> {
        let what = "the page pool";
        let bytes = pages.checked_mul(page_bytes).filter(|_| pages <= u32::MAX as usize);
        let (memory, start) = mapped(bytes.ok_or(KernelError::OutOfMemory { what, bytes: usize::MAX })?, what)?;
        let epochs = Epochs::new(pages);
        Ok(Self { memory: memory.into(), start, page_bytes, epochs })
    }

    /// Where `bytes` of a page begin. Reaching them is the caller's responsibility.
    ///
    /// # Panics
    /// When they leave the page or the page does not exist.
    #[inline(always)]
    fn place(&self, page: u32, bytes: &Range<usize>) -> *mut u8 {
        assert!((page as usize) < self.epochs.len(), "page {page} is outside the pool");
        assert!(bytes.start <= bytes.end && bytes.end <= self.page_bytes, "{bytes:?} leave a page");
        // SAFETY: the mapping holds `start` and all pages after it.
        unsafe { self.memory.as_mut_ptr().add(self.start + page as usize * self.page_bytes + bytes.start) }
    }
}

impl CpuPages {
    /// `pages` pages for a model of `layers` layers, all of them zero and free.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(spec: &AttentionSpec, layers: usize, pages: usize, precision: Precision) -> Result<Self, KernelError> {
        let arena = Arc::new(Arena::new(pages, kv::page_bytes(spec, layers, precision))?);
        Ok(Self { arena, layout: KvLayout::new(spec, layers), precision })
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.arena.page_bytes
    }

    /// Makes the pages an adapter's.
    ///
    /// # Errors
    /// [`KernelError::Page`] for a page that does not exist or is an adapter's already; then none has been taken.
    pub fn take(&mut self, pages: &[u32]) -> Result<CpuPageSet, KernelError> {
        let pages = self.arena.epochs.take(pages)?;
        Ok(CpuPageSet { arena: Arc::clone(&self.arena), pages })
    }

    /// Whether all pages of these block tables can be used as KV.
    ///
    /// # Errors
    /// [`KernelError::Page`] for one that does not exist or holds an adapter.
    pub fn check(&self, block_tables: &[u32]) -> Result<(), KernelError> {
        self.arena.epochs.check(block_tables)
    }

    /// A KV block's numbers over all layers, laid out as [`super::kv`] says.
    ///
    /// # Panics
    /// When there is no such page or it holds an adapter.
    #[inline(always)]
    pub(super) fn page<T: Pod>(&self, page: u32) -> &[T] {
        let len = self.layout.page_elements();
        let start = self.kv_place::<T>(page);
        // SAFETY: `len` numbers within the page, aligned, initialised since they were mapped; any bits are a `T`. The epoch is
        // even and stays so while self is borrowed, and KV is not written meanwhile (the module's argument).
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// For writing KV.
    pub(super) fn writer<T: Pod>(&mut self) -> KvWriter<'_, T> {
        KvWriter { pages: self, element: PhantomData }
    }

    #[inline(always)]
    fn kv_place<T: Pod>(&self, page: u32) -> *mut T {
        const { assert!(align_of::<T>() <= LINE) };
        let place = self.arena.place(page, &(0..self.layout.page_elements() * size_of::<T>()));
        assert!(self.arena.epochs.of(page).is_some_and(|epoch| epoch.is_multiple_of(2)), "page {page} is an adapter's");
        place.cast()
    }

    /// Fills all pages that no adapter owns with one number: tests poison them with NaN to show that nothing unwritten is read.
    pub fn fill(&mut self, value: f32) {
        match self.precision {
            Precision::Quantised => self.fill_with(f16::from_f32(value)),
            Precision::F32 => self.fill_with(value),
        }
    }

    fn fill_with<T: Pod>(&mut self, value: T) {
        let bytes = 0..self.arena.page_bytes;
        for page in 0..self.arena.epochs.len() as u32 {
            if self.check(&[page]).is_ok() {
                let start = self.arena.place(page, &bytes).cast::<T>();
                // SAFETY: the whole page, aligned and initialised. Its epoch is even and self is borrowed mutably.
                unsafe { std::slice::from_raw_parts_mut(start, bytes.len() / size_of::<T>()) }.fill(value);
            }
        }
    }
}

/// The pool while KV is written. Threads share it.
pub(super) struct KvWriter<'a, T> {
    pages: &'a CpuPages,
    element: PhantomData<&'a mut [T]>,
}

impl<T: Pod> KvWriter<'_, T> {
    /// A KV block's numbers over all layers. Parts of one page that overlap must not live at the same time, through whichever
    /// [`Disjoint`] they were reached.
    ///
    /// # Panics
    /// When there is no such page or it holds an adapter.
    #[inline(always)]
    pub(super) fn page(&self, page: u32) -> Disjoint<'_, T> {
        let len = self.pages.layout.page_elements();
        // SAFETY: `len` numbers within the page, aligned and initialised. The pool is borrowed mutably for as long as self
        // lives and the page's epoch is even, so only what this function returns reaches them (the module's argument).
        unsafe { Disjoint::from_raw(self.pages.kv_place(page), len) }
    }
}

impl CpuPageSet {
    /// Pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.arena.page_bytes
    }

    /// Whether the pages are still this set's.
    ///
    /// # Errors
    /// [`KernelError::Page`] for one that has changed owner since, which nothing but an error in this room can bring about.
    #[inline]
    pub fn check(&self) -> Result<(), KernelError> {
        self.arena.epochs.check_taken(&self.pages)
    }

    /// `len` numbers of the set's page number `index`, from `offset` bytes on.
    ///
    /// # Panics
    /// When they leave the page or are not aligned.
    #[inline(always)]
    pub(super) fn read<T: Pod>(&self, index: usize, offset: usize, len: usize) -> &[T] {
        let start = self.arena.place(self.pages[index].page, &(offset..offset + len * size_of::<T>())).cast::<T>();
        assert!(start.is_aligned());
        // SAFETY: within the page, aligned, initialised since it was mapped; any bits are a `T`. The page is this set's alone and
        // is written through `&mut self` only.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// As [`Self::read`], for writing.
    ///
    /// # Panics
    /// When they leave the page or are not aligned.
    pub(super) fn write<T: Pod>(&mut self, index: usize, offset: usize, len: usize) -> &mut [T] {
        let start = self.arena.place(self.pages[index].page, &(offset..offset + len * size_of::<T>())).cast::<T>();
        assert!(start.is_aligned());
        // SAFETY: as in `read`, and self is borrowed mutably. No set has a page twice, because taking it again fails.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

impl Drop for CpuPageSet {
    fn drop(&mut self) {
        self.arena.epochs.give_back(&mut self.pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(pages: usize) -> CpuPages {
        let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 6, block_size: 4, scale: 1.0, norm_eps: 0.0 };
        CpuPages::new(&spec, 2, pages, Precision::F32).expect("memory")
    }

    fn message<T: std::fmt::Debug>(result: Result<T, KernelError>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn a_page_has_one_owner_until_it_is_given_back() {
        let mut pool = pool(4);
        let set = pool.take(&[2, 0]).expect("free");
        assert_eq!(message(pool.take(&[1, 2])), "page 2 belongs to an adapter already");
        assert_eq!(message(pool.take(&[3, 3])), "page 3 belongs to an adapter already");
        assert_eq!(message(pool.take(&[3, 4])), "page 4 does not exist in this pool");
        assert_eq!(message(pool.check(&[1, 3, 0])), "page 0 is in a block table, but an adapter owns it");
        assert_eq!(message(pool.check(&[4])), "page 4 is in a block table, but does not exist in this pool");
        pool.check(&[1, 3]).expect("what could not be taken together was not taken at all");
        std::thread::spawn(move || drop(set)).join().expect("no panic");
        pool.check(&[0, 1, 2, 3]).expect("all are free");
        drop(pool.take(&[0, 1, 2, 3]).expect("all are free"));
    }

    #[test]
    fn an_epoch_counts_every_change_of_owner() {
        let mut pool = pool(2);
        for round in 0..3 {
            assert_eq!(pool.arena.epochs.of(1), Some(2 * round));
            let set = pool.take(&[1]).expect("free");
            assert_eq!(pool.arena.epochs.of(1), Some(2 * round + 1));
            drop(set);
        }
        assert_eq!(pool.arena.epochs.of(0), Some(0));
    }

    #[test]
    fn a_set_whose_page_has_another_epoch_is_refused() {
        let mut pool = pool(3);
        let set = pool.take(&[0, 2]).expect("free");
        set.check().expect("both are the set's");
        pool.arena.epochs.disturb(2);
        assert_eq!(message(set.check()), "page 2 has changed owner since its adapter was loaded");
    }

    #[test]
    fn pages_outlive_the_pool_in_their_set() {
        let mut pool = pool(3);
        let mut set = pool.take(&[2, 1]).expect("free");
        drop(pool);
        set.write::<f32>(0, 64, 3).fill(5.0);
        set.write::<f32>(1, 64, 3).fill(7.0);
        assert_eq!(set.read::<f32>(0, 64, 3), [5.0; 3]);
        assert_eq!(set.read::<f32>(1, 60, 5), [0.0, 7.0, 7.0, 7.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "leave a page")]
    fn a_set_reaches_no_further_than_its_page() {
        let set = pool(2).take(&[0]).expect("free");
        let _ = set.read::<f32>(0, set.page_bytes() - 4, 2);
    }

    #[test]
    fn filling_leaves_adapters_alone() {
        let mut pool = pool(2);
        let mut set = pool.take(&[0]).expect("free");
        set.write::<f32>(0, 0, 2).fill(3.0);
        pool.fill(f32::NAN);
        assert_eq!(set.read::<f32>(0, 0, 3), [3.0, 3.0, 0.0]);
        assert!(pool.page::<f32>(1).iter().all(|value| value.is_nan()));
    }

    #[test]
    fn a_pool_that_cannot_exist_is_an_error() {
        let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 64, block_size: 16, scale: 1.0, norm_eps: 0.0 };
        for pages in [u32::MAX as usize + 1, usize::MAX / 2] {
            let error = CpuPages::new(&spec, 1, pages, Precision::F32).expect_err("too large");
            assert!(error.to_string().starts_with("the page pool: "), "{error}");
        }
    }
}
