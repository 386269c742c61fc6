//! LoRA on the processor: what each row's adapter adds to a linear's output, for rows of many adapters in one call (Punica's
//! SGMV, Chen et al. 2023, section 4).
//!
//! There are two parts, each shared by all threads: *shrink*, `z = scale A x` for every adapted site of every row, beside the
//! base linear's multiplication; then *expand*, `out += B z`. A part is cut into pieces of one adapter, one site, some rows
//! and some ranks or columns; each thread has a run of pieces with its share of the work, so that one adapter of rank 256
//! beside thirty of rank 8 keeps nobody waiting. Nothing is padded to the largest rank.
//!
//! With many adapters every number is read for a row or two, from memory, which would take longer than the arithmetic. So
//! beside one piece the kernels ask for what the next one reads.
//!
//! **A row's bits** depend on its own adapter alone: an element of `z` is one chain of multiply-adds over the inputs and one
//! sum over 16 lanes, or the sum of one for each strip of A where its rows are longer than a page; an output is one chain over
//! the ranks, then the additions and products of the definition in [`openlora_types::SiteWeights`].

mod adapter;
mod kernels;
mod placement;
mod plan;

pub use adapter::CpuAdapter;
pub(super) use adapter::SiteFactors;
pub(super) use kernels::{Columns, Outputs, expand};

use std::ops::Range;

use half::f16;

use super::ahead::Ahead;
use super::linear::Beside;
use super::pool::Disjoint;
use super::vector_math::{Element, Kernel, Simd, dispatch};
use super::{CpuTensor, Isa, Pool};
use crate::{KernelError, LoraRows, Precision, SiteSpan};
use kernels::{Strided, expand_turns, shrink, shrink_turns};
use placement::Rows;
use plan::{Job, Piece, Plan};

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
    /// What was planned last.
    plan: Plan,
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

/// What is to be done for the rows of one linear: shrinking, [`Beside`] its multiplication, then [`Planned::expand`].
pub(super) struct Planned<'a> {
    pool: &'a Pool,
    isa: Isa,
    adapt: Adapt<'a>,
    x: &'a CpuTensor,
    plan: &'a Plan,
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
pub(super) fn planned<T>(
    pool: &Pool,
    isa: Isa,
    adapt: Adapt<'_>,
    x: &CpuTensor,
    scratch: &mut LoraScratch,
    then: impl FnOnce(Option<Planned<'_>>) -> Result<T, KernelError>,
) -> Result<T, KernelError> {
    let LoraScratch { plan, shrunk } = scratch;
    if !plan.make(pool.threads(), &adapt, (x.rows(), x.width()))? {
        return then(None);
    }
    if shrunk.len() < plan.shrunk {
        shrunk.resize(plan.shrunk, 0.0);
    }
    then(Some(Planned { pool, isa, adapt, x, plan, shrunk: &Disjoint::new(shrunk) }))
}

impl<'a> Planned<'a> {
    /// Adds what has been shrunk to `out`, which holds `W x` and, unless [`Adapt::bias`] is given, the bias.
    pub(super) fn expand(self, out: &mut CpuTensor) {
        assert_eq!(self.x.rows(), out.rows(), "rows of x and of W x");
        let out_width = out.width();
        let out = Disjoint::new(out.values_mut());
        // SAFETY: shrinking borrowed self, which is owned here: it is over, and nobody writes there any more.
        let shrunk = unsafe { self.shrunk.slice(0..self.shrunk.len()) };
        let expands = &self.plan.expands;
        let part = |pieces: Range<usize>| {
            dispatch(self.isa, Expand { planned: &self, pieces, shrunk, out: &out, out_width });
        };
        if expands.are_for_one_worker() {
            return part(expands.of(0));
        }
        self.pool.run(&|worker| part(expands.of(worker)));
    }

    #[inline(always)]
    fn adapter(&self, job: &Job) -> Option<(&'a CpuAdapter, &'a SiteFactors)> {
        let adapter = self.adapt.lora.segments[job.segment].adapter?;
        Some((adapter, adapter.site(self.adapt.sites[job.span].index)?))
    }

    /// What a shrinking piece reads of A, nearly always all of it.
    fn reads_a(&self, piece: Option<&Piece>) -> &'a [u8] {
        fn of<'a, T: Element>(adapter: &'a CpuAdapter, site: &'a SiteFactors, piece: &Piece) -> &'a [u8] {
            let a = adapter.a::<T>(site, 0);
            let (count, rows) = a.run(piece.first);
            bytemuck::cast_slice(&rows[..count.min(piece.count) * a.width()])
        }
        match piece.and_then(|piece| Some((piece, self.adapter(&self.plan.jobs[piece.job])?))) {
            Some((piece, (adapter, site))) => match adapter.precision {
                Precision::Quantised => of::<f16>(adapter, site, piece),
                Precision::F32 => of::<f32>(adapter, site, piece),
            },
            None => &[],
        }
    }

    /// What an expanding piece reads of B, nearly always all of it; of pieces that share it, the first asks for all.
    fn reads_b(&self, piece: Option<&Piece>) -> &'a [u8] {
        let first = piece.filter(|piece| piece.first == 0);
        match first.and_then(|piece| self.adapter(&self.plan.jobs[piece.job])) {
            Some((adapter, site)) => match adapter.precision {
                Precision::Quantised => bytemuck::cast_slice(adapter.b::<f16>(site, 0).run(0).1),
                Precision::F32 => bytemuck::cast_slice(adapter.b::<f32>(site, 0).run(0).1),
            },
            None => &[],
        }
    }
}

