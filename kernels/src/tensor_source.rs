use std::ops::Range;

use openlora_types::Site;

/// How weights are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Integer kernels: 4- or 8-bit weights, 8-bit activations with a scale per 32 inputs, 16-bit KV and adapters.
    Quantised,
    /// f32 throughout, on the dequantised weights: for parity with the reference and for receipts.
    F32,
}

/// Storage of a tensor in a file. Block layouts are ggml's (`ggml-common.h`); a block runs along a row's inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 x i8 and an f16 scale.
    Q8_0,
    /// 32 x u4 and an f16 scale, zero point 8.
    Q4_0,
    /// 32 x u4, an f16 scale and an f16 minimum.
    Q4_1,
    /// 32 x u5 and an f16 scale, zero point 16.
    Q5_0,
    /// 32 x u5, an f16 scale and an f16 minimum.
    Q5_1,
    /// 256 x u4 in eight sub-blocks with 6-bit scales and minima.
    Q4K,
    /// 256 x i6 in sixteen sub-blocks with 8-bit scales.
    Q6K,
}

/// A weight matrix where it lies in its (memory-mapped) file.
#[derive(Clone, Copy, Debug)]
pub struct TensorSource<'a> {
    /// Name in the file, for errors.
    pub name: &'a str,
    /// Storage.
    pub format: BlockFormat,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows` rows of `cols / block` blocks, little-endian.
    pub bytes: &'a [u8],
    /// `row_order[i]` is the file's row that becomes row i; `None` keeps the order. (Llama GGUFs hold q and k permuted.)
    pub row_order: Option<&'a [u32]>,
}

/// One site's share of a fused linear's outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteSpan {
    /// The site.
    pub site: Site,
    /// Its dense index, [`Site::index`].
    pub index: usize,
    /// Its columns of the output.
    pub outputs: Range<usize>,
}

/// A linear to be loaded: several matrices with the same inputs, stacked by outputs (q, k, v; gate, up), so that one pass
/// computes all.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The stacked matrices.
    pub parts: Vec<TensorSource<'a>>,
    /// `[outputs]`, added to `W x`.
    pub bias: Option<Vec<f32>>,
    /// Which adapter sites the outputs belong to; same order as `parts`.
    pub sites: Vec<SiteSpan>,
}
