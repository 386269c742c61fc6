//! Causal attention over the paged KV cache.
//!
//! The query heads that share a key-value head, for several rows of a sequence, form a [`tile`] of up to [`TILE_ROWS`]
//! queries: all of them use a panel of 16 keys while it is in the first-level cache. Keys are visited in the order of their
//! *slots*: slot `s` is lane `s % 16` of the sequence's panel `s / 16` ([`super::kv`]). Eight panels are scored together, then
//! the softmax is carried on online (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1), then the
//! values are added up.
//!
//! **What keeps a row's bits the same in every batch.** A score is one chain of multiply-adds over the head's elements.
//! Groups of eight panels and spans of [`SPAN`] slots lie at fixed positions of the sequence. Within a span a row's
//! running maximum, sum and values are updated group by group in order; spans start afresh and are joined in order, even
//! when one thread does them all, so that several threads can share the spans of one long sequence. A key that a row may
//! not see is not multiplied by zero: it is not touched at all. How many queries share a tile changes only which chains
//! are computed side by side.

mod tile;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use super::kv::KvLayout;
use super::pages::CpuPages;
use super::pool::Disjoint;
use super::vector_math::{Element, Kernel, LANES, Simd, dispatch};
use super::{Cpu, CpuTensor, Isa, Pool};
use crate::{AttentionSpec, LayerAttention, Precision, SequenceRows, StepRows};
use tile::{GROUP_SLOTS, HEAD_DIM_MAX, Panels, Running, TILE_PANELS, TILE_ROWS, Tile};

/// Slots after which the online softmax starts afresh.
const SPAN: usize = 8 * GROUP_SLOTS;
/// A step with fewer tiles than this for each thread shares out the spans instead.
const TILES_PER_THREAD_MIN: usize = 3;
/// Multiply-adds below which the caller works alone: handing a part to another thread takes longer.
const ALONE: usize = 1 << 19;
/// Spans shared out in one step at most; bounds the memory for their parts.
const SHARED_SPANS_MAX: usize = 512;

/// What is attended to.
#[derive(Clone, Copy)]
pub struct Attend<'a> {
    /// The model's sizes.
    pub spec: &'a AttentionSpec,
    /// The rows.
    pub step: &'a StepRows<'a>,
    /// The layer.
    pub layer: LayerAttention<'a, Cpu>,
}

/// Buffers that are kept from step to step.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    items: Vec<Item>,
    workers: Vec<Worker>,
    /// One for each shared span.
    parts: Vec<Running>,
    shared: Vec<SharedSpan>,
}

impl AttentionScratch {
    /// Makes room for all spans that `threads` threads may share of the sequences in `pages` pages: nothing is allocated when
    /// sequences lengthen.
    pub(super) fn reserve(&mut self, threads: usize, layout: &KvLayout, pages: usize) {
        if threads == 1 {
            return;
        }
        let slots = pages.saturating_mul(layout.block_panels() * LANES);
        let spans = (TILES_PER_THREAD_MIN * threads).saturating_mul(slots.div_ceil(SPAN)).min(SHARED_SPANS_MAX);
        self.shared.clear();
        self.shared.reserve(spans);
        self.parts.resize_with(spans.max(self.parts.len()), Running::default);
        self.parts.iter_mut().for_each(|part| part.reserve(layout.value_row()));
    }
}

/// A tile: `rows` queries from `first` on, counted over the sequence's rows times the heads of a group.
#[derive(Clone, Copy, Debug)]
struct Item {
    sequence: SequenceRows,
    kv_head: usize,
    first: usize,
    rows: usize,
    /// Slots that at least one of the rows sees.
    slots: (usize, usize),
}

impl Item {
    /// Numbers of the spans that hold its slots.
    fn spans(&self) -> Range<usize> {
        self.slots.0 / SPAN..self.slots.1.div_ceil(SPAN)
    }

    /// Its slots in a span: from the first on, to before the second.
    #[inline(always)]
    fn span_slots(&self, span: usize) -> (usize, usize) {
        (self.slots.0.max(span * SPAN), self.slots.1.min((span + 1) * SPAN))
    }
}

