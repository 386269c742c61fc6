//! Counters for dashboards and for the engine's statistics.

/// A snapshot of the scheduler. Totals only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that hold blocks.
    pub running: usize,
    /// Sequences in the queue, preempted ones included.
    pub waiting: usize,
    /// Distinct adapter generations among the running sequences.
    pub adapters_running: usize,
    /// Adapters being loaded.
    pub adapters_loading: usize,
    /// Adapters on the device.
    pub adapters_resident: usize,
    /// Adapters pinned, loaded or not.
    pub adapters_pinned: usize,
    /// Pages of the pool.
    pub pages_total: usize,
    /// Pages that neither a sequence nor an adapter has; cached blocks count as free.
    pub pages_free: usize,
    /// Of the free pages, KV blocks that still hold a reusable prefix.
    pub pages_cached: usize,
    /// Pages of loading and resident adapters.
    pub adapter_pages: usize,
    /// Of those, pages of adapters that may be evicted.
    pub adapter_pages_idle: usize,
    /// Sequences admitted, readmissions after preemption included.
    pub admissions_total: u64,
    /// Sequences put back to waiting for want of pages.
    pub preemptions_total: u64,
    /// Sequences that ended by themselves.
    pub finished_total: u64,
    /// Sequences aborted.
    pub aborted_total: u64,
    /// Sequences ended by their deadline.
    pub expired_total: u64,
    /// Sequences ended because their adapter could not be loaded.
    pub failed_total: u64,
    /// Loads started.
    pub loads_total: u64,
    /// Loads that failed.
    pub load_failures_total: u64,
    /// Adapters evicted.
    pub adapter_evictions_total: u64,
    /// Sequences submitted while their adapter was resident.
    pub adapter_hits_total: u64,
    /// Sequences submitted while it was not.
    pub adapter_misses_total: u64,
    /// Tokens of admitted sequences that were looked up in the prefix cache.
    pub prefix_queries_total: u64,
    /// Of those, tokens found.
    pub prefix_hits_total: u64,
}
