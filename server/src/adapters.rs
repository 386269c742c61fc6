//! `openlora.v1.Adapters`: the adapters room over the wire. Everything here may touch a disk, so everything runs on
//! threads that may block.

use std::path::PathBuf;
use std::sync::Arc;

use openlora_adapters::{AdapterError, AdapterInfo, AdapterStore, Lease, Lineage, Quota, Registration};
use openlora_proto::v1 as wire;
use openlora_proto::v1::adapters_server::Adapters;
use openlora_types::{Alias, Generation, InvalidField};
use tonic::{Request, Response, Status, Streaming};

use crate::app::State;
use crate::auth::Caller;
use crate::convert::{page_size, parse_generation};
use crate::keys::check_name;
use crate::{ServerError, upload};

const PAGE_SIZE_DEFAULT: u32 = 100;
const PAGE_SIZE_MAX: u32 = 1_000;
/// Bytes of a path that is looked at: Linux's own limit.
const PATH_BYTES_MAX: usize = 4_096;

/// The service.
pub(crate) struct AdaptersService {
    pub(crate) state: Arc<State>,
}

impl State {
    /// What an alias stands for has changed. Who did it is in the log: the span has the tenant.
    async fn changed(&self, what: &str, info: &AdapterInfo) {
        tracing::info!(alias = %info.alias, generation = %info.generation.short(), bytes = info.bytes, "adapter {what}");
        self.follow_pins().await;
    }

    /// Tells the engine which adapters pinned aliases stand for now, to be kept on the device where there is room: at the
    /// start and after every change. What cannot be told is logged and told with the next change: the registry has it.
    pub(crate) async fn follow_pins(&self) {
        // Held until the engine is told, so that of two changes the later one is told last.
        let mut told = self.pinned.lock().await;
        let store = Arc::clone(&self.app.store);
        let leases = match tokio::task::spawn_blocking(move || store.pinned()).await {
            Ok(Ok(leases)) => leases,
            Ok(Err(error)) => return tracing::warn!(%error, "pins may not reach the device"),
            Err(_) => return tracing::error!("reading the pins panicked"),
        };
        let generations: Vec<_> = leases.iter().map(Lease::generation).collect();
        if *told != generations {
            match self.app.engine.set_pinned(leases) {
                Ok(()) => *told = generations,
                Err(error) => tracing::warn!(%error, "pins do not reach the device"),
            }
        }
    }
}

impl AdaptersService {
    fn alias(&self, text: &str) -> Result<Alias, ServerError> {
        Ok(Alias::parse("alias", text, &self.state.config.limits)?)
    }

    async fn store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&AdapterStore) -> Result<T, AdapterError> + Send + 'static,
    ) -> Result<T, ServerError> {
        let store = Arc::clone(&self.state.app.store);
        let task = tokio::task::spawn_blocking(move || work(&store));
        Ok(task.await.map_err(|_| ServerError::Internal("the adapter store panicked"))??)
    }

    fn quota(&self, owner: String, quota: Quota) -> wire::Quota {
        let limits = &self.state.config.limits;
        wire::Quota {
            owner,
            adapters: quota.adapters,
            bytes: quota.bytes,
            adapters_max: quota.adapters_max.unwrap_or(limits.owner_adapters_max),
            bytes_max: quota.bytes_max.unwrap_or(limits.owner_bytes_max),
            adapters_max_is_own: quota.adapters_max.is_some(),
            bytes_max_is_own: quota.bytes_max.is_some(),
        }
    }

    fn adapter(&self, info: AdapterInfo) -> wire::Adapter {
        wire::Adapter {
            on_device: self.state.app.engine.is_resident(&info.generation),
            alias: info.alias,
            generation: info.generation.to_string(),
            owner: info.owner,
            rank_max: info.rank_max,
            bytes: info.bytes,
            sites: info.sites,
            pinned: info.pinned,
            in_host_cache: info.in_host_cache,
            leases: info.leases,
            created_unix_s: info.created_unix_s,
            dora: info.dora,
            modules: info.modules,
            tags: info.tags,
            lineage: Some(wire::Lineage {
                parent: info.lineage.parent.map(|parent| parent.to_string()).unwrap_or_default(),
                training_run: info.lineage.training_run,
                snapshots: info.lineage.snapshots,
            }),
        }
    }
}

#[tonic::async_trait]
impl Adapters for AdaptersService {
    async fn register(
        &self,
        request: Request<wire::RegisterAdapterRequest>,
    ) -> Result<Response<wire::Adapter>, Status> {
        let _busy = self.state.begin();
        let (caller, request) = split(request)?;
        let alias = self.alias(&request.alias)?;
        caller.check_namespace(&alias)?;
        let path = path(request.path).map_err(ServerError::from)?;
        let registration = registration(request.replace, request.tags, request.lineage).map_err(ServerError::from)?;
        let actor = caller.actor();
        let info = self.store(move |store| store.register_folder(&alias, &path, &actor, registration)).await?;
        self.state.changed("registered", &info).await;
        Ok(Response::new(self.adapter(info)))
    }

    async fn upload(
        &self,
        request: Request<Streaming<wire::UploadAdapterRequest>>,
    ) -> Result<Response<wire::Adapter>, Status> {
        let _busy = self.state.begin();
        let (caller, stream) = split(request)?;
        let info = upload::receive(&self.state, &caller, stream).await?;
        self.state.changed("uploaded", &info).await;
        Ok(Response::new(self.adapter(info)))
    }

    async fn get(&self, request: Request<wire::GetAdapterRequest>) -> Result<Response<wire::Adapter>, Status> {
        let (caller, request) = split(request)?;
        let alias = self.alias(&request.alias)?;
        let actor = caller.actor();
        let info = self.store(move |store| store.get(alias.as_str(), &actor)).await?;
        Ok(Response::new(self.adapter(info)))
    }

