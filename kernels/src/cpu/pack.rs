//! Weight panels: how a linear's weights lie in memory after loading.
//!
//! A panel holds 16 outputs. Along the inputs it is a row of blocks of 32, stored in the order the kernels read them, so
//! that a linear is one stream from start to end. Within a block, four consecutive inputs of an output share a 32-bit lane
//! (what `vpdpbusd` multiplies) and the 16 outputs fill a 512-bit vector; docs/cpu.md draws the bytes.
//!
//! | panel | for | holds |
//! |---|---|---|
//! | [`PanelFormat::Q4`] | Q4_0, Q4_1 exactly; Q4_K with its scales rounded to f16 (relative error at most 2^-11) | w = d q + m, q in 0..=15 |
//! | [`PanelFormat::Q8`] | Q8_0 and Q5_0 exactly; Q5_1, Q6_K, F16, BF16, F32 requantised (absolute error at most d/2, d about largest/127 of the block) | w = d (q - 128), q in 0..=255 |
//! | [`PanelFormat::F32`] | every format, exactly: precision f32 | w |
//!
//! Outputs that are not a multiple of 16 and inputs that are not a multiple of 32 are filled up with zero weights.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::f16;

use super::pool::{Disjoint, Pool};
use super::tensor::Aligned;
use crate::reference::dequantise::{dequantise, f16_at, q4_k_scale_min, q5_codes};
use crate::{BlockFormat, KernelError, LinearSpec, Precision, TensorSource};

/// Outputs of a panel: f32 or i32 lanes of the widest vector.
pub const PANEL: usize = 16;
/// Inputs of a block: they share a weight scale and an activation scale.
pub const BLOCK: usize = 32;
/// Bytes of a Q4 block: 16 scales, 16 minima, 16 x 32 half bytes.
pub const Q4_BLOCK_BYTES: usize = 32 + 32 + 256;
/// Bytes of two Q8 blocks: 2 x 16 scales, then 2 x 16 x 32 bytes. In pairs so that every vector is a cache line.
pub const Q8_PAIR_BYTES: usize = 64 + 2 * Q8_CODES;
/// Bytes of one Q8 block's codes.
pub const Q8_CODES: usize = 512;
/// The largest weight that a Q8 block can hold: 127 times the largest f16.
const Q8_LARGEST: f32 = 127.0 * 65504.0;

/// How a panel's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanelFormat {
    /// Per block: `d: [f16; 16]`, `m: [f16; 16]`, then four vectors; byte 4c + i of vector v holds output c's input 4v + i in
    /// its low half and input 16 + 4v + i in its high half.
    Q4,
    /// Per two blocks: `d: [[f16; 16]; 2]`, then per block eight vectors; byte 4c + i of vector g holds output c's input 4g + i,
    /// plus 128.
    Q8,
    /// Per input: 16 f32.
    F32,
}

impl PanelFormat {
    fn of(format: BlockFormat, precision: Precision) -> Self {
        match (precision, format) {
            (Precision::F32, _) => Self::F32,
            (Precision::Quantised, BlockFormat::Q4_0 | BlockFormat::Q4_1 | BlockFormat::Q4K) => Self::Q4,
            (Precision::Quantised, _) => Self::Q8,
        }
    }

    /// Bytes of one panel over `inputs`; a multiple of a cache line.
    #[must_use]
    pub fn panel_bytes(self, inputs: usize) -> usize {
        let blocks = inputs.div_ceil(BLOCK);
        match self {
            Self::Q4 => blocks * Q4_BLOCK_BYTES,
            Self::Q8 => blocks / 2 * Q8_PAIR_BYTES + blocks % 2 * (64 + Q8_CODES),
            Self::F32 => inputs * PANEL * size_of::<f32>(),
        }
    }
}

