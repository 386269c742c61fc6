//! The registry of adapters: aliases, the generations they stand for, and leases on those.
//!
//! An alias is a reusable name; a generation is a content hash. Registering under a taken alias with `replace` points it
//! at a new generation and remembers the old one for a while ([`Limits::alias_history_max`]), so that it can be pointed
//! back, and so that `alias@generation` keeps working. Requests run on leases of generations and never notice.
//!
//! Two locks: `changes` is held through a whole change, disk included, so that changes are serial; `registry` only to
//! read or swap the map, so that no request ever waits for a disk flush.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{SystemTime, UNIX_EPOCH},
};

use openlora_types::{AdapterWeights, Alias, Generation, Limits, ModelShape};
use tempfile::TempDir;
use tracing::{info, warn};

use crate::{
    cache::{HostCache, Lease},
    disk::{Disk, Known, Record, References},
    error::AdapterError,
    folder::{AdapterFolder, FILES, check_size},
    parse::{BaseRows, Parsed},
    upload::Upload,
    weights,
};

/// Bytes copied at a time.
const PIECE: usize = 1 << 20;
/// How often a lookup is repeated when the alias moves on between the lookup and the read.
const RETRIES: usize = 4;

/// Where the store is and how much memory it may take.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The store's own folder; created if missing.
    pub data_dir: PathBuf,
    /// Folders under which adapters may be registered by path.
    pub allowed_roots: Vec<PathBuf>,
    /// Bytes of adapters kept in host memory, and again for those in use; no adapter may be larger.
    pub host_cache_bytes: u64,
}

/// Who asks for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The name that aliases are owned under.
    pub name: String,
    /// Whether they may change everybody's.
    pub admin: bool,
}

/// An alias and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterInfo {
    /// The alias.
    pub alias: String,
    /// What it stands for.
    pub generation: Generation,
    /// Who may change it.
    pub owner: String,
    /// Largest rank of any site.
    pub rank_max: u32,
    /// Bytes of the factors in memory.
    pub bytes: u64,
    /// Sites adapted.
    pub sites: u32,
    /// Whether it is kept in the host cache.
    pub pinned: bool,
    /// Whether its weights are in host memory now.
    pub in_host_cache: bool,
    /// Leases on the generation now, whatever name they were taken under.
    pub leases: u32,
    /// When the alias was first registered, in seconds since 1970.
    pub created_unix_s: u64,
    /// Whether it has DoRA magnitudes.
    pub dora: bool,
    /// Names of the modules adapted, such as `q_proj`, each once.
    pub modules: Vec<String>,
}

/// The store's gauges and counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Aliases.
    pub registered: u64,
    /// Generations that an alias stands for or remembers.
    pub generations: u64,
    /// Generations in the cache.
    pub cached_entries: u64,
    /// Bytes of those; at most `host_cache_bytes`.
    pub cached_bytes: u64,
    /// Generations held by leases and pins.
    pub held_entries: u64,
    /// Bytes of those; at most `host_cache_bytes`.
    pub held_bytes: u64,
    /// Leases out.
    pub leases: u64,
    /// Leases given without reading the disk.
    pub hits: u64,
    /// Leases that read the disk.
    pub misses: u64,
}

/// The registry, its disk and its cache. Share it by reference or `Arc`; every method takes `&self` and may block on the
/// disk but for [`Self::get`], [`Self::list`] and [`Self::stats`].
pub struct AdapterStore {
    inner: Arc<Inner>,
}

/// What the store shares with its uploads.
pub(crate) struct Inner {
    pub(crate) disk: Disk,
    pub(crate) limits: Limits,
    pub(crate) uploads: AtomicUsize,
    shape: ModelShape,
    roots: Vec<PathBuf>,
    host_cache_bytes: u64,
    base: Option<Arc<dyn BaseRows>>,
    cache: HostCache,
    changes: Mutex<()>,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    records: BTreeMap<String, Arc<Record>>,
    references: References,
}