    async fn list(
        &self,
        request: Request<wire::ListAdaptersRequest>,
    ) -> Result<Response<wire::ListAdaptersResponse>, Status> {
        let (caller, request) = split(request)?;
        let wanted = page_size(request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX).map_err(ServerError::from)?;
        // The token is the last alias of the page before.
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(Alias::parse("page_token", token, &self.state.config.limits).map_err(ServerError::from)?),
        };
        // One more than asked for tells whether there is a next page.
        let actor = caller.actor();
        let page = move |store: &AdapterStore| store.list(&actor, after.as_ref().map(Alias::as_str), wanted + 1);
        let mut infos = self.store(page).await?;
        let more = infos.len() > wanted;
        infos.truncate(wanted);
        let next = infos.last().filter(|_| more).map(|info| info.alias.clone());
        Ok(Response::new(wire::ListAdaptersResponse {
            adapters: infos.into_iter().map(|info| self.adapter(info)).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn unregister(
        &self,
        request: Request<wire::UnregisterAdapterRequest>,
    ) -> Result<Response<wire::UnregisterAdapterResponse>, Status> {
        let _busy = self.state.begin();
        let (caller, request) = split(request)?;
        let alias = self.alias(&request.alias)?;
        caller.check_namespace(&alias)?;
        let actor = caller.actor();
        tracing::info!(%alias, "adapter to be unregistered");
        let generation = self.store(move |store| store.unregister(alias.as_str(), &actor)).await?;
        self.state.follow_pins().await;
        Ok(Response::new(wire::UnregisterAdapterResponse { generation: generation.to_string() }))
    }

    async fn set_alias(&self, request: Request<wire::SetAliasRequest>) -> Result<Response<wire::Adapter>, Status> {
        let _busy = self.state.begin();
        let (caller, request) = split(request)?;
        let alias = self.alias(&request.alias)?;
        caller.check_namespace(&alias)?;
        let generation = parse_generation("generation", &request.generation).map_err(ServerError::from)?;
        let expected: Option<Generation> = match request.expected_generation.as_str() {
            "" => None,
            text => Some(parse_generation("expected_generation", text).map_err(ServerError::from)?),
        };
        let actor = caller.actor();
        let info = self.store(move |store| store.set_alias(&alias, generation, expected, &actor)).await?;
        self.state.changed("pointed elsewhere", &info).await;
        Ok(Response::new(self.adapter(info)))
    }

    async fn pin(&self, request: Request<wire::PinAdapterRequest>) -> Result<Response<wire::Adapter>, Status> {
        let _busy = self.state.begin();
        let (caller, request) = split(request)?;
        let alias = self.alias(&request.alias)?;
        caller.check_namespace(&alias)?;
        let actor = caller.actor();
        let pinned = request.pinned;
        let info = self.store(move |store| store.pin(alias.as_str(), pinned, &actor)).await?;
        self.state.follow_pins().await;
        Ok(Response::new(self.adapter(info)))
    }

    async fn get_quota(&self, request: Request<wire::GetQuotaRequest>) -> Result<Response<wire::Quota>, Status> {
        let (caller, request) = split(request)?;
        let actor = caller.actor();
        let owner = if request.owner.is_empty() { actor.name.clone() } else { request.owner };
        check_name("owner", &owner).map_err(ServerError::from)?;
        let of = owner.clone();
        let quota = self.store(move |store| store.quota(&of, &actor)).await?;
        Ok(Response::new(self.quota(owner, quota)))
    }

    async fn set_quota(&self, request: Request<wire::SetQuotaRequest>) -> Result<Response<wire::Quota>, Status> {
        let _busy = self.state.begin();
        let (caller, request) = split(request)?;
        let wire::SetQuotaRequest { owner, adapters_max, bytes_max } = request;
        check_name("owner", &owner).map_err(ServerError::from)?;
        let (of, actor) = (owner.clone(), caller.actor());
        let quota = self.store(move |store| store.set_quota(&of, adapters_max, bytes_max, &actor)).await?;
        tracing::info!(owner, adapters_max, bytes_max, "quota set");
        Ok(Response::new(self.quota(owner, quota)))
    }
}

/// Who asks, and what.
pub(crate) fn split<T>(request: Request<T>) -> Result<(Caller, T), ServerError> {
    let (_, extensions, message) = request.into_parts();
    let caller = extensions.get::<Caller>().cloned().ok_or(ServerError::Internal("a call without a caller"))?;
    Ok((caller, message))
}

/// How an adapter is to be registered. What tags and lineage may hold is the store's to say.
pub(crate) fn registration(
    replace: Option<bool>,
    tags: Vec<String>,
    lineage: Option<wire::Lineage>,
) -> Result<Registration, InvalidField> {
    let lineage = lineage.unwrap_or_default();
    let parent = match lineage.parent.as_str() {
        "" => None,
        text => Some(parse_generation("lineage.parent", text)?),
    };
    let lineage = Lineage { parent, training_run: lineage.training_run, snapshots: lineage.snapshots };
    Ok(Registration { replace: replace.unwrap_or(false), tags, lineage })
}

/// The path as a path. Whether it is under an allowed root is the store's to say, after resolving links.
fn path(text: String) -> Result<PathBuf, InvalidField> {
    if text.is_empty() {
        return Err(InvalidField::new("path", "must not be empty"));
    }
    if text.len() > PATH_BYTES_MAX || text.contains('\0') {
        return Err(InvalidField::new("path", format!("must be at most {PATH_BYTES_MAX} bytes, without NUL")));
    }
    Ok(PathBuf::from(text))
}
