//! The layout of keys and values in a page of the pool ([`super::pages`]), as attention reads them.
//!
//! A page is one block of tokens over all layers. Its tokens are cut into panels of 16, the lanes of a vector (the last panel
//! of a block is padded when 16 does not divide the block size). For each (layer, key-value head) a page holds the keys of all
//! panels, then their values:
//!
//! ```text
//! keys    [panel][head_dim][16 tokens]      one vector holds one element of 16 keys, so that the dot products of 16 keys
//!                                           with a query are head_dim multiply-adds with nothing to add up across lanes
//! values  [panel][16 tokens][head_dim up to a multiple of 16]     a token's value is head_dim / 16 vectors
//! ```

use half::f16;

use super::pages::{CpuPages, LINE};
use super::vector_math::{Element, LANES};
use crate::{AttentionSpec, Precision};

/// Where a token's numbers are in a page, counted in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KvLayout {
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
}

impl KvLayout {
    pub(super) fn new(spec: &AttentionSpec, layers: usize) -> Self {
        let AttentionSpec { kv_heads, head_dim, block_size, .. } = *spec;
        Self { layers, kv_heads, head_dim, block_size }
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

    /// The first key of a head's first panel.
    ///
    /// # Panics
    /// When the layer or the head does not exist.
    pub(super) fn keys(&self, layer: usize, kv_head: usize) -> usize {
        assert!(
            layer < self.layers && kv_head < self.kv_heads,
            "head {kv_head} of layer {layer} is not in the KV cache"
        );
        (layer * self.kv_heads + kv_head) * self.block_panels() * (self.key_panel() + self.value_panel())
    }

    /// The first value of a head's first panel.
    ///
    /// # Panics
    /// When the layer or the head does not exist.
    pub(super) fn values(&self, layer: usize, kv_head: usize) -> usize {
        self.keys(layer, kv_head) + self.block_panels() * self.key_panel()
    }

    /// Elements of a page.
    pub(super) fn page_elements(&self) -> usize {
        self.layers * self.kv_heads * self.block_panels() * (self.key_panel() + self.value_panel())
    }
}

/// Bytes of a page: one block over all layers, keys and values, up to a cache line.
#[must_use]
pub fn page_bytes(spec: &AttentionSpec, layers: usize, precision: Precision) -> usize {
    (KvLayout::new(spec, layers).page_elements() * precision.element_bytes()).next_multiple_of(LINE)
}

impl Precision {
    /// Bytes of one number of the KV cache or an adapter.
    pub(super) fn element_bytes(self) -> usize {
        match self {
            Self::Quantised => size_of::<f16>(),
            Self::F32 => size_of::<f32>(),
        }
    }
}

impl CpuPages {
    /// The key and the value of one token, `[head_dim]` each, as they are held: for tests and inspection.
    ///
    /// # Panics
    /// When there is no such place.
    #[must_use]
    pub fn token(&self, layer: usize, block: u32, kv_head: usize, offset: usize) -> (Vec<f32>, Vec<f32>) {
        assert!(offset < self.layout.block_size, "no such place in the KV cache");
        match self.precision {
            Precision::Quantised => self.token_in::<f16>(layer, block, kv_head, offset),
            Precision::F32 => self.token_in::<f32>(layer, block, kv_head, offset),
        }
    }

    fn token_in<T: Element>(&self, layer: usize, block: u32, kv_head: usize, offset: usize) -> (Vec<f32>, Vec<f32>) {
        let (layout, page) = (&self.layout, self.page::<T>(block));
        let (panel, lane) = (offset / LANES, offset % LANES);
        let key = &page[layout.keys(layer, kv_head) + panel * layout.key_panel()..][..layout.key_panel()];
        let value = layout.values(layer, kv_head) + panel * layout.value_panel() + lane * layout.value_row();
        (
            key.iter().skip(lane).step_by(LANES).map(|x| Element::to_f32(*x)).collect(),
            page[value..][..layout.head_dim].iter().map(|x| Element::to_f32(*x)).collect(),
        )
    }
}
