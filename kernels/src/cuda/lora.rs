//! LoRA on the device: what each row's adapter adds to a linear's output, for rows of many adapters in one launch (SGMV; Punica, Chen
//! et al. 2023, section 4). What the kernels do, and why, is said in `csrc/lora.cu`.
//!
//! A step goes like this. [`LoraPlan::segments`] names its adapters for [`StepMemory::write`](super::step::StepMemory::write);
//! [`LoraPlan::plan`] is its first launch; then [`LoraPlan::shrink`] and [`LoraPlan::expand`] follow each linear's product, and
//! [`LoraPlan::embed`] the embedding. All are launches alone, so that one recorded graph serves any step of its size, whatever
//! adapters and ranks are in it.

mod adapter;
mod placement;

pub use adapter::CudaAdapter;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};

use super::device::{Address, Device, Element, Launch, Memory, Stream};
use super::step::{Segment, Step};
use super::tensor::CudaTensor;
use crate::{KernelError, LoraRows, SiteSpan};

// As in `csrc/lora.cu`.
const THREADS: u32 = 256;
/// Sites of a fused linear at most.
const SITES: usize = 3;
const UNIT: usize = 16;
const SPLIT: usize = 1024;
const LARGE_FROM: usize = 256;
const SMALL_ROWS: usize = 16;
const SHRINK_ROWS: usize = 128;
const SHRINK_UNITS: usize = 4;
const EXPAND_ROWS: usize = 64;
const COLUMNS: usize = 512;
/// Largest rank of an adapter: what the kernels' shared memory has room for.
pub const RANK_MAX: usize = 256;

/// Shared memory of `lora_plan`, and of the shrink: this tile's item and the next, the sums of 8 warps, 16 rows of 16 and 4 unused.
const PLAN_SHARED: u32 = 8 * 4;
const SHRINK_SHARED: u32 = (2 * SHRINK_UNITS * UNIT_BYTES + 8 * SMALL_ROWS * (UNIT + 4) * 4) as u32;
/// Blocks for each multiprocessor: what its registers have room for.
const BLOCKS: usize = 2;

/// `LoraUnit` in `csrc/lora.cu`, of which only the size matters here.
const UNIT_BYTES: usize = 48;
/// `LoraExpand`
const EXPAND_BYTES: usize = 80;
/// `LoraCounts`
const COUNTS_BYTES: usize = 16;

/// A linear that adapters may target, or whose bias [`LoraPlan::expand`] adds; or the embedding table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraLinear {
    /// Its sites, three at most, in ascending order.
    pub sites: Vec<SiteSpan>,
    /// Inputs; of the embedding table the vocabulary.
    pub inputs: usize,
    /// Outputs of all sites.
    pub outputs: usize,
    /// Whether it has a bias, which then comes after DoRA's factor.
    pub bias: bool,
    /// Whether it is the embedding table.
    pub embedding: bool,
}

/// Room for the largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraLimits {
    /// Rows.
    pub rows: usize,
    /// Segments.
    pub segments: usize,
    /// Ranks of an adapter's sites, 256 at most.
    pub rank: usize,
}

/// What a step's adapters have to do at each linear of a model, worked out on the device, and the room it takes.
#[derive(Debug)]
pub struct LoraPlan<D: Device> {
    device: Arc<D>,
    element: Element,
    limits: LoraLimits,
    linears: Vec<Planned>,
    /// [`LinearEntry`] of each.
    entries: Memory<D>,
    /// Counts and items of each.
    _items: Memory<D>,
    /// Partial sums: `[splits][rows][sites][ranks]` f32, of one linear at a time.
    z: Memory<D>,
    /// No other plan has it; not 0.
    number: u64,
}

#[derive(Clone, Debug)]
struct Planned {
    linear: LoraLinear,
    entry: LinearEntry,
}

/// `LoraLinear` in `csrc/lora.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct LinearEntry {
    counts: Address,
    small: Address,
    large: Address,
    expand: Address,
    site: [u32; SITES],
    sites: u32,
    z_site: u32,
    bias: u32,
    gathers: u32,
    unused: u32,
}

/// `LoraPlanParams`
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct PlanParams {
    step: Step,
    linears: Address,
    large: u32,
    unused: u32,
}

/// `LoraShrinkParams`
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct ShrinkParams {
    counts: Address,
    small: Address,
    large: Address,
    x: Address,
    z: Address,
    z_split: u64,
    z_row: u32,
    inputs: u32,
    splits: u32,
    small_max: u32,
}

/// `LoraColumns`
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Columns {
    first: u32,
    outputs: u32,
}

