//! Where an adapter's factors lie in its pages.
//!
//! A factor is `[rank][length]`, A's length being the inputs and B's, transposed, the outputs; rows are padded to 16 bytes, which
//! the widths of models are a multiple of. It is cut into **pieces** of up to 8 ranks that are contiguous, each in one page:
//!
//! ```text
//! page of the pool         piece: ranks 8..16 of A of layer 0's q                 where 8 rows are longer than a page: strips
//! +--------------------+   +------------------------------------------+          +---------+---------+----+
//! | q A  ranks 0..8    |   | rank 8    inputs 0 .. 4096               |          | 0..8    | 0..8    |    |  strip 0, 1, ... of
//! | q A  ranks 8..16   |   | rank 9                                   |          | strip 0 | strip 1 | .. |  `width` columns, the
//! | q B  ranks 0..8    |   |  ..                                      |          +---------+---------+----+  last narrower
//! | q B  ranks 8..16   |   | rank 15                                  |          | 8..11   | 8..11   |    |  rank 11: 3 rows, not 8
//! | k A  ..            |   +------------------------------------------+          +---------+---------+----+
//! +--------------------+   starts at a multiple of 128 bytes                     in this order: strip 0, 0..8, 8..11, strip 1, ...
//! ```
//!
//! Nothing is padded to another adapter's rank or another site's size: a page's end is left empty only where the next piece does
//! not fit.

use openlora_types::{AdapterSizes, SiteSize};

/// Ranks of a piece at most.
pub(super) const GROUP: usize = 8;
/// Rows are padded to it, and widths of strips are multiples of it: what a lane loads at once.
pub(super) const VECTOR: usize = 16;
/// Where pieces start.
const LINE: usize = 128;
/// Pieces that a page holds where strips are needed, if it holds as many: enough that little is lost at its end.
const STRIP_PIECES: usize = 4;
/// More pieces than any adapter has.
const PIECES_MAX: usize = 1 << 24;

/// How a factor is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Factor {
    pub(super) rank: usize,
    /// Numbers of a row, padded.
    pub(super) length: usize,
    /// Columns of a strip; `length` where there is one.
    pub(super) width: usize,
}

/// Where a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Number in the adapter's pages.
    pub(super) page: usize,
    /// In bytes.
    pub(super) offset: usize,
}

impl Factor {
    fn new(rank: usize, length: usize, page_bytes: usize, element_bytes: usize) -> Self {
        let vector = VECTOR / element_bytes;
        let length = length.max(1).div_ceil(vector).saturating_mul(vector);
        let rows = rank.clamp(1, GROUP);
        let fit = page_bytes / rows / element_bytes;
        if length <= fit {
            return Self { rank, length, width: length };
        }
        let most = (fit / STRIP_PIECES / vector * vector).max(vector);
        let width = length.div_ceil(length.div_ceil(most)).next_multiple_of(vector);
        Self { rank, length, width }
    }

    pub(super) fn groups(&self) -> usize {
        self.rank.div_ceil(GROUP)
    }

    pub(super) fn strips(&self) -> usize {
        self.length.div_ceil(self.width)
    }

    /// Strip by strip: which ranks and which columns.
    pub(super) fn pieces(self) -> impl Iterator<Item = (std::ops::Range<usize>, std::ops::Range<usize>)> {
        let Self { rank, length, width } = self;
        (0..self.strips()).flat_map(move |strip| {
            let columns = strip * width..length.min((strip + 1) * width);
            (0..rank).step_by(GROUP).map(move |first| (first..rank.min(first + GROUP), columns.clone()))
        })
    }
}

/// Where all factors of an adapter lie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// A and transposed B of each site, and where their pieces are.
    pub(super) sites: Vec<[(Factor, Vec<Place>); 2]>,
    /// Pages used.
    pub(super) pages: usize,
    /// Bytes of the factors.
    pub(super) bytes: usize,
}

/// How many pages an adapter of these sizes needs; more than there can be for sizes beyond any memory.
///
/// # Panics
/// When a page is less than 256 bytes.
pub(super) fn pages_needed(sizes: &AdapterSizes, page_bytes: usize, element_bytes: usize) -> usize {
    Placement::of(sizes, page_bytes, element_bytes, false).map_or(usize::MAX, |placement| placement.pages)
}

impl Placement {
    /// Of an adapter in pages of `page_bytes`, with `element_bytes` for each number; `None` for sizes beyond any memory.
    ///
    /// # Panics
    /// When a page is less than 256 bytes.
    pub(super) fn new(sizes: &AdapterSizes, page_bytes: usize, element_bytes: usize) -> Option<Self> {
        Self::of(sizes, page_bytes, element_bytes, true)
    }

