//! Causal attention over the pages: the plan of a step's work, room for partial results, the launches.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::{Address, Device, Element, Launch, Memory, Stream};
use super::step::Step;
use super::tensor::CudaTensor;
use crate::{AttentionSpec, KernelError};

/// Positions of one split of the keys.
const SPLIT: usize = 256;
/// Pairs of a query row and a head that one tile of the tensor cores takes.
const PAIRS: usize = 16;
/// Longest head.
const HEAD_MAX: usize = 256;
const WARP: usize = 32;
const PLAN_THREADS: u32 = 256;
const JOIN_THREADS: u32 = 128;
/// Blocks for each multiprocessor at most; they walk through the plan.
const BLOCKS_EACH: usize = 24;
/// Bytes of an `Item` and of a `Join` in `csrc/attention.cu`.
const ENTRY: usize = 16;
/// Bytes of a `Share` there.
const SHARE: u32 = 28;

/// `PlanParams` of `csrc/attention.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PlanParams {
    step: Step,
    plan: PlanAddresses,
    group: u32,
    window: u32,
    many_pairs: u32,
    unused: u32,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct PlanAddresses {
    counts: Address,
    few: Address,
    many: Address,
    joins: Address,
}

/// `Params` of `csrc/attention.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    step: Step,
    plan: PlanAddresses,
    states: Address,
    sums: Address,
    qkv: Address,
    out: Address,
    pages: Address,
    page_bytes: u64,
    heads: u32,
    kv_heads: u32,
    group: u32,
    head_dim: u32,
    block_size: u32,
    window: u32,
    scale_log2: f32,
    unused: u32,
}

/// Numbers of one layer in a page.
fn layer_elements(spec: &AttentionSpec) -> usize {
    spec.kv_heads * 2 * spec.block_size * spec.head_dim
}

/// The keys and values of one layer in a pool of pages.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer {
    /// Page 0.
    pub pages: Address,
    /// From one page to the next.
    pub page_bytes: usize,
    /// Layer, from 0.
    pub layer: usize,
}

impl KvLayer {
    /// The layer's part of page 0.
    pub(super) fn address(self, spec: &AttentionSpec, element: Element) -> Address {
        self.pages.plus(self.layer * layer_elements(spec) * element.bytes())
    }
}

/// The largest step that a launch must do for, or that there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionBounds {
    /// Rows of a step.
    pub rows: usize,
    /// Rows of one sequence: 1 where steps only decode.
    pub rows_each: usize,
    /// Entries of all block tables.
    pub table_entries: usize,
}

/// How many of everything there are at most.
#[derive(Clone, Copy, Debug)]
struct Most {
    few: usize,
    many: usize,
    joins: usize,
    slots: usize,
}

impl AttentionBounds {
    fn most(&self, spec: &AttentionSpec, many_pairs: usize) -> Most {
        let group = spec.heads / spec.kv_heads;
        let rows_few = (PAIRS / group).max(1).min(self.rows_each);
        // A sequence has at most one split more than its tokens fill.
        let filled = self.table_entries * spec.block_size / SPLIT;
        let many = if self.rows_each > rows_few {
            (self.rows * group).div_ceil(many_pairs) + self.rows / (rows_few + 1)
        } else {
            0
        };
        Most {
            few: (filled + self.rows) * group.div_ceil(PAIRS),
            many,
            joins: self.rows,
            // Those with one split have no partial results, and of the others there are no more than filled splits.
            slots: filled * rows_few + self.rows.min(filled * rows_few),
        }
    }

    fn within(&self, room: &Self) -> bool {
        self.rows <= room.rows && self.rows_each <= room.rows_each && self.table_entries <= room.table_entries
    }
}

/// Which instantiation of `Attend` in `csrc/attention.cu`.
#[derive(Clone, Copy, Debug)]
struct Shape {
    head: usize,
    /// Tiles of [`PAIRS`] pairs of a block, and warps for each.
    tiles: usize,
    warps: usize,
    shared_queries: bool,
    tight: bool,
    many: bool,
}

impl Shape {
    fn few(head_dim: usize) -> Self {
        let head = Self::head(head_dim);
        Self { head, tiles: 1, warps: 4, shared_queries: head > 128, tight: head > 128, many: false }
    }