/// `LoraExpandParams`
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct ExpandParams {
    counts: Address,
    items: Address,
    z: Address,
    tokens: Address,
    out: Address,
    bias: Address,
    z_split: u64,
    z_row: u32,
    z_site: u32,
    splits: u32,
    inputs: u32,
    width: u32,
    sites: u32,
    across: u32,
    items_max: u32,
    columns: [Columns; SITES],
}

impl LoraLimits {
    /// Rows for which there is an item each, at most: of small segments and of large ones as expanded.
    fn row_tiles(&self, rows: usize) -> usize {
        rows.min(rows / SMALL_ROWS + self.segments)
    }

    /// Units of all sites, as many as ranks allow.
    fn units(&self, sites: usize) -> usize {
        sites * self.rank.div_ceil(UNIT)
    }

    fn small_units(&self, rows: usize, sites: usize) -> usize {
        self.row_tiles(rows) * self.units(sites)
    }

    fn large_items(&self, rows: usize, sites: usize) -> usize {
        // A segment's last tile may have few rows.
        (rows / SHRINK_ROWS + rows / LARGE_FROM) * self.units(sites).div_ceil(SHRINK_UNITS)
    }
}

impl<D: Device> LoraPlan<D> {
    /// For linears of a model, named by their place in `linears` from now on, whose inputs are of `element`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    ///
    /// # Panics
    /// When a linear has more than three sites, an embedding table more than one, or the limits allow ranks above 256.
    pub fn new(
        device: &Arc<D>,
        element: Element,
        linears: &[LoraLinear],
        limits: LoraLimits,
    ) -> Result<Self, KernelError> {
        assert!((1..=RANK_MAX).contains(&limits.rank), "ranks up to {}", limits.rank);
        for linear in linears {
            assert!(linear.sites.len() <= if linear.embedding { 1 } else { SITES }, "{} sites", linear.sites.len());
        }
        let sizes = linears.iter().map(|linear| item_bytes(linear, &limits)).collect::<Vec<_>>();
        let items = Memory::new(device, sizes.iter().flatten().sum())?;
        let mut at = items.address();
        let linears: Vec<Planned> = linears
            .iter()
            .zip(sizes)
            .map(|(linear, sizes)| {
                let [counts, small, large, expand] = sizes.map(|bytes| {
                    let start = at;
                    at = at.plus(bytes);
                    start
                });
                let mut site = [0; SITES];
                site.iter_mut().zip(&linear.sites).for_each(|(site, span)| *site = span.index as u32);
                let entry = LinearEntry {
                    counts,
                    small,
                    large,
                    expand,
                    site,
                    sites: linear.sites.len() as u32,
                    z_site: (limits.rank.div_ceil(UNIT) * UNIT) as u32,
                    bias: linear.bias.into(),
                    gathers: linear.embedding.into(),
                    unused: 0,
                };
                Planned { linear: linear.clone(), entry }
            })
            .collect();
        let entries: Vec<LinearEntry> = linears.iter().map(|planned| planned.entry).collect();
        let shrunk = linears.iter().filter(|planned| !planned.linear.embedding);
        let z_bytes = shrunk.map(|planned| planned.splits() * limits.rows * planned.z_row() * 4).max().unwrap_or(0);
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        Ok(Self {
            device: Arc::clone(device),
            element,
            limits,
            entries: Memory::holding(device, &entries)?,
            _items: items,
            z: Memory::new(device, z_bytes)?,
            linears,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// A step's segments with the addresses of their adapters; none when no row has an adapter. Steps enqueued from now on wait
    /// on the device until these adapters are loaded.
    ///
    /// # Errors
    /// [`KernelError::Page`] when an adapter's pages are not its own any more, or a device failure.
    ///
    /// # Panics
    /// When an adapter does not fit a linear or the limits, which who loaded it has checked against the model; when it is
    /// of another element; or when there are more segments than the limits allow.
    pub fn segments(&self, lora: &LoraRows<'_, CudaAdapter<D>>) -> Result<Vec<Segment>, KernelError> {
        assert!(lora.segments.len() <= self.limits.segments, "{} segments", lora.segments.len());
        if lora.segments.iter().all(|segment| segment.adapter.is_none()) {
            return Ok(Vec::new());
        }
        let segment = |segment: &crate::LoraSegment<'_, CudaAdapter<D>>| {
            let address = match segment.adapter {
                Some(adapter) => {
                    adapter.check()?;
                    adapter.fits(self.number, || self.compare(adapter));
                    adapter.settle()?;
                    adapter.address()
                }
                None => Address::default(),
            };
            Ok(Segment { row: segment.row as u32, rows: segment.rows as u32, adapter: address })
        };
        lora.segments.iter().map(segment).collect()
    }

    fn compare(&self, adapter: &CudaAdapter<D>) {
        assert_eq!(adapter.element(), self.element, "an adapter of another element");
        for Planned { linear, .. } in &self.linears {
            for span in &linear.sites {
                let Some([rank, inputs, outputs]) = adapter.size(span.index) else { continue };
                assert!(rank <= self.limits.rank, "{}: rank {rank} of {} at most", span.site, self.limits.rank);
                let fits = (inputs, outputs) == (linear.inputs, span.outputs.len());
                assert!(fits, "{}: an adapter of {inputs} inputs and {outputs} outputs", span.site);
            }
        }
    }

    /// Works out what the step's adapters have to do at every linear: before the first of them, once per step.
    ///
    /// # Errors
    /// A device failure.
    pub fn plan(&self, step: Step) -> Result<(), KernelError> {
        if self.linears.is_empty() {
            return Ok(());
        }
        let large = (self.element != Element::F32).into();
        let params = PlanParams { step, linears: self.entries.address(), large, unused: 0 };
        let launch = Launch::new("lora_plan", [self.linears.len() as u32, 1], THREADS, &params).shared(PLAN_SHARED);
        // SAFETY: the entries' lists have room for any step within the limits, to which `segments` holds those who write steps.
        unsafe { self.device.launch(Stream::Compute, &launch) }
    }

    /// `z = A x` for each site of a linear and each row, of at most `rows_max`, into room of the plan's own, until the next linear.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When `x` is not the linear's input, or there are more rows than the limits allow.
    pub fn shrink(&self, linear: usize, x: &CudaTensor<D>, rows_max: usize) -> Result<(), KernelError> {
        let planned = &self.linears[linear];
        let (inputs, sites, splits) = (planned.linear.inputs, planned.linear.sites.len(), planned.splits());
        assert!(!planned.linear.embedding && x.width() == inputs && x.element() == self.element, "another linear's x");
        assert!(rows_max <= self.limits.rows, "{rows_max} rows");
        if sites == 0 {
            return Ok(());
        }
        let entry = &planned.entry;
        let params = ShrinkParams {
            counts: entry.counts,
            small: entry.small,
            large: entry.large,
            x: x.address(),
            z: self.z.address(),
            z_split: self.z_split(planned),
            z_row: planned.z_row() as u32,
            inputs: inputs as u32,
            splits: splits as u32,
            small_max: self.limits.small_units(self.limits.rows, sites) as u32,
        };
        let large = if self.element == Element::F32 { 0 } else { self.limits.large_items(rows_max, sites) };
        let tiles = (self.limits.small_units(rows_max, sites) + large) * splits;
        let kernel = format!("lora_shrink_{}", self.element.suffix());
        let launch = Launch::new(&kernel, self.grid(tiles), THREADS, &params);
        let shared = if self.element == Element::F32 { 0 } else { SHRINK_SHARED };
        // SAFETY: items name rows of the step, of which x has as many; z has room for them and all ranks within the limits; the
        // adapters' sizes are the linear's, compared in `segments`.
        unsafe { self.device.launch(Stream::Compute, &launch.shared(shared)) }
    }

    /// Turns a linear's `out = W x` into `output_scale (out + scale (B z + b_bias)) + bias` where a row's adapter has the site, and
    /// into `out + bias` elsewhere. `bias` is f32 `[outputs]`, given exactly for linears that have one.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When `out` or `bias` is not the linear's, or there are more rows than the limits allow.
    pub fn expand(
        &self,
        linear: usize,
        out: &mut CudaTensor<D>,
        bias: Option<Address>,
        rows_max: usize,
    ) -> Result<(), KernelError> {
        let planned = &self.linears[linear];
        assert!(!planned.linear.embedding && bias.is_some() == planned.linear.bias, "another linear's bias");
        self.launch_expand("expand", planned, out, Inputs { bias, tokens: None }, rows_max)
    }

    /// Adds what the adapters of the embedding table do to `out`, the embeddings of the step's tokens.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When the linear is no embedding table or `out` not its, or there are more rows than the limits allow.
    pub fn embed(
        &self,
        linear: usize,
        step: Step,
        out: &mut CudaTensor<D>,
        rows_max: usize,
    ) -> Result<(), KernelError> {
        let planned = &self.linears[linear];
        assert!(planned.linear.embedding && !planned.linear.bias, "no embedding table");
        self.launch_expand("embed", planned, out, Inputs { bias: None, tokens: Some(step.tokens) }, rows_max)
    }

    /// The partial sums of the linear that was shrunk last, `[splits][rows][sites][ranks]` for the limits' rows and ranks, NaN or
    /// others' where it has none: for tests, which see in them what rounding hides in the outputs.
    ///
    /// # Errors
    /// A device failure.
    pub fn read_shrunk(&self, linear: usize) -> Result<Vec<f32>, KernelError> {
        let planned = &self.linears[linear];
        self.z.read(0, planned.splits() * self.limits.rows * planned.z_row())
    }

    fn launch_expand(
        &self,
        what: &str,
        planned: &Planned,
        out: &mut CudaTensor<D>,
        inputs: Inputs,
        rows_max: usize,
    ) -> Result<(), KernelError> {
        let LoraLinear { sites, inputs: vocab, outputs, .. } = &planned.linear;
        assert!(out.width() == *outputs, "another linear's out");
        assert!(rows_max <= self.limits.rows, "{rows_max} rows");
        let mut columns = [Columns::default(); SITES];
        for (columns, span) in columns.iter_mut().zip(sites) {
            *columns = Columns { first: span.outputs.start as u32, outputs: span.outputs.len() as u32 };
        }
        let across: usize = sites.iter().map(|span| span.outputs.len().div_ceil(COLUMNS)).sum();
        let params = ExpandParams {
            counts: planned.entry.counts,
            items: planned.entry.expand,
            z: self.z.address(),
            tokens: inputs.tokens.unwrap_or_default(),
            out: out.address(),
            bias: inputs.bias.unwrap_or_default(),
            z_split: self.z_split(planned),
            z_row: planned.z_row() as u32,
            z_site: planned.entry.z_site,
            splits: planned.splits() as u32,
            inputs: *vocab as u32,
            width: *outputs as u32,
            sites: sites.len() as u32,
            across: across as u32,
            items_max: self.limits.row_tiles(self.limits.rows) as u32,
            columns,
        };
        let tiles = self.limits.row_tiles(rows_max) * across;
        if tiles == 0 {
            return Ok(());
        }
        let to = match (self.element, out.element()) {
            (of, to) if of == to => "",
            (_, Element::F32) => "_to_f32",
            _ => panic!("outputs of another element"),
        };
        let rank = self.limits.rank.div_ceil(UNIT) * UNIT;
        let shared = match self.element {
            Element::F32 => SMALL_ROWS * rank * 4,
            // Rows lie 16 bytes apart, for the banks.
            _ if rows_max < LARGE_FROM => SMALL_ROWS * (rank + 8) * 2,
            _ => EXPAND_ROWS * (rank + 8) * 2,
        };
        // This tile's item and the next.
        let shared = shared + 2 * EXPAND_BYTES;
        let kernel = format!("lora_{what}_{}{to}", self.element.suffix());
        let launch = Launch::new(&kernel, self.grid(tiles), THREADS, &params).shared(shared as u32);
        // SAFETY: items name rows of the step, of which out has as many; the adapters' sizes are the linear's and ranks within the
        // limits, compared in `segments`; what is read of z has been shrunk before.
        unsafe { self.device.launch(Stream::Compute, &launch) }
    }

    /// As many blocks as run side by side, no more than there can be tiles: a constant of the launch's size.
    fn grid(&self, tiles: usize) -> [u32; 2] {
        let side_by_side = self.device.properties().multiprocessors as usize * BLOCKS;
        [side_by_side.min(tiles).max(1) as u32, 1]
    }

    fn z_split(&self, planned: &Planned) -> u64 {
        (self.limits.rows * planned.z_row()) as u64
    }
}

/// What is given for one launch of an expand.
struct Inputs {
    bias: Option<Address>,
    tokens: Option<Address>,
}

impl Planned {
    fn splits(&self) -> usize {
        if self.linear.embedding { 1 } else { self.linear.inputs.div_ceil(SPLIT) }
    }

    /// From a row of z to the next.
    fn z_row(&self) -> usize {
        self.linear.sites.len() * self.entry.z_site as usize
    }
}

/// Bytes of a linear's counts, small units, large items, and what is to be expanded.
fn item_bytes(linear: &LoraLinear, limits: &LoraLimits) -> [usize; 4] {
    let sites = linear.sites.len();
    let expand = limits.row_tiles(limits.rows) * sites * EXPAND_BYTES;
    if linear.embedding {
        return [COUNTS_BYTES, 0, 0, expand];
    }
    let small = limits.small_units(limits.rows, sites) * UNIT_BYTES;
    [COUNTS_BYTES, small, limits.large_items(limits.rows, sites) * SHRINK_UNITS * UNIT_BYTES, expand]
}
