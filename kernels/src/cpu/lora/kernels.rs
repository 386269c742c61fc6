//! The two inner loops of LoRA.

use std::ops::Range;

use super::super::ahead::Ahead;
use super::super::vector_math::{Chunk, Element, LANES, Simd, load_part, store_part};
use super::plan::Piece;
use super::{Rows, SiteFactors};

/// Rows of numbers, each `stride` after the one before.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a, E> {
    pub(super) values: &'a [E],
    pub(super) stride: usize,
    pub(super) rows: usize,
}

impl<'a, E> Strided<'a, E> {
    /// The first `width` numbers of a row.
    #[inline(always)]
    fn row(&self, row: usize, width: usize) -> &'a [E] {
        &self.values[row * self.stride..][..width]
    }

    #[inline(always)]
    fn skip(&self, rows: usize) -> Self {
        Self { values: &self.values[rows * self.stride..], rows: self.rows - rows, ..*self }
    }
}

/// About how many turns the loops of [`shrink`] take for a piece.
#[inline(always)]
pub(super) fn shrink_turns(piece: &Piece, inputs: usize) -> usize {
    // Sums of 16 products at a time, or of one row with 8 ranks.
    inputs / LANES * (piece.rows * piece.count / 16).max(1)
}

/// About how many turns the loops of [`expand`] take for a piece.
#[inline(always)]
pub(super) fn expand_turns(piece: &Piece) -> usize {
    // 12 or 16 vectors at a time; the work is one more than the ranks for each output.
    (piece.work / (LANES * 12)).max(1)
}

/// `put(row, rank, a_rank . x_row)` for all rows of x and of A, over their first `width` numbers.
///
/// Ranks in the outer loop: a few rows of A stay in the first-level cache while all rows of x pass.
#[inline(always)]
pub(super) fn shrink<S: Simd, T: Element>(
    simd: S,
    x: Strided<'_, f32>,
    a: Strided<'_, T>,
    width: usize,
    ahead: &mut Ahead,
    put: &mut impl FnMut(usize, usize, f32),
) {
    let mut rank = 0;
    while rank < a.rows {
        let (rows, rest) = (x.rows, a.rows - rank);
        let a = a.skip(rank);
        let put = &mut |row: usize, i: usize, value: f32| put(row, rank + i, value);
        // One row at a time reads as many rows of A together as it takes to keep the multipliers busy.
        rank += match (S::WIDE, rows, rest) {
            (true, 0..4, 8..) => shrink_ranks::<S, T, 1, 8>(simd, x, a, width, ahead, put),
            (true, _, 4..) => shrink_ranks::<S, T, 4, 4>(simd, x, a, width, ahead, put),
            (true, _, 2..) => shrink_ranks::<S, T, 4, 2>(simd, x, a, width, ahead, put),
            (true, ..) => shrink_ranks::<S, T, 4, 1>(simd, x, a, width, ahead, put),
            (false, 0..2, 4..) => shrink_ranks::<S, T, 1, 4>(simd, x, a, width, ahead, put),
            (false, _, 2..) => shrink_ranks::<S, T, 2, 2>(simd, x, a, width, ahead, put),
            (false, ..) => shrink_ranks::<S, T, 2, 1>(simd, x, a, width, ahead, put),
        };
    }
}

/// [`shrink`] for the first `K` rows of `a`, `R` rows of x at a time. Returns `K`.
#[inline(always)]
fn shrink_ranks<S: Simd, T: Element, const R: usize, const K: usize>(
    simd: S,
    x: Strided<'_, f32>,
    a: Strided<'_, T>,
    width: usize,
    ahead: &mut Ahead,
    put: &mut impl FnMut(usize, usize, f32),
) -> usize {
    let a: [&[T]; K] = std::array::from_fn(|i| a.row(i, width));
    let mut row = 0;
    while row + R <= x.rows {
        let dots = dot::<S, T, R, K>(simd, std::array::from_fn(|i| x.row(row + i, width)), a, ahead);
        for (i, dots) in dots.iter().enumerate() {
            for (j, value) in dots.iter().enumerate() {
                put(row + i, j, *value);
            }
        }
        row += R;
    }
    while row < x.rows {
        let [dots] = dot::<S, T, 1, K>(simd, [x.row(row, width)], a, ahead);
        for (j, value) in dots.iter().enumerate() {
            put(row, j, *value);
        }
        row += 1;
    }
    K
}