impl Beside for Planned<'_> {
    fn share(&self, worker: usize) -> Range<usize> {
        self.plan.shrinks.of(worker)
    }

    fn run(&self, pieces: Range<usize>) {
        dispatch(self.isa, Shrink { planned: self, pieces });
    }
}

/// The adapters' part of a linear by itself. `out` holds `W x` and, unless [`Adapt::bias`] is given, the bias.
///
/// # Errors
/// [`KernelError::Page`] when an adapter's pages are not its own any more.
///
/// # Panics
/// When an adapter does not fit the linear, which who loaded it has checked against the model.
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

struct Shrink<'a, 'b> {
    planned: &'a Planned<'b>,
    /// Numbers in the plan's.
    pieces: Range<usize>,
}

impl Kernel for Shrink<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let all = &self.planned.plan.shrinks.all;
        for number in self.pieces.clone() {
            let piece = &all[number];
            let job = &self.planned.plan.jobs[piece.job];
            let (adapter, site) = self.planned.adapter(job).expect("a job with ranks has an adapter");
            let mut ahead = Ahead::new(self.planned.reads_a(all.get(number + 1)), shrink_turns(piece, site.inputs()));
            let mut column = 0;
            while column < site.inputs() {
                let place = (piece, site, &mut ahead);
                column = match adapter.precision {
                    Precision::Quantised => self.strip::<_, f16>(simd, place, adapter.a(site, column)),
                    Precision::F32 => self.strip::<_, f32>(simd, place, adapter.a(site, column)),
                };
            }
        }
    }
}

impl Shrink<'_, '_> {
    /// Adds up one strip of A's columns, after those before it. Returns its end.
    #[inline(always)]
    fn strip<S: Simd, T: Element>(
        &self,
        simd: S,
        (piece, site, ahead): (&Piece, &SiteFactors, &mut Ahead),
        a: Rows<'_, T>,
    ) -> usize {
        let Planned { plan, x, adapt, shrunk, .. } = self.planned;
        let job = &plan.jobs[piece.job];
        let (stride, columns) = (x.width(), a.columns());
        let values = &x.values()[piece.row * stride..][..piece.rows * stride][columns.start..];
        let x = Strided { values, stride, rows: piece.rows };
        let start = job.shrunk + (piece.row - adapt.lora.segments[job.segment].row) * site.rank();
        let (mut first, end) = (piece.first, piece.first + piece.count);
        while first < end {
            let (count, rows) = a.run(first);
            let count = count.min(end - first);
            let a = Strided { values: rows, stride: a.width(), rows: count };
            shrink(simd, x, a, columns.len(), ahead, &mut |row, rank, value| {
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

struct Expand<'a, 'b> {
    planned: &'a Planned<'b>,
    /// Numbers in the plan's.
    pieces: Range<usize>,
    shrunk: &'a [f32],
    out: &'a Disjoint<'a, f32>,
    out_width: usize,
}

impl Kernel for Expand<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let all = &self.planned.plan.expands.all;
        for number in self.pieces.clone() {
            let piece = &all[number];
            let ahead = Ahead::new(self.planned.reads_b(all.get(number + 1)), expand_turns(piece));
            let job = &self.planned.plan.jobs[piece.job];
            let span = &self.planned.adapt.sites[job.span];
            let bias = self.planned.adapt.bias.map(|bias| &bias[span.outputs.clone()]);
            match self.planned.adapter(job) {
                Some((adapter, site)) => match adapter.precision {
                    Precision::Quantised => {
                        self.piece::<_, f16>(simd, piece, Columns::new(site, adapter.b(site, piece.first), bias), ahead)
                    }
                    Precision::F32 => {
                        self.piece::<_, f32>(simd, piece, Columns::new(site, adapter.b(site, piece.first), bias), ahead)
                    }
                },
                None => self.add_bias(piece, bias.expect("a job without an adapter adds the bias")),
            }
        }
    }
}

impl Expand<'_, '_> {
    #[inline(always)]
    fn piece<S: Simd, T: Element>(&self, simd: S, piece: &Piece, columns: Columns<'_, T>, mut ahead: Ahead) {
        let job = &self.planned.plan.jobs[piece.job];
        let first = job.shrunk + (piece.row - self.planned.adapt.lora.segments[job.segment].row) * job.rank;
        let shrunk = &self.shrunk[first..][..piece.rows * job.rank];
        let mut part = Part { expand: self, piece };
        expand(simd, shrunk, &columns, piece.first..piece.first + piece.count, &mut ahead, &mut part);
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
        let span = &expand.planned.adapt.sites[expand.planned.plan.jobs[piece.job].span];
        let start = (piece.row + row) * expand.out_width + span.outputs.start + piece.first;
        // SAFETY: pieces do not share rows and columns, each is taken by one thread, and the borrow of self lets a thread
        // hold one row's columns at a time.
        unsafe { expand.out.slice(start..start + piece.count) }
    }
}