/// One source matrix as panels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// How its panels are stored.
    pub format: PanelFormat,
    /// Its columns of the linear's output.
    pub outputs: Range<usize>,
    /// Its panels among all of the linear's.
    pub panels: Range<usize>,
    /// Bytes of one panel.
    pub panel_bytes: usize,
    /// Where its first panel starts in the linear's bytes.
    pub offset: usize,
}

/// The panels of a linear: the only copy of its weights.
#[derive(Debug)]
pub struct Panels {
    /// Inputs of the linear.
    pub inputs: usize,
    /// Outputs of the linear.
    pub outputs: usize,
    /// The source matrices in order.
    pub parts: Vec<Part>,
    bytes: Aligned<u8>,
}

impl Panels {
    /// Repacks all parts of `spec`, spread over the pool.
    ///
    /// # Errors
    /// A part that is not sound or does not fit the others, weights that are not finite, or memory.
    pub fn pack(pool: &Pool, spec: &LinearSpec<'_>, precision: Precision) -> Result<Self, KernelError> {
        let inputs = spec.parts.first().map_or(0, |part| part.cols);
        let (mut parts, mut offset, mut outputs, mut panels) = (Vec::with_capacity(spec.parts.len()), 0, 0, 0);
        for source in &spec.parts {
            source.check()?;
            if source.cols != inputs {
                let (found, expected) = (source.cols, inputs);
                return Err(KernelError::Parts { name: source.name.into(), what: "inputs", found, expected });
            }
            let format = PanelFormat::of(source.format, precision);
            let count = source.rows.div_ceil(PANEL);
            let panel_bytes = format.panel_bytes(inputs);
            let part = Part {
                format,
                outputs: outputs..outputs + source.rows,
                panels: panels..panels + count,
                panel_bytes,
                offset,
            };
            offset += count * panel_bytes;
            outputs += source.rows;
            panels += count;
            parts.push(part);
        }
        let mut bytes = Aligned::zeroed(offset, "packed weights")?;
        fill(pool, spec, &parts, &mut bytes)?;
        Ok(Self { inputs, outputs, parts, bytes })
    }

    /// Bytes held.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.bytes.byte_len()
    }

    /// Panel `panel` of `part`, counted over the whole linear.
    #[must_use]
    pub fn panel(&self, part: &Part, panel: usize) -> &[u8] {
        let start = part.offset + (panel - part.panels.start) * part.panel_bytes;
        &self.bytes[start..start + part.panel_bytes]
    }

    /// As many bytes as panel `panel` of `part` has, or fewer at the end, from `distance` bytes after its start on.
    #[must_use]
    pub(super) fn ahead(&self, part: &Part, panel: usize, distance: usize) -> &[u8] {
        let start = part.offset + (panel - part.panels.start) * part.panel_bytes + distance;
        let end = (start + part.panel_bytes).min(self.bytes.len());
        &self.bytes[start.min(end)..end]
    }

    /// Panels of all parts.
    #[must_use]
    pub fn count(&self) -> usize {
        self.parts.last().map_or(0, |part| part.panels.end)
    }
}

/// Packs every panel of every part. The first failure in order of panels is reported.
fn fill(pool: &Pool, spec: &LinearSpec<'_>, parts: &[Part], bytes: &mut [u8]) -> Result<(), KernelError> {
    let failure: Mutex<Option<(usize, KernelError)>> = Mutex::new(None);
    let bytes = Disjoint::new(bytes);
    pool.run(&|worker| {
        let mut scratch = vec![0.0; spec.parts.first().map_or(0, |part| part.cols.next_multiple_of(BLOCK))];
        for (part, source) in parts.iter().zip(&spec.parts) {
            for panel in pool.split(part.panels.len(), worker) {
                let start = part.offset + panel * part.panel_bytes;
                // SAFETY: panels do not overlap, and `split` gives each to exactly one worker.
                let out = unsafe { bytes.slice(start..start + part.panel_bytes) };
                let rows = panel * PANEL..(panel * PANEL + PANEL).min(source.rows);
                if let Err(error) = pack_panel(source, part.format, rows, &mut scratch, out) {
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    let number = part.panels.start + panel;
                    if failure.as_ref().is_none_or(|(first, _)| number < *first) {
                        *failure = Some((number, error));
                    }
                    return;
                }
            }
        }
    });
    pool.check()?;
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}

