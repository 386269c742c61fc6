//! The KV cache: fixed blocks of tokens, in the layouts that attention reads.
//!
//! A block's tokens are cut into panels of 16, the lanes of a vector (the last panel of a block is padded when 16 does not
//! divide the block size). For each (layer, block, key-value head, panel):
//!
//! ```text
//! keys    [head_dim][16 tokens]      one vector holds one element of 16 keys, so that the dot products of 16 keys with a
//!                                    query are head_dim multiply-adds with nothing to add up across lanes
//! values  [16 tokens][head_dim up to a multiple of 16]     a token's value is head_dim / 16 vectors
//! ```

use half::f16;

use super::tensor::Aligned;
use super::vector_math::{Element, LANES};
use crate::{AttentionSpec, KernelError, Precision};

/// Keys and values of all layers: f16 with [`Precision::Quantised`], f32 with [`Precision::F32`].
#[derive(Debug)]
pub struct CpuKv {
    pub(super) layout: KvLayout,
    pub(super) store: KvStore,
}

/// The numbers.
#[derive(Debug)]
pub(super) enum KvStore {
    F16(KvNumbers<f16>),
    F32(KvNumbers<f32>),
}

/// Keys and values of one element type, laid out as the module says.
#[derive(Debug)]
pub(super) struct KvNumbers<T: Element> {
    pub(super) keys: Aligned<T>,
    pub(super) values: Aligned<T>,
}

/// Where a token's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KvLayout {
    pub(super) layers: usize,
    pub(super) blocks: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
}

impl KvLayout {
    fn new(spec: &AttentionSpec, layers: usize, blocks: usize) -> Self {
        let AttentionSpec { kv_heads, head_dim, block_size, .. } = *spec;
        Self { layers, blocks, kv_heads, head_dim, block_size }
    }

    /// Panels of one block.
    pub(super) fn block_panels(&self) -> usize {
        self.block_size.div_ceil(LANES)
    }

    /// Elements of a panel's keys.
    pub(super) fn key_panel(&self) -> usize {
        self.head_dim * LANES
    }

    /// Elements of one token's value, padded to whole vectors.
    pub(super) fn value_row(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a panel's values.
    pub(super) fn value_panel(&self) -> usize {
        self.value_row() * LANES
    }

    /// Number of a block's first panel.
    ///
    /// # Panics
    /// When the block or the layer does not exist.
    pub(super) fn first_panel(&self, layer: usize, block: u32, kv_head: usize) -> usize {
        let block = block as usize;
        assert!(layer < self.layers && block < self.blocks, "block {block} of layer {layer} is outside the KV cache");
        ((layer * self.blocks + block) * self.kv_heads + kv_head) * self.block_panels()
    }

    fn panels(&self) -> Option<usize> {
        [self.blocks, self.kv_heads, self.block_panels()].iter().try_fold(self.layers, |n, &m| n.checked_mul(m))
    }
}

/// Bytes of one block over all layers, keys and values.
#[must_use]
pub fn block_bytes(spec: &AttentionSpec, layers: usize, precision: Precision) -> usize {
    let layout = KvLayout::new(spec, layers, 1);
    let element = match precision {
        Precision::Quantised => size_of::<f16>(),
        Precision::F32 => size_of::<f32>(),
    };
    layers * spec.kv_heads * layout.block_panels() * (layout.key_panel() + layout.value_panel()) * element
}

impl CpuKv {
    /// A cache of `blocks` blocks of `spec.block_size` tokens for each of `layers` layers.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(spec: &AttentionSpec, layers: usize, blocks: usize, precision: Precision) -> Result<Self, KernelError> {
        let layout = KvLayout::new(spec, layers, blocks);
        let store = match precision {
            Precision::Quantised => KvStore::F16(KvNumbers::new(&layout)?),
            Precision::F32 => KvStore::F32(KvNumbers::new(&layout)?),
        };
        Ok(Self { layout, store })
    }

    /// Fills the whole cache with one number: tests poison it with NaN to show that nothing unwritten is read.
    pub fn fill(&mut self, value: f32) {
        match &mut self.store {
            KvStore::F16(numbers) => {
                numbers.keys.fill(f16::from_f32(value));
                numbers.values.fill(f16::from_f32(value));
            }
            KvStore::F32(numbers) => {
                numbers.keys.fill(value);
                numbers.values.fill(value);
            }
        }
    }

    /// The key and the value of one token, `[head_dim]` each, as they are held: for tests and inspection.
    ///
    /// # Panics
    /// When there is no such place.
    #[must_use]
    pub fn token(&self, layer: usize, block: u32, kv_head: usize, offset: usize) -> (Vec<f32>, Vec<f32>) {
        assert!(kv_head < self.layout.kv_heads && offset < self.layout.block_size, "no such place in the KV cache");
        match &self.store {
            KvStore::F16(numbers) => numbers.token(&self.layout, layer, block, kv_head, offset),
            KvStore::F32(numbers) => numbers.token(&self.layout, layer, block, kv_head, offset),
        }
    }
}

impl<T: Element> KvNumbers<T> {
    fn new(layout: &KvLayout) -> Result<Self, KernelError> {
        let len = |panel: usize| {
            let len = layout.panels().and_then(|panels| panels.checked_mul(panel));
            len.ok_or(KernelError::OutOfMemory { what: "the KV cache", bytes: usize::MAX })
        };
        Ok(Self {
            keys: Aligned::zeroed(len(layout.key_panel())?, "the KV cache's keys")?,
            values: Aligned::zeroed(len(layout.value_panel())?, "the KV cache's values")?,
        })
    }

    fn token(
        &self,
        layout: &KvLayout,
        layer: usize,
        block: u32,
        kv_head: usize,
        offset: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let panel = layout.first_panel(layer, block, kv_head) + offset / LANES;
        let key = &self.keys[panel * layout.key_panel()..][..layout.key_panel()];
        let value =
            &self.values[panel * layout.value_panel() + offset % LANES * layout.value_row()..][..layout.head_dim];
        (
            key.iter().skip(offset % LANES).step_by(LANES).map(|x| Element::to_f32(*x)).collect(),
            value.iter().map(|x| Element::to_f32(*x)).collect(),
        )
    }
}