/// One span of a tile, when spans are shared out.
#[derive(Clone, Copy, Debug)]
struct SharedSpan {
    item: usize,
    span: usize,
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Worker {
    tile: Tile,
    total: Running,
    part: Running,
}

/// [`crate::Backend::attention`].
///
/// # Panics
/// When the step does not fit the model's sizes or the cache: widths, heads that groups do not divide, a short block table,
/// a block that is not KV ([`CpuPages::check`]).
pub fn attention(
    pool: &Pool,
    isa: Isa,
    attend: Attend<'_>,
    qkv: &CpuTensor,
    pages: &CpuPages,
    out: &mut CpuTensor,
    scratch: &mut AttentionScratch,
) {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *attend.spec;
    assert!(head_dim <= HEAD_DIM_MAX, "heads of {head_dim} elements; the kernels have room for {HEAD_DIM_MAX}");
    assert!(heads.is_multiple_of(kv_heads), "{heads} query heads over {kv_heads} key-value heads");
    assert_eq!(qkv.width(), (heads + 2 * kv_heads) * head_dim, "q, k and v beside each other");
    assert_eq!(out.width(), heads * head_dim, "one output for each query head");
    assert_eq!(attend.step.positions.len(), qkv.rows(), "one position for each row");
    out.set_rows(qkv.rows());
    match pages.precision {
        Precision::Quantised => Call::<f16>::new(attend, qkv, pages, out).run(pool, isa, scratch),
        Precision::F32 => Call::<f32>::new(attend, qkv, pages, out).run(pool, isa, scratch),
    }
}

/// One call of [`attention`].
struct Call<'a, T: Element> {
    attend: Attend<'a>,
    /// Query heads for each key-value head.
    group: usize,
    layout: KvLayout,
    qkv: &'a [f32],
    pages: &'a CpuPages,
    out: Disjoint<'a, f32>,
    element: PhantomData<T>,
}

impl<'a, T: Element> Call<'a, T> {
    fn new(attend: Attend<'a>, qkv: &'a CpuTensor, pages: &'a CpuPages, out: &'a mut CpuTensor) -> Self {
        Self {
            attend,
            group: attend.spec.heads / attend.spec.kv_heads,
            layout: pages.layout,
            qkv: qkv.values(),
            pages,
            out: Disjoint::new(out.values_mut()),
            element: PhantomData,
        }
    }

    fn run(&self, pool: &Pool, isa: Isa, scratch: &mut AttentionScratch) {
        scratch.items.clear();
        for sequence in self.attend.step.sequences {
            self.add_tiles(*sequence, &mut scratch.items);
        }
        scratch.workers.resize_with(pool.threads(), Worker::default);
        for worker in &mut scratch.workers {
            worker.tile.reserve();
            worker.total.reserve(self.layout.value_row());
            worker.part.reserve(self.layout.value_row());
        }
        let scores = scratch.items.iter().map(|item| item.rows * (item.slots.1 - item.slots.0));
        let alone = pool.threads() == 1 || 2 * self.layout.head_dim * scores.sum::<usize>() < ALONE;
        let spans: usize = scratch.items.iter().map(|item| item.spans().len()).sum();
        let few = scratch.items.len() < TILES_PER_THREAD_MIN * pool.threads();
        if !alone && few && spans > scratch.items.len() && spans <= SHARED_SPANS_MAX {
            self.run_spans(pool, isa, scratch);
        } else {
            self.run_tiles((!alone).then_some(pool), isa, scratch);
        }
    }

    /// Appends the tiles of one sequence. The last rows see the most, so they come first: threads that finish early find
    /// small tiles left.
    fn add_tiles(&self, sequence: SequenceRows, items: &mut Vec<Item>) {
        let queries = sequence.rows * self.group;
        for tile in (0..queries.div_ceil(TILE_ROWS)).rev() {
            let first = tile * TILE_ROWS;
            let rows = TILE_ROWS.min(queries - first);
            let (oldest, _) = self.visible(sequence.row + first / self.group);
            let (_, newest) = self.visible(sequence.row + (first + rows - 1) / self.group);
            let kv_heads = 0..self.attend.spec.kv_heads;
            items.extend(kv_heads.map(|kv_head| Item { sequence, kv_head, first, rows, slots: (oldest, newest) }));
        }
    }

    /// The slots that a row of the step sees: from the first on, to before the second.
    #[inline(always)]
    fn visible(&self, row: usize) -> (usize, usize) {
        let position = self.attend.step.positions[row] as usize;
        let oldest = self.attend.layer.window.map_or(0, |window| (position + 1).saturating_sub(window));
        (self.slot(oldest), self.slot(position) + 1)
    }