fn pack_panel(
    source: &TensorSource<'_>,
    format: PanelFormat,
    rows: Range<usize>,
    scratch: &mut [f32],
    out: &mut [u8],
) -> Result<(), KernelError> {
    if format == PanelFormat::Q8 && rows.len() < PANEL {
        // Rows beyond the last hold the code of zero.
        for block in 0..source.cols.div_ceil(BLOCK) {
            q8_block(out, block).1.fill(128);
        }
    }
    for (column, row) in rows.enumerate() {
        match format {
            PanelFormat::Q4 => pack_q4_row(source, row, column, out)?,
            PanelFormat::Q8 => pack_q8_row(source, row, column, scratch, out)?,
            PanelFormat::F32 => pack_f32_row(source, row, column, scratch, out)?,
        }
    }
    Ok(())
}

fn put_f16(out: &mut [u8], column: usize, value: f32) -> bool {
    let value = f16::from_f32(value);
    out[column * 2..column * 2 + 2].copy_from_slice(&value.to_le_bytes());
    value.is_finite()
}

fn not_finite(source: &TensorSource<'_>, row: usize) -> KernelError {
    KernelError::WeightRange { name: source.name.into(), row }
}

fn pack_q4_row(source: &TensorSource<'_>, row: usize, column: usize, out: &mut [u8]) -> Result<(), KernelError> {
    let mut finite = true;
    let mut put = |block: usize, d: f32, m: f32, codes: &[u8]| {
        let out = &mut out[block * Q4_BLOCK_BYTES..(block + 1) * Q4_BLOCK_BYTES];
        finite &= put_f16(&mut out[..32], column, d) & put_f16(&mut out[32..64], column, m);
        for (vector, codes) in codes.chunks_exact(4).enumerate() {
            out[64 + vector * 64 + column * 4..][..4].copy_from_slice(codes);
        }
    };
    let blocks = source.row(row).chunks_exact(source.format.block_bytes()).enumerate();
    match source.format {
        BlockFormat::Q4_0 => blocks.for_each(|(block, bytes)| {
            let d = f16_at(bytes, 0);
            put(block, d, -8.0 * d, &bytes[2..]);
        }),
        BlockFormat::Q4_1 => {
            blocks.for_each(|(block, bytes)| put(block, f16_at(bytes, 0), f16_at(bytes, 2), &bytes[4..]))
        }
        _ => blocks.for_each(|(index, bytes)| {
            let (d, dmin) = (f16_at(bytes, 0), f16_at(bytes, 2));
            for sub in 0..8 {
                let (scale, min) = q4_k_scale_min(&bytes[4..16], sub);
                // 32 bytes hold this sub-block's 32 codes in one half; the panel wants inputs j and j + 16 in one byte.
                let (q, shift) = (&bytes[16 + sub / 2 * 32..][..32], sub % 2 * 4);
                let codes: [u8; 16] = std::array::from_fn(|j| (q[j] >> shift & 15) | (q[j + 16] >> shift & 15) << 4);
                put(index * 8 + sub, d * f32::from(scale), -dmin * f32::from(min), &codes);
            }
        }),
    }
    if finite { Ok(()) } else { Err(not_finite(source, row)) }
}

/// The scales and codes of one block of a Q8 panel.
fn q8_block(panel: &mut [u8], block: usize) -> (&mut [u8], &mut [u8]) {
    let (scales, codes) = panel[block / 2 * Q8_PAIR_BYTES..].split_at_mut(64);
    let half = block % 2;
    (&mut scales[half * 32..half * 32 + 32], &mut codes[half * Q8_CODES..(half + 1) * Q8_CODES])
}

