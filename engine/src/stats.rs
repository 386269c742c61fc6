/// A copy of the engine's counters as of its last step. Totals only grow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences that hold blocks.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Pages of the pool.
    pub pages_total: usize,
    /// Pages that neither a sequence nor an adapter has; cached prefixes count as free.
    pub pages_free: usize,
    /// Of the free pages, those that still hold a reusable prefix.
    pub pages_cached: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Steps run.
    pub steps_total: u64,
    /// Prompt rows computed, recomputation after preemption included.
    pub prompt_tokens_total: u64,
    /// Tokens sampled.
    pub generation_tokens_total: u64,
    /// Sequences put back to waiting for want of blocks.
    pub preemptions_total: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries_total: u64,
    /// Of those, tokens found.
    pub prefix_hits_total: u64,
    /// Adapters on the device.
    pub adapters_resident: usize,
    /// Adapters being loaded.
    pub adapters_loading: usize,
    /// Adapters pinned to the device.
    pub adapters_pinned: usize,
    /// Pages of loading and resident adapters.
    pub adapter_pages: usize,
    /// Loads begun.
    pub adapter_loads_total: u64,
    /// Loads that failed.
    pub adapter_load_failures_total: u64,
    /// Time that loads took, microseconds.
    pub adapter_load_micros_total: u64,
    /// Adapters dropped from the device to make room.
    pub adapter_evictions_total: u64,
    /// Samples whose adapter was on the device when they came.
    pub adapter_hits_total: u64,
    /// Samples whose adapter was not.
    pub adapter_misses_total: u64,
    /// Time spent in steps, microseconds.
    pub step_micros_total: u64,
}
