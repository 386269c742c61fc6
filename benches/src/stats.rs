//! Percentiles of measured times.

use serde::Serialize;

/// Order statistics, in the unit of the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// How many samples.
    pub count: usize,
}

impl Percentiles {
    /// Nearest-rank percentiles; all 0 without samples.
    #[must_use]
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let count = samples.len();
        let at = |share: f64| match count {
            0 => 0.0,
            _ => samples[((share * count as f64).ceil() as usize).clamp(1, count) - 1],
        };
        Self { p50: at(0.50), p95: at(0.95), p99: at(0.99), max: at(1.0), count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let percentiles = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(percentiles, Percentiles { p50: 50.0, p95: 95.0, p99: 99.0, max: 100.0, count: 100 });
        assert_eq!(Percentiles::of(vec![7.0]).p99, 7.0);
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }
}
