//! Token embedding: rows of the table straight from the mapped file, dequantised, and what an adapter of the table adds.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use openlora_types::{Module, Site, Token};

use super::ahead::Ahead;
use super::lora::{Columns, CpuAdapter, LoraScratch, Outputs, SiteFactors, expand};
use super::pool::Disjoint;
use super::vector_math::{Element, RowKernel, Simd, dispatch_rows};
use super::{CpuTensor, Isa, Pool};
use crate::reference::dequantise::dequantise;
use crate::{BlockFormat, KernelError, LoraRows, LoraSegment, Precision, TensorSource};

/// An embedding table `[vocab, hidden]` that stays where it is in its file: a step reads a few rows of it.
pub struct CpuEmbedding {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    /// Of the table in `owner`.
    bytes: Range<usize>,
    format: BlockFormat,
    hidden: usize,
    row_bytes: usize,
    row_order: Option<Vec<u32>>,
}

impl std::fmt::Debug for CpuEmbedding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (vocab, format) = (self.bytes.len() / self.row_bytes, self.format.name());
        write!(f, "CpuEmbedding[{vocab}, {}] in {format}", self.hidden)
    }
}

impl CpuEmbedding {
    /// The table that `source` describes, whose bytes start `offset` bytes into `owner`'s.
    ///
    /// # Errors
    /// What [`TensorSource::check`] finds; [`KernelError::TensorSize`] when `owner` ends before the table does.
    pub fn new(
        source: &TensorSource<'_>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        offset: usize,
    ) -> Result<Self, KernelError> {
        source.check()?;
        let whole = (*owner).as_ref().len();
        let end = offset.checked_add(source.bytes.len()).filter(|end| *end <= whole);
        let Some(end) = end else {
            return Err(KernelError::TensorSize {
                name: source.name.into(),
                format: source.format.name(),
                rows: source.rows,
                cols: source.cols,
                expected: source.bytes.len(),
                found: whole.saturating_sub(offset),
            });
        };
        Ok(Self {
            owner,
            bytes: offset..end,
            format: source.format,
            hidden: source.cols,
            row_bytes: source.row_bytes(),
            row_order: source.row_order.map(<[u32]>::to_vec),
        })
    }

    /// Elements of a row.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// One token's row.
    fn read(&self, token: Token, out: &mut [f32]) {
        let row = self.row_order.as_ref().map_or(token, |order| order[token as usize]) as usize;
        let table = &(*self.owner).as_ref()[self.bytes.clone()];
        dequantise(self.format, &table[row * self.row_bytes..][..self.row_bytes], out);
    }
}

/// [`crate::Backend::embed`].
///
/// # Panics
/// When `out` is not as wide as the table, on a token that the table does not have, or on an adapter that does not fit it.
pub fn embed(
    pool: &Pool,
    isa: Isa,
    table: &CpuEmbedding,
    tokens: &[Token],
    lora: LoraRows<'_, CpuAdapter>,
    out: &mut CpuTensor,
    scratch: &mut LoraScratch,
) {
    assert_eq!(out.width(), table.hidden, "width of the embedding");
    out.set_rows(tokens.len());
    let ranks = |segment: &LoraSegment<'_, CpuAdapter>| {
        segment.adapter.and_then(CpuAdapter::embedding).map_or(0, |site| site.rank())
    };
    let rank_max = lora.segments.iter().map(ranks).max().unwrap_or(0);
    if scratch.shrunk.len() < tokens.len() * rank_max {
        scratch.shrunk.resize(tokens.len() * rank_max, 0.0);
    }
    let kernel = Embed {
        table,
        tokens,
        segments: if rank_max > 0 { lora.segments } else { &[] },
        rank_max,
        out: Disjoint::new(out.values_mut()),
        shrunk: Disjoint::new(&mut scratch.shrunk),
    };
    dispatch_rows(pool, isa, tokens.len(), &kernel);
}

struct Embed<'a> {
    table: &'a CpuEmbedding,
    tokens: &'a [Token],
    segments: &'a [LoraSegment<'a, CpuAdapter>],
    rank_max: usize,
    out: Disjoint<'a, f32>,
    shrunk: Disjoint<'a, f32>,
}

impl RowKernel for Embed<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, rows: Range<usize>) {
        for row in rows {
            let hidden = self.table.hidden;
            // SAFETY: every row is given to one thread alone, and each thread holds one row at a time.
            let (out, shrunk) = unsafe {
                let shrunk = self.shrunk.slice(row * self.rank_max..(row + 1) * self.rank_max);
                (self.out.slice(row * hidden..(row + 1) * hidden), shrunk)
            };
            self.table.read(self.tokens[row], out);
            let segment = self.segments.partition_point(|segment| segment.row + segment.rows <= row);
            let adapter = self.segments.get(segment).and_then(|segment| segment.adapter);
            let Some((adapter, site)) = adapter.and_then(|adapter| Some((adapter, adapter.embedding()?))) else {
                continue;
            };
            let token = self.tokens[row] as usize;
            match adapter.precision {
                Precision::Quantised => adapt::<_, f16>(simd, (adapter, site), token, shrunk, out),
                Precision::F32 => adapt::<_, f32>(simd, (adapter, site), token, shrunk, out),
            }
        }
    }
}

/// `out = output_scale (out + scale B A[:, token] + b_bias)`
#[inline(always)]
fn adapt<S: Simd, T: Element>(
    simd: S,
    (adapter, site): (&CpuAdapter, &SiteFactors),
    token: usize,
    shrunk: &mut [f32],
    out: &mut [f32],
) {
    assert!(
        token < site.inputs() && out.len() == site.outputs(),
        "{}: shape",
        Site { layer: 0, module: Module::Embed }
    );
    let shrunk = &mut shrunk[..site.rank()];
    let a = adapter.a::<T>(site, token);
    let token = token - a.columns().start;
    let mut first = 0;
    while first < site.rank() {
        let (count, rows) = a.run(first);
        for (value, row) in shrunk[first..first + count].iter_mut().zip(rows.chunks_exact(a.width())) {
            *value = row[token].to_f32() * site.scale();
        }
        first += count;
    }
    let mut first = 0;
    while first < site.outputs() {
        let b = adapter.b::<T>(site, first);
        let columns = b.columns();
        first = columns.end;
        let mut nothing = Ahead::new(&[], 1);
        expand(
            simd,
            shrunk,
            &Columns::new(site, b, None),
            columns.clone(),
            &mut nothing,
            &mut OneRow(&mut out[columns]),
        );
    }
}

struct OneRow<'a>(&'a mut [f32]);

impl Outputs for OneRow<'_> {
    #[inline(always)]
    fn row(&mut self, _: usize) -> &mut [f32] {
        self.0
    }
}
