//! [`Simd`] in plain Rust: arrays that the compiler turns into whatever vectors the target always has.

use half::f16;

use super::{Chunk, Kernel, LANES, Simd};

/// Every machine has this.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Runs a kernel in a function of its own.
#[inline(never)]
pub(super) fn run<K: Kernel>(kernel: K) {
    kernel.run(Portable);
}

#[inline(always)]
fn zip(a: Chunk<f32>, b: Chunk<f32>, f: impl Fn(f32, f32) -> f32) -> Chunk<f32> {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Simd for Portable {
    type V = Chunk<f32>;
    type M = [bool; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &Chunk<f32>) -> Self::V {
        *from
    }
    #[inline(always)]
    fn load_f16(self, from: &Chunk<f16>) -> Self::V {
        from.map(widen)
    }
    #[inline(always)]
    fn store(self, value: Self::V, to: &mut Chunk<f32>) {
        *to = value;
    }
    #[inline(always)]
    fn store_f16(self, value: Self::V, to: &mut Chunk<f16>) {
        const MAX: f32 = 65_504.0;
        // `clamp` keeps a NaN, as the vector units do here.
        *to = value.map(|value| f16::from_f32_const(value.clamp(-MAX, MAX)));
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not f32::mul_add, which calls a slow function where the target has no such instruction.
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = a[i] * b[i] + c[i];
        }
        out
    }

    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V) -> Self::M {
        let mut out = [false; LANES];
        for i in 0..LANES {
            out[i] = a[i] >= b[i];
        }
        out
    }
    #[inline(always)]
    fn lanes(self, first: usize, end: usize) -> Self::M {
        std::array::from_fn(|i| i >= first && i < end)
    }
    #[inline(always)]
    fn bits(self, mask: Self::M) -> u32 {
        mask.iter().rev().fold(0, |bits, &set| bits << 1 | u32::from(set))
    }
    #[inline(always)]
    fn select(self, mask: Self::M, a: Self::V, b: Self::V) -> Self::V {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = if mask[i] { a[i] } else { b[i] };
        }
        out
    }

    #[inline(always)]
    fn exp2_of_rounded(self, biased: Self::V) -> Self::V {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::from_bits((biased[i].to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
        }
        out
    }

    #[inline(always)]
    fn sum(self, value: Self::V) -> f32 {
        fold(value, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, value: Self::V) -> f32 {
        fold(value, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        run(kernel);
    }
}

#[inline(always)]
fn fold(mut value: Chunk<f32>, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            value[i] = f(value[i], value[i + half]);
        }
        half /= 2;
    }
    value[0]
}

/// f16 to f32 without branches, so that it vectorises: the exponent is rebiased by a multiplication, which also makes
/// subnormals right; infinity and NaN get their exponent back.
#[inline(always)]
fn widen(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let not_finite = if bits & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
    f32::from_bits(magnitude.to_bits() | not_finite | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let (wide, expected) = (widen(half), half.to_f32());
            assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan(), "{bits:#x}");
        }
    }
}
