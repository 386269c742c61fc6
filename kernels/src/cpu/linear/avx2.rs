//! The kernels for AVX2 with FMA and F16C.
//!
//! `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs to 16 bits, saturating. Q4 codes cannot saturate: a
//! pair is at most 2 x 15 x 127 = 3,810, and eight of them, a block of 32 inputs, still fit. Q8 codes would (2 x 255 x 127),
//! so there the weight's magnitude is the unsigned operand and its sign moves to the activation: 2 x 128 x 127 fits.
//!
//! A panel's 16 outputs are two halves of eight lanes; rows are taken up to four at a time, as 16 registers allow.

#![expect(clippy::needless_range_loop, reason = "a row number indexes accumulators, activations and outputs alike")]

use std::arch::x86_64::*;

use super::Tile;
use super::activations::{GROUP, Group, SECOND_STEPS};
use crate::cpu::pack::{BLOCK, PANEL, Q4_BLOCK_BYTES, Q8_CODES, Q8_PAIR_BYTES};

/// Rows at once.
const ROWS: usize = 4;
/// Outputs at once.
const LANES: usize = 8;

/// Calls `$kernel::<R>(arguments, first row, first output)` until all rows and outputs are done.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident($($argument:expr),*)) => {
        for first in (0..$rows).step_by(ROWS) {
            for column in [0, LANES] {
                match $rows - first {
                    1 => $kernel::<1>($($argument),*, first, column),
                    2 => $kernel::<2>($($argument),*, first, column),
                    3 => $kernel::<3>($($argument),*, first, column),
                    _ => $kernel::<ROWS>($($argument),*, first, column),
                }
            }
        }
    };
}

/// `out[row] = panel * row` for the first `rows` rows of a group, on a Q4 panel.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn q4(panel: &[u8], activations: Group<'_>, rows: usize, out: &mut Tile) {
    assert!((1..=GROUP).contains(&rows) && panel.len() >= activations.blocks.len() * Q4_BLOCK_BYTES);
    // SAFETY: the panel has a block for every block of activations.
    unsafe { by_rows!(rows, q4_rows(panel.as_ptr(), activations, out)) }
}

/// As [`q4`], on a Q8 panel.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn q8(panel: &[u8], activations: Group<'_>, rows: usize, out: &mut Tile) {
    let (pairs, single) = (activations.blocks.len() / 2, activations.blocks.len() % 2);
    assert!((1..=GROUP).contains(&rows) && panel.len() >= pairs * Q8_PAIR_BYTES + single * (64 + Q8_CODES));
    // SAFETY: the panel has a block for every block of activations.
    unsafe { by_rows!(rows, q8_rows(panel.as_ptr(), activations, out)) }
}

/// As [`q4`], on an f32 panel and at most [`GROUP`] f32 rows of `inputs` elements.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn f32(panel: &[f32], x: &[f32], inputs: usize, out: &mut Tile) {
    let rows = x.len() / inputs;
    assert!((1..=GROUP).contains(&rows) && x.len() == rows * inputs && panel.len() >= inputs * PANEL);
    // SAFETY: `x` holds `rows` rows of `inputs` and the panel 16 weights for each input.
    unsafe { by_rows!(rows, f32_rows(panel.as_ptr(), x.as_ptr(), inputs, out)) }
}

/// Four neighbouring codes of a row in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(codes: &[i8; BLOCK], group_of_four: usize) -> __m256i {
    _mm256_set1_epi32(bytemuck::cast(codes.as_chunks::<4>().0[group_of_four]))
}

/// Adds the dot product with a row's second digits to that with its first.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_second(dot: __m256i, total: __m256) -> __m256 {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(1.0 / SECOND_STEPS), total)
}

