//! Where an adapter's factors lie in its pages.
//!
//! Factors follow each other in the order of the sites, A before B, page by page. A factor is cut between rows only, one row
//! for each rank, and as a rule after a multiple of [`RUN_ROWS`] rows, so that the kernels read runs of many rows; a factor of
//! a small rank is not cut at all. Nothing is padded to another adapter's rank or another site's size: a page's end is left
//! empty only where the next few rows do not fit.
//!
//! One function decides, for who asks how many pages an adapter needs and for who writes it.

use std::ops::Range;

use openlora_types::{AdapterSizes, Site, SiteSize};

use super::super::pages::{CpuPageSet, LINE};
use super::super::vector_math::Element;
use crate::KernelError;

/// Rows that are kept together where a page has room for them: as many as the kernels read side by side at most.
const RUN_ROWS: usize = 8;

/// Where the rows of one factor lie: `head` rows from `offset` on in page number `page` of the adapter's, then `per_page` rows
/// from the start of each following page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FactorPlace {
    pub(super) rows: usize,
    /// Elements of a row.
    pub(super) len: usize,
    row_bytes: usize,
    page: usize,
    /// In bytes, on a cache line.
    offset: usize,
    head: usize,
    per_page: usize,
}

/// Rows of one factor that follow each other in one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) rows: Range<usize>,
    /// Number in the adapter's pages.
    pub(super) page: usize,
    /// In bytes.
    pub(super) offset: usize,
}

impl FactorPlace {
    /// From `row` to the end of its run.
    fn run(&self, row: usize) -> Run {
        if row < self.head {
            return Run { rows: row..self.head, page: self.page, offset: self.offset + row * self.row_bytes };
        }
        let (page, in_page) = ((row - self.head) / self.per_page, (row - self.head) % self.per_page);
        let end = self.rows.min(row - in_page + self.per_page);
        Run { rows: row..end, page: self.page + 1 + page, offset: in_page * self.row_bytes }
    }

    /// All rows, in order.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let run = (next < self.rows).then(|| self.run(next))?;
            next = run.rows.end;
            Some(run)
        })
    }
}

/// Where all factors of an adapter lie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// A's rows, `[rank][inputs]`, and B's transposed, `[rank][outputs]`, of each site.
    pub(super) sites: Vec<[FactorPlace; 2]>,
    /// Pages used.
    pub(super) pages: usize,
    /// Bytes used in them.
    pub(super) bytes: usize,
}

impl Placement {
    /// Of an adapter in pages of `page_bytes`, with `element_bytes` for each number.
    ///
    /// # Errors
    /// [`KernelError::AdapterRow`] when a page does not hold one row.
    pub(super) fn new(sizes: &AdapterSizes, page_bytes: usize, element_bytes: usize) -> Result<Self, KernelError> {
        let mut cursor = Cursor { page_bytes, element_bytes, pages: 0, offset: page_bytes, bytes: 0 };
        let place = |size: &SiteSize| {
            let a = cursor.place(size.site, "A", size.rank, size.inputs)?;
            Ok([a, cursor.place(size.site, "B", size.rank, size.outputs)?])
        };
        let sites = sizes.sites.iter().map(place).collect::<Result<_, KernelError>>()?;
        Ok(Self { sites, pages: cursor.pages, bytes: cursor.bytes })
    }
}

/// Where the next factor goes at the earliest.
struct Cursor {
    page_bytes: usize,
    element_bytes: usize,
    /// Pages begun.
    pages: usize,
    /// In the last of them.
    offset: usize,
    bytes: usize,
}

impl Cursor {
    fn place(&mut self, site: Site, factor: &'static str, rows: usize, len: usize) -> Result<FactorPlace, KernelError> {
        // A factor without columns takes no room, but a row's number is divided by what fits a page.
        let row_bytes = len.saturating_mul(self.element_bytes).max(1);
        let fit = self.page_bytes / row_bytes;
        if fit == 0 {
            return Err(KernelError::AdapterRow { site, factor, bytes: row_bytes, page_bytes: self.page_bytes });
        }
        let together = RUN_ROWS.min(fit);
        let whole = |rows: usize| rows - rows % together;
        let room = (self.page_bytes - self.offset) / row_bytes;
        let mut head = if room >= rows { rows } else { whole(room) };
        if head == 0 {
            self.pages = self.pages.saturating_add(1);
            self.offset = 0;
            head = if fit >= rows { rows } else { whole(fit) };
        }
        let (page, offset, per_page) = (self.pages - 1, self.offset, whole(fit));
        let rest = rows - head;
        let mut end = offset + head * row_bytes;
        if rest > 0 {
            self.pages = self.pages.saturating_add(rest.div_ceil(per_page));
            end = ((rest - 1) % per_page + 1) * row_bytes;
        }
        self.offset = end.next_multiple_of(LINE).min(self.page_bytes);
        self.bytes = self.bytes.saturating_add(rows.saturating_mul(row_bytes));
        Ok(FactorPlace { rows, len, row_bytes, page, offset, head, per_page })
    }
}

/// The rows of one factor, to be read.
#[derive(Debug)]
pub(in super::super) struct Rows<'a, T> {
    pages: &'a CpuPageSet,
    place: &'a FactorPlace,
    /// `[head][len]`: all there is of most factors.
    head: &'a [T],
}

