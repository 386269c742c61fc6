//! The gated feed-forward activation.

use std::ops::Range;

use super::pool::Disjoint;
use super::vector_math::{LANES, RowKernel, Simd, dispatch_rows, exp, load_part, store_part};
use super::{CpuTensor, Isa, Pool};

/// [`crate::Backend::swiglu`].
///
/// # Panics
/// When `gate_up` is not twice as wide as `out`.
pub fn swiglu(pool: &Pool, isa: Isa, gate_up: &CpuTensor, out: &mut CpuTensor) {
    let (rows, width) = (gate_up.rows(), out.width());
    assert_eq!(gate_up.width(), 2 * width, "gate and up beside each other");
    out.set_rows(rows);
    let kernel = SwiGlu { gate_up: gate_up.values(), width, out: Disjoint::new(out.values_mut()) };
    dispatch_rows(pool, isa, rows, &kernel);
}

struct SwiGlu<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: Disjoint<'a, f32>,
}

impl RowKernel for SwiGlu<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, rows: Range<usize>) {
        let width = self.width;
        for row in rows {
            // SAFETY: every row is given to one thread alone, and each thread holds one row at a time.
            let out = unsafe { self.out.slice(row * width..(row + 1) * width) };
            let (gate, up) = self.gate_up[2 * row * width..2 * (row + 1) * width].split_at(width);
            let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
            let (out, out_rest) = out.as_chunks_mut::<LANES>();
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                simd.store(gated(simd, simd.load(gate), simd.load(up)), out);
            }
            let rest = gated(simd, load_part(simd, gate_rest), load_part(simd, up_rest));
            store_part(simd, rest, out_rest);
        }
    }
}

/// `gate / (1 + e^-gate) * up`
#[inline(always)]
fn gated<S: Simd>(simd: S, gate: S::V, up: S::V) -> S::V {
    let exp = exp(simd, simd.sub(simd.splat(0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), exp)), up)
}
