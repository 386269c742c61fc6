//! What works row by row: tokens taken from the sampling before, embedding, RMSNorm, SwiGLU, bias, rows picked out, pages copied
//! (`csrc/rows.cu`).
//!
//! A launch covers [`Rows::max`] rows; how many there are the kernels read on the device, and leave the others alone.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::{Address, Device, Element, Launch, Memory, Stream};
use super::step::{Step, StepMemory};
use super::tensor::CudaTensor;
use crate::KernelError;

/// Threads of a block of every kernel but `add_rms_norm`.
const ROW_THREADS: u32 = 256;
/// Threads of a block of `add_rms_norm` at most.
const NORM_THREADS: u32 = 512;
/// Bytes that one thread moves at once.
const WIDE_BYTES: usize = 16;
/// Bytes of a page that one block copies.
const COPY_BYTES: usize = ROW_THREADS as usize * WIDE_BYTES * 8;

/// The rows that a launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Their number on the device, a u32.
    pub count: Address,
    /// How many there can be: the launch's size, the same for all steps that one recorded graph serves.
    pub max: usize,
}

impl Rows {
    /// The rows of a step.
    #[must_use]
    pub fn of_step(step: &Step, max: usize) -> Self {
        // The first field of its counts.
        Self { count: step.counts, max }
    }
}

/// A number and so many items, at addresses that stay.
#[derive(Debug)]
pub struct DeviceList<D: Device, T> {
    memory: Memory<D>,
    /// What was written last, as it lies on the device.
    host: Vec<u8>,
    max: usize,
    item: PhantomData<T>,
}

/// Where the items of a [`DeviceList`] begin.
const ITEMS: usize = 256;

impl<D: Device, T: Pod> DeviceList<D, T> {
    /// Room for `max` items; none yet.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn new(device: &Arc<D>, max: usize) -> Result<Self, KernelError> {
        let memory = Memory::new(device, ITEMS + max * size_of::<T>())?;
        let mut list = Self { memory, host: Vec::with_capacity(ITEMS + max * size_of::<T>()), max, item: PhantomData };
        list.write(&[])?;
        Ok(list)
    }

    /// Copies items to the device, in one copy.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn write(&mut self, items: &[T]) -> Result<(), KernelError> {
        assert!(items.len() <= self.max, "{} items in a list with room for {}", items.len(), self.max);
        self.host.clear();
        self.host.resize(ITEMS, 0);
        self.host[..4].copy_from_slice(&(items.len() as u32).to_le_bytes());
        self.host.extend_from_slice(bytemuck::cast_slice(items));
        self.memory.write(0, &self.host)
    }

    /// The items as the rows of a launch.
    #[must_use]
    pub fn rows(&self) -> Rows {
        Rows { count: self.memory.address(), max: self.max }
    }

    /// The first item.
    #[must_use]
    pub fn items(&self) -> Address {
        self.memory.address().plus(ITEMS)
    }
}

/// A page to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PagePair {
    /// Its number.
    pub from: u32,
    /// The number of the page that becomes like it.
    pub to: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DrawnParams {
    drawn: Address,
    results: Address,
    tokens: Address,
    count: u32,
    unused: u32,
}

