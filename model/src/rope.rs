//! Rotary embedding (Su et al. 2021) and its scalings, as the table of cos and sin that kernels read.
//!
//! Frequencies and angles are rounded to f32 where transformers rounds them, so that far positions agree with it.

use std::f64::consts::PI;

use openlora_kernels::RopeTable;

use crate::error::ModelError;

/// What turns positions into angles.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Rotated elements of a head.
    pub rotary_dim: usize,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// `[rotary_dim / 2]` divisors of the frequencies (GGUF's `rope_freqs.weight`: Llama 3's scaling, precomputed).
    pub factors: Option<Vec<f32>>,
}

/// Long-context scalings.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by a factor (Chen et al. 2023).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth band between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context before scaling, in tokens.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023).
    Yarn(Yarn),
}

/// YaRN's parameters (sections 3.2 and 3.4 of the paper).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How much longer the context becomes.
    pub factor: f64,
    /// Context before scaling, in tokens.
    pub original_context: usize,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded outwards to whole dimensions.
    pub truncate: bool,
    /// What cos and sin are multiplied with.
    pub attention: YarnAttention,
}

/// YaRN's attention factor: multiplies cos and sin, so q·k by its square.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum YarnAttention {
    /// As given.
    Given(f64),
    /// `times * (0.1 ln(factor) + 1)`.
    FromFactor {
        /// Further multiplier.
        times: f64,
    },
    /// `(0.1 mscale ln(factor) + 1) / (0.1 all_dim ln(factor) + 1)`.
    Ratio {
        /// Numerator's coefficient.
        mscale: f64,
        /// Denominator's coefficient.
        all_dim: f64,
    },
}

