//! LoRA on the processor: what each row's adapter adds to a linear's output, for rows of many adapters in one call (Punica's
//! SGMV, Chen et al. 2023, section 4).
//!
//! There are two parts, each shared by all threads: *shrink*, `z = scale A x` for every adapted site of every row, beside the
//! base linear's multiplication; then *expand*, `out += B z`. A part is cut into pieces of one adapter, one site, some rows
//! and some ranks or columns; each thread has a run of pieces with its share of the work, so that one adapter of rank 256
//! beside thirty of rank 8 keeps nobody waiting. Nothing is padded to the largest rank.
//!
//! With many adapters every number is read for a row or two, from memory, which would take longer than the arithmetic. So
//! each thread asks for what its pieces of both parts read while it multiplies ([`Beside::reads`]).
//!
//! **A row's bits** depend on its own adapter alone: an element of `z` is one chain of multiply-adds over the inputs and one
//! sum over 16 lanes, or the sum of one for each strip of A where its rows are longer than a page; an output is one chain over
//! the ranks, then the additions and products of the definition in [`openlora_types::SiteWeights`].

mod adapter;
mod kernels;
mod placement;

pub use adapter::CpuAdapter;
pub(super) use adapter::SiteFactors;
pub(super) use kernels::{Columns, Outputs, expand};

use std::ops::Range;

use half::f16;

use super::linear::Beside;
use super::pool::Disjoint;
use super::vector_math::{Element, Kernel, Simd, dispatch};
use super::{CpuTensor, Isa, Pool};
use crate::{KernelError, LoraRows, LoraSegment, Precision, SiteSpan};
use kernels::{Strided, shrink};
use placement::Rows;

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

/// What to apply to a linear's output.
#[derive(Clone, Copy)]
pub struct Adapt<'a> {
    /// The linear's sites.
    pub sites: &'a [SiteSpan],
    /// Which adapter each row has.
    pub lora: LoraRows<'a, CpuAdapter>,
    /// The base linear's bias where it has not been added yet; given if and only if [`rescales`] says so. DoRA scales
    /// `W x`, and not the bias that is added to it.
    pub bias: Option<&'a [f32]>,
}

/// Whether some row's adapter scales the output of one of these sites (DoRA): then the linear leaves its bias out, and
/// [`apply`] adds it to every row.
#[must_use]
pub fn rescales(sites: &[SiteSpan], lora: LoraRows<'_, CpuAdapter>) -> bool {
    let scales = |adapter: &CpuAdapter, span: &SiteSpan| {
        adapter.site(span.index).is_some_and(|site| site.output_scale().is_some())
    };
    let mut adapters = lora.segments.iter().filter_map(|segment| segment.adapter);
    adapters.any(|adapter| sites.iter().any(|span| scales(adapter, span)))
}

/// Buffers that are kept from step to step.
#[derive(Debug, Default)]
pub struct LoraScratch {
    jobs: Vec<Job>,
    shrinks: Pieces,
    expands: Pieces,
    /// `[rows][rank]` of each job, one after the other.
    pub(super) shrunk: Vec<f32>,
}

impl LoraScratch {
    /// Makes room for `rows` rows whose adapters have at most `ranks` ranks over the sites of one linear.
    pub fn reserve(&mut self, rows: usize, ranks: usize) {
        let more = |needed: usize, len: usize| needed.saturating_sub(len);
        self.shrunk.reserve(more(rows * ranks, self.shrunk.len()));
    }
}

/// One site of one segment.
#[derive(Clone, Copy, Debug)]
struct Job {
    segment: usize,
    span: usize,
    /// Of its first element in [`LoraScratch::shrunk`].
    shrunk: usize,
    /// 0 where the adapter has nothing at this site and only the bias is added.
    rank: usize,
    /// Columns of a strip of B.
    strip: usize,
}

/// A part of a job: rows of the step, and ranks or columns.
#[derive(Clone, Copy, Debug)]
struct Piece {
    job: usize,
    row: usize,
    rows: usize,
    first: usize,
    count: usize,
    /// Multiply-adds, and one for each output.
    work: usize,
}

/// Pieces in order, and where each worker's begin.
#[derive(Debug, Default)]
struct Pieces {
    all: Vec<Piece>,
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

    /// The worker's, of `threads`.
    fn of(&self, worker: usize) -> Range<usize> {
        let start = |worker: usize| self.starts.get(worker).copied().unwrap_or(self.all.len());
        start(worker)..start(worker + 1)
    }
}

