//! Where an adapter's factors lie in its pages.
//!
//! A factor is held in **strips** of columns, `[strips][rank][width]`. Where a row fits a page there is one strip, as wide as
//! the factor; a longer row, as of an adapter of a large vocabulary, is cut into strips so narrow that a page holds a few runs.
//! So everything else is about rows that fit: they follow each other in the order of the sites, A before B, strip by strip, page
//! by page. They are cut between rows only, one row for each rank, and as a rule after a multiple of [`RUN_ROWS`] rows, so
//! that the kernels read runs of many rows; a factor of a small rank is not cut at all. Nothing is padded to another
//! adapter's rank or another site's size: a page's end is left empty only where the next few rows do not fit.
//!
//! One function decides, for who asks how many pages an adapter needs and for who writes it.

use std::num::NonZeroU32;
use std::ops::Range;

use openlora_types::{AdapterSizes, SiteSize};

use super::super::pages::{CpuPageSet, LINE};
use super::super::vector_math::Element;

/// Rows that are kept together where a page has room for them: as many as the kernels read side by side at most.
const RUN_ROWS: usize = 8;
/// Rows of a strip that a page holds where strips are needed, if it holds as many cache lines: enough that little is lost at a
/// page's end.
const STRIP_ROWS: usize = 4 * RUN_ROWS;

/// Where the rows of one factor lie, the strips' one after the other: `head` rows from `offset` on in page number `page` of
/// the adapter's, then `per_page` rows from the start of each following page.
///
/// Small, because a step with many adapters looks at two of them for every site and adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FactorPlace {
    /// Of each strip.
    rows: u32,
    /// Elements of a row over all strips.
    len: NonZeroU32,
    /// Elements from a row to the next. The last strip may have fewer columns.
    width: u32,
    page: u32,
    /// In elements; on a cache line.
    offset: u32,
    head: u32,
    per_page: u32,
}

/// Rows of one strip that follow each other in one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) rows: Range<usize>,
    /// The strip's.
    pub(super) columns: Range<usize>,
    /// Number in the adapter's pages.
    pub(super) page: usize,
    /// In elements.
    pub(super) offset: usize,
}