    fn of(sizes: &AdapterSizes, page_bytes: usize, element_bytes: usize, listed: bool) -> Option<Self> {
        assert!(page_bytes >= 256, "pages of {page_bytes} bytes");
        let mut cursor = Cursor { page_bytes, pages: 0, offset: page_bytes };
        let mut placement = Self { sites: Vec::new(), pages: 0, bytes: 0 };
        for size in &sizes.sites {
            let SiteSize { rank, inputs, outputs, .. } = *size;
            let numbers = rank.checked_mul(inputs.checked_add(outputs)?)?;
            placement.bytes = placement.bytes.checked_add(numbers.checked_mul(element_bytes)?)?;
            let mut place = |length| {
                let factor = Factor::new(rank, length, page_bytes, element_bytes);
                let count = factor.strips().checked_mul(factor.groups()).filter(|count| *count <= PIECES_MAX)?;
                let mut places = Vec::with_capacity(if listed { count } else { 0 });
                for (ranks, columns) in factor.pieces() {
                    let place = cursor.place(ranks.len() * columns.len() * element_bytes);
                    if listed {
                        places.push(place);
                    }
                }
                Some((factor, places))
            };
            let site = [place(inputs)?, place(outputs)?];
            if listed {
                placement.sites.push(site);
            }
        }
        placement.pages = cursor.pages;
        Some(placement)
    }
}

/// Where the next piece goes at the earliest.
struct Cursor {
    page_bytes: usize,
    /// Pages begun.
    pages: usize,
    /// In the last of them.
    offset: usize,
}

impl Cursor {
    fn place(&mut self, bytes: usize) -> Place {
        debug_assert!(bytes <= self.page_bytes);
        if self.page_bytes - self.offset < bytes {
            self.pages += 1;
            self.offset = 0;
        }
        let place = Place { page: self.pages - 1, offset: self.offset };
        self.offset = (self.offset + bytes).next_multiple_of(LINE).min(self.page_bytes);
        place
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

    #[test]
    fn pieces_hold_every_number_once_and_lie_beside_each_other_within_pages() {
        let ranks = [1, 2, 7, 8, 9, 16, 31, 64, 255, 256];
        let sites: Vec<_> = ranks.iter().map(|&rank| (rank, 3 + rank % 50, 611 - rank % 50)).collect();
        for page_bytes in [256, 512, 5_120, 10_240, 1 << 20] {
            for element_bytes in [2, 4] {
                let sizes = sizes(&sites);
                let placement = Placement::new(&sizes, page_bytes, element_bytes).expect("small");
                assert_eq!(pages_needed(&sizes, page_bytes, element_bytes), placement.pages);
                let mut end = Place { page: 0, offset: 0 };
                for (factor, places) in placement.sites.iter().flatten() {
                    let mut seen = vec![false; factor.rank * factor.length];
                    assert_eq!(places.len(), factor.strips() * factor.groups());
                    for ((ranks, columns), place) in factor.pieces().zip(places) {
                        let bytes = ranks.len() * columns.len() * element_bytes;
                        assert!(place.offset % LINE == 0 && place.offset + bytes <= page_bytes);
                        let follows = place.page == end.page && place.offset >= end.offset;
                        assert!(follows || (place.page == end.page + 1 && place.offset == 0), "{end:?} {place:?}");
                        assert!(follows || page_bytes - end.offset < bytes, "a page is left early");
                        end = Place { page: place.page, offset: (place.offset + bytes).next_multiple_of(LINE) };
                        for rank in ranks {
                            for column in columns.clone() {
                                let seen = &mut seen[rank * factor.length + column];
                                assert!(!*seen);
                                *seen = true;
                            }
                        }
                    }
                    assert!(seen.iter().all(|seen| *seen));
                }
                assert_eq!(placement.pages, end.page + 1);
            }
        }
    }

    #[test]
    fn true_rank_decides_and_little_is_lost() {
        let needed = |site, page_bytes| pages_needed(&sizes(&[site]), page_bytes, 2);
        // Llama-3.1-8B: 32 layers of 8 key-value heads of 128 in blocks of 16, bf16; A and B of a down projection.
        let page = 32 * 8 * 2 * 16 * 128 * 2;
        assert_eq!([1, 8, 16, 64, 256].map(|rank| needed((rank, 14_336, 4_096), page)), [1, 1, 1, 2, 5]);
        // Qwen2.5-0.5B: 24 layers of 2 heads of 64. A of `embed_tokens` is longer than a page.
        let page = 24 * 2 * 2 * 16 * 64 * 2;
        let bytes = |rank: usize| (rank * (151_936 + 896) * 2).div_ceil(page);
        assert_eq!([1, 8, 12, 64].map(bytes), [2, 13, 19, 100]);
        assert_eq!([1, 8, 12, 64].map(|rank| needed((rank, 151_936, 896), page)), [2, 13, 20, 101]);
        assert_eq!(pages_needed(&AdapterSizes::default(), page, 2), 0);
    }

    #[test]
    fn sizes_beyond_any_memory_are_counted_without_overflow() {
        for site in [(1, usize::MAX, 1), (usize::MAX, 1, usize::MAX), (usize::MAX, usize::MAX, usize::MAX)] {
            assert_eq!(pages_needed(&sizes(&[site]), 1 << 20, 4), usize::MAX, "{site:?}");
        }
    }
}