impl RopeConfig {
    /// Refuses parameters that would give angles that are not numbers.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let positive = |what: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(ModelError::metadata(format!("rope {what}"), format!("is {value}; it must be positive and finite")))
        };
        positive("theta", self.theta)?;
        if let Some(factors) = &self.factors {
            if factors.len() != self.rotary_dim / 2 {
                let reason = format!("has {} elements; {} are needed", factors.len(), self.rotary_dim / 2);
                return Err(ModelError::Tensor { name: "rope_freqs.weight".into(), reason });
            }
            factors.iter().try_for_each(|factor| positive("factors", f64::from(*factor)))?;
        }
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)?;
                positive("original context", *original_context as f64)
            }
            RopeScaling::Yarn(yarn) => {
                positive("factor", yarn.factor)?;
                positive("original context", yarn.original_context as f64)?;
                positive("beta_fast", yarn.beta_fast)?;
                positive("beta_slow", yarn.beta_slow)?;
                positive("theta - 1", self.theta - 1.0)?;
                positive("attention factor", yarn.attention_factor())
            }
        }
    }

    /// The angle per position of each pair of elements, and what cos and sin are multiplied with.
    #[must_use]
    pub fn frequencies(&self) -> (Vec<f32>, f32) {
        let pairs = self.rotary_dim / 2;
        let base: Vec<f64> = (0..pairs)
            .map(|pair| {
                let frequency = self.theta.powf(-(2.0 * pair as f64) / self.rotary_dim as f64);
                frequency / self.factors.as_ref().map_or(1.0, |factors| f64::from(factors[pair]))
            })
            .collect();
        let (scaled, attention): (Vec<f64>, f64) = match &self.scaling {
            RopeScaling::None => (base, 1.0),
            RopeScaling::Linear { factor } => (base.iter().map(|frequency| frequency / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let rotations = |frequency: f64| *original_context as f64 * frequency / (2.0 * PI);
                let scale = |frequency: &f64| {
                    let smooth = (rotations(*frequency) - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let smooth = smooth.clamp(0.0, 1.0);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                };
                (base.iter().map(scale).collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.ramp(self.theta, self.rotary_dim);
                let scale = |(pair, frequency): (usize, &f64)| {
                    let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / yarn.factor * interpolated + frequency * (1.0 - interpolated)
                };
                (base.iter().enumerate().map(scale).collect(), yarn.attention_factor())
            }
        };
        (scaled.iter().map(|frequency| *frequency as f32).collect(), attention as f32)
    }

    /// cos and sin of positions 0 to `positions - 1`.
    #[must_use]
    pub fn table(&self, positions: usize) -> RopeTable {
        let (frequencies, attention) = self.frequencies();
        let entries = positions * frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
        for position in 0..positions {
            for frequency in &frequencies {
                // The product is rounded to f32 as transformers does; the functions are then exact for it.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32 * attention);
                sin.push(angle.sin() as f32 * attention);
            }
        }
        RopeTable { rotary_dim: self.rotary_dim, cos, sin }
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let mscale = |coefficient: f64| match self.factor {
            factor if factor <= 1.0 => 1.0,
            factor => 0.1 * coefficient * factor.ln() + 1.0,
        };
        match self.attention {
            YarnAttention::Given(factor) => factor,
            YarnAttention::FromFactor { times } => times * mscale(1.0),
            YarnAttention::Ratio { mscale: numerator, all_dim } => mscale(numerator) / mscale(all_dim),
        }
    }

    /// Pairs between which frequencies go from kept to divided.
    fn ramp(&self, theta: f64, rotary_dim: usize) -> (f64, f64) {
        let dim = rotary_dim as f64;
        let pair_of =
            |rotations: f64| dim * (self.original_context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 10_000.0, rotary_dim: 16, scaling, factors: None }
    }

    fn close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected.abs(), "{found} is not {expected}");
        }
    }

    #[test]
    fn precomputed_factors_equal_the_scaling_they_stand_for() {
        let factor = 4.0;
        let linear = config(RopeScaling::Linear { factor });
        let divided = RopeConfig { factors: Some(vec![4.0; 8]), ..config(RopeScaling::None) };
        assert_eq!(linear.frequencies(), divided.frequencies());
    }

    #[test]
    fn llama3_keeps_high_divides_low_and_blends_between() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
        let (frequencies, attention) = config(scaling).frequencies();
        assert_eq!(attention, 1.0);
        let base = |pair: i32| 10_000_f64.powf(-f64::from(pair) / 8.0);
        // Rotations over 64 positions: 10.2 and 3.2 for the first two pairs, 1.02 for the third, below 1 from the fourth on.
        let blend = |pair: i32| {
            let smooth = (64.0 * base(pair) / (2.0 * PI) - 1.0) / 3.0;
            base(pair) * (smooth + (1.0 - smooth) / 8.0)
        };
        let low = (3..8).map(|pair| base(pair) / 8.0);
        close(&frequencies, &[base(0), blend(1), blend(2)].into_iter().chain(low).collect::<Vec<_>>());
    }

    #[test]
    fn yarn_attention_factor_follows_the_papers_formula_unless_given() {
        let yarn = |attention| Yarn {
            factor: 4.0,
            original_context: 32,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention,
        };
        assert!((yarn(YarnAttention::FromFactor { times: 1.0 }).attention_factor() - 1.138_629_436).abs() < 1e-9);
        assert_eq!(yarn(YarnAttention::Given(0.5)).attention_factor(), 0.5);
        assert_eq!(yarn(YarnAttention::Ratio { mscale: 1.0, all_dim: 1.0 }).attention_factor(), 1.0);
    }

    #[test]
    fn parameters_that_give_no_angles_are_refused() {
        let yarn = |factor: f64, beta_fast: f64| {
            RopeScaling::Yarn(Yarn {
                factor,
                original_context: 32,
                beta_fast,
                beta_slow: 1.0,
                truncate: true,
                attention: YarnAttention::FromFactor { times: 1.0 },
            })
        };
        for scaling in [
            RopeScaling::Linear { factor: 0.0 },
            RopeScaling::Linear { factor: f64::NAN },
            yarn(-1.0, 32.0),
            yarn(4.0, 0.0),
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 4.0, high_freq_factor: 4.0, original_context: 64 },
        ] {
            assert!(config(scaling.clone()).check().is_err(), "{scaling:?}");
        }
        assert!(config(yarn(4.0, 32.0)).check().is_ok());
    }
}