impl AdapterStore {
    /// Opens the store and finishes what a crash interrupted: unfinished uploads and generations without an alias are
    /// removed, aliases without files are reported and left out.
    ///
    /// # Errors
    /// [`AdapterError::Io`] where the folder cannot be used or another process uses it; [`AdapterError::Invalid`] where an
    /// allowed root does not exist.
    pub fn open(config: StoreConfig, shape: ModelShape, limits: Limits) -> Result<Self, AdapterError> {
        let canonical = |root: &PathBuf| {
            let bad = |error| AdapterError::invalid("allowed_roots", format!("names {}: {error}", root.display()));
            root.canonicalize().map_err(bad)
        };
        let roots = config.allowed_roots.iter().map(canonical).collect::<Result<_, _>>()?;
        let (disk, recovered) = Disk::open(&config.data_dir, &limits)?;
        for note in &recovered.notes {
            warn!("recovering the adapters' folder: {note}");
        }
        let mut registry = Registry::default();
        for record in recovered.records {
            registry.references.add(&record);
            registry.records.insert(record.alias.clone(), Arc::new(record));
        }
        info!(aliases = registry.records.len(), generations = registry.references.len(), "adapters opened");
        let inner = Inner {
            disk,
            cache: HostCache::new(config.host_cache_bytes, &limits),
            limits,
            uploads: AtomicUsize::new(0),
            shape,
            roots,
            host_cache_bytes: config.host_cache_bytes,
            base: None,
            changes: Mutex::default(),
            registry: Mutex::new(registry),
        };
        Ok(Self { inner: Arc::new(inner) })
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

    /// Registers the PEFT folder at `path`, which must lie under an allowed root. The files are copied first and
    /// verified in the copy, so what is kept is what was verified. Registering what an alias stands for already changes
    /// nothing.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming what is wrong with the folder, [`AdapterError::AlreadyExists`],
    /// [`AdapterError::PermissionDenied`], [`AdapterError::LimitReached`], [`AdapterError::Io`]. Nothing is left behind.
    pub fn register_folder(
        &self,
        alias: &Alias,
        path: &Path,
        actor: &Actor,
        replace: bool,
    ) -> Result<AdapterInfo, AdapterError> {
        self.inner.may_write(alias, actor, replace)?;
        let folder = AdapterFolder::open_under(path, &self.inner.roots)?;
        folder.check_entries(&self.inner.limits)?;
        let staged = self.inner.disk.stage()?;
        for name in FILES {
            let (source, _) = folder.open(name, &self.inner.limits)?;
            copy(source, name, staged.path(), &self.inner.limits)?;
        }
        self.inner.admit(staged, alias, actor, replace)
    }

    /// Starts an upload; nothing is visible before [`Upload::finish`].
    ///
    /// # Errors
    /// As [`Self::register_folder`], and [`AdapterError::LimitReached`] for `uploads_max`.
    pub fn begin_upload(&self, alias: &Alias, actor: &Actor, replace: bool) -> Result<Upload, AdapterError> {
        self.inner.may_write(alias, actor, replace)?;
        Upload::begin(Arc::clone(&self.inner), alias.clone(), actor.clone(), replace)
    }

    /// A lease on what `name` stands for: `alias`, or `alias@generation` for one it stands for now or remembers. Reads
    /// the disk where the weights are not in memory; what is read is hashed and must be the generation.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] on `adapter`, [`AdapterError::NotFound`], [`AdapterError::LimitReached`] where running
    /// requests hold all memory, [`AdapterError::Corrupt`], [`AdapterError::Io`].
    pub fn resolve(&self, name: &str) -> Result<Lease, AdapterError> {
        let (alias, wanted) = match name.split_once('@') {
            Some((alias, generation)) => (alias, Some(Generation::from_hex(generation)?)),
            None => (name, None),
        };
        Alias::parse("adapter", alias, &self.inner.limits)?;
        let mut missing = None;
        for _ in 0..RETRIES {
            let (known, pinned) = self.inner.lookup(alias, wanted)?;
            let read = || self.inner.read(known.generation);
            match self.inner.cache.lease(known.generation, known.summary.bytes, read) {
                // The alias has moved on since it was looked up and its old files with it, or this call waited for a read
                // that began when they were away.
                Err(AdapterError::NotFound { .. }) => missing = Some(known.generation),
                Err(error) => return Err(error),
                Ok(lease) => {
                    // A pin from before a restart or a replacement takes effect with the first use.
                    if pinned && let Err(error) = self.inner.cache.pin(&lease) {
                        warn!(alias, %error, "the pin has no room");
                    }
                    return Ok(lease);
                }
            }
        }
        let generation = missing.ok_or_else(|| AdapterError::NotFound { name: name.to_owned() })?;
        Err(AdapterError::Corrupt { generation, reason: "its folder is gone".into() })
    }

    /// What `alias` stands for.
    ///
    /// # Errors
    /// [`AdapterError::NotFound`].
    pub fn get(&self, alias: &str) -> Result<AdapterInfo, AdapterError> {
        Ok(self.inner.info(&*self.inner.record(alias)?))
    }

    /// At most `limit` aliases in ascending order, those after `after`.
    #[must_use]
    pub fn list(&self, after: Option<&str>, limit: usize) -> Vec<AdapterInfo> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let registry = self.inner.registry();
        let records: Vec<_> = registry
            .records
            .range::<str, _>((from, Bound::Unbounded))
            .take(limit)
            .map(|(_, r)| Arc::clone(r))
            .collect();
        drop(registry);
        records.iter().map(|record| self.inner.info(record)).collect()
    }