    fn many(head_dim: usize, small: bool) -> Self {
        let head = Self::head(head_dim);
        let (warps, all) = (if head > 128 { 2 } else { 1 }, if small { 4 } else { 12 });
        let shared_queries = head == 96 || (!small && head > 64);
        Self { head, tiles: all / warps, warps, shared_queries, tight: small, many: true }
    }

    /// The length that kernels are compiled for.
    fn head(head_dim: usize) -> usize {
        [64, 96, 128].into_iter().find(|head| head_dim <= *head).unwrap_or(HEAD_MAX)
    }

    fn threads(&self) -> usize {
        self.tiles * self.warps * WARP
    }

    /// As `Attend` lays it out.
    fn shared_bytes(&self) -> usize {
        let Self { head, tiles, warps, .. } = *self;
        let (keys, chunks) = (if head > 128 { 32 } else { 64 }, head / 8);
        let stride = if self.tight && chunks % 8 == 0 { chunks } else { chunks + 1 };
        let stages = 2 * 2 * keys * stride * 16;
        let exchanged = if warps > 1 { tiles * keys / 16 * WARP * 16 + tiles * warps * PAIRS * 4 } else { 0 };
        let queries = if self.shared_queries { tiles * head / 16 * WARP * 16 } else { 0 };
        let totals = self.threads() * (head / 16).div_ceil(warps) * 8 * 4 + tiles * warps * 2 * PAIRS * 4;
        let totals = if self.many { totals } else { 0 };
        stages + exchanged + queries + totals
    }
}

/// Who does what in one step, for the layers of one window. Written on the device by [`AttentionPlan::make`], once a step.
#[derive(Debug)]
pub struct AttentionPlan<D: Device> {
    memory: Memory<D>,
    addresses: PlanAddresses,
    room: AttentionBounds,
    group: usize,
    head_dim: usize,
    window: Option<usize>,
    small: bool,
    /// What a block of the device may have.
    shared_bytes: u32,
}

impl<D: Device> AttentionPlan<D> {
    /// Room for the plans of steps within `room`. `shared_bytes`: what a block of the device may have, which decides how much one
    /// block does.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    ///
    /// # Panics
    /// When heads are too long for the kernels, odd, or no multiple of the key and value heads.
    pub fn new(
        device: &Arc<D>,
        spec: &AttentionSpec,
        room: AttentionBounds,
        window: Option<usize>,
        shared_bytes: u32,
    ) -> Result<Self, KernelError> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
        assert!(head_dim.is_multiple_of(2) && head_dim <= HEAD_MAX, "heads of {head_dim} elements");
        assert!(heads.is_multiple_of(kv_heads), "{heads} query heads for {kv_heads} key and value heads");
        let small = Shape::many(head_dim, false).shared_bytes() > shared_bytes as usize;
        let most = room.most(spec, Shape::many(head_dim, small).tiles * PAIRS);
        let sizes = [ENTRY, most.few * ENTRY, most.many * ENTRY, most.joins * ENTRY];
        let memory = Memory::new(device, sizes.iter().sum())?;
        let mut at = memory.address();
        let [counts, few, many, joins] = sizes.map(|size| {
            let address = at;
            at = at.plus(size);
            address
        });
        let addresses = PlanAddresses { counts, few, many, joins };
        Ok(Self { memory, addresses, room, group: heads / kv_heads, head_dim, window, small, shared_bytes })
    }

    /// Bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Enqueues the planning of a step, which has to be within the bounds.
    ///
    /// # Errors
    /// A device failure.
    pub fn make(&self, device: &D, stream: Stream, step: Step) -> Result<(), KernelError> {
        let params = PlanParams {
            step,
            plan: self.addresses,
            group: self.group as u32,
            window: window_of(self.window),
            many_pairs: (Shape::many(self.head_dim, self.small).tiles * PAIRS) as u32,
            unused: 0,
        };
        let launch = Launch::new("attention_plan", [1, 1], PLAN_THREADS, &params).shared(128 + PLAN_THREADS * SHARE);
        // SAFETY: the step is one of StepMemory; the plan has room for any step within its bounds, as this one is.
        unsafe { device.launch(stream, &launch) }
    }
}

