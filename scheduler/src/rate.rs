//! A token bucket per tenant: how much may be computed for it over time, whoever else is served.
//!
//! The bucket fills at `tokens_per_second` up to `burst`. What is computed takes from it, into debt where one prompt is
//! larger than what is left. Below one whole token the tenant's waiting sequences have no turn; running ones go on.

use openlora_types::Time;

const MICROS: i128 = 1_000_000;

/// How many tokens, computed prompt and generated ones alike, a tenant may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// What the bucket gains, at least 1.
    pub tokens_per_second: u64,
    /// What it holds when it is full, at least 1.
    pub burst: u64,
}

/// One tenant's bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    rate: Rate,
    /// Millionths of a token; below 0 is debt. 128 bits hold every product of two u64 but the largest, which saturate.
    balance: i128,
    filled: Time,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(rate: Rate, now: Time) -> Self {
        Self { rate, balance: i128::from(rate.burst) * MICROS, filled: now }
    }

    /// Follows another rate from now on.
    pub(crate) fn set_rate(&mut self, rate: Rate, now: Time) {
        self.fill(now);
        self.rate = rate;
        self.fill(now);
    }

    pub(crate) fn fill(&mut self, now: Time) {
        let gained = i128::from(now.since_micros(self.filled)).saturating_mul(i128::from(self.rate.tokens_per_second));
        self.balance = self.balance.saturating_add(gained).min(i128::from(self.rate.burst) * MICROS);
        self.filled = self.filled.max(now);
    }

    pub(crate) fn take(&mut self, tokens: u64, now: Time) {
        self.fill(now);
        self.balance = self.balance.saturating_sub(i128::from(tokens) * MICROS);
    }

    /// As of the last filling.
    pub(crate) fn is_empty(&self) -> bool {
        self.balance < MICROS
    }

    /// When it stops being empty, if nothing more is taken.
    pub(crate) fn refilled_at(&self) -> Time {
        let missing = (MICROS - self.balance).max(0) as u128;
        let micros = missing.div_ceil(u128::from(self.rate.tokens_per_second));
        self.filled.after_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gains_its_rate_up_to_its_burst_and_pays_its_debts_first() {
        let mut bucket = Bucket::new(Rate { tokens_per_second: 10, burst: 5 }, Time(0));
        bucket.take(4, Time(0));
        assert!(!bucket.is_empty());
        bucket.take(4, Time(0));
        assert!(bucket.is_empty());
        // 3 tokens of debt and 1 to have.
        assert_eq!(bucket.refilled_at(), Time(400_000));
        for (micros, empty) in [(399_999, true), (400_000, false)] {
            bucket.fill(Time(micros));
            assert_eq!(bucket.is_empty(), empty, "after {micros} µs");
        }
        bucket.fill(Time(60_000_000));
        bucket.take(5, Time(60_000_000));
        assert!(bucket.is_empty());
        bucket.fill(Time(0));
        assert_eq!(bucket.refilled_at(), Time(60_100_000), "time does not run backwards");
    }

    #[test]
    fn no_rate_overflows() {
        let all = Rate { tokens_per_second: u64::MAX, burst: u64::MAX };
        let mut bucket = Bucket::new(all, Time(0));
        bucket.take(u64::MAX, Time(0));
        bucket.take(u64::MAX, Time(0));
        bucket.fill(Time(u64::MAX));
        assert!(!bucket.is_empty());
        let mut slow = Bucket::new(Rate { tokens_per_second: 1, burst: 1 }, Time(0));
        slow.take(u64::MAX, Time(0));
        assert_eq!(slow.refilled_at(), Time(u64::MAX));
    }
}