/// What is to be done for the rows of one linear: shrinking, [`Beside`] its multiplication, then [`Planned::expand`].
#[derive(Clone, Copy)]
pub struct Planned<'a> {
    pool: &'a Pool,
    isa: Isa,
    adapt: Adapt<'a>,
    x: &'a CpuTensor,
    jobs: &'a [Job],
    shrinks: &'a Pieces,
    expands: &'a Pieces,
    shrunk: &'a Disjoint<'a, f32>,
}

/// Plans what the adapters of `x`'s rows do, and calls `then` with it; with `None` when no row has an adapter with one of the
/// sites.
///
/// # Errors
/// [`KernelError::Page`] when an adapter's pages are not its own any more, and what `then` returns.
///
/// # Panics
/// When an adapter does not fit the linear, which who loaded it has checked against the model.
pub fn planned<T>(
    pool: &Pool,
    isa: Isa,
    adapt: Adapt<'_>,
    x: &CpuTensor,
    scratch: &mut LoraScratch,
    then: impl FnOnce(Option<Planned<'_>>) -> Result<T, KernelError>,
) -> Result<T, KernelError> {
    if !plan(pool.threads(), &adapt, (x.rows(), x.width()), scratch)? {
        return then(None);
    }
    let LoraScratch { jobs, shrinks, expands, shrunk } = scratch;
    then(Some(Planned { pool, isa, adapt, x, jobs, shrinks, expands, shrunk: &Disjoint::new(shrunk) }))
}

impl<'a> Planned<'a> {
    /// Adds what has been shrunk to `out`, which holds `W x` and, unless [`Adapt::bias`] is given, the bias.
    pub fn expand(self, out: &mut CpuTensor) {
        assert_eq!(self.x.rows(), out.rows(), "rows of x and of W x");
        let out_width = out.width();
        let out = Disjoint::new(out.values_mut());
        // SAFETY: shrinking is over and nobody writes there any more.
        let shrunk = unsafe { self.shrunk.slice(0..self.shrunk.len()) };
        let part = |pieces: Range<usize>| {
            let pieces = &self.expands.all[pieces];
            dispatch(self.isa, Expand { planned: &self, pieces, shrunk, out: &out, out_width });
        };
        if self.expands.starts.len() == 1 {
            return part(self.expands.of(0));
        }
        self.pool.run(&|worker| part(self.expands.of(worker)));
    }

    #[inline(always)]
    fn adapter(&self, job: &Job) -> Option<(&'a CpuAdapter, &'a SiteFactors)> {
        let adapter = self.adapt.lora.segments[job.segment].adapter?;
        Some((adapter, adapter.site(self.adapt.sites[job.span].index)?))
    }

    /// What a shrinking piece reads of A, nearly always all of it: bytes, and of each so many the first so many.
    fn reads_a(&self, piece: &Piece) -> Strips<'a> {
        fn of<'a, T: Element>(adapter: &'a CpuAdapter, site: &'a SiteFactors, piece: &Piece) -> Strips<'a> {
            let a = adapter.a::<T>(site, 0);
            let (count, rows) = a.run(piece.first);
            let bytes: &[u8] = bytemuck::cast_slice(&rows[..count.min(piece.count) * a.width()]);
            Strips { bytes, stride: bytes.len(), width: bytes.len() }
        }
        match self.adapter(&self.jobs[piece.job]) {
            Some((adapter, site)) if adapter.precision == Precision::F32 => of::<f32>(adapter, site, piece),
            Some((adapter, site)) => of::<f16>(adapter, site, piece),
            None => Strips::default(),
        }
    }

    /// What an expanding piece reads of B, nearly always all of it.
    fn reads_b(&self, piece: &Piece) -> Strips<'a> {
        fn of<'a, T: Element>(adapter: &'a CpuAdapter, site: &'a SiteFactors, piece: &Piece) -> Strips<'a> {
            let b = adapter.b::<T>(site, piece.first);
            let (_, rows) = b.run(0);
            let bytes: &[u8] = bytemuck::cast_slice(&rows[piece.first - b.columns().start..]);
            let (stride, width) = (b.width() * size_of::<T>(), piece.count * size_of::<T>());
            // Rows that are read whole are one strip.
            let (stride, width) = if width == stride { (bytes.len(), bytes.len()) } else { (stride, width) };
            Strips { bytes, stride, width }
        }
        match self.adapter(&self.jobs[piece.job]) {
            Some((adapter, site)) if adapter.precision == Precision::F32 => of::<f32>(adapter, site, piece),
            Some((adapter, site)) => of::<f16>(adapter, site, piece),
            None => Strips::default(),
        }
    }
}

