//! Rotary embedding with storing, and attention, over a pool full of random keys and values.

use super::super::attention::{self, Attention, AttentionBounds, AttentionPartials, AttentionPlan, KvLayer};
use super::super::device::{Device, Stream};
use super::super::pages::page_bytes;
use super::super::rope::{self, Rope, RopeMemory};
use super::{Measure, Timing, Work};
use crate::{KernelError, RopeTable};

impl<D: Device> Measure<D> {
    /// Attention of one layer over `sequences` of `context` tokens, the last `rows` of each attending: 1 is decode, all of them prefill.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn attention(&self, sequences: usize, rows: usize, context: usize) -> Result<Timing, KernelError> {
        let spec = self.spec();
        let (size, kv) = (self.element.bytes(), spec.kv_heads * spec.head_dim);
        let all_rows = sequences * rows;
        let cached = sequences * context * 2 * kv * size;
        let bytes = (cached + all_rows * 2 * spec.heads * spec.head_dim * size) as f64;
        // Each row sees itself and what is before it.
        let seen = all_rows as f64 * ((context - rows) as f64 + (rows + 1) as f64 / 2.0);
        let work = Work { bytes, flops: 4.0 * (spec.heads * spec.head_dim) as f64 * seen };
        // Sets are layers of one pool.
        let sets = self.sets(bytes);
        let step = self.step(sequences, rows, context)?;
        let page_bytes = page_bytes(&spec, sets, self.element);
        let blocks = sequences * context.div_ceil(spec.block_size);
        let pages = self.random(blocks * page_bytes)?;
        let room = AttentionBounds { rows: all_rows, rows_each: rows, table_entries: blocks };
        let shared = self.device.properties().shared_bytes_max;
        let plan = AttentionPlan::new(&self.device, &spec, room, None, shared)?;
        let partials = AttentionPartials::new(&self.device, &spec, room)?;
        plan.make(&self.device, Stream::Compute, step.view())?;
        let width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
        let qkv = self.tensors(sets.min(8), all_rows, width)?;
        let mut out = self.tensors(sets.min(8), all_rows, spec.heads * spec.head_dim)?;
        let mut call = |i: usize| {
            let kv = KvLayer { pages: pages.address(), page_bytes, layer: i };
            let launch =
                Attention { spec: &spec, step: step.view(), kv, plan: &plan, partials: &partials, bounds: room };
            let i = i % qkv.len();
            attention::attention(&*self.device, Stream::Compute, &launch, &qkv[i], &mut out[i])
        };
        // SAFETY: all of that lives as long as this runs.
        unsafe { self.time(work, sets, &mut call) }
    }

    /// Rotary embedding of q and k and storing of k and v in one layer, for `rows` sequences of one row.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn rope(&self, rows: usize) -> Result<Timing, KernelError> {
        let spec = self.spec();
        let (size, kv) = (self.element.bytes(), 2 * spec.kv_heads * spec.head_dim);
        let width = spec.heads * spec.head_dim + kv;
        // q, k and v are read; q is written back, k and v to their pages.
        let bytes = (2 * rows * width * size) as f64;
        let work = Work { bytes, flops: 3.0 * (rows * width) as f64 };
        let sets = self.sets(bytes);
        let step = self.step(rows, 1, spec.block_size)?;
        let page_bytes = page_bytes(&spec, 1, self.element);
        let pages = self.random(rows * page_bytes)?;
        let half = spec.head_dim / 2;
        let angles = spec.block_size * half;
        let table = RopeTable { rotary_dim: spec.head_dim, cos: vec![0.6; angles], sin: vec![0.8; angles] };
        let table = RopeMemory::new(&self.device, &table)?;
        let mut qkv = self.tensors(sets, rows, width)?;
        let mut call = |i: usize| {
            let kv = KvLayer { pages: pages.address(), page_bytes, layer: 0 };
            let rope = Rope { spec: &spec, step: step.view(), kv, table: &table, qk_norm: None, rows_max: rows };
            rope::rope_and_store(&*self.device, Stream::Compute, &rope, &mut qkv[i])
        };
        // SAFETY: all of that lives as long as this runs.
        unsafe { self.time(work, sets, &mut call) }
    }
}
