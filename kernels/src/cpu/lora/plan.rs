//! What is to be done for the rows of one linear, cut into pieces for the threads.
//!
//! The layers of a model are alike, and so are most adapters' layers: a plan made for one serves for the next as well.

use std::ops::Range;

use openlora_types::Module;

use super::{Adapt, CpuAdapter, SiteFactors};
use crate::{KernelError, LoraSegment};

/// Rows of a piece: few enough that their inputs stay in the nearest cache and that a batch of one adapter occupies all
/// threads.
const PIECE_ROWS: usize = 16;
/// Ranks of a shrinking piece.
const PIECE_RANKS: usize = 16;
/// Columns of an expanding piece: when many rows give many pieces anyway, and when a few rows must keep all threads busy.
const PIECE_COLUMNS: usize = 640;
const PIECE_COLUMNS_FEW_ROWS: usize = 192;
const FEW_ROWS: usize = 8;
/// Multiply-adds below which the caller does a part alone: waking another thread takes longer.
const ALONE: usize = 1 << 15;

/// One site of one segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) segment: usize,
    pub(super) span: usize,
    /// Of its first element in what has been shrunk.
    pub(super) shrunk: usize,
    /// 0 where the adapter has nothing at this site and only the bias is added.
    pub(super) rank: usize,
    /// Columns of a strip of B.
    strip: usize,
}

/// A part of a job: rows of the step, and ranks or columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) job: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) first: usize,
    pub(super) count: usize,
    /// Multiply-adds, and one for each output.
    pub(super) work: usize,
}

/// Pieces in order, and where each worker's begin.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    pub(super) all: Vec<Piece>,
    /// One for each worker and the end.
    starts: Vec<usize>,
}

impl Pieces {
    fn clear(&mut self) {
        self.all.clear();
        self.starts.clear();
    }

    /// Appends the pieces of `rows` by some ranks or columns, at most `most` at a time, that cost `each` multiply-adds.
    fn add(&mut self, rows: Piece, (all, each): (Range<usize>, usize), most: usize) {
        let mut first = all.start;
        while first < all.end {
            let count = most.min(all.end - first);
            self.all.push(Piece { first, count, work: rows.rows * count * each, ..rows });
            first += count;
        }
    }

    /// Gives each worker a run of about the same work; all to the first where there is less than `alone`.
    fn share(&mut self, threads: usize, alone: usize) {
        let work: usize = self.all.iter().map(|piece| piece.work).sum();
        let threads = if work < alone { 1 } else { threads };
        let mut done = 0;
        self.starts.push(0);
        for (number, piece) in self.all.iter().enumerate() {
            while done * threads >= work * self.starts.len() {
                self.starts.push(number);
            }
            done += piece.work;
        }
    }

    /// Whether the first worker has all.
    pub(super) fn are_for_one_worker(&self) -> bool {
        self.starts.len() == 1
    }

    /// The worker's.
    pub(super) fn of(&self, worker: usize) -> Range<usize> {
        let start = |worker: usize| self.starts.get(worker).copied().unwrap_or(self.all.len());
        start(worker)..start(worker + 1)
    }
}

/// Jobs and their pieces.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What they were planned for, where they are the same for the sites of other layers.
    made_for: Option<Key>,
    /// The spans' modules and outputs.
    spans: Vec<(Module, Range<usize>)>,
    /// The rows' adapters and how many rows have each in turn, together all rows: by their [`CpuAdapter::number`], 0 for none.
    segments: Vec<(u64, usize)>,
    pub(super) jobs: Vec<Job>,
    pub(super) shrinks: Pieces,
    pub(super) expands: Pieces,
    /// Elements that are shrunk to.
    pub(super) shrunk: usize,
}

/// All that decides a plan but its spans and segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    threads: usize,
    bias: bool,
}

