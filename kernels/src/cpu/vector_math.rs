//! Vectors of 16 f32 lanes, the same in every instruction set, and what is computed with them: sums in a fixed order and
//! [`exp`].
//!
//! A kernel is written once, generic over [`Simd`], and [`dispatch`] compiles it for each [`Isa`]. Sixteen lanes are one
//! AVX-512 register, two of AVX2, and an array in portable code, so data layouts and the order of every sum are the same
//! for all three; AVX2 and AVX-512 even give the same bits, since both have fused multiply-add.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Isa, Pool};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;
/// The lanes in memory.
pub(crate) type Chunk<T> = [T; LANES];

/// An instruction set's vectors. A value of the implementing type is the proof that the machine has the instructions, which
/// is what makes the methods safe.
///
/// `max` and `min` follow x86: when either lane is NaN the second operand is the result. `mul_add` rounds once where the
/// instruction set can and twice otherwise.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// 16 floats.
    type V: Copy;
    /// 16 truth values.
    type M: Copy;
    /// Whether there are registers for two dozen vectors at once (AVX-512: 32 registers of a whole vector; AVX2: 16 of half).
    const WIDE: bool;

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &Chunk<f32>) -> Self::V;
    fn load_f16(self, from: &Chunk<f16>) -> Self::V;
    fn store(self, value: Self::V, to: &mut Chunk<f32>);
    /// Rounds to nearest even, saturating to the largest finite f16 instead of overflowing to infinity.
    fn store_f16(self, value: Self::V, to: &mut Chunk<f16>);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// Lanes where `a >= b`; false for NaN.
    fn at_least(self, a: Self::V, b: Self::V) -> Self::M;
    /// Lanes `first..end`.
    fn lanes(self, first: usize, end: usize) -> Self::M;
    /// One bit per lane, lane 0 lowest.
    fn bits(self, mask: Self::M) -> u32;
    /// `a` where the mask is set, else `b`.
    fn select(self, mask: Self::M, a: Self::V, b: Self::V) -> Self::V;

    /// `2^n` for `biased = ROUND + n`, n integral in [-126, 127]: moves the low bits of `biased` into the exponent.
    fn exp2_of_rounded(self, biased: Self::V) -> Self::V;

    /// The sum of the lanes: halves are added until one lane is left, so the order is the same everywhere.
    fn sum(self, value: Self::V) -> f32;
    /// The largest lane; NaN lanes may be ignored.
    fn largest(self, value: Self::V) -> f32;

    /// Runs `kernel` in a function of its own, compiled once however many callers it has. For bodies so large that a call
    /// costs nothing beside them: everything else is inlined into every caller.
    fn call<K: Kernel>(self, kernel: K);
}

/// Adding this rounds an f32 below 2^22 to the nearest integer, which is then in the low bits (1.5 * 2^23).
const ROUND: f32 = 12_582_912.0;
/// Below this, e^x is no normal number: ln 2^-126.
const EXP_LOW: f32 = -87.336_54;
/// Above this, the exponent would leave its range: e^88 is the result instead.
const EXP_HIGH: f32 = 88.0;
/// ln 2 in two parts; the first has 9 significant bits, so that its product with n is exact (Cody and Waite 1980).
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, lowest order first: the minimax polynomial for the relative error of e^r, found
/// with Remez' exchange; its error is 3.1e-9, a twentieth of an ulp.
const EXP_POLYNOMIAL: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_39, 0.008_368_745, 0.001_381_454];

/// e^x within 2 ulp for x in [-87.33, 88]; 0 below, e^88 above, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    // The constant first: a NaN in the second operand stays.
    exp_to_88(simd, simd.min(simd.splat(EXP_HIGH), x))
}

/// [`exp`] for x that is at most 88, such as the distance of a score from the largest.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial, times 2^n by the exponent bits.
#[inline(always)]
pub(crate) fn exp_to_88<S: Simd>(simd: S, x: S::V) -> S::V {
    let vanishes = simd.at_least(simd.splat(EXP_LOW), x);
    let biased = simd.mul_add(x, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND));
    let n = simd.sub(biased, simd.splat(ROUND));
    let r = simd.mul_add(n, simd.splat(-LN2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN2_LOW), r);
    let mut polynomial = simd.splat(EXP_POLYNOMIAL[4]);
    for coefficient in [EXP_POLYNOMIAL[3], EXP_POLYNOMIAL[2], EXP_POLYNOMIAL[1], EXP_POLYNOMIAL[0]] {
        polynomial = simd.mul_add(polynomial, r, simd.splat(coefficient));
    }
    let power = simd.mul_add(polynomial, simd.mul(r, r), simd.add(r, simd.splat(1.0)));
    let result = simd.mul(power, simd.exp2_of_rounded(biased));
    simd.select(vanishes, simd.splat(0.0), result)
}

/// Loads up to 16 values; the other lanes are 0.
#[inline(always)]
pub(crate) fn load_part<S: Simd, T: Element>(simd: S, from: &[T]) -> S::V {
    if let Some(full) = from.first_chunk() {
        return T::load(simd, full);
    }
    let mut lanes = [T::default(); LANES];
    lanes[..from.len()].copy_from_slice(from);
    T::load(simd, &lanes)
}

/// Stores the first `to.len()` lanes, up to 16.
#[inline(always)]
pub(crate) fn store_part<S: Simd>(simd: S, value: S::V, to: &mut [f32]) {
    if let Some(full) = to.first_chunk_mut() {
        return simd.store(value, full);
    }
    let mut lanes = [0.0; LANES];
    simd.store(value, &mut lanes);
    to.copy_from_slice(&lanes[..to.len()]);
}

