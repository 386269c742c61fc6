//! The kernels for AVX-512 with VNNI.
//!
//! `vpdpbusd` multiplies 64 unsigned weights with 64 signed activations and adds groups of four to 16 lanes, one lane per
//! output. Eight of them make a block of 32 inputs; the exact integer result is then converted and folded into the f32 sum
//! with the block's scales. On Golden Cove everything here competes for ports 0 and 5, so what counts is the number of
//! vector instructions per `vpdpbusd`: rows are taken eight at a time to share the unpacking of the weights, activations
//! are broadcast by the load inside `vpdpbusd`, and the offset of unsigned Q8 codes is where its accumulator starts.
//!
//! No closure holds an intrinsic: `map` and `from_fn` are compiled without the target features, so each call of the closure
//! would stay a call.

#![expect(clippy::needless_range_loop, reason = "a row number indexes accumulators, activations and outputs alike")]

use std::arch::x86_64::*;

use super::Tile;
use super::activations::{ActivationBlock, GROUP, Group, SECOND_STEPS, SMALLEST};
use crate::cpu::ahead::Ahead;
use crate::cpu::pack::{BLOCK, PANEL, Q4_BLOCK_BYTES, Q8_CODES, Q8_PAIR_BYTES};

/// Calls `$kernel::<R>` with R the number of rows.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident($($argument:expr),*)) => {
        match $rows {
            1 => $kernel::<1>($($argument),*),
            2 => $kernel::<2>($($argument),*),
            3 => $kernel::<3>($($argument),*),
            4 => $kernel::<4>($($argument),*),
            5 => $kernel::<5>($($argument),*),
            6 => $kernel::<6>($($argument),*),
            7 => $kernel::<7>($($argument),*),
            _ => $kernel::<8>($($argument),*),
        }
    };
}

/// `out[row] = panel * row` for the first `rows` rows of a group, on a Q4 panel.
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn q4(panel: &[u8], activations: Group<'_>, rows: usize, ahead: Ahead, out: &mut Tile) {
    assert!((1..=GROUP).contains(&rows) && panel.len() >= activations.blocks.len() * Q4_BLOCK_BYTES);
    // SAFETY: the panel has a block for every block of activations.
    unsafe { by_rows!(rows, q4_rows(panel.as_ptr(), activations, ahead, out)) }
}

/// As [`q4`], on a Q8 panel.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn q8(panel: &[u8], activations: Group<'_>, rows: usize, ahead: Ahead, out: &mut Tile) {
    let (pairs, single) = (activations.blocks.len() / 2, activations.blocks.len() % 2);
    assert!((1..=GROUP).contains(&rows) && panel.len() >= pairs * Q8_PAIR_BYTES + single * (64 + Q8_CODES));
    // SAFETY: the panel has a block for every block of activations.
    unsafe { by_rows!(rows, q8_rows(panel.as_ptr(), activations, ahead, out)) }
}

/// As [`q4`], on an f32 panel and at most [`GROUP`] f32 rows of `inputs` elements.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn f32(panel: &[f32], x: &[f32], inputs: usize, out: &mut Tile) {
    let rows = x.len() / inputs;
    assert!((1..=GROUP).contains(&rows) && x.len() == rows * inputs && panel.len() >= inputs * PANEL);
    // SAFETY: `x` holds `rows` rows of `inputs` and the panel 16 weights for each input.
    unsafe { by_rows!(rows, f32_rows(panel.as_ptr(), x.as_ptr(), inputs, out)) }
}

/// Four neighbouring codes of a row in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(codes: &[i8; BLOCK], group_of_four: usize) -> __m512i {
    _mm512_set1_epi32(bytemuck::cast(codes.as_chunks::<4>().0[group_of_four]))
}

/// The integer sums of all rows as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn convert<const R: usize>(dots: [__m512i; R]) -> [__m512; R] {
    let mut totals = [_mm512_setzero_ps(); R];
    for row in 0..R {
        totals[row] = _mm512_cvtepi32_ps(dots[row]);
    }
    totals
}

/// Adds the dot product with a row's second digits to that with its first.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_second(dot: __m512i, total: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(1.0 / SECOND_STEPS), total)
}

/// # Safety
/// `bytes` points at 16 f16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_f16(bytes: *const u8) -> __m512 {
    // SAFETY: 32 bytes, as the caller promises.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.cast()) })
}