/// The first `width` of every `stride` bytes.
#[derive(Default)]
struct Strips<'a> {
    bytes: &'a [u8],
    stride: usize,
    width: usize,
}

impl<'a> Strips<'a> {
    fn each(self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.stride.max(1)).map(move |bytes| &bytes[..self.width.min(bytes.len())])
    }
}

impl Beside for Planned<'_> {
    fn share(&self, worker: usize) -> Range<usize> {
        self.shrinks.of(worker)
    }

    fn run(&self, pieces: Range<usize>) {
        let pieces = &self.shrinks.all[pieces];
        dispatch(self.isa, Shrink { planned: self, pieces });
    }

    fn reads(&self, worker: usize, part: Range<usize>, parts: usize) -> (usize, impl Iterator<Item = &[u8]>) {
        let shrinks = &self.shrinks.all[self.shrinks.of(worker)];
        let expands = &self.expands.all[self.expands.of(worker)];
        let some = |pieces: &'_ [Piece]| pieces.len() * part.start / parts..pieces.len() * part.end / parts;
        let (shrinks, expands) = (&shrinks[some(shrinks)], &expands[some(expands)]);
        // Of f16; what is read of f32 is asked for in part.
        let bytes = |piece: &Piece| piece.work / piece.rows * size_of::<f16>();
        let strips =
            shrinks.iter().map(|piece| self.reads_a(piece)).chain(expands.iter().map(|piece| self.reads_b(piece)));
        (shrinks.iter().chain(expands).map(bytes).sum(), strips.flat_map(Strips::each))
    }
}

/// The adapters' part of a linear by itself: `out` as for [`Planned::expand`].
///
/// # Errors
/// [`KernelError::Page`] when an adapter's pages are not its own any more.
///
/// # Panics
/// As for [`planned`].
pub fn apply(
    pool: &Pool,
    isa: Isa,
    adapt: Adapt<'_>,
    x: &CpuTensor,
    out: &mut CpuTensor,
    scratch: &mut LoraScratch,
) -> Result<(), KernelError> {
    planned(pool, isa, adapt, x, scratch, |planned| {
        if let Some(planned) = planned {
            pool.run(&|worker| planned.run(planned.share(worker)));
            planned.expand(out);
        }
        Ok(())
    })
}

/// Lists the jobs and their pieces. False when there is nothing to do.
fn plan<'a>(
    threads: usize,
    adapt: &Adapt<'a>,
    (rows, inputs): (usize, usize),
    scratch: &mut LoraScratch,
) -> Result<bool, KernelError> {
    let columns_most = if rows <= FEW_ROWS { PIECE_COLUMNS_FEW_ROWS } else { PIECE_COLUMNS };
    let LoraScratch { jobs, shrinks, expands, shrunk } = scratch;
    jobs.clear();
    shrinks.clear();
    expands.clear();
    let mut shrunk_len = 0;
    let with_sites = |adapter: &&CpuAdapter| adapter.may_have(adapt.sites);
    let with_sites = |segment: &LoraSegment<'a, CpuAdapter>| segment.adapter.filter(with_sites);
    for (i, segment) in adapt.lora.segments.iter().enumerate() {
        let adapter = with_sites(segment);
        if let Some(adapter) = adapter {
            adapter.check()?;
        } else if adapt.bias.is_none() {
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
            jobs.push(Job { segment: i, span: j, shrunk: shrunk_len, rank, strip });
            shrunk_len += segment.rows * rank;
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
    if jobs.is_empty() {
        return Ok(false);
    }
    shrinks.share(threads, 0);
    expands.share(threads, ALONE);
    if shrunk.len() < shrunk_len {
        shrunk.resize(shrunk_len, 0.0);
    }
    Ok(true)
}

struct Shrink<'a, 'b> {
    planned: &'a Planned<'b>,
    pieces: &'a [Piece],
}

impl Kernel for Shrink<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for piece in self.pieces {
            let job = &self.planned.jobs[piece.job];
            let (adapter, site) = self.planned.adapter(job).expect("a job with ranks has an adapter");
            let mut column = 0;
            while column < site.inputs() {
                column = match adapter.precision {
                    Precision::Quantised => self.strip::<_, f16>(simd, piece, site, adapter.a(site, column)),
                    Precision::F32 => self.strip::<_, f32>(simd, piece, site, adapter.a(site, column)),
                };
            }
        }
    }
}

