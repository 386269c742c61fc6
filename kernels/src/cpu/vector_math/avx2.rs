//! [`Simd`] with AVX2, FMA and F16C: two registers per vector.

use std::arch::x86_64::*;

use half::f16;

use super::{Chunk, Kernel, LANES, Simd};

/// Proof that the machine has AVX2, FMA and F16C. Made in [`run`] alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

/// # Safety
/// The machine must have AVX2, FMA and F16C.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

/// Lanes 0..8 and 8..16.
type Pair = [__m256; 2];

/// Rounding of f32 to f16: to nearest even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

// Every `unsafe` below: the value `self` proves that the instructions exist, and pointers come from references to as many
// elements as are accessed, without requirements on alignment.
impl Simd for Avx2 {
    type V = Pair;
    type M = Pair;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn load(self, from: &Chunk<f32>) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn load_f16(self, from: &Chunk<f16>) -> Pair {
        // SAFETY: see above the impl; f16 is a transparent u16.
        unsafe {
            let from = from.as_ptr();
            [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))]
        }
    }
    #[inline(always)]
    fn store(self, value: Pair, to: &mut Chunk<f32>) {
        // SAFETY: see above the impl.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value[1]);
        }
    }
    #[inline(always)]
    fn store_f16(self, value: Pair, to: &mut Chunk<f16>) {
        let value = self.min(self.splat(65_504.0), self.max(self.splat(-65_504.0), value));
        // SAFETY: see above the impl; f16 is a transparent u16.
        unsafe {
            let to = to.as_mut_ptr();
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<NEAREST>(value[0]));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<NEAREST>(value[1]));
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn at_least(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_cmp_ps::<_CMP_GE_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_GE_OQ>(a[1], b[1])] }
    }
    #[inline(always)]
    fn lanes(self, first: usize, end: usize) -> Pair {
        debug_assert!(end <= LANES);
        // SAFETY: see above the impl.
        unsafe {
            let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let (first, end) = (_mm256_set1_epi32(first as i32), _mm256_set1_epi32(end as i32));
            [index, _mm256_add_epi32(index, _mm256_set1_epi32(8))].map(|index| {
                let before = _mm256_cmpgt_epi32(first, index);
                _mm256_castsi256_ps(_mm256_andnot_si256(before, _mm256_cmpgt_epi32(end, index)))
            })
        }
    }
    #[inline(always)]
    fn bits(self, mask: Pair) -> u32 {
        // SAFETY: see above the impl.
        unsafe { _mm256_movemask_ps(mask[0]) as u32 | (_mm256_movemask_ps(mask[1]) as u32) << 8 }
    }
    #[inline(always)]
    fn select(self, mask: Pair, a: Pair, b: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe { [_mm256_blendv_ps(b[0], a[0], mask[0]), _mm256_blendv_ps(b[1], a[1], mask[1])] }
    }

    #[inline(always)]
    fn exp2_of_rounded(self, biased: Pair) -> Pair {
        // SAFETY: see above the impl.
        unsafe {
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(biased[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(biased[1]));
            [_mm256_castsi256_ps(_mm256_add_epi32(low, one)), _mm256_castsi256_ps(_mm256_add_epi32(high, one))]
        }
    }

    #[inline(always)]
    fn sum(self, value: Pair) -> f32 {
        // SAFETY: see above the impl.
        unsafe {
            let eight = _mm256_add_ps(value[0], value[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn largest(self, value: Pair) -> f32 {
        // SAFETY: see above the impl.
        unsafe {
            let eight = _mm256_max_ps(value[0], value[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        // SAFETY: `self` proves that the machine has the instructions.
        unsafe { run(kernel) }
    }
}