fn pack_q8_row(
    source: &TensorSource<'_>,
    row: usize,
    column: usize,
    scratch: &mut [f32],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let mut finite = true;
    let mut put = |block: usize, d: f32, codes: &[u8; 32]| {
        let (scales, out) = q8_block(out, block);
        finite &= put_f16(scales, column, d);
        for (vector, codes) in codes.chunks_exact(4).enumerate() {
            out[vector * 64 + column * 4..][..4].copy_from_slice(codes);
        }
    };
    let bytes = source.row(row);
    match source.format {
        BlockFormat::Q8_0 => {
            for (block, bytes) in bytes.chunks_exact(source.format.block_bytes()).enumerate() {
                // i8 + 128 as u8 is the i8 with its sign bit flipped.
                put(block, f16_at(bytes, 0), &std::array::from_fn(|i| bytes[2 + i] ^ 128));
            }
        }
        BlockFormat::Q5_0 => {
            for (block, bytes) in bytes.chunks_exact(source.format.block_bytes()).enumerate() {
                put(block, f16_at(bytes, 0), &q5_codes(&bytes[2..]).map(|code| code + (128 - 16)));
            }
        }
        format => {
            dequantise(format, bytes, &mut scratch[..source.cols]);
            scratch[source.cols..].fill(0.0);
            for (block, weights) in scratch.chunks_exact(BLOCK).enumerate() {
                let (d, codes) = requantise(weights).ok_or_else(|| not_finite(source, row))?;
                put(block, d, &codes);
            }
        }
    }
    if finite { Ok(()) } else { Err(not_finite(source, row)) }
}

/// The scale and codes (plus 128) of the Q8 block nearest to 32 weights, or `None` when one is not finite or too large.
///
/// The scale is the least f16 with which the largest weight is at most 127 steps, so no code is clipped and every weight is
/// within half a step.
fn requantise(weights: &[f32]) -> Option<(f32, [u8; 32])> {
    if !weights.iter().all(|weight| weight.abs() <= Q8_LARGEST) {
        return None;
    }
    let largest = weights.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
    let mut d = f16::from_f32(largest / 127.0);
    if d.to_f32() * 127.0 < largest {
        d = f16::from_bits(d.to_bits() + 1);
    }
    let d = d.to_f32();
    let code = |weight: f32| if d == 0.0 { 128 } else { ((weight / d).round_ties_even() + 128.0) as u8 };
    Some((d, std::array::from_fn(|i| code(weights[i]))))
}

fn pack_f32_row(
    source: &TensorSource<'_>,
    row: usize,
    column: usize,
    scratch: &mut [f32],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let weights = &mut scratch[..source.cols];
    dequantise(source.format, source.row(row), weights);
    for (weight, out) in weights.iter().zip(out.chunks_exact_mut(PANEL * size_of::<f32>())) {
        if !weight.is_finite() {
            return Err(not_finite(source, row));
        }
        out[column * 4..column * 4 + 4].copy_from_slice(&weight.to_ne_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requantised_weights_are_within_half_a_step_and_never_clipped() {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for magnitude in [0.0, 1e-9, 3e-7, 1e-4, 0.03, 1.0, 1e4, Q8_LARGEST] {
            for _ in 0..50 {
                let mut weights: [f32; 32] = std::array::from_fn(|_| next() * magnitude);
                weights[7] = -magnitude;
                let (d, codes) = requantise(&weights).expect("finite");
                assert_eq!(f16::from_f32(d).to_f32(), d);
                for (weight, code) in weights.iter().zip(codes) {
                    let error = (d * (f32::from(code) - 128.0) - weight).abs();
                    assert!(error <= d * 0.500_01, "{weight} as {d} x {code}: off by {error}");
                }
                assert!(d <= magnitude / 127.0 * 1.001 + 6e-8, "no coarser than needed: {d} for {magnitude}");
            }
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e7] {
            let mut weights = [0.5; 32];
            weights[31] = bad;
            assert!(requantise(&weights).is_none(), "{bad}");
        }
    }
}
