//! `openlora.v1.Server`: what this server is and how busy it is.

use std::sync::Arc;

use openlora_proto::v1 as wire;
use openlora_proto::v1::server_server::Server;
use tonic::{Request, Response, Status};

use crate::app::State;

/// The service.
pub(crate) struct ServerService {
    pub(crate) state: Arc<State>,
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[tonic::async_trait]
impl Server for ServerService {
    async fn get_info(&self, _: Request<wire::GetInfoRequest>) -> Result<Response<wire::ServerInfo>, Status> {
        let app = &self.state.app;
        let stats = app.engine.stats();
        Ok(Response::new(wire::ServerInfo {
            version: app.version.clone(),
            backend: app.engine.describe().to_owned(),
            precision: app.precision.clone(),
            uptime_s: self.state.started.elapsed().as_secs(),
            running_sequences: count(stats.running),
            waiting_sequences: count(stats.waiting),
            pages_total: count(stats.pages_total),
            pages_free: count(stats.pages_free),
            adapter_pages: count(stats.adapter_pages),
            page_bytes: stats.page_bytes as u64,
            adapters_on_device: count(stats.adapters_resident),
            adapter_hits: stats.adapter_hits_total,
            adapter_misses: stats.adapter_misses_total,
            adapter_loads: stats.adapter_loads_total,
            adapter_evictions: stats.adapter_evictions_total,
            max_num_seqs: count(app.engine_limits.max_num_seqs),
            max_num_batched_tokens: count(app.engine_limits.max_num_batched_tokens),
            max_loras: count(app.engine_limits.max_loras),
            max_lora_rank: count(self.state.config.limits.lora_rank_max),
            draining: self.state.is_draining(),
        }))
    }

    async fn get_model(&self, _: Request<wire::GetModelRequest>) -> Result<Response<wire::ModelInfo>, Status> {
        let app = &self.state.app;
        let shape = &app.model.shape;
        Ok(Response::new(wire::ModelInfo {
            name: shape.name.clone(),
            architecture: app.model.architecture.clone(),
            layers: count(shape.layers),
            hidden: count(shape.hidden),
            intermediate: count(shape.intermediate),
            heads: count(shape.heads),
            kv_heads: count(shape.kv_heads),
            head_dim: count(shape.head_dim),
            vocab: count(shape.vocab),
            context: count(shape.context),
            tied_head: shape.tied_head,
            has_chat_template: app.template.is_some(),
            eos_token_ids: app.model.eos_tokens.clone(),
        }))
    }
}