impl Shrink<'_, '_> {
    /// Adds up one strip of A's columns, after those before it. Returns its end.
    #[inline(always)]
    fn strip<S: Simd, T: Element>(&self, simd: S, piece: &Piece, site: &SiteFactors, a: Rows<'_, T>) -> usize {
        let Planned { jobs, x, adapt, shrunk, .. } = self.planned;
        let job = &jobs[piece.job];
        let (stride, columns) = (x.width(), a.columns());
        let values = &x.values()[piece.row * stride..][..piece.rows * stride][columns.start..];
        let x = Strided { values, stride, rows: piece.rows };
        let start = job.shrunk + (piece.row - adapt.lora.segments[job.segment].row) * site.rank();
        let (mut first, end) = (piece.first, piece.first + piece.count);
        while first < end {
            let (count, rows) = a.run(first);
            let count = count.min(end - first);
            let a = Strided { values: rows, stride: a.width(), rows: count };
            shrink(simd, x, a, columns.len(), &mut |row, rank, value| {
                let place = start + row * site.rank() + first + rank;
                // SAFETY: pieces do not share rows and ranks, and each is computed by one thread.
                let shrunk = unsafe { &mut shrunk.slice(place..place + 1)[0] };
                let value = value * site.scale();
                *shrunk = if columns.start == 0 { value } else { *shrunk + value };
            });
            first += count;
        }
        columns.end
    }
}

#[derive(Clone, Copy)]
struct Expand<'a, 'b> {
    planned: &'a Planned<'b>,
    pieces: &'a [Piece],
    shrunk: &'a [f32],
    out: &'a Disjoint<'a, f32>,
    out_width: usize,
}

impl Kernel for Expand<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for piece in self.pieces {
            let job = &self.planned.jobs[piece.job];
            let span = &self.planned.adapt.sites[job.span];
            let bias = self.planned.adapt.bias.map(|bias| &bias[span.outputs.clone()]);
            match self.planned.adapter(job) {
                Some((adapter, site)) => match adapter.precision {
                    Precision::Quantised => {
                        self.piece::<_, f16>(simd, piece, Columns::new(site, adapter.b(site, piece.first), bias))
                    }
                    Precision::F32 => {
                        self.piece::<_, f32>(simd, piece, Columns::new(site, adapter.b(site, piece.first), bias))
                    }
                },
                None => self.add_bias(piece, bias.expect("a job without an adapter adds the bias")),
            }
        }
    }
}

impl Expand<'_, '_> {
    #[inline(always)]
    fn piece<S: Simd, T: Element>(&self, simd: S, piece: &Piece, columns: Columns<'_, T>) {
        let job = &self.planned.jobs[piece.job];
        let first = job.shrunk + (piece.row - self.planned.adapt.lora.segments[job.segment].row) * job.rank;
        let shrunk = &self.shrunk[first..][..piece.rows * job.rank];
        let mut part = Part { expand: self, piece };
        expand(simd, shrunk, &columns, piece.first..piece.first + piece.count, &mut part);
    }

    fn add_bias(&self, piece: &Piece, bias: &[f32]) {
        let mut part = Part { expand: self, piece };
        for row in 0..piece.rows {
            for (out, bias) in part.row(row).iter_mut().zip(&bias[piece.first..]) {
                *out += bias;
            }
        }
    }
}

/// An expanding piece's part of the output.
struct Part<'a, 'b> {
    expand: &'a Expand<'a, 'b>,
    piece: &'a Piece,
}

impl Outputs for Part<'_, '_> {
    #[inline(always)]
    fn row(&mut self, row: usize) -> &mut [f32] {
        let Self { expand, piece } = self;
        let span = &expand.planned.adapt.sites[expand.planned.jobs[piece.job].span];
        let start = (piece.row + row) * expand.out_width + span.outputs.start + piece.first;
        // SAFETY: pieces do not share rows and columns, each is taken by one thread, and the borrow of self lets a thread
        // hold one row's columns at a time.
        unsafe { expand.out.slice(start..start + piece.count) }
    }
}