impl Plan {
    /// Plans what the adapters of `rows` rows of `inputs` do at the sites of a linear; false when that is nothing.
    ///
    /// # Errors
    /// [`KernelError::Page`] when an adapter's pages are not its own any more.
    pub(super) fn make<'a>(
        &mut self,
        threads: usize,
        adapt: &Adapt<'a>,
        (rows, inputs): (usize, usize),
    ) -> Result<bool, KernelError> {
        let modules = adapt.sites.iter().fold(0, |modules, span| modules | 1 << span.site.module as u32);
        let with_sites = |segment: &LoraSegment<'a, CpuAdapter>| segment.adapter.filter(|adapter| adapter.has(modules));
        let (mut any, mut uniform) = (adapt.bias.is_some(), true);
        for adapter in adapt.lora.segments.iter().filter_map(with_sites) {
            adapter.check()?;
            any = true;
            uniform &= adapter.is_uniform(modules);
        }
        if !any {
            return Ok(false);
        }
        let key = Key { threads, bias: adapt.bias.is_some() };
        let spans = adapt.sites.iter().map(|span| (span.site.module, span.outputs.clone()));
        let segments = adapt.lora.segments.iter();
        let segments = segments.map(|segment| (with_sites(segment).map_or(0, CpuAdapter::number), segment.rows));
        let is_made = uniform
            && self.made_for == Some(key)
            && spans.clone().eq(self.spans.iter().cloned())
            && segments.clone().eq(self.segments.iter().copied());
        if is_made {
            return Ok(true);
        }
        self.made_for = None;
        self.spans.clear();
        self.spans.extend(spans);
        self.segments.clear();
        self.segments.extend(segments);
        self.list(adapt, modules, (rows, inputs));
        if self.jobs.is_empty() {
            return Ok(false);
        }
        self.shrinks.share(threads, 0);
        self.expands.share(threads, ALONE);
        self.made_for = uniform.then_some(key);
        Ok(true)
    }

    /// Lists the jobs and their pieces.
    fn list(&mut self, adapt: &Adapt<'_>, modules: u32, (rows, inputs): (usize, usize)) {
        let columns_most = if rows <= FEW_ROWS { PIECE_COLUMNS_FEW_ROWS } else { PIECE_COLUMNS };
        let Self { jobs, shrinks, expands, shrunk, .. } = self;
        jobs.clear();
        shrinks.clear();
        expands.clear();
        *shrunk = 0;
        for (i, segment) in adapt.lora.segments.iter().enumerate() {
            let adapter = segment.adapter.filter(|adapter| adapter.has(modules));
            if adapter.is_none() && adapt.bias.is_none() {
                continue;
            }
            let first_job = jobs.len();
            for (j, span) in adapt.sites.iter().enumerate() {
                let site = adapter.and_then(|adapter| adapter.site(span.index));
                if site.is_none() && adapt.bias.is_none() {
                    continue;
                }
                if let Some(site) = site {
                    assert_eq!((site.inputs(), site.outputs()), (inputs, span.outputs.len()), "{}: shape", span.site);
                }
                let rank = site.map_or(0, SiteFactors::rank);
                let strip = site.map_or(usize::MAX, SiteFactors::output_strip);
                jobs.push(Job { segment: i, span: j, shrunk: *shrunk, rank, strip });
                *shrunk += segment.rows * rank;
            }
            // Rows outside, so that a worker has all sites of some rows, and no two have a site each of different size.
            for row in (0..segment.rows).step_by(PIECE_ROWS) {
                let (rows, row) = (PIECE_ROWS.min(segment.rows - row), segment.row + row);
                for (number, job) in (first_job..).zip(&jobs[first_job..]) {
                    let piece = Piece { job: number, row, rows, first: 0, count: 0, work: 0 };
                    shrinks.add(piece, (0..job.rank, inputs), PIECE_RANKS);
                    let outputs = adapt.sites[job.span].outputs.len();
                    for first in (0..outputs).step_by(job.strip.clamp(1, outputs.max(1))) {
                        let columns = first..outputs.min(first.saturating_add(job.strip));
                        expands.add(piece, (columns, job.rank + 1), columns_most);
                    }
                }
            }
        }
    }
}
