//! The adapters of a server: aliases, the generations they stand for, and leases on those.
//!
//! An alias is a reusable name; a generation is a content hash. Registering under a taken alias with `replace` points it
//! at a new generation and remembers the old one for a while ([`Limits::alias_history_max`]), so that it can be pointed
//! back, and so that `alias@generation` keeps working. Requests run on leases of generations and never notice.
//!
//! Nothing is kept in memory per registered adapter. A registration stages files, verifies them, notes their location in
//! the registry, puts them there and publishes them in one transaction; what a crash leaves is in staging or noted, and
//! the next start removes it. A change reads and writes in one transaction, so it is a compare-and-swap (`change.rs`).
//!
//! The calls block on disk and database through a small runtime of the store's own: call them where blocking is allowed.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use openlora_database::{Database, DatabaseUrl};
use openlora_types::{AdapterWeights, Alias, Generation, Limits, ModelShape};
use tokio::runtime::Runtime;
use tracing::{info, warn};

use crate::{
    cache::HostCache,
    error::AdapterError,
    files::Files,
    folder::{AdapterFolder, FILES, bytes_max, check_size},
    info::{Actor, AdapterInfo, Registration, StoreStats},
    lease::{Lease, Leases},
    names::{Named, Names},
    parse::{BaseRows, Parsed},
    registry::{self, Known, Quota, Record},
    sweep::{self, Core},
    upload::Upload,
    weights,
};

/// How often a lookup is repeated when aliases change between the lookup and the lease.
const RETRIES: usize = 16;
/// How long closing waits for the database.
const CLOSE: Duration = Duration::from_secs(5);

/// Where the store is and how much memory it may take.
#[derive(Clone, Debug, Default)]
pub struct StoreConfig {
    /// The store's own folder; created if missing.
    pub data_dir: PathBuf,
    /// `sqlite:` or `postgres:` URL of the registry; empty: `registry.db` in `data_dir`.
    pub database_url: String,
    /// `s3:` or `file:` URL of the adapters' files; empty: `adapters/` in `data_dir`.
    pub store_url: String,
    /// Folders under which adapters may be registered by path.
    pub allowed_roots: Vec<PathBuf>,
    /// Bytes of adapters kept in host memory; no adapter may be larger.
    pub host_cache_bytes: u64,
}

/// Tries an adapter on the model that would serve it. One at a time, and before anything is published.
pub trait Probe: Send {
    /// # Errors
    /// [`AdapterError::Invalid`] for an adapter that must not be served, [`AdapterError::Probe`] where it could not be tried.
    fn probe(&mut self, weights: &AdapterWeights) -> Result<(), AdapterError>;
}

/// The registry, its files and its cache. Share it by reference or `Arc`; every method takes `&self` and may block on
/// disk, database or network, so none is for a thread that runs async tasks.
pub struct AdapterStore {
    pub(crate) inner: Arc<Inner>,
}

/// What the store shares with its uploads and leases.
pub(crate) struct Inner {
    /// Taken when dropped.
    runtime: Option<Runtime>,
    pub(crate) core: Arc<Core>,
    pub(crate) limits: Limits,
    pub(crate) uploads: AtomicUsize,
    pub(crate) shape: ModelShape,
    roots: Vec<PathBuf>,
    host_cache_bytes: u64,
    base: Option<Arc<dyn BaseRows>>,
    probe: Option<Mutex<Box<dyn Probe>>>,
    pub(crate) cache: HostCache,
    pub(crate) names: Names,
    /// What the registry last said, for when it does not answer.
    counted: [AtomicU64; 2],
}

impl AdapterStore {
    /// Opens the store and removes what a crash left unfinished. Takes no longer with more adapters.
    ///
    /// # Errors
    /// [`AdapterError::Io`] where a folder cannot be used or another process uses it; [`AdapterError::Database`] where the
    /// registry cannot be reached or written, or is of a newer release; [`AdapterError::Invalid`] where an allowed root
    /// does not exist or a URL cannot be used.
    pub fn open(config: StoreConfig, shape: ModelShape, limits: Limits) -> Result<Self, AdapterError> {
        // On a thread of its own, where waiting for the store's runtime is allowed wherever the caller is.
        let opener = std::thread::spawn(move || Self::open_blocking(&config, shape, limits));
        let panicked = |_| Err(AdapterError::io("open the adapters")(std::io::Error::other("opening panicked")));
        opener.join().unwrap_or_else(panicked)
    }

