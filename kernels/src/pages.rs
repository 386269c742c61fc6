//! What the backends' pools of pages and their adapters have in common, whatever memory they are in: who owns a page, and whether
//! factors fit each other.

use std::sync::atomic::{AtomicU64, Ordering};

use openlora_types::{Matrix, Module, SiteWeights};

use crate::KernelError;

/// Of each page, how often it has changed owner: odd while an adapter owns it, even while it is KV or free. Pools make a page odd
/// while they are borrowed mutably; page sets, when they are dropped, make it even on any thread.
#[derive(Debug)]
pub(crate) struct Epochs(Box<[AtomicU64]>);

/// A page and the epoch it was taken with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) page: u32,
    epoch: u64,
}

impl Epochs {
    /// Of so many pages, all free.
    pub(crate) fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    /// Pages.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The page's epoch; `None` when there is no such page.
    #[inline(always)]
    pub(crate) fn of(&self, page: u32) -> Option<u64> {
        Some(self.0.get(page as usize)?.load(Ordering::Acquire))
    }

    /// Makes the pages an adapter's; on an error none has been taken.
    pub(crate) fn take(&self, pages: &[u32]) -> Result<Vec<Taken>, KernelError> {
        let mut all = Vec::with_capacity(pages.len());
        for &page in pages {
            let refused = match self.of(page) {
                None => "does not exist in this pool",
                Some(epoch) if !epoch.is_multiple_of(2) => "belongs to an adapter already",
                Some(epoch) => {
                    // Only what is given back changes an epoch beside this, and that only makes an odd one even.
                    self.0[page as usize].store(epoch + 1, Ordering::Release);
                    all.push(Taken { page, epoch: epoch + 1 });
                    continue;
                }
            };
            self.give_back(&mut all);
            return Err(wrong(page, refused));
        }
        Ok(all)
    }

    /// Whether all pages of these block tables can be used as KV.
    pub(crate) fn check(&self, block_tables: &[u32]) -> Result<(), KernelError> {
        for &page in block_tables {
            match self.of(page) {
                Some(epoch) if epoch.is_multiple_of(2) => {}
                Some(_) => return Err(wrong(page, "is in a block table, but an adapter owns it")),
                None => return Err(wrong(page, "is in a block table, but does not exist in this pool")),
            }
        }
        Ok(())
    }

    /// Whether the pages are still whose they were when they were taken.
    #[inline]
    pub(crate) fn check_taken(&self, pages: &[Taken]) -> Result<(), KernelError> {
        let lost = pages.iter().find(|taken| self.of(taken.page) != Some(taken.epoch));
        lost.map_or(Ok(()), |taken| Err(wrong(taken.page, "has changed owner since its adapter was loaded")))
    }

    /// Makes the pages free.
    pub(crate) fn give_back(&self, pages: &mut Vec<Taken>) {
        for Taken { page, epoch } in pages.drain(..) {
            // A page that were somebody else's by now would be left alone.
            let mine = &self.0[page as usize];
            let _ = mine.compare_exchange(epoch, epoch.wrapping_add(1), Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// As if a page had been given back and taken again behind its owner's back.
    #[cfg(test)]
    pub(crate) fn disturb(&self, page: u32) {
        self.0[page as usize].fetch_add(2, Ordering::AcqRel);
    }
}

fn wrong(page: u32, what: &'static str) -> KernelError {
    KernelError::Page { page, what }
}

/// Whether the site's parts fit each other; that they fit the model was checked where the model is known.
pub(crate) fn check_site(site: &SiteWeights, output_scale: Option<&[f32]>, layers: usize) -> Result<(), KernelError> {
    let (inputs, outputs, rank) = (site.a.cols, site.b.rows, site.rank());
    let error = |matrix: &Matrix| KernelError::AdapterShape {
        site: site.site,
        rows: matrix.rows,
        cols: matrix.cols,
        inputs,
        outputs,
    };
    let whole = |matrix: &Matrix| matrix.rows.checked_mul(matrix.cols) == Some(matrix.elements.len());
    let in_layer = !matches!(site.site.module, Module::Embed | Module::LmHead);
    if rank == 0 || !whole(&site.a) || in_layer && site.site.layer as usize >= layers {
        return Err(error(&site.a));
    }
    let vector_fits = |vector: Option<&[f32]>| vector.is_none_or(|vector| vector.len() == outputs);
    if site.b.cols != rank || !whole(&site.b) || !vector_fits(site.b_bias.as_deref()) || !vector_fits(output_scale) {
        return Err(error(&site.b));
    }
    Ok(())
}