impl<'a, T: Element> Rows<'a, T> {
    #[inline(always)]
    pub(super) fn new(pages: &'a CpuPageSet, place: &'a FactorPlace) -> Self {
        Self { pages, place, head: pages.read(place.page, place.offset, place.head * place.len) }
    }

    /// The rows from `row` on that follow each other in memory: how many, and they, `[rows][len]`.
    #[inline(always)]
    pub(in super::super) fn run(&self, row: usize) -> (usize, &'a [T]) {
        if row < self.place.head {
            return (self.place.head - row, &self.head[row * self.place.len..]);
        }
        let run = self.place.run(row);
        (run.rows.len(), self.pages.read(run.page, run.offset, run.rows.len() * self.place.len))
    }
}

#[cfg(test)]
mod tests {
    use openlora_types::Module;

    use super::*;

    fn sizes(sites: &[(usize, usize, usize)]) -> AdapterSizes {
        let size = |(layer, &(rank, inputs, outputs)): (usize, &(usize, usize, usize))| SiteSize {
            site: Site { layer: layer as u32, module: Module::Up },
            rank,
            inputs,
            outputs,
            b_bias: false,
            dora: false,
        };
        AdapterSizes { sites: sites.iter().enumerate().map(size).collect() }
    }

    /// The runs of all factors as (page, bytes).
    fn runs(placement: &Placement) -> Vec<(usize, Range<usize>)> {
        let bytes = |place: &FactorPlace, run: Run| run.offset..run.offset + run.rows.len() * place.row_bytes;
        let factors = placement.sites.iter().flatten();
        factors.flat_map(|place| place.runs().map(|run| (run.page, bytes(place, run)))).collect()
    }

    #[test]
    fn rows_lie_in_order_within_their_pages_and_beside_each_other() {
        let ranks = [1, 2, 7, 8, 9, 16, 31, 64, 255, 256];
        let sites: Vec<_> = ranks.iter().map(|&rank| (rank, 3 + rank % 50, 61 - rank % 50)).collect();
        for page_bytes in [128, 192, 320, 1_024, 4_096, 1 << 20] {
            for element_bytes in [2, 4] {
                if page_bytes < 64 * element_bytes {
                    continue;
                }
                let sizes = sizes(&sites);
                let placement = Placement::new(&sizes, page_bytes, element_bytes).expect("rows fit");
                let runs = runs(&placement);
                assert!(runs.iter().all(|(_, bytes)| bytes.start % LINE == 0 && bytes.end <= page_bytes));
                let in_order = |pair: &[(usize, Range<usize>)]| {
                    let [(page, bytes), (next_page, next_bytes)] = pair else { unreachable!("pairs") };
                    if page == next_page { bytes.end <= next_bytes.start } else { page + 1 == *next_page }
                };
                assert!(runs.windows(2).all(in_order), "{runs:?}");
                assert_eq!(placement.pages, runs.last().expect("sites").0 + 1);
                let used: usize = runs.iter().map(|(_, bytes)| bytes.len()).sum();
                assert_eq!(placement.bytes, used);
                for place in placement.sites.iter().flatten() {
                    let rows: Vec<usize> = place.runs().flat_map(|run| run.rows).collect();
                    assert_eq!(rows, (0..place.rows).collect::<Vec<_>>());
                    // From a row in the middle on as well.
                    for row in 0..place.rows {
                        let whole = place.runs().find(|run| run.rows.contains(&row)).expect("every row has a run");
                        let offset = whole.offset + (row - whole.rows.start) * place.row_bytes;
                        assert_eq!(place.run(row), Run { rows: row..whole.rows.end, page: whole.page, offset });
                    }
                }
            }
        }
    }

    #[test]
    fn factors_of_small_rank_are_not_cut_and_others_after_whole_runs() {
        let placement = Placement::new(&sizes(&[(8, 100, 36), (40, 30, 20)]), 5_120, 2).expect("rows fit");
        let lengths = |place: &FactorPlace| place.runs().map(|run| run.rows.len()).collect::<Vec<_>>();
        let found: Vec<_> = placement.sites.iter().flatten().map(lengths).collect();
        // 1,600 and 576 bytes; of 40 x 60 bytes all fit into the 2,944 that are left, of 40 x 40 into 512 eight.
        assert_eq!(found, [vec![8], vec![8], vec![40], vec![8, 32]]);
        assert_eq!(placement.pages, 2);
    }

    #[test]
    fn no_sites_need_no_pages() {
        let placement = Placement::new(&AdapterSizes::default(), 1_024, 2).expect("nothing to place");
        assert_eq!((placement.pages, placement.bytes), (0, 0));
    }

    #[test]
    fn a_row_longer_than_a_page_is_refused_by_name() {
        for (inputs, factor) in [(33, "factor A"), (usize::MAX, "factor A"), (3, "factor B")] {
            let error =
                Placement::new(&sizes(&[(2, 32, 32), (2, inputs, 40)]), 64, 2).expect_err("too long").to_string();
            assert!(
                error.contains("layers.1") && error.contains(factor) && error.contains("page of the pool has 64"),
                "{error}"
            );
        }
    }
}