    fn open_blocking(config: &StoreConfig, shape: ModelShape, limits: Limits) -> Result<Self, AdapterError> {
        let canonical = |root: &PathBuf| {
            let bad = |error| AdapterError::invalid("allowed_roots", format!("names {}: {error}", root.display()));
            root.canonicalize().map_err(bad)
        };
        let roots = config.allowed_roots.iter().map(canonical).collect::<Result<_, _>>()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(AdapterError::io("start the adapter store's thread"))?;
        let files = Files::open(&config.data_dir, &config.store_url)?;
        let url = match config.database_url.as_str() {
            "" => {
                let folder = config.data_dir.canonicalize();
                DatabaseUrl::sqlite(&folder.map_err(AdapterError::io("find the data folder"))?.join("registry.db"))
            }
            url => DatabaseUrl::parse("adapters.database_url", url)?,
        };
        let db = runtime.block_on(Database::open(&url, registry::SCHEMA))?;
        let shared = db.is_shared();
        let core = Arc::new(Core { db, files, leases: Arc::new(Leases::default()) });
        runtime.block_on(sweep::recover(&core))?;
        runtime.spawn(sweep::run(Arc::clone(&core)));
        let inner = Inner {
            runtime: Some(runtime),
            core,
            cache: HostCache::new(config.host_cache_bytes, &limits),
            names: Names::new(&limits, shared),
            limits,
            uploads: AtomicUsize::new(0),
            shape,
            roots,
            host_cache_bytes: config.host_cache_bytes,
            base: None,
            probe: None,
            counted: Default::default(),
        };
        let store = Self { inner: Arc::new(inner) };
        let stats = store.stats();
        info!(aliases = stats.registered, generations = stats.generations, "adapters opened");
        Ok(store)
    }

    /// Accepts adapters that carry a copy of the base model's embedding or head, where the copy says what `base` says.
    /// Call it before the store is shared.
    ///
    /// # Panics
    /// Where the store is shared with an upload already.
    #[must_use]
    pub fn with_base(mut self, base: Arc<dyn BaseRows>) -> Self {
        Arc::get_mut(&mut self.inner).expect("the base is given before the store is used").base = Some(base);
        self
    }

    /// Has every adapter tried by `probe` before it is registered. Call it before the store is shared.
    ///
    /// # Panics
    /// Where the store is shared with an upload already.
    #[must_use]
    pub fn with_probe(mut self, probe: Box<dyn Probe>) -> Self {
        let inner = Arc::get_mut(&mut self.inner).expect("the probe is given before the store is used");
        inner.probe = Some(Mutex::new(probe));
        self
    }

    /// Registers the PEFT folder at `path`, which must lie under an allowed root. The files are copied first and
    /// verified in the copy, so what is kept is what was verified. Registering what an alias stands for already puts
    /// fresh files in place and changes nothing else. A plain bool is a registration that may replace, or not.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming what is wrong with the folder, [`AdapterError::AlreadyExists`],
    /// [`AdapterError::PermissionDenied`], [`AdapterError::LimitReached`], [`AdapterError::Io`],
    /// [`AdapterError::Database`]. Nothing is left behind.
    pub fn register_folder(
        &self,
        alias: &Alias,
        path: &Path,
        actor: &Actor,
        registration: impl Into<Registration>,
    ) -> Result<AdapterInfo, AdapterError> {
        let registration = registration.into();
        self.inner.may_begin(alias, actor, &registration)?;
        let folder = AdapterFolder::open_under(path, &self.inner.roots)?;
        folder.check_entries(&self.inner.limits)?;
        let staged = self.inner.core.files.stage()?;
        for name in FILES {
            let (source, _) = folder.open(name, &self.inner.limits)?;
            copy(source, name, staged.path(), &self.inner.limits)?;
        }
        self.inner.admit(staged, alias, actor, &registration)
    }