/// Writes the tokens of the step's drawn rows, from the results of a sampling enqueued before.
///
/// # Errors
/// A device failure.
///
/// # Safety
/// `results` are a sampling's ([`Sampler::drawn`](super::sample::Sampler::drawn)), which has every row that the step's drawn tokens name.
pub unsafe fn take_drawn<D: Device>(
    device: &D,
    stream: Stream,
    step: &StepMemory<D>,
    results: Address,
) -> Result<(), KernelError> {
    let (drawn, count) = step.drawn();
    let params = DrawnParams { drawn, results, tokens: step.view().tokens, count: count as u32, unused: 0 };
    let grid = [params.count.div_ceil(ROW_THREADS), 1];
    // SAFETY: the step's memory has the drawn tokens and the rows they name, checked when they were written; the results are the
    // caller's promise.
    unsafe { launch(device, stream, Launch::new("take_drawn", grid, ROW_THREADS, &params)) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct EmbedParams {
    rows: Address,
    tokens: Address,
    table: Address,
    out: Address,
    vocab: u32,
    hidden: u32,
}

/// `out[i] = table[tokens[i]]` for the tokens of a step. `table: [vocab, hidden]`; `out` holds f32 or what the table does. A token that
/// the table does not have gives NaN.
///
/// # Errors
/// A device failure.
///
/// # Safety
/// `step` is of a live [`StepMemory`] with room for `rows_max` rows.
///
/// # Panics
/// When shapes or elements do not fit.
pub unsafe fn embed<D: Device>(
    device: &D,
    stream: Stream,
    step: &Step,
    rows_max: usize,
    table: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let element = table.element();
    let kernel = match (element, out.element()) {
        (Element::F32, Element::F32) => "embed_f32",
        (Element::Bf16, Element::F32) => "embed_bf16",
        (Element::F16, Element::F32) => "embed_f16",
        (Element::Bf16, Element::Bf16) => "embed_narrow_bf16",
        (Element::F16, Element::F16) => "embed_narrow_f16",
        (table, out) => panic!("an embedding of {table:?} into {out:?}"),
    };
    assert_eq!(table.width(), out.width(), "widths of table and output");
    out.set_rows(rows_max);
    let (vocab, hidden) = (table.rows() as u32, table.width() as u32);
    let params = EmbedParams {
        rows: step.counts,
        tokens: step.tokens,
        table: table.address(),
        out: out.address(),
        vocab,
        hidden,
    };
    let grid = [rows_max as u32, blocks_of_width(table.width(), element)];
    // SAFETY: the tensors have the rows and widths named, tokens are checked against the table's rows by the kernel, and the step
    // is the caller's promise.
    unsafe { launch(device, stream, Launch::new(kernel, grid, ROW_THREADS, &params)) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NormParams {
    rows: Address,
    residual: Address,
    delta: Address,
    weight: Address,
    out: Address,
    width: u32,
    eps: f32,
}

/// The weight of an RMSNorm.
#[derive(Debug)]
pub struct NormWeight<'a, D: Device> {
    /// `[width]` f32
    pub weight: &'a Memory<D>,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// `residual += delta` where given, then `out = residual / sqrt(mean(residual^2) + eps) * weight`. The residual is f32, `delta` and
/// `out` are of the same element. A row's width alone says how many threads share it, so its bits depend on nothing else.
///
/// # Errors
/// A device failure.
///
/// # Safety
/// `rows.count` is the address of a u32 that lives until the launch is over.
///
/// # Panics
/// When shapes or elements do not fit.
pub unsafe fn add_rms_norm<D: Device>(
    device: &D,
    stream: Stream,
    rows: Rows,
    residual: &mut CudaTensor<D>,
    delta: Option<&CudaTensor<D>>,
    norm: &NormWeight<'_, D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let (width, element) = (residual.width(), out.element());
    assert_eq!(residual.element(), Element::F32, "the residual's element");
    assert!(residual.rows() >= rows.max && out.width() == width && norm.weight.bytes() >= width * 4, "shapes");
    if let Some(delta) = delta {
        assert!(delta.rows() >= rows.max && delta.width() == width && delta.element() == element, "the addend");
    }
    out.set_rows(rows.max);
    let kernel = match element {
        Element::F32 => "add_rms_norm_f32",
        Element::Bf16 => "add_rms_norm_bf16",
        Element::F16 => "add_rms_norm_f16",
    };
    let params = NormParams {
        rows: rows.count,
        residual: residual.address(),
        delta: delta.map_or(Address(0), CudaTensor::address),
        weight: norm.weight.address(),
        out: out.address(),
        width: width as u32,
        eps: norm.eps,
    };
    let packs = if width.is_multiple_of(4) { width / 4 } else { width };
    let threads = (packs.div_ceil(2).next_multiple_of(32) as u32).min(NORM_THREADS);
    let launch_of = Launch::new(kernel, [rows.max as u32, 1], threads, &params).shared(threads / 32 * 4);
    // SAFETY: the tensors have the rows and widths named, just checked; the count is the caller's promise.
    unsafe { launch(device, stream, launch_of) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SwigluParams {
    rows: Address,
    gate_up: Address,
    out: Address,
    width: u32,
    unused: u32,
}

/// `out = silu(gate) * up` of `gate_up: [rows, 2 width]`, the gate first.
///
/// # Errors
/// A device failure.
///
/// # Safety
/// `rows.count` is the address of a u32 that lives until the launch is over.
///
/// # Panics
/// When shapes or elements do not fit.
pub unsafe fn swiglu<D: Device>(
    device: &D,
    stream: Stream,
    rows: Rows,
    gate_up: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let (width, element) = (out.width(), out.element());
    assert!(gate_up.width() == 2 * width && gate_up.rows() >= rows.max && gate_up.element() == element, "gate and up");
    out.set_rows(rows.max);
    let kernel = match element {
        Element::F32 => "swiglu_f32",
        Element::Bf16 => "swiglu_bf16",
        Element::F16 => "swiglu_f16",
    };
    let params = SwigluParams {
        rows: rows.count,
        gate_up: gate_up.address(),
        out: out.address(),
        width: width as u32,
        unused: 0,
    };
    let grid = [rows.max as u32, blocks_of_width(width, element)];
    // SAFETY: the tensors have the rows and widths named, just checked; the count is the caller's promise.
    unsafe { launch(device, stream, Launch::new(kernel, grid, ROW_THREADS, &params)) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BiasParams {
    rows: Address,
    bias: Address,
    out: Address,
    width: u32,
    unused: u32,
}

/// `out += bias`, `bias: [width]` f32.
///
/// # Errors
/// A device failure.
///
/// # Safety
/// `rows.count` is the address of a u32 that lives until the launch is over.
///
/// # Panics
/// When shapes do not fit.
pub unsafe fn add_bias<D: Device>(
    device: &D,
    stream: Stream,
    rows: Rows,
    bias: &Memory<D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let width = out.width();
    assert!(out.rows() >= rows.max && bias.bytes() >= width * 4, "shapes");
    let kernel = match out.element() {
        Element::F32 => "add_bias_f32",
        Element::Bf16 => "add_bias_bf16",
        Element::F16 => "add_bias_f16",
    };
    let params =
        BiasParams { rows: rows.count, bias: bias.address(), out: out.address(), width: width as u32, unused: 0 };
    let grid = [rows.max as u32, blocks_of_width(width, out.element())];
    // SAFETY: the tensors have the rows and widths named, just checked; the count is the caller's promise.
    unsafe { launch(device, stream, Launch::new(kernel, grid, ROW_THREADS, &params)) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GatherParams {
    rows: Address,
    indices: Address,
    x: Address,
    out: Address,
    x_rows: u32,
    row_bytes: u32,
}

/// `out[i] = x[picked[i]]` for the first `rows_max` of what is picked. A row that `x` does not have gives NaN.
///
/// # Errors
/// A device failure.
///
/// # Panics
/// When shapes or elements do not fit.
pub fn gather_rows<D: Device>(
    device: &D,
    stream: Stream,
    picked: &DeviceList<D, u32>,
    rows_max: usize,
    x: &CudaTensor<D>,
    out: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    assert!(out.width() == x.width() && out.element() == x.element(), "shapes");
    assert!(rows_max <= picked.max, "{rows_max} rows of a list with room for {}", picked.max);
    out.set_rows(rows_max);
    let row_bytes = x.width() * x.element().bytes();
    let params = GatherParams {
        rows: picked.rows().count,
        indices: picked.items(),
        x: x.address(),
        out: out.address(),
        x_rows: x.rows() as u32,
        row_bytes: row_bytes as u32,
    };
    let grid = [rows_max as u32, row_bytes.div_ceil(ROW_THREADS as usize * WIDE_BYTES) as u32];
    // SAFETY: the tensors have the rows and widths named, just checked; the kernel checks what is picked against the rows of x.
    unsafe { launch(device, stream, Launch::new("gather_rows", grid, ROW_THREADS, &params)) }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CopyParams {
    pairs_count: Address,
    pairs: Address,
    pages: Address,
    page_bytes: u64,
    pages_count: u32,
    unused: u32,
}

/// Copies pages of `page_bytes` (a multiple of 16) within `pages`. No page is both copied and written, or written twice; one that
/// the pool does not have is left out.
///
/// # Errors
/// A device failure.
///
/// # Panics
/// When `page_bytes` is not a multiple of 16.
pub fn copy_blocks<D: Device>(
    device: &D,
    stream: Stream,
    pairs: &DeviceList<D, PagePair>,
    pages: &Memory<D>,
    page_bytes: usize,
) -> Result<(), KernelError> {
    assert!(page_bytes.is_multiple_of(WIDE_BYTES), "pages of {page_bytes} bytes");
    let params = CopyParams {
        pairs_count: pairs.rows().count,
        pairs: pairs.items(),
        pages: pages.address(),
        page_bytes: page_bytes as u64,
        pages_count: (pages.bytes() / page_bytes) as u32,
        unused: 0,
    };
    let grid = [pairs.max as u32, page_bytes.div_ceil(COPY_BYTES) as u32];
    // SAFETY: the kernel checks the pages' numbers against how many there are in `pages`.
    unsafe { launch(device, stream, Launch::new("copy_blocks", grid, ROW_THREADS, &params)) }
}

/// Blocks that share a row where each thread has 16 bytes of it.
fn blocks_of_width(width: usize, element: Element) -> u32 {
    width.div_ceil(ROW_THREADS as usize * WIDE_BYTES / element.bytes()) as u32
}

/// Launches unless there is nothing to do: a grid of no blocks is refused by the driver.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn launch<D: Device>(device: &D, stream: Stream, what: Launch<'_>) -> Result<(), KernelError> {
    if what.grid.contains(&0) {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { device.launch(stream, &what) }
}