    #[inline(always)]
    fn slot(&self, position: usize) -> usize {
        let size = self.layout.block_size;
        position / size * self.layout.block_panels() * LANES + position % size
    }

    /// Every tile from its first span to its last on one thread: the pool's, or the caller alone.
    fn run_tiles(&self, pool: Option<&Pool>, isa: Isa, scratch: &mut AttentionScratch) {
        let workers = Disjoint::new(&mut scratch.workers);
        let next = AtomicUsize::new(0);
        let part = |worker: usize| {
            // SAFETY: each worker takes its own buffers.
            let worker = unsafe { &mut workers.slice(worker..worker + 1)[0] };
            dispatch(isa, Tiles { call: self, items: &scratch.items, next: &next, worker });
        };
        match pool {
            Some(pool) => pool.run(&part),
            None => part(0),
        }
    }

    /// Few tiles with many keys: threads share the spans, then the caller joins them. The same numbers as [`Self::run_tiles`].
    fn run_spans(&self, pool: &Pool, isa: Isa, scratch: &mut AttentionScratch) {
        let AttentionScratch { items, workers, parts, shared } = scratch;
        shared.clear();
        for (item, spans) in items.iter().map(Item::spans).enumerate() {
            shared.extend(spans.map(|span| SharedSpan { item, span }));
        }
        if parts.len() < shared.len() {
            parts.resize_with(shared.len(), Running::default);
        }
        parts[..shared.len()].iter_mut().for_each(|part| part.reserve(self.layout.value_row()));
        {
            let (workers, parts) = (Disjoint::new(workers), Disjoint::new(parts));
            let next = AtomicUsize::new(0);
            pool.run(&|worker| {
                // SAFETY: each worker takes its own buffers.
                let worker = unsafe { &mut workers.slice(worker..worker + 1)[0] };
                dispatch(isa, Spans { call: self, items, shared, next: &next, parts: &parts, worker });
            });
        }
        dispatch(isa, Join { call: self, items, parts });
    }

    /// The panels of one group of [`TILE_PANELS`], as far as slots before `end` reach.
    #[inline(always)]
    fn panels(&self, item: &Item, group: usize, end: usize) -> Panels<'a, T> {
        let table = &self.attend.step.block_tables[item.sequence.table..][..item.sequence.blocks];
        let block_panels = self.layout.block_panels();
        let (key_panel, value_panel) = (self.layout.key_panel(), self.layout.value_panel());
        let keys = self.layout.keys(self.attend.layer.layer, item.kv_head);
        let values = self.layout.values(self.attend.layer.layer, item.kv_head);
        let mut panels = Panels::default();
        for i in 0..TILE_PANELS.min((end - group * GROUP_SLOTS).div_ceil(LANES)) {
            let panel = group * TILE_PANELS + i;
            let (block, part) = (panel / block_panels, panel % block_panels);
            let page = self.pages.page::<T>(table[block]);
            panels.keys[i] = page[keys + part * key_panel..][..key_panel].as_chunks().0;
            panels.values[i] = page[values + part * value_panel..][..value_panel].as_chunks().0;
            panels.tokens[i] = (self.layout.block_size - part * LANES).min(LANES);
        }
        panels
    }

    /// Brings the tile's queries and what they see into `tile`.
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, item: &Item, tile: &mut Tile) {
        let AttentionSpec { heads, kv_heads, head_dim, scale, .. } = *self.attend.spec;
        tile.start::<S>(item.rows, head_dim);
        for query in 0..item.rows {
            let (row, member) = ((item.first + query) / self.group, (item.first + query) % self.group);
            let row = item.sequence.row + row;
            let head = item.kv_head * self.group + member;
            let start = row * (heads + 2 * kv_heads) * head_dim + head * head_dim;
            tile.set_query(simd, query, &self.qkv[start..start + head_dim], scale, self.visible(row));
        }
    }

    /// The first group of one span.
    #[inline(always)]
    fn first_panels(&self, (item, span): (&Item, usize)) -> Panels<'a, T> {
        let (first, end) = item.span_slots(span);
        self.panels(item, first / GROUP_SLOTS, end)
    }

    /// Attends to one span's slots, of which `panels` are the first group; `running` starts afresh. Returns the first group
    /// of the span that comes `next`, whose keys have been asked for.
    #[inline(always)]
    fn span<S: Simd>(
        &self,
        simd: S,
        (item, span): (&Item, usize),
        mut panels: Panels<'a, T>,
        next: Option<(&Item, usize)>,
        (tile, running): (&mut Tile, &mut Running),
    ) -> Panels<'a, T> {
        running.start(item.rows);
        let (first, end) = item.span_slots(span);
        let groups = first / GROUP_SLOTS..end.div_ceil(GROUP_SLOTS);
        for group in groups.clone() {
            let following = match group + 1 < groups.end {
                true => self.panels(item, group + 1, end),
                false => next.map_or_else(Panels::default, |next| self.first_panels(next)),
            };
            tile.attend(simd, &panels, &following, group * GROUP_SLOTS, running);
            panels = following;
        }
        panels
    }

    /// Divides by the sum of the weights and writes the rows out.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, item: &Item, running: &Running) {
        let AttentionSpec { heads, head_dim, .. } = *self.attend.spec;
        for query in 0..item.rows {
            let (row, member) = ((item.first + query) / self.group, (item.first + query) % self.group);
            let start = ((item.sequence.row + row) * heads + item.kv_head * self.group + member) * head_dim;
            // SAFETY: one head of one row, which belongs to this tile alone; each tile is finished by one thread.
            let out = unsafe { self.out.slice(start..start + head_dim) };
            running.write(simd, query, out);
        }
    }
}

