//! Which instruction set the kernels use: found once at run time, so that one binary is fast on every x86-64 machine and
//! runs on any other.

/// An instruction set level that the kernels are written for. A value above portable proves that this machine has it: other
/// crates get one only from [`Isa::detect`] and [`Isa::available`], and this crate makes none elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, every architecture.
    Portable,
    /// AVX2 with FMA and F16C (Haswell, Zen and later).
    #[non_exhaustive]
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later), beside everything AVX2 needs.
    #[non_exhaustive]
    Avx512Vnni,
}

impl Isa {
    /// The best level this machine has.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Portable)
    }

    /// All levels this machine can run, worst first.
    #[must_use]
    pub fn available() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx512 {
                return &[Self::Portable, Self::Avx2, Self::Avx512Vnni];
            }
            if avx2 {
                return &[Self::Portable, Self::Avx2];
            }
        }
        &[Self::Portable]
    }

    /// Name in logs and benchmarks.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512-vnni",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_level_is_available_and_portable_always_is() {
        assert!(Isa::available().contains(&Isa::detect()));
        assert_eq!(Isa::available()[0], Isa::Portable);
    }
}