    /// Takes the alias away, with its history; files that no other alias names go too. Leases keep working.
    ///
    /// # Errors
    /// [`AdapterError::NotFound`], [`AdapterError::PermissionDenied`], [`AdapterError::Io`].
    pub fn unregister(&self, alias: &str, actor: &Actor) -> Result<Generation, AdapterError> {
        let _changing = self.inner.changing();
        let record = self.inner.owned_record(alias, actor)?;
        self.inner.disk.remove_record(alias)?;
        self.inner.registry().records.remove(alias);
        self.inner.let_go(&record);
        Ok(record.current.generation)
    }

    /// Points `alias` at a generation that is here already: one the alias remembers, or one of another alias that the
    /// actor may change. `expected` is what the alias must stand for now; `None`: it must be new.
    ///
    /// # Errors
    /// [`AdapterError::AlreadyExists`], [`AdapterError::Conflict`], [`AdapterError::NotFound`],
    /// [`AdapterError::PermissionDenied`], [`AdapterError::LimitReached`], [`AdapterError::Io`].
    pub fn set_alias(
        &self,
        alias: &Alias,
        generation: Generation,
        expected: Option<Generation>,
        actor: &Actor,
    ) -> Result<AdapterInfo, AdapterError> {
        let _changing = self.inner.changing();
        let old = match expected {
            None => self.inner.may_write(alias, actor, false)?,
            Some(expected) => {
                let record = self.inner.owned_record(alias.as_str(), actor)?;
                let found = record.current.generation;
                if found != expected {
                    return Err(AdapterError::Conflict { alias: alias.to_string(), expected, found });
                }
                Some(record)
            }
        };
        let known = self.inner.known_to(generation, actor);
        let known = known.ok_or_else(|| AdapterError::NotFound { name: format!("{alias}@{generation}") })?;
        self.inner.point(alias, known, old, actor)
    }

    /// Keeps what `alias` stands for in memory (it is read now), or lets it go again. A pin follows its alias.
    ///
    /// # Errors
    /// As [`Self::resolve`], and [`AdapterError::PermissionDenied`], [`AdapterError::LimitReached`] for `pins_max` or for
    /// half of `host_cache_bytes`.
    pub fn pin(&self, alias: &str, pinned: bool, actor: &Actor) -> Result<AdapterInfo, AdapterError> {
        self.inner.owned_record(alias, actor)?;
        let lease = if pinned { Some(self.resolve(alias)?) } else { None };
        let _changing = self.inner.changing();
        let old = self.inner.owned_record(alias, actor)?;
        if pinned && !old.pinned {
            self.inner.check_pins(&old.owner)?;
        }
        if let Some(lease) = lease.filter(|lease| lease.generation() == old.current.generation) {
            self.inner.cache.pin(&lease)?;
        }
        let record = Arc::new(Record { pinned, ..Record::clone(&old) });
        let written = self.inner.disk.write_record(&record);
        if written.is_ok() {
            self.inner.registry().records.insert(record.alias.clone(), Arc::clone(&record));
        }
        // Undoes the pin where the record could not be written, and does it where it was taken away.
        self.inner.unpin_unless_wanted(record.current.generation);
        written?;
        Ok(self.inner.info(&record))
    }

    /// Gauges and counters.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let (registered, generations) = {
            let registry = self.inner.registry();
            (registry.records.len() as u64, registry.references.len() as u64)
        };
        let cache = self.inner.cache.stats();
        StoreStats {
            registered,
            generations,
            cached_entries: cache.cached_entries,
            cached_bytes: cache.cached_bytes,
            held_entries: cache.held_entries,
            held_bytes: cache.held_bytes,
            leases: cache.leases,
            hits: cache.hits,
            misses: cache.misses,
        }
    }
}