/// Room for what splits of the keys come to before they are joined; used by one layer after the other.
#[derive(Debug)]
pub struct AttentionPartials<D: Device> {
    states: Memory<D>,
    sums: Memory<D>,
    room: AttentionBounds,
}

impl<D: Device> AttentionPartials<D> {
    /// Room for steps within `room`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(device: &Arc<D>, spec: &AttentionSpec, room: AttentionBounds) -> Result<Self, KernelError> {
        let places = room.most(spec, PAIRS).slots * spec.heads;
        let states = Memory::new(device, places * 8)?;
        let sums = Memory::new(device, places * spec.head_dim * 4)?;
        Ok(Self { states, sums, room })
    }

    /// Bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.states.bytes() + self.sums.bytes()
    }
}

/// What [`attention`] is done with.
#[derive(Debug)]
pub struct Attention<'a, D: Device> {
    /// Sizes.
    pub spec: &'a AttentionSpec,
    /// The step on the device: every row's position is in its sequence's block table, and the keys and values up to it are in
    /// the pages.
    pub step: Step,
    /// Where they are.
    pub kv: KvLayer,
    /// The step's plan, with the layer's window.
    pub plan: &'a AttentionPlan<D>,
    /// Room for partial results.
    pub partials: &'a AttentionPartials<D>,
    /// The largest step that these launches must do for.
    pub bounds: AttentionBounds,
}

/// [`crate::Backend::attention`]. Two or three launches; the second and third are left out where `bounds` say that no step needs them.
///
/// # Errors
/// Heads so long that their tiles do not fit the shared memory that a block of the device may have, or a device failure.
///
/// # Panics
/// When the tensors do not fit the sizes, or plan and partials have no room for `bounds`.
pub fn attention<D: Device>(
    device: &D,
    stream: Stream,
    attention: &Attention<'_, D>,
    qkv: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let Attention { spec, plan, partials, bounds, .. } = attention;
    let AttentionSpec { heads, kv_heads, head_dim, .. } = **spec;
    assert_eq!(qkv.width(), (heads + 2 * kv_heads) * head_dim, "q, k and v beside each other");
    assert_eq!(out.width(), heads * head_dim, "a row of all heads");
    assert_eq!(qkv.element(), out.element(), "elements");
    assert_eq!((plan.group, plan.head_dim), (heads / kv_heads, head_dim), "the plan's heads");
    assert!(bounds.within(&plan.room) && bounds.within(&partials.room), "{bounds:?}");
    let params = params(attention, qkv, out);
    let element = qkv.element();
    let run = |kernel: &str, grid: [usize; 2], threads: usize, shared: usize| {
        if grid[0] == 0 {
            return Ok(());
        }
        let grid = grid.map(|blocks| blocks as u32);
        let launch = Launch::new(kernel, grid, threads as u32, &params).shared(shared as u32);
        // SAFETY: the step is one of StepMemory within `bounds`, as the caller says, so that plan and partials have room for it; its
        // rows are in qkv and out and its pages in the pool.
        unsafe { device.launch(stream, &launch) }
    };
    if element == Element::F32 {
        let blocks = (bounds.rows * heads).div_ceil(4);
        return run("attention_f32", [blocks, 1], 4 * WARP, 4 * (HEAD_MAX * 4 + WARP * 12));
    }
    let (few, many) = (Shape::few(head_dim), Shape::many(head_dim, plan.small));
    fits_shared(device, head_dim, few.shared_bytes().max(many.shared_bytes()), plan.shared_bytes)?;
    let most = bounds.most(spec, many.tiles * PAIRS);
    let blocks_max = device.properties().multiprocessors as usize * BLOCKS_EACH;
    let blocks = |items: usize| [(items * kv_heads).min(blocks_max), 1];
    let (head, suffix) = (few.head, element.suffix());
    let name = format!("attention_few_{head}_{suffix}");
    run(&name, blocks(most.few), few.threads(), few.shared_bytes())?;
    let name = format!("attention_many_{}{head}_{suffix}", if plan.small { "small_" } else { "" });
    run(&name, blocks(most.many), many.threads(), many.shared_bytes())?;
    let units = (heads * head_dim / 2).div_ceil(JOIN_THREADS as usize);
    let rows = most.joins.min(blocks_max);
    run(&format!("attention_join_{suffix}"), [rows, units], JOIN_THREADS as usize, 0)
}