/// # Safety
/// `panel` points at `activations.blocks.len()` Q4 blocks; `first + R` is at most [`GROUP`]; `column` is 0 or 8.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_rows<const R: usize>(
    panel: *const u8,
    activations: Group<'_>,
    out: &mut Tile,
    first: usize,
    column: usize,
) {
    let low_half = _mm256_set1_epi8(15);
    let mut sums = [_mm256_setzero_ps(); R];
    for (block, (x, second)) in activations.blocks.iter().zip(activations.seconds).enumerate() {
        // SAFETY: the caller promises a block of 320 bytes for every block of activations; every load lies within it.
        let (d, m, codes) = unsafe {
            let weights = panel.add(block * Q4_BLOCK_BYTES);
            let d = _mm256_cvtph_ps(_mm_loadu_si128(weights.add(column * 2).cast()));
            let m = _mm256_cvtph_ps(_mm_loadu_si128(weights.add(32 + column * 2).cast()));
            (d, m, weights.add(64 + column * 4))
        };
        let mut pairs = [_mm256_setzero_si256(); R];
        for vector in 0..4 {
            // SAFETY: eight lanes of one of the block's four vectors.
            let codes = unsafe { _mm256_loadu_si256(codes.add(vector * 64).cast()) };
            let low = _mm256_and_si256(codes, low_half);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_half);
            for row in 0..R {
                let x = &x.codes[first + row];
                let low = _mm256_maddubs_epi16(low, broadcast(x, vector));
                let high = _mm256_maddubs_epi16(high, broadcast(x, vector + 4));
                pairs[row] = _mm256_add_epi16(pairs[row], _mm256_add_epi16(low, high));
            }
        }
        for row in 0..R {
            let mut total = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[row], _mm256_set1_epi16(1)));
            if x.has_second >> (first + row) & 1 == 1 {
                let x = &second.codes[first + row];
                let mut pairs = _mm256_setzero_si256();
                for vector in 0..4 {
                    // SAFETY: as above.
                    let codes = unsafe { _mm256_loadu_si256(codes.add(vector * 64).cast()) };
                    let low = _mm256_and_si256(codes, low_half);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_half);
                    let low = _mm256_maddubs_epi16(low, broadcast(x, vector));
                    let high = _mm256_maddubs_epi16(high, broadcast(x, vector + 4));
                    pairs = _mm256_add_epi16(pairs, _mm256_add_epi16(low, high));
                }
                total = add_second(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), total);
            }
            let scale = _mm256_mul_ps(d, _mm256_set1_ps(x.scale[first + row]));
            sums[row] = _mm256_fmadd_ps(total, scale, sums[row]);
            sums[row] = _mm256_fmadd_ps(m, _mm256_set1_ps(x.scaled_sum[first + row]), sums[row]);
        }
    }
    store(sums, out, first, column);
}

/// # Safety
/// `panel` points at `activations.blocks.len()` Q8 blocks; `first + R` is at most [`GROUP`]; `column` is 0 or 8.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_rows<const R: usize>(
    panel: *const u8,
    activations: Group<'_>,
    out: &mut Tile,
    first: usize,
    column: usize,
) {
    let sign = _mm256_set1_epi8(-128);
    let mut sums = [_mm256_setzero_ps(); R];
    for (block, (x, second)) in activations.blocks.iter().zip(activations.seconds).enumerate() {
        // SAFETY: the caller promises that the panel holds this block; every load lies within its scales or its codes.
        let (d, codes) = unsafe {
            let pair = panel.add(block / 2 * Q8_PAIR_BYTES);
            let d = _mm256_cvtph_ps(_mm_loadu_si128(pair.add(block % 2 * 32 + column * 2).cast()));
            (d, pair.add(64 + block % 2 * Q8_CODES + column * 4))
        };
        let mut dots = [_mm256_setzero_si256(); R];
        for vector in 0..8 {
            // SAFETY: eight lanes of one of the block's eight vectors.
            let codes = unsafe { _mm256_loadu_si256(codes.add(vector * 64).cast()) };
            let codes = _mm256_xor_si256(codes, sign);
            let magnitude = _mm256_abs_epi8(codes);
            for row in 0..R {
                let signed = _mm256_sign_epi8(broadcast(&x.codes[first + row], vector), codes);
                let pairs = _mm256_maddubs_epi16(magnitude, signed);
                dots[row] = _mm256_add_epi32(dots[row], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        for row in 0..R {
            let mut total = _mm256_cvtepi32_ps(dots[row]);
            if x.has_second >> (first + row) & 1 == 1 {
                let mut dot = _mm256_setzero_si256();
                for vector in 0..8 {
                    // SAFETY: as above.
                    let codes = unsafe { _mm256_loadu_si256(codes.add(vector * 64).cast()) };
                    let codes = _mm256_xor_si256(codes, sign);
                    let signed = _mm256_sign_epi8(broadcast(&second.codes[first + row], vector), codes);
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), signed);
                    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
                total = add_second(dot, total);
            }
            let scale = _mm256_mul_ps(d, _mm256_set1_ps(x.scale[first + row]));
            sums[row] = _mm256_fmadd_ps(total, scale, sums[row]);
        }
    }
    store(sums, out, first, column);
}

/// # Safety
/// `panel` points at `inputs` x 16 weights and `x` at `first + R` rows of `inputs`; `column` is 0 or 8.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f32_rows<const R: usize>(
    panel: *const f32,
    x: *const f32,
    inputs: usize,
    out: &mut Tile,
    first: usize,
    column: usize,
) {
    let mut sums = [_mm256_setzero_ps(); R];
    for input in 0..inputs {
        // SAFETY: within the panel and the rows, as the caller promises.
        unsafe {
            let weights = _mm256_loadu_ps(panel.add(input * PANEL + column));
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_fmadd_ps(weights, _mm256_set1_ps(*x.add((first + row) * inputs + input)), *sum);
            }
        }
    }
    store(sums, out, first, column);
}

#[inline]
#[target_feature(enable = "avx2")]
fn store<const R: usize>(sums: [__m256; R], out: &mut Tile, first: usize, column: usize) {
    for (sum, out) in sums.into_iter().zip(&mut out[first..]) {
        let out = &mut out[column..column + LANES];
        // SAFETY: `out` is 8 f32.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
    }
}