/// # Safety
/// `panel` points at `activations.blocks.len()` Q4 blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q4_rows<const R: usize>(panel: *const u8, activations: Group<'_>, mut ahead: Ahead, out: &mut Tile) {
    let low_half = _mm512_set1_epi8(15);
    let mut sums = [_mm512_setzero_ps(); R];
    for (block, (x, second)) in activations.blocks.iter().zip(activations.seconds).enumerate() {
        ahead.ask();
        // SAFETY: the caller promises a block of 320 bytes for every block of activations.
        let weights = unsafe { panel.add(block * Q4_BLOCK_BYTES) };
        let mut dots = [_mm512_setzero_si512(); R];
        for vector in 0..4 {
            // SAFETY: within the block, after its scales and minima.
            let codes = unsafe { _mm512_loadu_si512(weights.add(64 + vector * 64).cast()) };
            let low = _mm512_and_si512(codes, low_half);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_half);
            for row in 0..R {
                dots[row] = _mm512_dpbusd_epi32(dots[row], low, broadcast(&x.codes[row], vector));
            }
            for row in 0..R {
                dots[row] = _mm512_dpbusd_epi32(dots[row], high, broadcast(&x.codes[row], vector + 4));
            }
        }
        let mut totals = convert(dots);
        if x.has_second != 0 {
            let mut low = [_mm512_setzero_si512(); 4];
            let mut high = [_mm512_setzero_si512(); 4];
            for vector in 0..4 {
                // SAFETY: as above.
                let codes = unsafe { _mm512_loadu_si512(weights.add(64 + vector * 64).cast()) };
                low[vector] = _mm512_and_si512(codes, low_half);
                high[vector] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_half);
            }
            for row in 0..R {
                if x.has_second >> row & 1 == 1 {
                    let mut dot = _mm512_setzero_si512();
                    for vector in 0..4 {
                        dot = _mm512_dpbusd_epi32(dot, low[vector], broadcast(&second.codes[row], vector));
                        dot = _mm512_dpbusd_epi32(dot, high[vector], broadcast(&second.codes[row], vector + 4));
                    }
                    totals[row] = add_second(dot, totals[row]);
                }
            }
        }
        // SAFETY: the first 64 bytes of the block.
        let (d, m) = unsafe { (load_f16(weights), load_f16(weights.add(32))) };
        for row in 0..R {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(x.scale[row]));
            sums[row] = _mm512_fmadd_ps(totals[row], scale, sums[row]);
            sums[row] = _mm512_fmadd_ps(m, _mm512_set1_ps(x.scaled_sum[row]), sums[row]);
        }
    }
    store(sums, out);
}

/// # Safety
/// `panel` points at `activations.blocks.len()` Q8 blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q8_rows<const R: usize>(panel: *const u8, activations: Group<'_>, mut ahead: Ahead, out: &mut Tile) {
    let mut sums = [_mm512_setzero_ps(); R];
    for (block, (x, second)) in activations.blocks.iter().zip(activations.seconds).enumerate() {
        ahead.ask();
        // SAFETY: the caller promises that the panel holds this block: its scales and its codes.
        let (scales, codes) = unsafe {
            let pair = panel.add(block / 2 * Q8_PAIR_BYTES);
            (pair.add(block % 2 * 32), pair.add(64 + block % 2 * Q8_CODES))
        };
        let mut dots = [_mm512_setzero_si512(); R];
        for row in 0..R {
            dots[row] = _mm512_set1_epi32(x.offset[row]);
        }
        for vector in 0..8 {
            // SAFETY: within the block's codes.
            let codes = unsafe { _mm512_loadu_si512(codes.add(vector * 64).cast()) };
            for row in 0..R {
                dots[row] = _mm512_dpbusd_epi32(dots[row], codes, broadcast(&x.codes[row], vector));
            }
        }
        let mut totals = convert(dots);
        if x.has_second != 0 {
            for row in 0..R {
                if x.has_second >> row & 1 == 1 {
                    let mut dot = _mm512_set1_epi32(second.offset[row]);
                    for vector in 0..8 {
                        // SAFETY: as above.
                        let codes = unsafe { _mm512_loadu_si512(codes.add(vector * 64).cast()) };
                        dot = _mm512_dpbusd_epi32(dot, codes, broadcast(&second.codes[row], vector));
                    }
                    totals[row] = add_second(dot, totals[row]);
                }
            }
        }
        // SAFETY: the block's 32 bytes of scales.
        let d = unsafe { load_f16(scales) };
        for row in 0..R {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(x.scale[row]));
            sums[row] = _mm512_fmadd_ps(totals[row], scale, sums[row]);
        }
    }
    store(sums, out);
}