    /// Starts an upload; nothing is visible before [`Upload::finish`].
    ///
    /// # Errors
    /// As [`Self::register_folder`], and [`AdapterError::LimitReached`] for `uploads_max`.
    pub fn begin_upload(
        &self,
        alias: &Alias,
        actor: &Actor,
        registration: impl Into<Registration>,
    ) -> Result<Upload, AdapterError> {
        let registration = registration.into();
        self.inner.may_begin(alias, actor, &registration)?;
        Upload::begin(Arc::clone(&self.inner), alias.clone(), actor.clone(), registration)
    }

    /// A lease on what `name` stands for: `alias`, or `alias@generation` for one it stands for now or remembers. Reads no
    /// weights.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `adapter`, [`AdapterError::NotFound`], [`AdapterError::Database`].
    pub fn resolve(&self, name: &str) -> Result<Lease, AdapterError> {
        let (alias, wanted) = match name.split_once('@') {
            Some((alias, generation)) => (alias, Some(Generation::from_hex(generation)?)),
            None => (name, None),
        };
        Alias::parse("adapter", alias, &self.inner.limits)?;
        for tried in 1.. {
            let epoch = self.inner.names.epoch();
            let named = self.inner.block_on(self.inner.lookup(alias, wanted, epoch))?;
            let (owner, pinned) = (Arc::clone(&named.owner), named.pinned);
            let lease = Lease::new(Arc::clone(&self.inner), named);
            // A change since may have removed the files before they were leased.
            if self.inner.names.epoch() == epoch {
                return Ok(lease);
            }
            if tried == RETRIES {
                // Something changes all the time. What the registry still names, now that it is leased, stays.
                let now = registry::generation(self.inner.core.db.reader(), lease.generation());
                let known = Arc::new(self.inner.block_on(now)?.ok_or_else(|| missing(name))?);
                return Ok(Lease::new(Arc::clone(&self.inner), Named { known, owner, pinned }));
            }
        }
        unreachable!("the last try returns")
    }

    /// Leases on what pinned aliases stand for, each generation once, in an order that is always the same.
    ///
    /// # Errors
    /// [`AdapterError::Database`].
    pub fn pinned(&self) -> Result<Vec<Lease>, AdapterError> {
        let aliases = self.inner.block_on(registry::pinned_aliases(self.inner.core.db.reader()))?;
        let mut leases: Vec<Lease> = Vec::new();
        for alias in aliases {
            match self.resolve(&alias) {
                Ok(lease) if leases.iter().all(|other| other.generation() != lease.generation()) => leases.push(lease),
                Err(error @ AdapterError::Database { .. }) => return Err(error),
                // Known already; gone meanwhile; or of another base model, which the server that serves it keeps.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(leases)
    }

    /// What `alias` stands for, where it is the actor's to see: their own, or any for an administrator.
    ///
    /// # Errors
    /// [`AdapterError::NotFound`], [`AdapterError::Database`].
    pub fn get(&self, alias: &str, actor: &Actor) -> Result<AdapterInfo, AdapterError> {
        let found = self.inner.block_on(registry::find(self.inner.core.db.reader(), alias))?;
        let mine = found.filter(|record| actor.may_change(&record.owner));
        mine.map(|record| self.inner.info(record)).ok_or_else(|| missing(alias))
    }

    /// At most `limit` aliases in ascending order, those after `after`, that are the actor's to see.
    ///
    /// # Errors
    /// [`AdapterError::Database`].
    pub fn list(&self, actor: &Actor, after: Option<&str>, limit: usize) -> Result<Vec<AdapterInfo>, AdapterError> {
        let owner = (!actor.admin).then_some(actor.name.as_str());
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let page = registry::list(&self.inner.core.db, owner, after.unwrap_or_default(), limit);
        let records = self.inner.block_on(page)?;
        Ok(records.into_iter().map(|record| self.inner.info(record)).collect())
    }

    /// What `owner` has and may have.
    ///
    /// # Errors
    /// [`AdapterError::QuotaDenied`] for anybody but the owner and administrators, [`AdapterError::Database`].
    pub fn quota(&self, owner: &str, actor: &Actor) -> Result<Quota, AdapterError> {
        if !actor.may_change(owner) {
            return Err(AdapterError::QuotaDenied { owner: owner.to_owned() });
        }
        self.inner.block_on(registry::quota(self.inner.core.db.reader(), owner))
    }

    /// Gauges and counters; those of the registry are the last known where it does not answer.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let db = self.inner.core.db.reader();
        let counted = self.inner.block_on(async { [registry::aliases(db).await, registry::generations(db).await] });
        let counted = counted.map(Result::ok);
        for (last, now) in self.inner.counted.iter().zip(counted) {
            if let Some(now) = now {
                last.store(now, Ordering::Relaxed);
            }
        }
        let cache = self.inner.cache.stats();
        StoreStats {
            registered: self.inner.counted[0].load(Ordering::Relaxed),
            generations: self.inner.counted[1].load(Ordering::Relaxed),
            cached_entries: cache.cached_entries,
            cached_bytes: cache.cached_bytes,
            held_entries: cache.held_entries,
            held_bytes: cache.held_bytes,
            leases: self.inner.core.leases.total(),
            hits: cache.hits,
            misses: cache.misses,
        }
    }
}

impl Inner {
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("taken only when dropped").block_on(work)
    }

