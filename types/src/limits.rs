use serde::{Deserialize, Serialize};

/// Every bound of the system, by name. Input is checked against these before anything is allocated for it; an error
/// quotes the name, so that an administrator knows which line of `openlora.toml` to change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes in an alias.
    pub alias_bytes_max: usize,
    /// Tokens of one request, prompt and answer together. The model's own context length also applies.
    pub sequence_tokens_max: usize,
    /// Bytes of prompt text or of all chat messages together.
    pub prompt_bytes_max: usize,
    /// Messages in one chat.
    pub chat_messages_max: usize,
    /// Samples of one request (`n`).
    pub n_max: u32,
    /// Alternatives reported for each token (`logprobs`, `prompt_logprobs`).
    pub logprobs_max: u32,
    /// Stop strings and stop tokens, each.
    pub stops_max: usize,
    /// Bytes in one stop string.
    pub stop_bytes_max: usize,
    /// Entries of `logit_bias`.
    pub logit_bias_max: usize,
    /// Bytes in `request_id` and in `cache_salt`.
    pub request_id_bytes_max: usize,
    /// Requests waiting for the engine; one more is refused with a time to retry after.
    pub waiting_requests_max: usize,
    /// Of those, requests of one tenant.
    pub waiting_requests_per_tenant_max: usize,
    /// Events buffered for one slow reader; one more and the request is aborted.
    pub stream_events_max: usize,
    /// Bytes in one gRPC message.
    pub message_bytes_max: usize,
    /// Largest rank of any site of an adapter.
    pub lora_rank_max: usize,
    /// Bytes in an `adapter_config.json`.
    pub adapter_config_bytes_max: usize,
    /// Bytes in an `adapter_model.safetensors`.
    pub adapter_bytes_max: u64,
    /// Tensors in one safetensors file.
    pub adapter_tensors_max: usize,
    /// Bytes in the header of one safetensors file.
    pub safetensors_header_bytes_max: usize,
    /// Entries of `rank_pattern`, `alpha_pattern` and of each list in an adapter's configuration.
    pub adapter_list_max: usize,
    /// Bytes in one regular expression of an adapter's configuration.
    pub regex_bytes_max: usize,
    /// Aliases registered at once.
    pub adapters_max: usize,
    /// Aliases of one owner, where no quota of their own says otherwise.
    pub owner_adapters_max: u64,
    /// Bytes in memory of what the aliases of one owner stand for, where no quota of their own says otherwise.
    pub owner_bytes_max: u64,
    /// Tags of an adapter, and training data named in its lineage, each.
    pub tags_max: usize,
    /// Bytes of one tag, or of one name in a lineage.
    pub tag_bytes_max: usize,
    /// Aliases whose generation is remembered between requests, so that the registry is not asked again.
    pub names_cached_max: u64,
    /// Earlier generations an alias remembers, so that it can be pointed back at one.
    pub alias_history_max: usize,
    /// Corrupt generations remembered, so that each is not read from the disk again for every request.
    pub adapter_failures_max: u64,
    /// Seconds for which a corrupt generation is remembered.
    pub adapter_failure_ttl_s: u64,
    /// Generations one owner may pin.
    pub pins_max: usize,
    /// Operations a chat template may take before it is stopped.
    pub template_fuel: u64,
    /// Bytes a chat template may write.
    pub template_bytes_max: usize,
    /// Uploads in progress at once.
    pub uploads_max: usize,
    /// Metadata keys in one GGUF file.
    pub model_metadata_keys_max: usize,
    /// Bytes of one metadata value (a string or an array) of a GGUF file.
    pub model_metadata_bytes_max: usize,
    /// Tensors in a base model.
    pub model_tensors_max: usize,
    /// Decoder layers of a base model.
    pub model_layers_max: usize,
    /// Bytes in one JSON file of a model folder (`config.json`, `tokenizer.json`, a safetensors header or index).
    pub model_json_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            alias_bytes_max: 128,
            sequence_tokens_max: 32_768,
            prompt_bytes_max: 1 << 20,
            chat_messages_max: 1_024,
            n_max: 16,
            logprobs_max: 20,
            stops_max: 16,
            stop_bytes_max: 256,
            logit_bias_max: 1_024,
            request_id_bytes_max: 128,
            waiting_requests_max: 1_024,
            waiting_requests_per_tenant_max: 512,
            stream_events_max: 1_024,
            message_bytes_max: 4 << 20,
            lora_rank_max: 256,
            adapter_config_bytes_max: 1 << 20,
            adapter_bytes_max: 4 << 30,
            adapter_tensors_max: 32_768,
            safetensors_header_bytes_max: 16 << 20,
            adapter_list_max: 8_192,
            regex_bytes_max: 8_192,
            adapters_max: 100_000,
            owner_adapters_max: 100_000,
            owner_bytes_max: 1 << 40,
            tags_max: 16,
            tag_bytes_max: 128,
            names_cached_max: 1_024,
            alias_history_max: 4,
            adapter_failures_max: 1_024,
            adapter_failure_ttl_s: 10,
            pins_max: 64,
            template_fuel: 2_000_000,
            template_bytes_max: 4 << 20,
            uploads_max: 8,
            model_metadata_keys_max: 4_096,
            model_metadata_bytes_max: 64 << 20,
            model_tensors_max: 65_536,
            model_layers_max: 1_024,
            model_json_bytes_max: 64 << 20,
        }
    }
}