/// # Safety
/// `panel` points at `inputs` x 16 weights and `x` at `R` rows of `inputs`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn f32_rows<const R: usize>(panel: *const f32, x: *const f32, inputs: usize, out: &mut Tile) {
    let mut sums = [_mm512_setzero_ps(); R];
    for input in 0..inputs {
        // SAFETY: within the panel and the rows, as the caller promises.
        unsafe {
            let weights = _mm512_loadu_ps(panel.add(input * PANEL));
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(weights, _mm512_set1_ps(*x.add(row * inputs + input)), *sum);
            }
        }
    }
    store(sums, out);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const R: usize>(sums: [__m512; R], out: &mut Tile) {
    for (sum, out) in sums.into_iter().zip(out) {
        // SAFETY: `out` is 16 f32.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

/// Blocks quantised together: one lane for the result of each.
const CHUNK: usize = 16;

/// The first digits of whole blocks of one row into place `slot` of each block of `out`.
///
/// Finding a block's largest element and the sum of its codes are reductions over lanes, the costly part; 16 blocks share
/// them, and their divisions.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn first_digits(row: &[f32], out: &mut [ActivationBlock], slot: usize) {
    for (row, out) in row.chunks(CHUNK * BLOCK).zip(out.chunks_mut(CHUNK)) {
        let mut lanes = [_mm512_setzero_si512(); CHUNK];
        for (x, lanes) in row.chunks_exact(BLOCK).zip(&mut lanes) {
            let (low, high) = load_block(x);
            // As integers, magnitudes order the same and NaN is the largest of all; a float maximum would drop it.
            let (low, high) = (_mm512_castps_si512(_mm512_abs_ps(low)), _mm512_castps_si512(_mm512_abs_ps(high)));
            *lanes = _mm512_max_epi32(low, high);
        }
        let largest = _mm512_castsi512_ps(reduce_each::<false>(&lanes));
        // Not `<`: a NaN must not become zeros.
        let not_tiny = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(largest, _mm512_set1_ps(SMALLEST));
        let scale = _mm512_maskz_div_ps(not_tiny, largest, _mm512_set1_ps(127.0));
        let inverse = to_array(_mm512_maskz_div_ps(not_tiny, _mm512_set1_ps(1.0), scale));
        for (index, (x, lanes)) in row.chunks_exact(BLOCK).zip(&mut lanes).enumerate() {
            let (low, high) = load_block(x);
            let inverse = _mm512_set1_ps(inverse[index]);
            let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            *lanes = _mm512_add_epi32(low, high);
            let codes = out[index].codes[slot].as_mut_ptr();
            // SAFETY: a place for 32 codes.
            unsafe {
                _mm_storeu_si128(codes.cast(), _mm512_cvtepi32_epi8(low));
                _mm_storeu_si128(codes.add(16).cast(), _mm512_cvtepi32_epi8(high));
            }
        }
        let sum = reduce_each::<true>(&lanes);
        let scaled_sum = to_array(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
        let (scale, sum) = (to_array(scale), to_array(_mm512_castsi512_ps(sum)));
        for (index, out) in out.iter_mut().enumerate() {
            out.scale[slot] = scale[index];
            out.scaled_sum[slot] = scaled_sum[index];
            // Wrapping: where an element is not finite its code is meaningless, and the result is not finite by the scale.
            out.offset[slot] = sum[index].to_bits().cast_signed().wrapping_mul(-128);
        }
    }
}

/// The second digits of a block; returns their sum.
///
/// # Safety
/// As for [`q4`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn second_digit(x: &[f32; BLOCK], inverse: f32, first: &[i8; BLOCK], out: &mut [i8; BLOCK]) -> i32 {
    let (low, high) = load_block(x);
    // SAFETY: 32 codes.
    let (first_low, first_high) = unsafe {
        let first = first.as_ptr();
        (_mm_loadu_si128(first.cast()), _mm_loadu_si128(first.add(16).cast()))
    };
    let (low, high) = (rest(low, inverse, first_low), rest(high, inverse, first_high));
    // SAFETY: a place for 32 codes.
    unsafe {
        _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(low));
        _mm_storeu_si128(out.as_mut_ptr().add(16).cast(), _mm512_cvtepi32_epi8(high));
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rest(x: __m512, inverse: f32, first: __m128i) -> __m512i {
    let first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
    let rest = _mm512_sub_ps(_mm512_mul_ps(x, _mm512_set1_ps(inverse)), first);
    _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(SECOND_STEPS)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_block(x: &[f32]) -> (__m512, __m512) {
    let x = &x[..BLOCK];
    // SAFETY: 32 f32.
    unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn to_array(lanes: __m512) -> [f32; 16] {
    let mut array = [0.0; 16];
    // SAFETY: 16 f32.
    unsafe { _mm512_storeu_ps(array.as_mut_ptr(), lanes) };
    array
}

/// Lane i of the result is the sum (or the largest) of all lanes of vector i: the halves of pairs of vectors are put beside
/// each other and combined, four times.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce_each<const SUM: bool>(vectors: &[__m512i; CHUNK]) -> __m512i {
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let mut eight = [_mm512_setzero_si512(); 8];
    for i in 0..8 {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        eight[i] = combine::<SUM>(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    let mut four = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        let (a, b) = (eight[2 * i], eight[2 * i + 1]);
        four[i] = combine::<SUM>(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    let mut two = [_mm512_setzero_si512(); 2];
    for i in 0..2 {
        let (a, b) = (four[2 * i], four[2 * i + 1]);
        two[i] = combine::<SUM>(_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b));
    }
    let [a, b] = two;
    combine::<SUM>(_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn combine<const SUM: bool>(a: __m512i, b: __m512i) -> __m512i {
    if SUM { _mm512_add_epi32(a, b) } else { _mm512_max_epi32(a, b) }
}
