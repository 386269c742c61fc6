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
    /// KV blocks in the pool.
    pub blocks_total: usize,
    /// KV blocks that no sequence holds; cached ones count as free.
    pub blocks_free: usize,
    /// Of the free blocks, those that still hold a reusable prefix.
    pub blocks_cached: usize,
    /// Sequences admitted, readmissions after preemption included.
    pub admissions_total: u64,
    /// Sequences put back to waiting for want of blocks.
    pub preemptions_total: u64,
    /// Sequences that ended by themselves.
    pub finished_total: u64,
    /// Sequences aborted.
    pub aborted_total: u64,
    /// Sequences ended by their deadline.
    pub expired_total: u64,
    /// Tokens of admitted sequences that were looked up in the prefix cache.
    pub prefix_queries_total: u64,
    /// Of those, tokens found.
    pub prefix_hits_total: u64,
}
