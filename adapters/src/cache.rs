//! Adapters in host memory: a bounded cache of what was used lately, and what requests and pins hold.
//!
//! Two sets share the same `Arc`s. The cache (moka, weighed in KiB, TinyLFU) keeps generations that nobody needs right
//! now; it never exceeds `host_cache_bytes`. Held generations are those with a lease or a pin; they too are bounded by
//! `host_cache_bytes` together, and one lease more than fits is refused with an error that passes when requests end. So
//! adapters take at most twice that setting, and usually once, since a held generation is mostly cached as well. A
//! generation evicted while it is held lives on through its holders and is never read a second time for others.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use openlora_types::{AdapterSizes, AdapterWeights, Generation, Limits};

use crate::error::AdapterError;

/// The unit of the cache's weights, whose counter has 32 bits for one entry.
const KIB: u64 = 1024;

/// A request's hold on one generation: while any lease lives, the weights stay in memory whatever happens to the alias,
/// the cache or the files. Clone it for each holder; each is counted.
pub struct Lease {
    weights: Arc<AdapterWeights>,
    sizes: Arc<AdapterSizes>,
    hold: Hold,
}

impl Lease {
    fn new(weights: Arc<AdapterWeights>, hold: Hold) -> Self {
        Self { sizes: Arc::new(weights.sizes()), weights, hold }
    }

    /// The weights.
    ///
    /// # Errors
    /// A file that cannot be read or is not what was registered.
    pub fn load(&self) -> Result<Arc<AdapterWeights>, AdapterError> {
        Ok(Arc::clone(&self.weights))
    }

    /// The weights.
    #[must_use]
    pub fn weights(&self) -> &Arc<AdapterWeights> {
        &self.weights
    }

    /// What they need of a device.
    #[must_use]
    pub fn sizes(&self) -> &Arc<AdapterSizes> {
        &self.sizes
    }

    /// Their identity.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.hold.generation
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        self.hold.held.lock().entry(self.hold.generation).leases += 1;
        let hold = Hold { held: Arc::clone(&self.hold.held), generation: self.hold.generation };
        Self { weights: Arc::clone(&self.weights), sizes: Arc::clone(&self.sizes), hold }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("generation", &self.hold.generation).finish_non_exhaustive()
    }
}

/// One count on a generation, with or without its weights read yet.
struct Hold {
    held: Arc<Held>,
    generation: Generation,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.held.lock();
        state.entry(self.generation).leases -= 1;
        let released = state.release_if_unused(self.generation);
        // Freeing gigabytes takes a while: not under the lock.
        drop(state);
        drop(released);
    }
}

struct HeldEntry {
    /// What the entry is charged with, from the time its weights are being read.
    bytes: u64,
    leases: u32,
    pinned: bool,
    /// `None` while the first holder reads it.
    weights: Option<Arc<AdapterWeights>>,
}

#[derive(Default)]
struct HeldState {
    entries: HashMap<Generation, HeldEntry>,
    bytes: u64,
    pinned_bytes: u64,
}

impl HeldState {
    fn entry(&mut self, generation: Generation) -> &mut HeldEntry {
        self.entries.get_mut(&generation).expect("a generation with holders has an entry")
    }

    fn release_if_unused(&mut self, generation: Generation) -> Option<HeldEntry> {
        let entry = self.entry(generation);
        if entry.leases > 0 || entry.pinned {
            return None;
        }
        self.bytes -= entry.bytes;
        self.entries.remove(&generation)
    }
}