/// A worker's share of the tiles: whichever is next.
struct Tiles<'a, 'b, T: Element> {
    call: &'a Call<'b, T>,
    items: &'a [Item],
    next: &'a AtomicUsize,
    worker: &'a mut Worker,
}

impl<'a, T: Element> Kernel for Tiles<'a, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Worker { tile, total, part } = self.worker;
        // The next tile is taken before one is done, so that its keys can be asked for.
        let take = || self.items.get(self.next.fetch_add(1, Ordering::Relaxed)).map(|item| (item, item.spans()));
        let mut taken = take();
        let start = |taken: &Option<(&'a Item, Range<usize>)>| taken.as_ref().map(|(item, spans)| (*item, spans.start));
        let mut panels = start(&taken).map_or_else(Panels::default, |first| self.call.first_panels(first));
        while let Some((item, spans)) = taken {
            taken = take();
            self.call.load(simd, item, tile);
            for span in spans.clone() {
                let next = if span + 1 < spans.end { Some((item, span + 1)) } else { start(&taken) };
                if span == spans.start {
                    panels = self.call.span(simd, (item, span), panels, next, (tile, total));
                } else {
                    panels = self.call.span(simd, (item, span), panels, next, (tile, part));
                    total.join(simd, part);
                }
            }
            self.call.finish(simd, item, total);
        }
    }
}

/// A worker's share of the spans: whichever is next.
struct Spans<'a, 'b, T: Element> {
    call: &'a Call<'b, T>,
    items: &'a [Item],
    shared: &'a [SharedSpan],
    next: &'a AtomicUsize,
    parts: &'a Disjoint<'a, Running>,
    worker: &'a mut Worker,
}

impl<T: Element> Kernel for Spans<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let take = || Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < self.shared.len());
        let start = |taken: Option<usize>| taken.map(|i| (&self.items[self.shared[i].item], self.shared[i].span));
        let mut taken = take();
        let mut panels = start(taken).map_or_else(Panels::default, |first| self.call.first_panels(first));
        while let (Some(i), Some((item, span))) = (taken, start(taken)) {
            taken = take();
            self.call.load(simd, item, &mut self.worker.tile);
            // SAFETY: the counter gives every span to one worker alone.
            let part = unsafe { &mut self.parts.slice(i..i + 1)[0] };
            panels = self.call.span(simd, (item, span), panels, start(taken), (&mut self.worker.tile, part));
        }
    }
}

/// Joins the spans of every tile in order.
struct Join<'a, 'b, T: Element> {
    call: &'a Call<'b, T>,
    items: &'a [Item],
    parts: &'a mut [Running],
}

impl<T: Element> Kernel for Join<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut parts = self.parts.iter_mut();
        for item in self.items {
            let total = parts.next().expect("at least one span for each tile");
            for _ in 1..item.spans().len() {
                total.join(simd, parts.next().expect("one part for each span"));
            }
            self.call.finish(simd, item, total);
        }
    }
}
