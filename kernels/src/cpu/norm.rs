//! RMSNorm, with the residual addition before it in the same pass.

use std::ops::Range;

use super::pool::Disjoint;
use super::vector_math::{LANES, RowKernel, Simd, dispatch_rows, load_part, store_part};
use super::{CpuTensor, Isa, Pool};

/// [`crate::Backend::add_rms_norm`].
///
/// # Panics
/// When the tensors' shapes differ or `weight` is not one row.
pub fn add_rms_norm(
    pool: &Pool,
    isa: Isa,
    residual: &mut CpuTensor,
    delta: Option<&CpuTensor>,
    weight: &[f32],
    eps: f32,
    out: &mut CpuTensor,
) {
    let (rows, width) = (residual.rows(), residual.width());
    assert!(weight.len() == width && out.width() == width, "widths {width}, {}, {}", weight.len(), out.width());
    if let Some(delta) = delta {
        assert_eq!((delta.rows(), delta.width()), (rows, width), "shape of the addend");
    }
    out.set_rows(rows);
    let kernel = AddRmsNorm {
        residual: Disjoint::new(residual.values_mut()),
        delta: delta.map(CpuTensor::values),
        weight,
        eps,
        out: Disjoint::new(out.values_mut()),
    };
    dispatch_rows(pool, isa, rows, &kernel);
}

struct AddRmsNorm<'a> {
    residual: Disjoint<'a, f32>,
    delta: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    out: Disjoint<'a, f32>,
}

impl RowKernel for AddRmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, rows: Range<usize>) {
        let width = self.weight.len();
        for row in rows {
            let range = row * width..(row + 1) * width;
            // SAFETY: every row is given to one thread alone, and each thread holds one row at a time.
            let (residual, out) = unsafe { (self.residual.slice(range.clone()), self.out.slice(range.clone())) };
            if let Some(delta) = self.delta {
                add(simd, residual, &delta[range]);
            }
            rms_norm(simd, residual, self.weight, self.eps, out);
        }
    }
}

#[inline(always)]
fn add<S: Simd>(simd: S, to: &mut [f32], what: &[f32]) {
    let ((to, to_rest), (what, what_rest)) = (to.as_chunks_mut::<LANES>(), what.as_chunks::<LANES>());
    for (to, what) in to.iter_mut().zip(what) {
        simd.store(simd.add(simd.load(to), simd.load(what)), to);
    }
    for (to, what) in to_rest.iter_mut().zip(what_rest) {
        *to += what;
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` of one row.
#[inline(always)]
fn rms_norm<S: Simd>(simd: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = simd.splat(rms_factor(simd, x, eps));
    let ((x, x_rest), (weight, weight_rest)) = (x.as_chunks::<LANES>(), weight.as_chunks::<LANES>());
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        simd.store(simd.mul(simd.mul(simd.load(x), factor), simd.load(weight)), out);
    }
    let rest = simd.mul(simd.mul(load_part(simd, x_rest), factor), load_part(simd, weight_rest));
    store_part(simd, rest, out_rest);
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
pub(super) fn rms_factor<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(simd, x) / x.len() as f32 + eps).sqrt()
}

/// Four partial sums, so that additions do not wait for each other.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let mut sums = [simd.splat(0.0); 4];
    let (groups, rest) = x.as_chunks::<{ 4 * LANES }>();
    for group in groups {
        for (sum, x) in sums.iter_mut().zip(group.as_chunks::<LANES>().0) {
            let x = simd.load(x);
            *sum = simd.mul_add(x, x, *sum);
        }
    }
    let (chunks, rest) = rest.as_chunks::<LANES>();
    for x in chunks {
        let x = simd.load(x);
        sums[0] = simd.mul_add(x, x, sums[0]);
    }
    let x = load_part(simd, rest);
    sums[1] = simd.mul_add(x, x, sums[1]);
    simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}
