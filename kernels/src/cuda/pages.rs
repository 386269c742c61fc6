//! The page pool on the device: equal pages, each of which is a KV block over all layers or a piece of one adapter.
//!
//! Every page has an epoch, counted up whenever it changes owner: odd while an adapter owns it, even while it is KV or
//! free. Which KV block belongs to which sequence is the scheduler's affair; the pool only keeps the two kinds apart.
//!
//! **Why sharing is sound.** KV is read and written by work on [`Stream::Compute`], adapters are written on [`Stream::Copy`] and
//! read on the former. What orders them, whichever way a page goes:
//!
//! - *KV or an adapter, then another adapter*: taking a page borrows the pool mutably, so no step that names it as KV is
//!   enqueued from then on ([`CudaPages::check`] refuses it), and who had it as an adapter has dropped it. Steps enqueued before
//!   may still run: [`CudaPageSet::begin`] lets the copies wait for all of them.
//! - *An adapter, then KV*: dropping the set lets the steps enqueued from then on wait for its copies, whether the
//!   adapter was ever used or not; its readers are earlier steps. Then its epoch becomes even.
//! - *Written, then read*: [`CudaPageSet::settle`], before the first step with the adapter is enqueued, lets steps wait for its copies.
//!
//! **Tables.** Beside its pages an adapter has a table, in memory of its own: giving that back would wait for both streams, and taking it
//! might. So tables outlive adapters, each as large as a power of two, and the next adapter that needs one as large gets it: there are
//! never more of a size than were in use at the same time. What orders their owners is the same. A table is written by copies alone, which
//! are in order; and it is taken before [`CudaPageSet::begin`] lets the copies wait for the steps, so that every step of whoever gave it
//! back has been enqueued by then. Steps wait for the new owner's copies as above.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Address, Device, Element, Memory, Stream};
use crate::pages::{Epochs, Taken};
use crate::{AttentionSpec, KernelError};

const ALIGNED: usize = 256;

/// Bytes of a page: for each layer and key-value head the keys of a block, `[block_size][head_dim]`, then its values, rounded
/// up to 256.
#[must_use]
pub fn page_bytes(spec: &AttentionSpec, layers: usize, element: Element) -> usize {
    let numbers = layers * spec.kv_heads * 2 * spec.block_size * spec.head_dim;
    (numbers * element.bytes()).next_multiple_of(ALIGNED)
}

/// A pool of pages that hold KV blocks or adapters.
#[derive(Debug)]
pub struct CudaPages<D: Device> {
    arena: Arc<Arena<D>>,
}

/// Pages that belong to one adapter, in the order they were asked for. Dropping it, on any thread, gives them back.
#[derive(Debug)]
pub struct CudaPageSet<D: Device> {
    arena: Arc<Arena<D>>,
    pages: Vec<Taken>,
    /// Of [`CudaPageSet::begin`].
    table: Option<Memory<D>>,
    /// Where the copies into them end, until steps wait for it.
    written: Mutex<Option<D::Event>>,
}

/// The memory of all pages, and who owns them.
#[derive(Debug)]
struct Arena<D: Device> {
    device: Arc<D>,
    memory: Memory<D>,
    page_bytes: usize,
    epochs: Epochs,
    /// Tables of adapters that are gone.
    tables: Mutex<Vec<Memory<D>>>,
}

impl<D: Device> Arena<D> {
    fn tables(&self) -> MutexGuard<'_, Vec<Memory<D>>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, page: u32) -> Address {
        self.memory.address().plus(page as usize * self.page_bytes)
    }
}

