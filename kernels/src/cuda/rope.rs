//! Rotary embedding of q and k, the head norms before it, and the way of k and v into the pages.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::attention::KvLayer;
use super::device::{Address, Device, Launch, Memory, Stream};
use super::step::Step;
use super::tensor::CudaTensor;
use crate::{AttentionSpec, KernelError, RopeTable};

const THREADS: u32 = 256;

/// `Params` of `csrc/rope.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    step: Step,
    qkv: Address,
    pages: Address,
    page_bytes: u64,
    cos: Address,
    sin: Address,
    q_norm: Address,
    k_norm: Address,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rotary_dim: u32,
    block_size: u32,
    norm_eps: f32,
}

/// A [`RopeTable`] on the device.
#[derive(Debug)]
pub struct RopeMemory<D: Device> {
    cos: Memory<D>,
    sin: Memory<D>,
    rotary_dim: usize,
}

impl<D: Device> RopeMemory<D> {
    /// Copies a table to the device.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn new(device: &Arc<D>, table: &RopeTable) -> Result<Self, KernelError> {
        let (cos, sin) = (Memory::holding(device, &table.cos)?, Memory::holding(device, &table.sin)?);
        Ok(Self { cos, sin, rotary_dim: table.rotary_dim })
    }
}

/// What [`rope_and_store`] is done with.
#[derive(Debug)]
pub struct Rope<'a, D: Device> {
    /// Sizes.
    pub spec: &'a AttentionSpec,
    /// The step on the device. Every position is in `table` and in its sequence's block table.
    pub step: Step,
    /// Where k and v go.
    pub kv: KvLayer,
    /// Angles.
    pub table: &'a RopeMemory<D>,
    /// Weights of the q and k head norms, `[head_dim]` f32 each.
    pub qk_norm: Option<(Address, Address)>,
    /// Rows the launch must do for at most.
    pub rows_max: usize,
}

/// [`crate::Backend::rope_and_store`]. k is not written back to `qkv`: attention reads it from the pages.
///
/// # Errors
/// A device failure.
///
/// # Panics
/// When the widths do not fit.
pub fn rope_and_store<D: Device>(
    device: &D,
    stream: Stream,
    rope: &Rope<'_, D>,
    qkv: &mut CudaTensor<D>,
) -> Result<(), KernelError> {
    let AttentionSpec { heads, kv_heads, head_dim, block_size, norm_eps, .. } = *rope.spec;
    let row_heads = heads + 2 * kv_heads;
    assert_eq!(qkv.width(), row_heads * head_dim, "q, k and v beside each other");
    assert!(head_dim.is_multiple_of(2) && rope.table.rotary_dim <= head_dim, "rotated elements of a head");
    let none = Address::default();
    let (q_norm, k_norm) = rope.qk_norm.unwrap_or((none, none));
    let params = Params {
        step: rope.step,
        qkv: qkv.address(),
        pages: rope.kv.address(rope.spec, qkv.element()),
        page_bytes: rope.kv.page_bytes as u64,
        cos: rope.table.cos.address(),
        sin: rope.table.sin.address(),
        q_norm,
        k_norm,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        rotary_dim: rope.table.rotary_dim as u32,
        block_size: block_size as u32,
        norm_eps,
    };
    let kernel = format!("rope_and_store_{}", qkv.element().suffix());
    let warps = rope.rows_max.max(1) * row_heads;
    let launch = Launch::new(&kernel, [warps.div_ceil(THREADS as usize / 32) as u32, 1], THREADS, &params);
    // SAFETY: the step is one of StepMemory, its rows are in qkv and its pages in the pool, as the caller says; the table is borrowed.
    unsafe { device.launch(stream, &launch) }
}