    /// What `alias` stands for, or `wanted` where it stands for that or remembers it.
    async fn lookup(&self, alias: &str, wanted: Option<Generation>, epoch: u64) -> Result<Named, AdapterError> {
        let db = self.core.db.reader();
        let named = match wanted {
            None => match self.names.get(alias) {
                Some(named) => named,
                None => {
                    let record = registry::find(db, alias).await?.ok_or_else(|| missing(alias))?;
                    let Record { current, owner, pinned, .. } = record;
                    let named = Named { known: Arc::new(current), owner: owner.into(), pinned };
                    self.names.keep(alias, &named, epoch);
                    named
                }
            },
            Some(wanted) => {
                let found = registry::remembered(db, alias, wanted).await?;
                let (known, owner, pinned) = found.ok_or_else(|| missing(&format!("{alias}@{wanted}")))?;
                Named { known: Arc::new(known), owner: owner.into(), pinned }
            }
        };
        if named.known.base == base_id(&self.shape) {
            return Ok(named);
        }
        let why =
            format!("was registered for a base model of other sizes than {}, which is served here", self.shape.name);
        Err(AdapterError::invalid("adapter", why))
    }

    /// The weights of a leased generation.
    pub(crate) fn load(&self, known: &Known, pinned: bool) -> Result<Arc<AdapterWeights>, AdapterError> {
        let weights = self.cache.load(known.generation, known.summary.bytes, || self.read(known))?;
        // A pin from before a restart or a replacement takes effect with the first use.
        if pinned {
            match self.cache.pin(&weights) {
                Ok(false) => {}
                Ok(true) => self.block_on(self.unpin_unless_wanted(known.generation)),
                Err(error) => warn!(generation = %known.generation.short(), %error, "the pin has no room"),
            }
        }
        Ok(weights)
    }

    /// Reads a generation's weights as strictly as a stranger's; what is read is hashed and must be the generation.
    fn read(&self, known: &Known) -> Result<AdapterWeights, AdapterError> {
        let generation = known.generation;
        let reason = match self.read_at(&known.location, generation) {
            Ok(Some(weights)) if weights.generation == generation => return Ok(weights),
            Ok(Some(weights)) => format!("they hash to {}", weights.generation),
            Ok(None) => "they are gone".to_owned(),
            Err(AdapterError::Invalid(problem)) => problem.to_string(),
            Err(error) => return Err(error),
        };
        warn!(generation = %generation.short(), reason, "a registered adapter is damaged");
        Err(AdapterError::Corrupt { generation, reason })
    }

    fn read_at(&self, location: &str, generation: Generation) -> Result<Option<AdapterWeights>, AdapterError> {
        let opened = self.block_on(async {
            if let Some(files) = self.core.files.open_both(location, &self.limits).await? {
                return Ok(Some(files));
            }
            // Registered again since it was looked up, the files are elsewhere.
            let now = registry::generation(self.core.db.reader(), generation).await?;
            let now = now.ok_or_else(|| missing(&generation.to_string()))?;
            self.core.files.open_both(&now.location, &self.limits).await
        })?;
        let Some([config, tensors]) = opened else { return Ok(None) };
        let parsed = Parsed::read_files(config, tensors, &self.shape, &self.limits)?;
        parsed.check()?;
        weights::load(&parsed.file, &parsed.header, &parsed.plan).map(Some)
    }