impl FactorPlace {
    /// Of a strip.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Elements of a row over all strips.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len.get() as usize
    }

    #[inline(always)]
    pub(super) fn strips(&self) -> usize {
        self.len().div_ceil(self.width())
    }

    /// Elements from a row of a strip to the next.
    #[inline(always)]
    pub(super) fn width(&self) -> usize {
        self.width as usize
    }

    #[inline(always)]
    fn columns(&self, strip: usize) -> Range<usize> {
        strip * self.width()..self.len().min((strip + 1) * self.width())
    }

    /// From `row` of a strip to the end of its run.
    #[inline(always)]
    fn run(&self, strip: usize, row: usize) -> Run {
        let (head, per_page, rows) = (self.head as usize, self.per_page as usize, self.rows());
        // Counted over all strips.
        let first = strip * rows + row;
        let (page, offset, end) = if first < head {
            (self.page as usize, self.offset as usize + first * self.width(), head)
        } else {
            let (page, in_page) = ((first - head) / per_page, (first - head) % per_page);
            (self.page as usize + 1 + page, in_page * self.width(), first - in_page + per_page)
        };
        Run { rows: row..rows.min(end - strip * rows), columns: self.columns(strip), page, offset }
    }

    /// All rows, strip by strip.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> {
        (0..self.strips()).flat_map(move |strip| {
            let mut next = 0;
            std::iter::from_fn(move || {
                let run = (next < self.rows()).then(|| self.run(strip, next))?;
                next = run.rows.end;
                Some(run)
            })
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
    /// # Panics
    /// When a page is less than a cache line.
    pub(super) fn new(sizes: &AdapterSizes, page_bytes: usize, element_bytes: usize) -> Self {
        assert!(page_bytes >= LINE, "pages of {page_bytes} bytes");
        let mut cursor = Cursor { page_bytes, element_bytes, pages: 0, offset: page_bytes, bytes: 0 };
        let mut place = |size: &SiteSize| [cursor.place(size.rank, size.inputs), cursor.place(size.rank, size.outputs)];
        let sites = sizes.sites.iter().map(&mut place).collect();
        Self { sites, pages: cursor.pages, bytes: cursor.bytes }
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
    fn place(&mut self, rows: usize, len: usize) -> FactorPlace {
        // A factor without columns is placed as if it had one: it is divided by its width.
        let len = len.max(1);
        let width = self.width(len);
        let row_bytes = width * self.element_bytes;
        let fit = self.page_bytes / row_bytes;
        let together = RUN_ROWS.min(fit);
        let whole = |rows: usize| rows - rows % together;
        let all_rows = rows.saturating_mul(len.div_ceil(width));
        let room = (self.page_bytes - self.offset) / row_bytes;
        let mut head = if room >= all_rows { all_rows } else { whole(room) };
        if head == 0 {
            self.pages = self.pages.saturating_add(1);
            self.offset = 0;
            head = if fit >= all_rows { all_rows } else { whole(fit) };
        }
        let (page, offset, per_page) = (self.pages - 1, self.offset, whole(fit));
        let rest = all_rows - head;
        let mut end = offset + head * row_bytes;
        if rest > 0 {
            self.pages = self.pages.saturating_add(rest.div_ceil(per_page));
            end = ((rest - 1) % per_page + 1) * row_bytes;
        }
        self.offset = end.next_multiple_of(LINE).min(self.page_bytes);
        self.bytes = self.bytes.saturating_add(rows.saturating_mul(len).saturating_mul(self.element_bytes));
        // What does not fit needs more pages than there are, and is never written.
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        FactorPlace {
            rows: small(rows),
            len: NonZeroU32::new(small(len)).unwrap_or(NonZeroU32::MIN),
            width: small(width),
            page: small(page),
            offset: small(offset / self.element_bytes),
            head: small(head),
            per_page: small(per_page),
        }
    }

    /// Of the strips of rows of `len` elements: all of them where they fit a page, else whole cache lines, which are whole
    /// vectors.
    fn width(&self, len: usize) -> usize {
        let fit = self.page_bytes / self.element_bytes;
        if len <= fit {
            return len;
        }
        let line = LINE / self.element_bytes;
        let most = (fit / STRIP_ROWS / line * line).max(line);
        len.div_ceil(len.div_ceil(most)).next_multiple_of(line)
    }
}

/// The rows of one strip of a factor, to be read.
#[derive(Debug)]
pub(in super::super) struct Rows<'a, T> {
    pages: &'a CpuPageSet,
    place: &'a FactorPlace,
    strip: usize,
    /// `[first run's rows][width]`: all there is of most factors.
    head: &'a [T],
    head_rows: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    /// The strip that has `column`.
    #[inline(always)]
    pub(super) fn new(pages: &'a CpuPageSet, place: &'a FactorPlace, column: usize) -> Self {
        // Nearly always in the first, without a division.
        let strip = if column < place.width() { 0 } else { column / place.width() };
        let run = place.run(strip, 0);
        let head = pages.read(run.page, run.offset * size_of::<T>(), run.rows.len() * place.width());
        Self { pages, place, strip, head, head_rows: run.rows.len() }
    }

    /// Which of the factor's columns these are.
    #[inline(always)]
    pub(in super::super) fn columns(&self) -> Range<usize> {
        self.place.columns(self.strip)
    }

    /// Elements from a row to the next, at least as many as there are columns.
    #[inline(always)]
    pub(in super::super) fn width(&self) -> usize {
        self.place.width()
    }

    /// The rows from `row` on that follow each other in memory: how many, and they, `[rows][width]`.
    #[inline(always)]
    pub(in super::super) fn run(&self, row: usize) -> (usize, &'a [T]) {
        if row < self.head_rows {
            return (self.head_rows - row, &self.head[row * self.width()..]);
        }
        let run = self.place.run(self.strip, row);
        (run.rows.len(), self.pages.read(run.page, run.offset * size_of::<T>(), run.rows.len() * self.width()))
    }
}

#[cfg(test)]
mod tests {
    use openlora_types::{Module, Site};

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
    fn runs(placement: &Placement, element_bytes: usize) -> Vec<(usize, Range<usize>)> {
        let bytes = |place: &FactorPlace, run: Run| {
            run.offset * element_bytes..(run.offset + run.rows.len() * place.width()) * element_bytes
        };
        let factors = placement.sites.iter().flatten();
        factors.flat_map(|place| place.runs().map(|run| (run.page, bytes(place, run)))).collect()
    }

    #[test]
    fn rows_lie_in_order_within_their_pages_and_beside_each_other() {
        let ranks = [1, 2, 7, 8, 9, 16, 31, 64, 255, 256];
        let sites: Vec<_> = ranks.iter().map(|&rank| (rank, 3 + rank % 50, 61 - rank % 50)).collect();
        for page_bytes in [64, 128, 192, 320, 1_024, 4_096, 1 << 20] {
            for element_bytes in [2, 4] {
                let placement = Placement::new(&sizes(&sites), page_bytes, element_bytes);
                let runs = runs(&placement, element_bytes);
                assert!(runs.iter().all(|(_, bytes)| bytes.start % LINE == 0 && bytes.end <= page_bytes));
                let in_order = |pair: &[(usize, Range<usize>)]| {
                    let [(page, bytes), (next_page, next_bytes)] = pair else { unreachable!("pairs") };
                    if page == next_page { bytes.end <= next_bytes.start } else { page + 1 == *next_page }
                };
                assert!(runs.windows(2).all(in_order), "{runs:?}");
                assert_eq!(placement.pages, runs.last().expect("sites").0 + 1);
                let factors = placement.sites.iter().flatten();
                let used: usize = factors.clone().map(|place| place.rows() * place.len() * element_bytes).sum();
                assert_eq!(placement.bytes, used);
                for place in factors {
                    assert_eq!(place.strips() == 1, place.len() * element_bytes <= page_bytes);
                    check_runs(place);
                }
            }
        }
    }

    /// Whether the runs have every number once, strip by strip, and start at any row.
    fn check_runs(place: &FactorPlace) {
        let mut left = place.runs();
        for (strip, first) in (0..place.len()).step_by(place.width()).enumerate() {
            let columns = first..place.len().min(first + place.width());
            let mut row = 0;
            while row < place.rows() {
                let run = left.next().expect("every row has a run");
                assert_eq!((run.rows.start, &run.columns), (row, &columns));
                for row in run.rows.clone() {
                    let offset = run.offset + (row - run.rows.start) * place.width();
                    let rest = Run { rows: row..run.rows.end, offset, ..run.clone() };
                    assert_eq!(place.run(strip, row), rest);
                }
                row = run.rows.end;
            }
        }
        assert_eq!(left.next(), None);
    }

    #[test]
    fn factors_of_small_rank_are_not_cut_and_others_after_whole_runs() {
        let placement = Placement::new(&sizes(&[(8, 100, 36), (40, 30, 20)]), 5_120, 2);
        let lengths = |place: &FactorPlace| place.runs().map(|run| run.rows.len()).collect::<Vec<_>>();
        let found: Vec<_> = placement.sites.iter().flatten().map(lengths).collect();
        // 1,600 and 576 bytes; of 40 x 60 bytes all fit into the 2,944 that are left, of 40 x 40 into 512 eight.
        assert_eq!(found, [vec![8], vec![8], vec![40], vec![8, 32]]);
        assert_eq!(placement.pages, 2);
    }

    #[test]
    fn no_sites_need_no_pages() {
        let placement = Placement::new(&AdapterSizes::default(), 1_024, 2);
        assert_eq!((placement.pages, placement.bytes), (0, 0));
    }

    /// Pages of one site, `(rank, inputs, outputs)`.
    fn pages(site: (usize, usize, usize), page_bytes: usize, element_bytes: usize) -> usize {
        Placement::new(&sizes(&[site]), page_bytes, element_bytes).pages
    }

    #[test]
    fn a_row_longer_than_a_page_wastes_little() {
        // Qwen2.5-0.5B: 24 layers with 2 key-value heads of 64 in blocks of 16, f16 and f32. A of `embed_tokens`.
        for (page_bytes, element_bytes) in [(24 * 2 * 64 * 16 * 2 * 2, 2), (24 * 2 * 64 * 16 * 2 * 4, 4)] {
            let needed = |rank: usize| (rank * (151_936 + 896) * element_bytes).div_ceil(page_bytes);
            let found = |rank: usize| pages((rank, 151_936, 896), page_bytes, element_bytes);
            assert_eq!([1, 8, 12, 64, 256].map(needed), [2, 13, 19, 100, 398]);
            assert_eq!([1, 8, 12, 64, 256].map(found), [2, 13, 19, 101, 403]);
        }
        // A row that just fits is not cut, one more number costs no second page.
        assert_eq!([pages((8, 512, 1), 1_024, 2), pages((8, 513, 1), 1_024, 2)], [9, 9]);
    }

    #[test]
    fn sizes_beyond_any_memory_are_counted_without_overflow() {
        for site in [(1, usize::MAX, 1), (usize::MAX, 1, usize::MAX), (usize::MAX, usize::MAX, usize::MAX)] {
            assert!(pages(site, 1 << 20, 4) >= usize::MAX / (1 << 20), "{site:?}");
        }
    }
}
