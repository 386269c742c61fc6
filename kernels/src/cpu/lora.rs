//! LoRA on the processor: what each row's adapter adds to a linear's output, for rows of many adapters in one call (Punica's
//! SGMV, Chen et al. 2023, section 4).
//!
//! A call has two parts, each shared by all threads: *shrink*, `z = scale A x` for every adapted site of every row, then
//! *expand*, `out += B z`. A part is cut into pieces of one adapter, one site, some rows and some ranks or columns; each
//! thread has a run of pieces with its share of the work, so that one adapter of rank 256 beside thirty of rank 8 keeps
//! nobody waiting. Nothing is padded to the largest rank.
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

use super::pool::Disjoint;
use super::vector_math::{Element, Kernel, Simd, dispatch};
use super::{CpuTensor, Isa, Pool};
use crate::{LoraRows, Precision, SiteSpan};
use kernels::{Strided, shrink};
use placement::Rows;

/// Rows of a piece: few enough that their inputs stay in the second-level cache.
const PIECE_ROWS: usize = 32;
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
        adapter.site(span.index).is_some_and(|site| site.output_scale.is_some())
    };
    let mut adapters = lora.segments.iter().filter_map(|segment| segment.adapter);
    adapters.any(|adapter| sites.iter().any(|span| scales(adapter, span)))
}

/// Buffers that are kept from step to step.
#[derive(Debug, Default)]
pub struct LoraScratch {
    jobs: Vec<Job>,
    shrinks: Vec<Piece>,
    expands: Vec<Piece>,
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

/// Applies the adapters: on entry `out` holds `W x` and, unless [`Adapt::bias`] is given, the bias. Costs nothing when no row
/// has an adapter with one of the sites.
///
/// # Panics
/// When an adapter does not fit the linear, which who loaded it has checked against the model.
pub fn apply(pool: &Pool, isa: Isa, adapt: Adapt<'_>, x: &CpuTensor, out: &mut CpuTensor, scratch: &mut LoraScratch) {
    if !plan(&adapt, (x.rows(), x.width()), scratch) {
        return;
    }
    assert_eq!(x.rows(), out.rows(), "rows of x and of W x");
    let LoraScratch { jobs, shrinks, expands, shrunk } = scratch;
    let (x_width, out_width) = (x.width(), out.width());
    let call = Call { adapt: &adapt, jobs, x: x.values(), x_width, out: Disjoint::new(out.values_mut()), out_width };
    {
        let shrunk = Disjoint::new(shrunk);
        share(pool, shrinks, &|pieces| dispatch(isa, Shrink { call: &call, pieces, shrunk: &shrunk }));
    }
    share(pool, expands, &|pieces| dispatch(isa, Expand { call: &call, pieces, shrunk }));
}

/// Calls `part` on every thread with a run of the pieces, or on this one alone when there is little to do.
fn share(pool: &Pool, pieces: &[Piece], part: &(dyn Fn(&[Piece]) + Sync)) {
    let work: usize = pieces.iter().map(|piece| piece.work).sum();
    if pieces.is_empty() {
        return;
    }
    if work < ALONE || pool.threads() == 1 {
        return part(pieces);
    }
    pool.run(&|worker| {
        let mine = pool.split(work, worker);
        part(&pieces[starting_before(pieces, mine.start)..starting_before(pieces, mine.end)]);
    });
}

/// How many pieces start before `work` multiply-adds are done.
fn starting_before(pieces: &[Piece], work: usize) -> usize {
    let mut done = 0;
    let starts_before = |piece: &&Piece| {
        let start = done;
        done += piece.work;
        start < work
    };
    pieces.iter().take_while(starts_before).count()
}

/// Lists the jobs and their pieces. False when there is nothing to do.
fn plan(adapt: &Adapt<'_>, (rows, inputs): (usize, usize), scratch: &mut LoraScratch) -> bool {
    let columns_most = if rows <= FEW_ROWS { PIECE_COLUMNS_FEW_ROWS } else { PIECE_COLUMNS };
    let LoraScratch { jobs, shrinks, expands, shrunk } = scratch;
    jobs.clear();
    shrinks.clear();
    expands.clear();
    let mut shrunk_len = 0;
    for (i, segment) in adapt.lora.segments.iter().enumerate() {
        for (j, span) in adapt.sites.iter().enumerate() {
            let site = segment.adapter.and_then(|adapter| adapter.site(span.index));
            if site.is_none() && adapt.bias.is_none() {
                continue;
            }
            if let Some(site) = site {
                assert_eq!((site.inputs, site.outputs), (inputs, span.outputs.len()), "{}: shape", span.site);
            }
            let job = Job { segment: i, span: j, shrunk: shrunk_len, rank: site.map_or(0, |site| site.rank) };
            for row in (0..segment.rows).step_by(PIECE_ROWS) {
                let (rows, row) = (PIECE_ROWS.min(segment.rows - row), segment.row + row);
                let piece = Piece { job: jobs.len(), row, rows, first: 0, count: 0, work: 0 };
                add_pieces(shrinks, piece, (0..job.rank, inputs), PIECE_RANKS);
                let outputs = span.outputs.len();
                let strip = site.map_or(outputs, SiteFactors::output_strip).max(1);
                for first in (0..outputs).step_by(strip) {
                    let columns = first..outputs.min(first + strip);
                    add_pieces(expands, piece, (columns, job.rank + 1), columns_most);
                }
            }
            shrunk_len += segment.rows * job.rank;
            jobs.push(job);
        }
    }
    if shrunk.len() < shrunk_len {
        shrunk.resize(shrunk_len, 0.0);
    }
    !jobs.is_empty()
}

/// Appends the pieces of `rows` by some ranks or columns, at most `most` at a time, that cost `each` multiply-adds.
fn add_pieces(pieces: &mut Vec<Piece>, rows: Piece, (all, each): (Range<usize>, usize), most: usize) {
    let end = all.end;
    pieces.extend(all.step_by(most).map(|first| {
        let count = most.min(end - first);
        Piece { first, count, work: rows.rows * count * each, ..rows }
    }));
}

/// One call of [`apply`].
struct Call<'a> {
    adapt: &'a Adapt<'a>,
    jobs: &'a [Job],
    x: &'a [f32],
    x_width: usize,
    out: Disjoint<'a, f32>,
    out_width: usize,
}