/// All products of `R` rows of x with `K` rows of A. Every product is one chain over the vectors of its row.
#[inline(always)]
fn dot<S: Simd, T: Element, const R: usize, const K: usize>(
    simd: S,
    x: [&[f32]; R],
    a: [&[T]; K],
    ahead: &mut Ahead,
) -> [[f32; K]; R] {
    let mut lanes = [[[0.0; LANES]; K]; R];
    let width = x[0].len();
    dot_chunks(simd, (&x, &a), width / LANES, ahead, &mut lanes);
    let mut products = [[0.0; K]; R];
    for r in 0..R {
        for k in 0..K {
            let mut sum = simd.load(&lanes[r][k]);
            if !width.is_multiple_of(LANES) {
                let rest = width - width % LANES;
                sum = simd.mul_add(load_part(simd, &a[k][rest..]), load_part(simd, &x[r][rest..]), sum);
            }
            products[r][k] = simd.sum(sum);
        }
    }
    products
}

/// [`dot`] for the first `chunks` vectors, before the sum over lanes. By itself and to memory: what follows is long, and a sum
/// that is indexed there would go to memory and back for every vector.
#[inline(always)]
fn dot_chunks<S: Simd, T: Element, const R: usize, const K: usize>(
    simd: S,
    (x, a): (&[&[f32]; R], &[&[T]; K]),
    chunks: usize,
    ahead: &mut Ahead,
    lanes: &mut [[Chunk<f32>; K]; R],
) {
    // Equal lengths, said so that the loop needs no checks.
    let mut x_chunks: [&[Chunk<f32>]; R] = [&[]; R];
    let mut a_chunks: [&[Chunk<T>]; K] = [&[]; K];
    for r in 0..R {
        x_chunks[r] = &x[r].as_chunks().0[..chunks];
    }
    for k in 0..K {
        a_chunks[k] = &a[k].as_chunks().0[..chunks];
    }
    let mut sums = [[simd.splat(0.0); K]; R];
    for i in 0..chunks {
        ahead.ask();
        let mut x = [simd.splat(0.0); R];
        for r in 0..R {
            x[r] = simd.load(&x_chunks[r][i]);
        }
        for k in 0..K {
            let a = T::load(simd, &a_chunks[k][i]);
            for r in 0..R {
                sums[r][k] = simd.mul_add(a, x[r], sums[r][k]);
            }
        }
    }
    for r in 0..R {
        for k in 0..K {
            simd.store(sums[r][k], &mut lanes[r][k]);
        }
    }
}

/// What an expanding loop reads of one site: one strip of B's columns.
pub(in super::super) struct Columns<'a, T> {
    rank: usize,
    b: Rows<'a, T>,
    /// The strip's first column, and the columns from a row to the next.
    first: usize,
    width: usize,
    b_bias: Option<&'a [f32]>,
    output_scale: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

impl<'a, T: Element> Columns<'a, T> {
    /// The site's with a strip of its B, and with the base linear's bias where it is still to be added.
    #[inline(always)]
    pub(in super::super) fn new(site: &'a SiteFactors, b: Rows<'a, T>, bias: Option<&'a [f32]>) -> Self {
        Self {
            rank: site.rank(),
            first: b.columns().start,
            width: b.width(),
            b,
            b_bias: site.b_bias(),
            output_scale: site.output_scale(),
            bias,
        }
    }
}

/// Where [`expand`] writes.
pub(in super::super) trait Outputs {
    /// The columns in question of one row.
    fn row(&mut self, row: usize) -> &mut [f32];
}

/// For all rows of `shrunk: [rows][rank]` the definition of [`openlora_types::SiteWeights`]: `out + bias + B z + b_bias`, or with an
/// output scale `output_scale (out + B z + b_bias) + bias`, absent vectors left out. `columns` says which outputs `out` has, all
/// of them in the site's strip.
///
/// Without an output scale the bias comes first, as where the linear has added it already.
///
/// Columns in the outer loop: a strip of B stays in the first-level cache while all rows pass.
#[inline(always)]
pub(in super::super) fn expand<S: Simd, T: Element>(
    simd: S,
    shrunk: &[f32],
    site: &Columns<'_, T>,
    columns: Range<usize>,
    ahead: &mut Ahead,
    out: &mut impl Outputs,
) {
    let rows = shrunk.len() / site.rank;
    let mut column = columns.start;
    while column < columns.end {
        let place = (column, column - columns.start);
        let vectors = (columns.end - column) / LANES;
        column += LANES
            * match (S::WIDE, rows, vectors) {
                (true, 0..4, 12..) => expand_columns::<S, T, 1, 12>(simd, shrunk, site, place, ahead, out),
                (true, _, 4..) => expand_columns::<S, T, 4, 4>(simd, shrunk, site, place, ahead, out),
                (false, 0..2, 4..) => expand_columns::<S, T, 1, 4>(simd, shrunk, site, place, ahead, out),
                (false, _, 2..) => expand_columns::<S, T, 2, 2>(simd, shrunk, site, place, ahead, out),
                (_, _, 1..) => expand_columns::<S, T, 4, 1>(simd, shrunk, site, place, ahead, out),
                (_, _, 0) => expand_rest(simd, shrunk, site, place, columns.end - column, out),
            };
    }
}