impl Inner {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, alias: &str) -> Result<Arc<Record>, AdapterError> {
        let record = self.registry().records.get(alias).map(Arc::clone);
        record.ok_or_else(|| AdapterError::NotFound { name: crate::json::shown(alias) })
    }

    fn owned_record(&self, alias: &str, actor: &Actor) -> Result<Arc<Record>, AdapterError> {
        let record = self.record(alias)?;
        if actor.may_change(&record) {
            return Ok(record);
        }
        Err(AdapterError::PermissionDenied { alias: record.alias.clone() })
    }

    /// What `alias` stands for, or `wanted` where it stands for that or remembers it; and whether it is pinned.
    fn lookup(&self, alias: &str, wanted: Option<Generation>) -> Result<(Known, bool), AdapterError> {
        let record = self.record(alias)?;
        let Some(wanted) = wanted else { return Ok((record.current.clone(), record.pinned)) };
        let known = record.generations().find(|known| known.generation == wanted);
        let known = known.ok_or_else(|| AdapterError::NotFound { name: format!("{alias}@{wanted}") })?;
        Ok((known.clone(), record.pinned && wanted == record.current.generation))
    }

    /// Whether `actor` may point `alias` at something; returns what it stands for now.
    fn may_write(&self, alias: &Alias, actor: &Actor, replace: bool) -> Result<Option<Arc<Record>>, AdapterError> {
        let taken = |reason| AdapterError::AlreadyExists { alias: alias.to_string(), reason };
        if alias.as_str() == self.shape.name {
            return Err(taken("is the base model's own name; choose another"));
        }
        let registry = self.registry();
        match registry.records.get(alias.as_str()) {
            Some(_) if !replace => Err(taken("is taken; ask to replace it, or choose another")),
            Some(record) if !actor.may_change(record) => {
                Err(AdapterError::PermissionDenied { alias: alias.to_string() })
            }
            Some(record) => Ok(Some(Arc::clone(record))),
            None if registry.records.len() >= self.limits.adapters_max => Err(AdapterError::LimitReached {
                limit: "adapters_max",
                max: self.limits.adapters_max as u64,
                reason: format!("{} aliases are registered; unregister one first", registry.records.len()),
                passes: false,
            }),
            None => Ok(None),
        }
    }

    /// Verifies a staged folder and publishes it under `alias`.
    pub(crate) fn admit(
        &self,
        staged: TempDir,
        alias: &Alias,
        actor: &Actor,
        replace: bool,
    ) -> Result<AdapterInfo, AdapterError> {
        let known = self.verify(staged.path())?;
        let generation = known.generation;
        // The same bytes may be here under another alias; they stay unless the disk has damaged them.
        let intact = self.verify(&self.disk.generation_dir(generation)).is_ok_and(|found| found == known);
        let _changing = self.changing();
        let old = self.may_write(alias, actor, replace)?;
        let place = || {
            let path = self.disk.generation_dir(generation);
            let here = path.exists();
            // Looked at again before it is taken away: another change may have published it since.
            let intact = intact || here && self.verify(&path).is_ok_and(|found| found == known);
            if here && !intact {
                self.disk.remove_generation(generation)?;
            }
            if !(here && intact) {
                self.disk.publish(staged, generation)?;
            }
            self.cache.forgive(generation);
            self.point(alias, known, old, actor)
        };
        let pointed = place();
        if pointed.is_err() && !self.registry().references.contains(generation) {
            // Nothing names it, so nothing will miss it; should this fail too, the next start collects it.
            let _best_effort = self.disk.remove_generation(generation);
        }
        pointed
    }

    /// Reads a folder of the store's own as strictly as a stranger's.
    fn verify(&self, path: &Path) -> Result<Known, AdapterError> {
        let parsed = Parsed::read(&AdapterFolder::open_own(path)?, &self.shape, &self.limits)?;
        parsed.check()?;
        parsed.check_base_copies(self.base.as_deref())?;
        let known = parsed.known()?;
        let (bytes, max) = (known.summary.bytes, self.host_cache_bytes);
        if bytes > max {
            return Err(AdapterError::LimitReached {
                limit: "host_cache_bytes",
                max,
                reason: format!("the adapter takes {bytes} bytes in memory"),
                passes: false,
            });
        }
        Ok(known)
    }

    /// Writes the alias's new record, then lets go of what only the old one named. Under the change lock.
    fn point(
        &self,
        alias: &Alias,
        known: Known,
        old: Option<Arc<Record>>,
        actor: &Actor,
    ) -> Result<AdapterInfo, AdapterError> {
        let record = match &old {
            Some(old) if old.current == known => return Ok(self.info(old)),
            Some(old) => {
                let others = old.generations().filter(|past| past.generation != known.generation);
                let history = others.take(self.limits.alias_history_max).cloned().collect();
                Record { current: known, history, ..Record::clone(old) }
            }
            None => Record {
                alias: alias.to_string(),
                owner: actor.name.clone(),
                created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
                pinned: false,
                current: known,
                history: Vec::new(),
            },
        };
        self.disk.write_record(&record)?;
        let record = Arc::new(record);
        {
            let mut registry = self.registry();
            registry.references.add(&record);
            registry.records.insert(record.alias.clone(), Arc::clone(&record));
        }
        if let Some(old) = old {
            self.let_go(&old);
        }
        Ok(self.info(&record))
    }

    /// Drops what `old` named from the counts, and what nothing else names from memory and disk. Under the change lock,
    /// once `old` is out of the registry.
    fn let_go(&self, old: &Record) {
        let orphans = self.registry().references.remove(old);
        self.unpin_unless_wanted(old.current.generation);
        for generation in orphans {
            self.cache.forget(generation);
            if let Err(error) = self.disk.remove_generation(generation) {
                // The change itself is done and durable; the next start collects the folder.
                warn!(generation = %generation.short(), %error, "could not remove a generation that no alias names");
            }
        }
    }

    fn unpin_unless_wanted(&self, generation: Generation) {
        let registry = self.registry();
        let wanted = |record: &Arc<Record>| record.pinned && record.current.generation == generation;
        let wanted = registry.records.values().any(wanted);
        drop(registry);
        if !wanted {
            self.cache.unpin(generation);
        }
    }

    fn check_pins(&self, owner: &str) -> Result<(), AdapterError> {
        let registry = self.registry();
        let pins = registry.records.values().filter(|record| record.pinned && record.owner == owner).count();
        if pins < self.limits.pins_max {
            return Ok(());
        }
        Err(AdapterError::LimitReached {
            limit: "pins_max",
            max: self.limits.pins_max as u64,
            reason: format!("{owner} has {pins} pins; let one go first"),
            passes: false,
        })
    }

    /// `generation`, where an alias that `actor` may change stands for it or remembers it. A hash alone gives no access.
    fn known_to(&self, generation: Generation, actor: &Actor) -> Option<Known> {
        let registry = self.registry();
        let mine = registry.records.values().filter(|record| actor.may_change(record));
        let mut knowns = mine.flat_map(|record| record.generations());
        knowns.find(|known| known.generation == generation).cloned()
    }

    /// Reads a generation's weights. [`AdapterError::NotFound`] where its folder is gone.
    fn read(&self, generation: Generation) -> Result<AdapterWeights, AdapterError> {
        let path = self.disk.generation_dir(generation);
        let read = || {
            let parsed = Parsed::read(&AdapterFolder::open_own(&path)?, &self.shape, &self.limits)?;
            parsed.check()?;
            weights::load(&parsed.file, &parsed.header, &parsed.plan)
        };
        let reason = match read() {
            Ok(weights) if weights.generation == generation => return Ok(weights),
            Ok(weights) => format!("they hash to {}", weights.generation),
            Err(AdapterError::Invalid(_)) if gone(&path) => {
                return Err(AdapterError::NotFound { name: generation.to_string() });
            }
            Err(AdapterError::Invalid(problem)) => problem.to_string(),
            Err(error) => return Err(error),
        };
        warn!(generation = %generation.short(), reason, "a registered adapter is damaged");
        Err(AdapterError::Corrupt { generation, reason })
    }

    fn info(&self, record: &Record) -> AdapterInfo {
        let Known { generation, summary } = &record.current;
        let (leases, in_host_cache) = self.cache.status(*generation);
        AdapterInfo {
            alias: record.alias.clone(),
            generation: *generation,
            owner: record.owner.clone(),
            rank_max: summary.rank_max,
            bytes: summary.bytes,
            sites: summary.sites,
            pinned: record.pinned,
            in_host_cache,
            leases,
            created_unix_s: record.created_unix_s,
            dora: summary.dora,
            modules: summary.modules.clone(),
        }
    }
}

impl Actor {
    fn may_change(&self, record: &Record) -> bool {
        self.admin || self.name == record.owner
    }
}

fn gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Copies `source` to `dir/name`, stopping where it outgrows its limit, whatever its size was said to be.
fn copy(mut source: File, name: &'static str, dir: &Path, limits: &Limits) -> Result<(), AdapterError> {
    let mut target = File::create_new(dir.join(name)).map_err(AdapterError::io(format!("store {name}")))?;
    let mut piece = vec![0; PIECE];
    let mut total = 0;
    loop {
        let read = source.read(&mut piece).map_err(AdapterError::io(format!("read {name}")))?;
        if read == 0 {
            return Ok(());
        }
        total += read as u64;
        check_size(name, total, limits)?;
        target.write_all(&piece[..read]).map_err(AdapterError::io(format!("store {name}")))?;
    }
}
