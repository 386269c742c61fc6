/// A copy of the engine's counters as of its last step. Totals only grow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences that hold blocks.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// KV blocks.
    pub blocks_total: usize,
    /// KV blocks that no running sequence holds; cached prefixes count as free.
    pub blocks_free: usize,
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
    /// Bytes of adapters on the device.
    pub adapter_bytes_resident: usize,
    /// Adapters copied to the device.
    pub adapter_loads_total: u64,
    /// Adapters dropped from the device to make room.
    pub adapter_evictions_total: u64,
    /// Time spent in steps, microseconds.
    pub step_micros_total: u64,
}