/// Turing has 64 KiB for a block: enough for heads of 64 elements.
fn fits_shared<D: Device>(device: &D, head_dim: usize, needed: usize, there: u32) -> Result<(), KernelError> {
    if needed <= there as usize {
        return Ok(());
    }
    let properties = device.properties();
    let (major, minor) = properties.compute;
    Err(KernelError::Device {
        device: properties.name.clone(),
        what: format!("attention over heads of {head_dim} elements"),
        reason: format!(
            "it takes {} KiB of shared memory for a block, and compute capability {major}.{minor} has {}; use a GPU of 8.0 or \
             newer, or the CPU",
            needed.div_ceil(1024),
            there / 1024
        ),
    })
}

fn params<D: Device>(attention: &Attention<'_, D>, qkv: &CudaTensor<D>, out: &CudaTensor<D>) -> Params {
    let Attention { spec, step, kv, plan, partials, .. } = *attention;
    Params {
        step,
        plan: plan.addresses,
        states: partials.states.address(),
        sums: partials.sums.address(),
        qkv: qkv.address(),
        out: out.address(),
        pages: kv.address(spec, qkv.element()),
        page_bytes: kv.page_bytes as u64,
        heads: spec.heads as u32,
        kv_heads: spec.kv_heads as u32,
        group: plan.group as u32,
        head_dim: spec.head_dim as u32,
        block_size: spec.block_size as u32,
        window: window_of(plan.window),
        scale_log2: spec.scale * std::f32::consts::LOG2_E,
        unused: 0,
    }
}

/// As kernels have it: 0 for none.
fn window_of(window: Option<usize>) -> u32 {
    window.map_or(0, |window| u32::try_from(window).unwrap_or(u32::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(group: usize, block_size: usize) -> AttentionSpec {
        AttentionSpec { heads: group, kv_heads: 1, head_dim: 64, block_size, scale: 1.0, norm_eps: 1e-6 }
    }

    proptest! {
        /// What `attention_plan` makes of any sequences has room.
        #[test]
        fn plans_have_room_for_any_sequences(
            sequences in prop::collection::vec((1_usize..40, 0_usize..3_000), 1..20),
            group in 1_usize..33,
            block_size in prop::sample::select(vec![1_usize, 7, 16, 32]),
            many_pairs in prop::sample::select(vec![64_usize, 96, 192]),
        ) {
            let entries = sequences.iter().map(|(rows, before)| (rows + before).div_ceil(block_size)).sum();
            let bounds = AttentionBounds {
                rows: sequences.iter().map(|(rows, _)| rows).sum(),
                rows_each: sequences.iter().map(|(rows, _)| *rows).max().unwrap_or(1),
                table_entries: entries,
            };
            let most = bounds.most(&spec(group, block_size), many_pairs);
            let (mut few, mut many, mut slots) = (0, 0, 0);
            for (rows, before) in sequences {
                if rows > 1 && rows * group > PAIRS {
                    many += (rows * group).div_ceil(many_pairs);
                    continue;
                }
                let splits = (before + rows - 1) / SPLIT + 1;
                few += splits * (rows * group).div_ceil(PAIRS);
                slots += if splits > 1 { splits * rows } else { 0 };
            }
            prop_assert!(few <= most.few && many <= most.many && slots <= most.slots, "{:?} of {:?}", (few, many, slots), most);
        }
    }

    /// Llama-3.1-8B, steps of 8,192 rows over a pool of 65,536 blocks.
    #[test]
    fn partial_results_take_a_small_part_of_a_pool() {
        let bounds = AttentionBounds { rows: 8_192, rows_each: 8_192, table_entries: 65_536 };
        let slots = bounds.most(&spec(4, 16), 192).slots;
        assert_eq!(slots, 24_576);
        // Of 32 heads of 128 numbers, of a pool of 128 GiB.
        assert!(slots * 32 * 128 * 4 <= (128 << 30) / 256, "{slots} slots");
    }
}
