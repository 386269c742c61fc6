//! Rotary embedding of q and k, the head norms before it, and the way of k and v into the cache.

use std::ops::Range;

use half::f16;

use super::kv::KvLayout;
use super::norm::rms_factor;
use super::pages::{CpuPages, KvWriter};
use super::pool::Disjoint;
use super::vector_math::{Element, LANES, RowKernel, Simd, dispatch_rows, load_part, store_part};
use super::{Cpu, CpuTensor, Isa, Pool};
use crate::{AttentionSpec, LayerAttention, Precision, SequenceRows, StepRows};

/// [`crate::Backend::rope_and_store`].
///
/// # Panics
/// When the step does not fit `spec`: widths, positions past the rotary table, a block table that is too short or names a page
/// that is not KV ([`CpuPages::check`]).
pub fn rope_and_store(
    pool: &Pool,
    isa: Isa,
    spec: &AttentionSpec,
    step: &StepRows<'_>,
    layer: LayerAttention<'_, Cpu>,
    qkv: &mut CpuTensor,
    pages: &mut CpuPages,
) {
    assert_eq!(qkv.width(), (spec.heads + 2 * spec.kv_heads) * spec.head_dim, "q, k and v beside each other");
    assert_eq!(step.positions.len(), qkv.rows(), "one position for each row");
    assert!(layer.rope.rotary_dim <= spec.head_dim, "rotated elements of a head");
    match pages.precision {
        Precision::Quantised => run::<f16>(pool, isa, (spec, step, layer), qkv, pages),
        Precision::F32 => run::<f32>(pool, isa, (spec, step, layer), qkv, pages),
    }
}

fn run<T: Element>(
    pool: &Pool,
    isa: Isa,
    (spec, step, layer): (&AttentionSpec, &StepRows<'_>, LayerAttention<'_, Cpu>),
    qkv: &mut CpuTensor,
    pages: &mut CpuPages,
) {
    let rows = qkv.rows();
    let kernel = RopeAndStore {
        spec,
        step,
        layer,
        layout: pages.layout,
        qkv: Disjoint::new(qkv.values_mut()),
        pages: pages.writer::<T>(),
    };
    dispatch_rows(pool, isa, rows, &kernel);
}

struct RopeAndStore<'a, T> {
    spec: &'a AttentionSpec,
    step: &'a StepRows<'a>,
    layer: LayerAttention<'a, Cpu>,
    layout: KvLayout,
    qkv: Disjoint<'a, f32>,
    pages: KvWriter<'a, T>,
}

impl<T: Element> RowKernel for RopeAndStore<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, rows: Range<usize>) {
        let sequences = self.step.sequences;
        let first = sequences.partition_point(|sequence| sequence.row + sequence.rows <= rows.start);
        for sequence in &sequences[first..] {
            let end = rows.end.min(sequence.row + sequence.rows);
            for row in rows.start.max(sequence.row)..end {
                self.row(simd, sequence, row);
            }
            if end == rows.end {
                break;
            }
        }
    }
}

impl<T: Element> RopeAndStore<'_, T> {
    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, sequence: &SequenceRows, row: usize) {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *self.spec;
        let width = (heads + 2 * kv_heads) * head_dim;
        // SAFETY: every row is given to one thread alone, and each thread holds one row at a time.
        let qkv = unsafe { self.qkv.slice(row * width..(row + 1) * width) };
        let position = self.step.positions[row] as usize;
        let rope = self.layer.rope;
        let angles = position * (rope.rotary_dim / 2)..(position + 1) * (rope.rotary_dim / 2);
        let (cos, sin) = (&rope.cos[angles.clone()], &rope.sin[angles]);
        let (rotated, _) = qkv.split_at_mut((heads + kv_heads) * head_dim);
        for (i, head) in rotated.chunks_exact_mut(head_dim).enumerate() {
            if let Some((q, k)) = self.layer.qk_norm {
                let weight = if i < heads { q } else { k };
                norm_in_place(simd, head, weight, self.spec.norm_eps);
            }
            let (x, y) = head[..rope.rotary_dim].split_at_mut(rope.rotary_dim / 2);
            rotate(simd, x, y, cos, sin);
        }
        let block = self.step.block_tables[sequence.table..][..sequence.blocks][position / self.layout.block_size];
        let page = self.pages.page(block);
        let (_, kv) = qkv.split_at(heads * head_dim);
        let (keys, values) = kv.split_at(kv_heads * head_dim);
        for (kv_head, (key, value)) in keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)).enumerate() {
            self.store(simd, &page, (kv_head, position % self.layout.block_size), key, value);
        }
    }

    /// Writes one token's key and value of one head; `offset` is the token's place in the block.
    #[inline(always)]
    fn store<S: Simd>(
        &self,
        simd: S,
        page: &Disjoint<'_, T>,
        (kv_head, offset): (usize, usize),
        key: &[f32],
        value: &[f32],
    ) {
        let (panel, lane) = (offset / LANES, offset % LANES);
        let start = self.layout.keys(self.layer.layer, kv_head) + panel * self.layout.key_panel() + lane;
        let mut halves = [T::default(); LANES];
        for (i, chunk) in key.chunks(LANES).enumerate() {
            T::store(simd, load_part(simd, chunk), &mut halves);
            for (j, number) in halves[..chunk.len()].iter().enumerate() {
                let place = start + (i * LANES + j) * LANES;
                // SAFETY: one element of this token's own lane; no two rows of a step write the same token.
                unsafe { page.slice(place..place + 1)[0] = *number };
            }
        }
        let row = self.layout.value_row();
        let values = self.layout.values(self.layer.layer, kv_head);
        let start = values + panel * self.layout.value_panel() + lane * row;
        // SAFETY: this token's own row; no two rows of a step write the same token.
        let to = unsafe { page.slice(start..start + row) };
        for (to, chunk) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(value.chunks(LANES)) {
            T::store(simd, load_part(simd, chunk), to);
        }
    }
}

/// `(x, y) = (x cos - y sin, y cos + x sin)`
#[inline(always)]
fn rotate<S: Simd>(simd: S, x: &mut [f32], y: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((x, y), cos), sin) in
        x.chunks_mut(LANES).zip(y.chunks_mut(LANES)).zip(cos.chunks(LANES)).zip(sin.chunks(LANES))
    {
        let (a, b) = (load_part(simd, x), load_part(simd, y));
        let (cos, sin) = (load_part(simd, cos), load_part(simd, sin));
        let minus_sin = simd.sub(simd.splat(0.0), sin);
        store_part(simd, simd.mul_add(a, cos, simd.mul(b, minus_sin)), x);
        store_part(simd, simd.mul_add(b, cos, simd.mul(a, sin)), y);
    }
}

#[inline(always)]
fn norm_in_place<S: Simd>(simd: S, head: &mut [f32], weight: &[f32], eps: f32) {
    let factor = simd.splat(rms_factor(simd, head, eps));
    for (x, weight) in head.chunks_mut(LANES).zip(weight.chunks(LANES)) {
        let normed = simd.mul(simd.mul(load_part(simd, x), factor), load_part(simd, weight));
        store_part(simd, normed, x);
    }
}