    /// Reads a staged folder as strictly as a stranger's.
    pub(crate) fn verify(&self, staged: &tempfile::TempDir) -> Result<Known, AdapterError> {
        let parsed = Parsed::read(&AdapterFolder::open_own(staged.path())?, &self.shape, &self.limits)?;
        parsed.check()?;
        parsed.check_base_copies(self.base.as_deref())?;
        let summary = parsed.summary();
        let (bytes, max) = (summary.bytes, self.host_cache_bytes);
        if bytes > max {
            return Err(AdapterError::LimitReached {
                limit: "host_cache_bytes",
                max,
                reason: format!("the adapter takes {bytes} bytes in memory"),
                passes: false,
            });
        }
        let generation = self.identify(&parsed)?;
        let location = Files::location(generation, staged);
        Ok(Known { generation, base: base_id(&self.shape), location, summary })
    }

    /// Hashes the tensors, and where there is a probe has it try them: what was tried is what was hashed.
    fn identify(&self, parsed: &Parsed) -> Result<Generation, AdapterError> {
        let Some(probe) = &self.probe else { return parsed.generation() };
        // Taken before the weights are read, which are outside the cache's bound: those of one adapter at a time.
        let mut probe = probe.lock().unwrap_or_else(PoisonError::into_inner);
        let weights = weights::load(&parsed.file, &parsed.header, &parsed.plan)?;
        probe.probe(&weights)?;
        Ok(weights.generation)
    }

    pub(crate) async fn unpin_unless_wanted(&self, generation: Generation) {
        // Where the registry does not answer the weights stay, within the bound on pins.
        if matches!(registry::pinned(self.core.db.reader(), generation).await, Ok(false)) {
            self.cache.unpin(generation);
        }
    }

    pub(crate) fn info(&self, record: Record) -> AdapterInfo {
        let generation = record.current.generation;
        let summary = record.current.summary;
        AdapterInfo {
            alias: record.alias,
            generation,
            owner: record.owner,
            rank_max: summary.rank_max,
            bytes: summary.bytes,
            sites: summary.sizes.sites.len() as u32,
            pinned: record.pinned,
            in_host_cache: self.cache.contains(generation),
            leases: self.core.leases.of(generation),
            created_unix_s: record.created_unix_s,
            dora: summary.dora,
            modules: summary.modules,
            tags: record.tags,
            lineage: record.lineage,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        let core = Arc::clone(&self.core);
        // A runtime may not be waited for on a thread of another one, which may be where the last owner is.
        let closer = std::thread::spawn(move || {
            let closed = runtime.block_on(async { tokio::time::timeout(CLOSE, core.db.close()).await });
            if closed.is_err() {
                warn!("the registry's database did not close in time");
            }
        });
        if closer.join().is_err() {
            warn!("closing the registry panicked");
        }
    }
}

/// The sizes of the base model an adapter fits.
fn base_id(shape: &ModelShape) -> String {
    let s = shape;
    format!(
        "{}x{} {} {}/{}x{} {}{}",
        s.layers,
        s.hidden,
        s.intermediate,
        s.heads,
        s.kv_heads,
        s.head_dim,
        s.vocab,
        if s.tied_head { " tied" } else { "" }
    )
}

pub(crate) fn missing(name: &str) -> AdapterError {
    AdapterError::NotFound { name: crate::json::shown(name) }
}

/// Copies `source` to `dir/name`, stopping where it outgrows its limit, whatever its size was said to be. The kernel
/// copies, or shares the blocks where the file system can.
fn copy(source: File, name: &'static str, dir: &Path, limits: &Limits) -> Result<(), AdapterError> {
    let failed = || AdapterError::io(format!("copy {name}"));
    let mut target = File::create_new(dir.join(name)).map_err(failed())?;
    let (max, _) = bytes_max(name, limits);
    // One byte more than the limit shows that there is more.
    let copied = io::copy(&mut source.take(max.saturating_add(1)), &mut target).map_err(failed())?;
    check_size(name, copied, limits)
}
