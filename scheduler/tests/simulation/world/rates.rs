//! The tenants' token buckets, as the world counts them.

use openlora_scheduler::{NewSequence, StepPlan};
use openlora_types::Time;

use super::World;

impl World {
    pub(super) fn pass_time(&mut self, now: Time) {
        let micros = i128::from(now.since_micros(self.now));
        for (rate, balance) in self.buckets.values_mut() {
            let full = i128::from(rate.burst) * 1_000_000;
            *balance = (*balance + micros * i128::from(rate.tokens_per_second)).min(full);
        }
        self.now = now;
    }

    pub(super) fn is_throttled(&self, new: &NewSequence) -> bool {
        self.buckets.get(&new.tenant).is_some_and(|(_, balance)| *balance < 1_000_000)
    }

    /// Nothing of a tenant whose bucket is empty is admitted; what is admitted of the others is taken from theirs.
    pub(super) fn check_rates(&mut self, plan: &StepPlan) {
        for sequence in &plan.sequences {
            let request = &self.live[&sequence.id];
            assert!(
                request.computed.is_some() || !self.is_throttled(&request.new),
                "{} has no tokens left",
                sequence.id
            );
        }
        let throttled = self.live.values().any(|request| request.computed.is_none() && self.is_throttled(&request.new));
        self.totals.throttled += u64::from(throttled);
        for sequence in &plan.sequences {
            let request = &self.live[&sequence.id];
            if request.admission.is_none()
                && let Some((_, balance)) = self.buckets.get_mut(&request.new.tenant)
            {
                *balance -= (request.tokens.len() - sequence.cached_tokens) as i128 * 1_000_000;
            }
        }
    }
}
