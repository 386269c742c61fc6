//! The scheduler's limits, and what makes a set of them usable.

use openlora_types::InvalidField;

/// What the scheduler may use. Names are vLLM's where vLLM has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens of one KV block.
    pub block_size: usize,
    /// Pages of the pool: each a KV block or a piece of an adapter.
    pub num_pages: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// The last of those places are for tenants that run fewer than an equal share, so that one whose sequences fill the rest
    /// does not make others wait for an end. Fewer than `max_num_seqs`; without effect while only one tenant is known.
    pub kept_places: usize,
    /// Rows of one step, which bound how long it takes. At least `max_num_seqs`, so that all running sequences can have one.
    pub max_num_batched_tokens: usize,
    /// Distinct adapter generations among the running sequences; the base model is free.
    pub max_loras: usize,
    /// Pages of those adapters together: what a step reads of adapters is a cost like its rows. One adapter that is larger runs
    /// alone.
    pub adapter_pages_per_step: usize,
    /// Adapters being loaded at once.
    pub max_loading: usize,
    /// Waiting sequences, in the queue's order, whose adapters a step may start to load; also how far it looks, inside one
    /// tenant's class, for a sequence whose adapter is active.
    pub lookahead: usize,
    /// About how long one KV block takes to compute, in microseconds: what the eviction of a cached one may cost.
    pub block_micros: u64,
    /// Sequences waiting for their first step; one more is refused. Preempted sequences wait beside these.
    pub max_waiting: usize,
    /// Of those, sequences of one tenant.
    pub max_waiting_per_tenant: usize,
    /// Whether full blocks are kept for sequences with the same beginning.
    pub prefix_cache: bool,
    /// Rows one sequence may take in a step while others live: bounds how long a decoding sequence waits for a
    /// neighbour's prompt.
    pub long_prefill_chunk: usize,
    /// How long a priority may wait, as a class, while higher ones are admitted, in microseconds; then it has the next
    /// turn. A running sequence this old is no longer preempted for higher priorities.
    pub starvation_micros: u64,
    /// What a prompt token adds to its tenant's counter (w_p of VTC, Sheng et al. 2024, section 3). 1 to 1000.
    pub input_weight: u64,
    /// What a generated token adds to its tenant's counter (w_q of VTC). 1 to 1000.
    pub output_weight: u64,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            block_size: 16,
            num_pages: 1_024,
            max_num_seqs: 32,
            kept_places: 2,
            max_num_batched_tokens: 80,
            max_loras: 64,
            adapter_pages_per_step: 1_024,
            max_loading: 4,
            lookahead: 64,
            block_micros: 10_000,
            max_waiting: 1_024,
            max_waiting_per_tenant: 1_024,
            prefix_cache: true,
            long_prefill_chunk: 256,
            starvation_micros: 5_000_000,
            input_weight: 1,
            output_weight: 2,
        }
    }
}

impl SchedulerConfig {
    /// Checks every limit by itself and against the others.
    ///
    /// # Errors
    /// The first limit that cannot work, named `engine.<limit>` as in `openlora.toml`.
    pub fn validate(&self) -> Result<(), InvalidField> {
        // Page ids and slots are u32; the bound keeps every product of two of these sizes inside u64.
        let max = u32::MAX as usize;
        for (name, value) in [
            ("block_size", self.block_size),
            ("num_pages", self.num_pages),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_loras", self.max_loras),
            ("adapter_pages_per_step", self.adapter_pages_per_step),
            ("max_loading", self.max_loading),
            ("lookahead", self.lookahead),
            ("max_waiting", self.max_waiting),
            ("max_waiting_per_tenant", self.max_waiting_per_tenant),
            ("long_prefill_chunk", self.long_prefill_chunk),
        ] {
            if value == 0 || value > max {
                let why = format!("is {value}; it must be from 1 to {max}");
                return Err(InvalidField::new(format!("engine.{name}"), why));
            }
        }
        for (name, value) in [("input_weight", self.input_weight), ("output_weight", self.output_weight)] {
            if !(1..=1_000).contains(&value) {
                let why = format!("is {value}; it must be from 1 to 1000");
                return Err(InvalidField::new(format!("engine.{name}"), why));
            }
        }
        if self.kept_places >= self.max_num_seqs {
            let why = format!("is {}; it must be less than max_num_seqs, {}", self.kept_places, self.max_num_seqs);
            return Err(InvalidField::new("engine.kept_places", why));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let why = format!(
                "is {}; it must be at least max_num_seqs, {}, so that every running sequence can get a row",
                self.max_num_batched_tokens, self.max_num_seqs
            );
            return Err(InvalidField::new("engine.max_num_batched_tokens", why));
        }
        Ok(())
    }

    /// Blocks that hold `tokens` tokens.
    pub(crate) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Tokens that the whole pool holds.
    pub(crate) fn pool_tokens(&self) -> usize {
        self.num_pages.saturating_mul(self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unusable_limit_is_named() {
        type Change = fn(&mut SchedulerConfig);
        let cases: &[(&str, Change)] = &[
            ("engine.block_size", |c| c.block_size = 0),
            ("engine.num_pages", |c| c.num_pages = 0),
            ("engine.num_pages", |c| c.num_pages = usize::MAX),
            ("engine.max_num_seqs", |c| c.max_num_seqs = 0),
            ("engine.max_num_batched_tokens", |c| c.max_num_batched_tokens = 0),
            ("engine.max_num_batched_tokens", |c| c.max_num_batched_tokens = c.max_num_seqs - 1),
            ("engine.kept_places", |c| c.kept_places = c.max_num_seqs),
            ("engine.max_loras", |c| c.max_loras = 0),
            ("engine.adapter_pages_per_step", |c| c.adapter_pages_per_step = 0),
            ("engine.max_loading", |c| c.max_loading = 0),
            ("engine.lookahead", |c| c.lookahead = 0),
            ("engine.max_waiting", |c| c.max_waiting = 0),
            ("engine.max_waiting_per_tenant", |c| c.max_waiting_per_tenant = 0),
            ("engine.long_prefill_chunk", |c| c.long_prefill_chunk = 0),
            ("engine.input_weight", |c| c.input_weight = 0),
            ("engine.output_weight", |c| c.output_weight = 1_001),
        ];
        for (field, change) in cases {
            let mut config = SchedulerConfig::default();
            change(&mut config);
            let error = config.validate().expect_err(field);
            assert_eq!(&error.field, field, "{error}");
        }
        assert_eq!(SchedulerConfig::default().validate(), Ok(()));
    }
}
