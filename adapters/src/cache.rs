//! Adapters in host memory: a cache of what was read lately (moka, bounded in bytes, TinyLFU), and what is pinned.
//!
//! Callers that ask for one generation at the same time share one read. Weights that the cache dropped but that somebody still
//! holds are found again through a weak reference and not read twice. The cache holds at most `host_cache_bytes`, and weights
//! outside it, held, pinned or being read, as much again; one load more is refused with an error that passes.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use moka::sync::Cache;
use openlora_types::{AdapterWeights, Generation, Limits};

use crate::error::AdapterError;

type Loaded = Result<Arc<AdapterWeights>, AdapterError>;

/// The unit of the cache's weights, whose counter has 32 bits for one entry.
const KIB: u64 = 1024;

#[derive(Default)]
struct Memory {
    /// Bytes of reads in progress.
    reading: u64,
    /// Every generation whose weights may still be in memory, with its bytes.
    alive: HashMap<Generation, (Weak<AdapterWeights>, u64)>,
    pins: HashMap<Generation, (Arc<AdapterWeights>, u64)>,
}

impl Memory {
    fn pinned_bytes(&self) -> u64 {
        self.pins.values().map(|(_, bytes)| bytes).sum()
    }

    /// The weights, where they are in memory.
    fn find(&self, generation: Generation) -> Option<Arc<AdapterWeights>> {
        self.alive.get(&generation)?.0.upgrade()
    }
}

/// Gauges and counters of the host cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheStats {
    pub(crate) cached_entries: u64,
    pub(crate) cached_bytes: u64,
    pub(crate) held_entries: u64,
    pub(crate) held_bytes: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

/// See the module.
pub(crate) struct HostCache {
    failed: Cache<Generation, AdapterError>,
    kept: Cache<Generation, Arc<AdapterWeights>>,
    memory: Mutex<Memory>,
    bytes_max: u64,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl HostCache {
    pub(crate) fn new(bytes_max: u64, limits: &Limits) -> Self {
        Self {
            failed: Cache::builder()
                .max_capacity(limits.adapter_failures_max)
                .time_to_live(Duration::from_secs(limits.adapter_failure_ttl_s))
                .build(),
            kept: Cache::builder()
                .weigher(|_, weights: &Arc<AdapterWeights>| {
                    u32::try_from((weights.byte_len() as u64).div_ceil(KIB)).unwrap_or(u32::MAX)
                })
                .max_capacity(bytes_max / KIB)
                .build(),
            memory: Mutex::default(),
            bytes_max,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // No code under this lock can panic midway, so a panic elsewhere leaves it whole.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights of `generation`, which take `bytes`; `read` is called by one of the callers that ask at the same time,
    /// and only where the weights are not in memory.
    ///
    /// # Errors
    /// `host_cache_bytes` reached, what `read` returned, or a damage remembered from an earlier call.
    pub(crate) fn load(
        &self,
        generation: Generation,
        bytes: u64,
        read: impl FnOnce() -> Result<AdapterWeights, AdapterError>,
    ) -> Loaded {
        if let Some(error) = self.failed.get(&generation) {
            return Err(error);
        }
        let mut missed = false;
        let loaded = self.kept.try_get_with(generation, || {
            if let Some(weights) = self.memory().find(generation) {
                return Ok(weights);
            }
            missed = true;
            let _reading = self.begin(bytes)?;
            let weights = Arc::new(read()?);
            self.memory().alive.insert(generation, (Arc::downgrade(&weights), bytes));
            Ok(weights)
        });
        // What is too much goes now, not with some later access.
        self.kept.run_pending_tasks();
        let counter = if missed { &self.misses } else { &self.hits };
        counter.fetch_add(1, Ordering::Relaxed);
        loaded.map_err(|error: Arc<AdapterError>| {
            if missed && matches!(*error, AdapterError::Corrupt { .. }) {
                self.failed.insert(generation, (*error).clone());
            }
            (*error).clone()
        })
    }

    /// Counts a read of `bytes` until the result is dropped.
    fn begin(&self, bytes: u64) -> Result<Reading<'_>, AdapterError> {
        let mut memory = self.memory();
        memory.alive.retain(|_, (weights, _)| weights.strong_count() > 0);
        let outside = memory.alive.iter().filter(|(generation, _)| !self.kept.contains_key(*generation));
        let taken = outside.map(|(_, (_, bytes))| bytes).sum::<u64>() + memory.reading;
        if taken + bytes > self.bytes_max {
            return Err(AdapterError::LimitReached {
                limit: "host_cache_bytes",
                max: self.bytes_max,
                reason: format!("adapters in use take {taken} bytes beside the cache; {bytes} more do not fit"),
                passes: true,
            });
        }
        memory.reading += bytes;
        Ok(Reading { cache: self, bytes })
    }

    /// Keeps weights in memory after those who use them. False where they are pinned already.
    ///
    /// # Errors
    /// Where pins would take more than half of `host_cache_bytes`, which requests need too.
    pub(crate) fn pin(&self, weights: &Arc<AdapterWeights>) -> Result<bool, AdapterError> {
        let mut memory = self.memory();
        let (pinned, max, bytes) = (memory.pinned_bytes(), self.bytes_max / 2, weights.byte_len() as u64);
        if memory.pins.contains_key(&weights.generation) {
            return Ok(false);
        }
        if pinned + bytes > max {
            return Err(AdapterError::LimitReached {
                limit: "host_cache_bytes / 2",
                max,
                reason: format!("pins hold {pinned} bytes of adapters; {bytes} more do not fit"),
                passes: false,
            });
        }
        memory.pins.insert(weights.generation, (Arc::clone(weights), bytes));
        Ok(true)
    }

    /// Lets a pinned generation go again; nothing happens to one that is not pinned.
    pub(crate) fn unpin(&self, generation: Generation) {
        let released = self.memory().pins.remove(&generation);
        // Freeing gigabytes takes a while: not under the lock.
        drop(released);
    }

    /// Drops a generation that no alias names any more; who uses it keeps it.
    pub(crate) fn forget(&self, generation: Generation) {
        self.unpin(generation);
        self.kept.invalidate(&generation);
        // moka frees what was invalidated a little later; nobody shall find it until then.
        self.memory().alive.remove(&generation);
        self.forgive(generation);
    }

    /// Forgets that a generation failed: its files are new.
    pub(crate) fn forgive(&self, generation: Generation) {
        self.failed.invalidate(&generation);
    }

    /// Whether the weights of `generation` are in memory.
    pub(crate) fn contains(&self, generation: Generation) -> bool {
        self.memory().find(generation).is_some()
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.kept.run_pending_tasks();
        let memory = self.memory();
        CacheStats {
            cached_entries: self.kept.entry_count(),
            cached_bytes: self.kept.iter().map(|(_, weights)| weights.byte_len() as u64).sum(),
            held_entries: memory.pins.len() as u64,
            held_bytes: memory.pinned_bytes(),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }
}

/// A read in progress.
struct Reading<'a> {
    cache: &'a HostCache,
    bytes: u64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.cache.memory().reading -= self.bytes;
    }
}