/// How numbers are held in KV blocks and adapters.
pub(crate) trait Element: bytemuck::Pod + Default + Send + Sync {
    fn load<S: Simd>(simd: S, from: &Chunk<Self>) -> S::V;
    fn store<S: Simd>(simd: S, value: S::V, to: &mut Chunk<Self>);
    fn to_f32(self) -> f32;
    /// Rounds to this format.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Chunk<f32>) -> S::V {
        simd.load(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, value: S::V, to: &mut Chunk<f32>) {
        simd.store(value, to);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Chunk<f16>) -> S::V {
        simd.load_f16(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, value: S::V, to: &mut Chunk<f16>) {
        simd.store_f16(value, to);
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// Work that [`dispatch`] compiles once per instruction set. `run` and everything it calls must be `#[inline(always)]`:
/// only what is inlined into the function that enables the instructions may use them.
pub(crate) trait Kernel {
    /// Does the work.
    fn run<S: Simd>(self, simd: S);
}

/// Runs `kernel` with `isa`'s vectors.
///
/// # Panics
/// When this machine does not have `isa`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    assert!(Isa::available().contains(&isa), "{} is not available on this machine", isa.name());
    match isa {
        Isa::Portable => portable::run(kernel),
        // SAFETY: the assertion above: this machine has AVX2, FMA and F16C.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        // SAFETY: the assertion above: this machine has AVX-512 F, BW, DQ and VL and everything AVX2 needs.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { avx512::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("asserted above"),
    }
}

/// Work on rows that do not depend on each other; see [`Kernel`].
pub(crate) trait RowKernel: Sync {
    /// Does `rows`' part. Several threads may call this at once, with ranges that do not overlap.
    fn run<S: Simd>(&self, simd: S, rows: Range<usize>);
}

/// Up to so many rows the caller works alone: handing a part to another thread takes longer.
const ROWS_ALONE: usize = 4;

/// Runs `kernel` on `rows` rows, spread over the pool's threads.
pub(crate) fn dispatch_rows<K: RowKernel>(pool: &Pool, isa: Isa, rows: usize, kernel: &K) {
    struct Part<'a, K>(&'a K, Range<usize>);
    impl<K: RowKernel> Kernel for Part<'_, K> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            self.0.run(simd, self.1);
        }
    }
    if rows <= ROWS_ALONE {
        dispatch(isa, Part(kernel, 0..rows));
    } else {
        pool.run(&|worker| dispatch(isa, Part(kernel, pool.split(rows, worker))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for Exp<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for (x, y) in self.0.as_chunks().0.iter().zip(self.1.as_chunks_mut().0) {
                simd.store(exp(simd, simd.load(x)), y);
            }
        }
    }

    fn exp_all(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len()];
        dispatch(isa, Exp(x, &mut y));
        y
    }

    #[test]
    fn exp_is_within_two_ulp_over_its_whole_range() {
        let x: Vec<f32> = (0..1_600_000).map(|i| -87.33 + i as f32 * (175.33 / 1_600_000.0)).collect();
        for &isa in Isa::available() {
            let mut worst = 0.0_f64;
            for (x, y) in x.iter().zip(exp_all(isa, &x)) {
                let expected = f64::from(*x).exp();
                let ulp = f64::from((expected as f32).next_up() - expected as f32);
                worst = worst.max((f64::from(y) - expected).abs() / ulp);
            }
            assert!(worst <= 2.0, "{}: {worst} ulp", isa.name());
        }
    }

    #[test]
    fn exp_is_defined_beyond_its_range() {
        let x = [0.0, -0.0, f32::NEG_INFINITY, -1e30, -87.34, f32::INFINITY, 1e30, f32::NAN];
        for &isa in Isa::available() {
            let y = exp_all(isa, &x.repeat(2));
            assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{}", isa.name());
            assert!(y[5] == y[6] && y[5].is_finite() && y[5] > 1.6e38, "{}", isa.name());
            assert!(y[7].is_nan(), "{}", isa.name());
        }
    }

    struct Everything<'a>(&'a mut Vec<f32>);
    impl Kernel for Everything<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let a: Chunk<f32> = std::array::from_fn(|i| (i as f32 - 7.0) * 1.25);
            let b: Chunk<f32> = std::array::from_fn(|i| if i == 3 { f32::NAN } else { (i * i) as f32 - 40.0 });
            let (a, b) = (simd.load(&a), simd.load(&b));
            let mut push = |value: S::V| {
                let mut lanes = [0.0; LANES];
                simd.store(value, &mut lanes);
                self.0.extend(lanes);
            };
            for value in [simd.add(a, b), simd.sub(a, b), simd.mul(a, b), simd.div(a, b)] {
                push(value);
            }
            for value in [simd.max(a, b), simd.max(b, a), simd.min(a, b), simd.min(b, a)] {
                push(value);
            }
            push(simd.mul_add(a, b, a));
            push(simd.select(simd.at_least(a, b), a, b));
            push(simd.select(simd.lanes(3, 11), a, b));
            let mut halves = [f16::ZERO; LANES];
            simd.store_f16(simd.mul(a, simd.splat(1e4)), &mut halves);
            push(simd.load_f16(&halves));
            self.0.extend([simd.sum(a), simd.largest(a), simd.bits(simd.at_least(a, b)) as f32]);
            self.0.extend([simd.bits(simd.lanes(0, 16)) as f32, simd.bits(simd.lanes(5, 5)) as f32]);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits_where_nothing_is_rounded_twice() {
        let all = |isa| {
            let mut values = Vec::new();
            dispatch(isa, Everything(&mut values));
            values
                .into_iter()
                .map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() })
                .collect::<Vec<_>>()
        };
        let portable = all(Isa::Portable);
        for &isa in Isa::available() {
            assert_eq!(all(isa), portable, "{}", isa.name());
        }
    }
}