impl<'a> Call<'a> {
    #[inline(always)]
    fn adapter(&self, job: &Job) -> Option<(&'a CpuAdapter, &'a SiteFactors)> {
        let adapter = self.adapt.lora.segments[job.segment].adapter?;
        Some((adapter, adapter.site(self.adapt.sites[job.span].index)?))
    }
}

struct Shrink<'a, 'b> {
    call: &'a Call<'b>,
    pieces: &'a [Piece],
    shrunk: &'a Disjoint<'a, f32>,
}

impl Kernel for Shrink<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for piece in self.pieces {
            let (adapter, site) = self.adapter(piece);
            let mut column = 0;
            while column < site.inputs {
                column = match adapter.precision {
                    Precision::Quantised => self.strip::<_, f16>(simd, piece, site, adapter.a(site, column)),
                    Precision::F32 => self.strip::<_, f32>(simd, piece, site, adapter.a(site, column)),
                };
            }
        }
    }
}

impl<'b> Shrink<'_, 'b> {
    #[inline(always)]
    fn adapter(&self, piece: &Piece) -> (&'b CpuAdapter, &'b SiteFactors) {
        self.call.adapter(&self.call.jobs[piece.job]).expect("a job with ranks has an adapter")
    }

    /// Adds up one strip of A's columns, after those before it. Returns its end.
    #[inline(always)]
    fn strip<S: Simd, T: Element>(&self, simd: S, piece: &Piece, site: &SiteFactors, a: Rows<'_, T>) -> usize {
        let job = &self.call.jobs[piece.job];
        let (stride, columns) = (self.call.x_width, a.columns());
        let values = &self.call.x[piece.row * stride..][..piece.rows * stride][columns.start..];
        let x = Strided { values, stride, rows: piece.rows };
        let start = job.shrunk + (piece.row - self.call.adapt.lora.segments[job.segment].row) * site.rank;
        let (mut first, end) = (piece.first, piece.first + piece.count);
        while first < end {
            let (count, rows) = a.run(first);
            let count = count.min(end - first);
            let a = Strided { values: rows, stride: a.width(), rows: count };
            shrink(simd, x, a, columns.len(), &mut |row, rank, value| {
                let place = start + row * site.rank + first + rank;
                // SAFETY: pieces do not share rows and ranks, and each is computed by one thread.
                let shrunk = unsafe { &mut self.shrunk.slice(place..place + 1)[0] };
                let value = value * site.scale;
                *shrunk = if columns.start == 0 { value } else { *shrunk + value };
            });
            first += count;
        }
        columns.end
    }
}

struct Expand<'a, 'b> {
    call: &'a Call<'b>,
    pieces: &'a [Piece],
    shrunk: &'a [f32],
}

impl Kernel for Expand<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for piece in self.pieces {
            let job = &self.call.jobs[piece.job];
            let span = &self.call.adapt.sites[job.span];
            let bias = self.call.adapt.bias.map(|bias| &bias[span.outputs.clone()]);
            match self.call.adapter(job) {
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
        let job = &self.call.jobs[piece.job];
        let first = job.shrunk + (piece.row - self.call.adapt.lora.segments[job.segment].row) * job.rank;
        let shrunk = &self.shrunk[first..][..piece.rows * job.rank];
        let mut part = Part { call: self.call, piece };
        expand(simd, shrunk, &columns, piece.first..piece.first + piece.count, &mut part);
    }

    fn add_bias(&self, piece: &Piece, bias: &[f32]) {
        let mut part = Part { call: self.call, piece };
        for row in 0..piece.rows {
            for (out, bias) in part.row(row).iter_mut().zip(&bias[piece.first..]) {
                *out += bias;
            }
        }
    }
}

/// An expanding piece's part of the output.
struct Part<'a, 'b> {
    call: &'a Call<'b>,
    piece: &'a Piece,
}

impl Outputs for Part<'_, '_> {
    #[inline(always)]
    fn row(&mut self, row: usize) -> &mut [f32] {
        let Self { call, piece } = self;
        let span = &call.adapt.sites[call.jobs[piece.job].span];
        let start = (piece.row + row) * call.out_width + span.outputs.start + piece.first;
        // SAFETY: pieces do not share rows and columns, each is taken by one thread, and the borrow of self lets a thread
        // hold one row's columns at a time.
        unsafe { call.out.slice(start..start + piece.count) }
    }
}