impl<D: Device> CudaPages<D> {
    /// `pages` pages, all of them free; what is in them is undefined.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(device: &Arc<D>, pages: usize, page_bytes: usize) -> Result<Self, KernelError> {
        let bytes = pages.checked_mul(page_bytes).filter(|_| u32::try_from(pages).is_ok());
        let bytes = bytes.ok_or(KernelError::OutOfMemory { what: "the page pool", bytes: usize::MAX })?;
        let memory = Memory::new(device, bytes)?;
        let (epochs, tables) = (Epochs::new(pages), Mutex::default());
        Ok(Self { arena: Arc::new(Arena { device: Arc::clone(device), memory, page_bytes, epochs, tables }) })
    }

    /// Page 0.
    #[must_use]
    pub fn address(&self) -> Address {
        self.arena.memory.address()
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.arena.page_bytes
    }

    /// Pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.arena.epochs.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes the pages an adapter's.
    ///
    /// # Errors
    /// [`KernelError::Page`] for a page that does not exist or is an adapter's already; then none has been taken.
    pub fn take(&mut self, pages: &[u32]) -> Result<CudaPageSet<D>, KernelError> {
        let pages = self.arena.epochs.take(pages)?;
        Ok(CudaPageSet { arena: Arc::clone(&self.arena), pages, table: None, written: Mutex::new(None) })
    }

    /// Whether all pages of these block tables can be used as KV.
    ///
    /// # Errors
    /// [`KernelError::Page`] for one that does not exist or holds an adapter.
    pub fn check(&self, block_tables: &[u32]) -> Result<(), KernelError> {
        self.arena.epochs.check(block_tables)
    }

    /// Fills all pages that no adapter owns with NaN, whatever the element: tests show by it that nothing unwritten is read.
    ///
    /// # Errors
    /// A device failure.
    pub fn poison(&mut self) -> Result<(), KernelError> {
        let nan = vec![0xff; self.page_bytes()];
        for page in (0..self.len() as u32).filter(|page| self.check(&[*page]).is_ok()) {
            // SAFETY: one page of the arena, which is KV or free.
            unsafe { self.arena.device.write(Stream::Compute, self.arena.address(page), &nan)? };
        }
        Ok(())
    }

    /// A page's bytes once the steps so far are done, for tests.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn read(&self, page: u32) -> Result<Vec<u8>, KernelError> {
        self.arena.memory.read(page as usize * self.page_bytes(), self.page_bytes())
    }
}

impl<D: Device> CudaPageSet<D> {
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

    /// The device they are on.
    #[must_use]
    pub fn device(&self) -> &Arc<D> {
        &self.arena.device
    }

    /// Where the set's page number `index` is.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn address(&self, index: usize) -> Address {
        self.arena.address(self.pages[index].page)
    }

    /// Whether the pages are still this set's.
    ///
    /// # Errors
    /// [`KernelError::Page`] for one that has changed owner since, which nothing but an error in this room can bring about.
    pub fn check(&self) -> Result<(), KernelError> {
        self.arena.epochs.check_taken(&self.pages)
    }

    /// Takes a table of at least `table_bytes` bytes, and lets what is copied from now on wait for all steps enqueued so far: they may
    /// still use the pages and the table.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub(super) fn begin(&mut self, table_bytes: usize) -> Result<(), KernelError> {
        let bytes = table_bytes.next_power_of_two();
        let spare = {
            let mut tables = self.arena.tables();
            tables.iter().position(|table| table.bytes() == bytes).map(|at| tables.swap_remove(at))
        };
        self.table = Some(match spare {
            Some(table) => table,
            None => Memory::new(&self.arena.device, bytes)?,
        });
        let device = self.device();
        device.wait(Stream::Copy, &device.record(Stream::Compute)?)
    }

    /// The table that [`CudaPageSet::begin`] took.
    ///
    /// # Panics
    /// Before that.
    pub(super) fn table(&self) -> &Memory<D> {
        self.table.as_ref().expect("taken by begin")
    }

    /// Copies the table, beside the steps.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When the bytes leave it.
    pub(super) fn write_table(&mut self, bytes: &[u8]) -> Result<(), KernelError> {
        let table = self.table();
        assert!(bytes.len() <= table.bytes(), "{} bytes leave a table", bytes.len());
        // SAFETY: within the table, which is this set's alone.
        unsafe { self.device().write(Stream::Copy, table.address(), bytes) }
    }

    /// Copies `bytes` to the start of the set's page number `index`, beside the steps.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When they leave the page.
    pub(super) fn write(&mut self, index: usize, bytes: &[u8]) -> Result<(), KernelError> {
        assert!(bytes.len() <= self.page_bytes(), "{} bytes leave a page", bytes.len());
        // SAFETY: within a page that is this set's alone.
        unsafe { self.device().write(Stream::Copy, self.address(index), bytes) }
    }

    /// Says that copies end here.
    ///
    /// # Errors
    /// A device failure.
    pub(super) fn finish(&mut self) -> Result<(), KernelError> {
        let event = self.device().record(Stream::Copy)?;
        *self.written.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(event);
        Ok(())
    }

    /// Lets the steps enqueued from now on wait for what was copied.
    ///
    /// # Errors
    /// A device failure.
    pub fn settle(&self) -> Result<(), KernelError> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = written.as_ref() {
            self.device().wait(Stream::Compute, event)?;
            *written = None;
        }
        Ok(())
    }
}

impl<D: Device> Drop for CudaPageSet<D> {
    fn drop(&mut self) {
        // A device that refuses this has failed, and runs no further step.
        let _ = self.settle();
        self.arena.tables().extend(self.table.take());
        self.arena.epochs.give_back(&mut self.pages);
    }
}