struct Held {
    state: Mutex<HeldState>,
    bytes_max: u64,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HeldState> {
        // A panic elsewhere cannot leave the counts half-changed: no code under this lock can panic midway.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Counts one more holder of `generation`, charging its `bytes` if it is the first.
    fn hold(self: &Arc<Self>, generation: Generation, bytes: u64) -> Result<Hold, AdapterError> {
        let mut state = self.lock();
        if let Some(entry) = state.entries.get_mut(&generation) {
            entry.leases += 1;
        } else {
            if state.bytes + bytes > self.bytes_max {
                return Err(AdapterError::LimitReached {
                    limit: "host_cache_bytes",
                    max: self.bytes_max,
                    reason: format!(
                        "running requests and pins hold {} bytes of adapters; {bytes} do not fit",
                        state.bytes
                    ),
                    passes: true,
                });
            }
            state.bytes += bytes;
            state.entries.insert(generation, HeldEntry { bytes, leases: 1, pinned: false, weights: None });
        }
        drop(state);
        Ok(Hold { held: Arc::clone(self), generation })
    }
}

/// Counters of the host cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheStats {
    pub(crate) cached_entries: u64,
    pub(crate) cached_bytes: u64,
    pub(crate) held_entries: u64,
    pub(crate) held_bytes: u64,
    pub(crate) leases: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

/// See the module.
pub(crate) struct HostCache {
    kept: moka::sync::Cache<Generation, Arc<AdapterWeights>>,
    failed: moka::sync::Cache<Generation, AdapterError>,
    held: Arc<Held>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl HostCache {
    pub(crate) fn new(bytes_max: u64, limits: &Limits) -> Self {
        let weigh = |_: &Generation, weights: &Arc<AdapterWeights>| {
            u32::try_from((weights.byte_len() as u64).div_ceil(KIB)).unwrap_or(u32::MAX)
        };
        Self {
            kept: moka::sync::Cache::builder().max_capacity(bytes_max / KIB).weigher(weigh).build(),
            failed: moka::sync::Cache::builder()
                .max_capacity(limits.adapter_failures_max)
                .time_to_live(Duration::from_secs(limits.adapter_failure_ttl_s))
                .build(),
            held: Arc::new(Held { state: Mutex::default(), bytes_max }),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// A lease on `generation`, whose weights take `bytes`; `read` is called by one of the callers that ask at the same
    /// time, and only where the weights are neither held nor cached.
    ///
    /// # Errors
    /// `host_cache_bytes` reached, what `read` returned, or a failure remembered from an earlier call.
    pub(crate) fn lease(
        &self,
        generation: Generation,
        bytes: u64,
        read: impl FnOnce() -> Result<AdapterWeights, AdapterError>,
    ) -> Result<Lease, AdapterError> {
        if let Some(error) = self.failed.get(&generation) {
            return Err(error);
        }
        let hold = self.held.hold(generation, bytes)?;
        let held = self.held.lock().entry(generation).weights.clone();
        if let Some(weights) = held {
            self.hits.fetch_add(1, Ordering::Relaxed);
            // Tells the cache's popularity counters, and puts the weights back where they were evicted.
            let _cached = self.kept.get_with(generation, || Arc::clone(&weights));
            return Ok(Lease::new(weights, hold));
        }
        let mut was_read = false;
        let loaded = self.kept.try_get_with(generation, || {
            was_read = true;
            read().map(Arc::new)
        });
        let counter = if was_read { &self.misses } else { &self.hits };
        counter.fetch_add(1, Ordering::Relaxed);
        let weights = loaded.map_err(|error| {
            let error = AdapterError::clone(&error);
            if matches!(error, AdapterError::Corrupt { .. }) {
                self.failed.insert(generation, error.clone());
            }
            error
        })?;
        // Two loads may have followed each other when the cache dropped the first at once: the first one stays.
        let weights = Arc::clone(self.held.lock().entry(generation).weights.get_or_insert(weights));
        Ok(Lease::new(weights, hold))
    }

    /// Keeps the leased generation in memory after its leases.
    ///
    /// # Errors
    /// Where pins would take more than half of `host_cache_bytes`, which requests need too.
    pub(crate) fn pin(&self, lease: &Lease) -> Result<(), AdapterError> {
        let mut state = self.held.lock();
        let max = self.held.bytes_max / 2;
        let pinned = state.pinned_bytes;
        let entry = state.entry(lease.generation());
        if entry.pinned {
            return Ok(());
        }
        let bytes = entry.bytes;
        if pinned + bytes > max {
            return Err(AdapterError::LimitReached {
                limit: "host_cache_bytes / 2",
                max,
                reason: format!("pins hold {pinned} bytes of adapters; {bytes} more do not fit"),
                passes: false,
            });
        }
        entry.pinned = true;
        state.pinned_bytes += bytes;
        Ok(())
    }

    /// Lets a pinned generation go again; nothing happens to one that is not pinned.
    pub(crate) fn unpin(&self, generation: Generation) {
        let mut state = self.held.lock();
        let Some(entry) = state.entries.get_mut(&generation).filter(|entry| entry.pinned) else { return };
        entry.pinned = false;
        state.pinned_bytes -= state.entries[&generation].bytes;
        let released = state.release_if_unused(generation);
        drop(state);
        drop(released);
    }

    /// Drops a generation that no alias names any more; its leases keep it for themselves.
    pub(crate) fn forget(&self, generation: Generation) {
        self.unpin(generation);
        self.kept.invalidate(&generation);
        self.forgive(generation);
    }

    /// Forgets that a generation failed: its files are new.
    pub(crate) fn forgive(&self, generation: Generation) {
        self.failed.invalidate(&generation);
    }

    /// Leases on `generation`, and whether it is in memory.
    pub(crate) fn status(&self, generation: Generation) -> (u32, bool) {
        let state = self.held.lock();
        let entry = state.entries.get(&generation);
        let leases = entry.map_or(0, |entry| entry.leases);
        let held = entry.is_some_and(|entry| entry.weights.is_some());
        (leases, held || self.kept.contains_key(&generation))
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.kept.run_pending_tasks();
        let state = self.held.lock();
        CacheStats {
            cached_entries: self.kept.entry_count(),
            cached_bytes: self.kept.weighted_size() * KIB,
            held_entries: state.entries.len() as u64,
            held_bytes: state.bytes,
            leases: state.entries.values().map(|entry| u64::from(entry.leases)).sum(),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }
}