/// [`expand`] for `C` vectors of columns, `R` rows at a time. `place`: the first column of B, and where it is in `out`'s part.
/// Returns `C`.
#[inline(always)]
fn expand_columns<S: Simd, T: Element, const R: usize, const C: usize>(
    simd: S,
    shrunk: &[f32],
    site: &Columns<'_, T>,
    place: (usize, usize),
    ahead: &mut Ahead,
    out: &mut impl Outputs,
) -> usize {
    let rows = shrunk.len() / site.rank;
    let mut lanes = [[[0.0; LANES]; C]; R];
    let mut row = 0;
    while row + R <= rows {
        let z: [&[f32]; R] = std::array::from_fn(|i| &shrunk[(row + i) * site.rank..][..site.rank]);
        products::<S, T, R, C>(simd, z, (site, place.0), ahead, &mut lanes);
        for (i, sums) in lanes.iter().enumerate() {
            finish(simd, sums, site, place.0, &mut out.row(row + i)[place.1..][..C * LANES]);
        }
        row += R;
    }
    while row < rows {
        let z = [&shrunk[row * site.rank..][..site.rank]];
        products::<S, T, 1, C>(simd, z, (site, place.0), ahead, std::array::from_mut(&mut lanes[0]));
        finish(simd, &lanes[0], site, place.0, &mut out.row(row)[place.1..][..C * LANES]);
        row += 1;
    }
    C
}

/// `B z` of `R` rows and `C` vectors of columns from `column` on, to memory as in [`dot_chunks`]: for each output one chain over the
/// ranks.
#[inline(always)]
fn products<S: Simd, T: Element, const R: usize, const C: usize>(
    simd: S,
    z: [&[f32]; R],
    (site, column): (&Columns<'_, T>, usize),
    ahead: &mut Ahead,
    lanes: &mut [[Chunk<f32>; C]; R],
) {
    let mut sums = [[simd.splat(0.0); C]; R];
    let column = column - site.first;
    let mut first = 0;
    while first < site.rank {
        let (count, rows) = site.b.run(first);
        for k in 0..count {
            ahead.ask();
            let b = rows[k * site.width + column..][..C * LANES].as_chunks::<LANES>().0;
            let mut values = [simd.splat(0.0); C];
            for c in 0..C {
                values[c] = T::load(simd, &b[c]);
            }
            for r in 0..R {
                let z = simd.splat(z[r][first + k]);
                for c in 0..C {
                    sums[r][c] = simd.mul_add(z, values[c], sums[r][c]);
                }
            }
        }
        first += count;
    }
    for r in 0..R {
        for c in 0..C {
            simd.store(sums[r][c], &mut lanes[r][c]);
        }
    }
}

/// Adds one row's products to its output and does what comes after.
#[inline(always)]
fn finish<S: Simd, T: Element>(simd: S, sums: &[Chunk<f32>], site: &Columns<'_, T>, column: usize, out: &mut [f32]) {
    for (i, (sum, out)) in sums.iter().zip(out.chunks_mut(LANES)).enumerate() {
        let columns = column + i * LANES..column + i * LANES + out.len();
        let mut value = load_part(simd, out);
        let bias = site.bias.map(|bias| &bias[columns.clone()]);
        if let (None, Some(bias)) = (site.output_scale, bias) {
            value = simd.add(value, load_part(simd, bias));
        }
        value = simd.add(value, simd.load(sum));
        if let Some(bias) = site.b_bias {
            value = simd.add(value, load_part(simd, &bias[columns.clone()]));
        }
        if let Some(scale) = site.output_scale {
            value = simd.mul(value, load_part(simd, &scale[columns.clone()]));
        }
        if let (Some(_), Some(bias)) = (site.output_scale, bias) {
            value = simd.add(value, load_part(simd, bias));
        }
        store_part(simd, value, out);
    }
}

/// [`expand`] for the last columns, fewer than a vector. Returns 1, a vector of columns.
#[inline(always)]
fn expand_rest<S: Simd, T: Element>(
    simd: S,
    shrunk: &[f32],
    site: &Columns<'_, T>,
    place: (usize, usize),
    count: usize,
    out: &mut impl Outputs,
) -> usize {
    for (row, z) in shrunk.chunks_exact(site.rank).enumerate() {
        let mut sum = simd.splat(0.0);
        let mut first = 0;
        while first < site.rank {
            let (ranks, rows) = site.b.run(first);
            for (k, z) in z[first..first + ranks].iter().enumerate() {
                let b = load_part(simd, &rows[k * site.width + place.0 - site.first..][..count]);
                sum = simd.mul_add(simd.splat(*z), b, sum);
            }
            first += ranks;
        }
        let mut lanes = [0.0; LANES];
        simd.store(sum, &mut lanes);
        finish(simd, &[lanes], site, place.0, &mut out.row(row)[place.1..][..count]);
    }
    1
}
