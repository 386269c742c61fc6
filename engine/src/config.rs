use openlora_scheduler::Rate;

/// What the engine may use. Names are vLLM's where vLLM has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes of the pool that KV blocks and adapters share; the number of pages follows from the model. 0: `device_memory_percent` of
    /// what is free on a device with memory of its own, once the weights and what steps need are there.
    pub pool_bytes: usize,
    /// See `pool_bytes`. The rest is for recorded passes and for what the driver takes.
    pub device_memory_percent: usize,
    /// Sequences that run at once. Where there are several tenants, one place in 16 is for those that run less than their share.
    pub max_num_seqs: usize,
    /// Rows of one step: decoding sequences take one each, prefill chunks the rest. They bound how long a step takes, and so
    /// how long a new request waits for its first.
    pub max_num_batched_tokens: usize,
    /// Rows one prefill may take in a step while other sequences wait for theirs.
    pub long_prefill_chunk: usize,
    /// Distinct adapters among the running sequences.
    pub max_loras: usize,
    /// Bytes of the distinct adapters among the running sequences: what a step reads beside the base weights. 0: a quarter of the pool.
    pub adapter_bytes_per_step: usize,
    /// Adapters being loaded at once.
    pub max_loading: usize,
    /// What each tenant may use; `None` is no limit.
    pub tenant_rate: Option<Rate>,
    /// Whether full blocks are kept for requests with the same beginning.
    pub prefix_cache: bool,
    /// A priority class that nothing was admitted from for this long gets the next turn.
    pub starvation_micros: u64,
    /// Longest sequence, prompt and answer; the model's context where that is shorter.
    pub sequence_tokens_max: usize,
    /// Requests waiting; one more is refused.
    pub waiting_requests_max: usize,
    /// Of those, requests of one tenant.
    pub waiting_requests_per_tenant_max: usize,
    /// Events buffered for one reader, or as many as one step makes for it where those are more; one beyond ends the
    /// request.
    pub stream_events_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let limits = openlora_types::Limits::default();
        Self {
            pool_bytes: 1 << 30,
            device_memory_percent: 90,
            max_num_seqs: 32,
            max_num_batched_tokens: 80,
            long_prefill_chunk: 256,
            max_loras: 64,
            adapter_bytes_per_step: 1 << 29,
            max_loading: 4,
            tenant_rate: None,
            prefix_cache: true,
            starvation_micros: 5_000_000,
            sequence_tokens_max: limits.sequence_tokens_max,
            waiting_requests_max: limits.waiting_requests_max,
            waiting_requests_per_tenant_max: limits.waiting_requests_per_tenant_max,
            stream_events_max: limits.stream_events_max,
        }
    }
}
