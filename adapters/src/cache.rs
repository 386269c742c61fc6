//! Adapters in host memory: a bounded cache of what was read lately, and what is pinned.
//!
//! The cache never exceeds `host_cache_bytes`. What it drops is chosen by GreedyDual with frequency (Cherkasova 1998): an
//! entry's worth is its uses plus the worth of what was dropped last when it was used, so what was used often stays, but
//! not for ever, and one pass over thousands of adapters does not wash it out. Cost over size, the rest of that formula,
//! is the same for all: reading costs by the byte.
//!
//! Weights that were dropped but that somebody still holds are found again through a weak reference and not read twice.
//! All weights alive, cached, pinned, held elsewhere or being read, stay within twice `host_cache_bytes`; one load more is
//! refused with an error that passes.

use std::{
    collections::HashMap,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use openlora_types::{AdapterWeights, Generation, Limits};

use crate::error::AdapterError;

type Loaded = Result<Arc<AdapterWeights>, AdapterError>;

/// An entry of the cache.
struct Kept {
    weights: Arc<AdapterWeights>,
    bytes: u64,
    uses: u64,
    worth: u64,
}

/// A read in progress, for which others wait.
#[derive(Default)]
struct Flight {
    landed: Mutex<Option<Loaded>>,
    ended: Condvar,
}

impl Flight {
    fn wait(&self) -> Loaded {
        let landed = self.landed.lock().unwrap_or_else(PoisonError::into_inner);
        let landed = self.ended.wait_while(landed, |landed| landed.is_none()).unwrap_or_else(PoisonError::into_inner);
        landed.clone().expect("waited for")
    }

    fn land(&self, loaded: Loaded) {
        *self.landed.lock().unwrap_or_else(PoisonError::into_inner) = Some(loaded);
        self.ended.notify_all();
    }
}

#[derive(Default)]
struct Memory {
    kept: HashMap<Generation, Kept>,
    kept_bytes: u64,
    /// Worth of the entry dropped last.
    floor: u64,
    flights: HashMap<Generation, Arc<Flight>>,
    /// Bytes of reads in progress.
    reading: u64,
    /// Every generation whose weights may still be in memory, with its bytes.
    alive: HashMap<Generation, (Weak<AdapterWeights>, u64)>,
    pins: HashMap<Generation, (Arc<AdapterWeights>, u64)>,
}

impl Memory {
    fn alive_bytes(&mut self) -> u64 {
        self.alive.retain(|_, (weights, _)| weights.strong_count() > 0);
        self.alive.values().map(|(_, bytes)| bytes).sum()
    }

    fn pinned_bytes(&self) -> u64 {
        self.pins.values().map(|(_, bytes)| bytes).sum()
    }

    /// The weights, where they are in memory.
    fn find(&self, generation: Generation) -> Option<Arc<AdapterWeights>> {
        self.alive.get(&generation)?.0.upgrade()
    }

    /// Takes the entry of least worth out of the cache. The scan is short beside the read that makes it necessary.
    fn evict(&mut self) -> Option<Arc<AdapterWeights>> {
        let least = self.kept.iter().min_by_key(|(_, kept)| kept.worth).map(|(&generation, _)| generation)?;
        self.floor = self.kept[&least].worth;
        self.take(least)
    }

    fn take(&mut self, generation: Generation) -> Option<Arc<AdapterWeights>> {
        let kept = self.kept.remove(&generation)?;
        self.kept_bytes -= kept.bytes;
        Some(kept.weights)
    }

    /// Counts a use and keeps the weights; returns what had to go, to be freed outside the lock.
    fn keep(&mut self, weights: &Arc<AdapterWeights>, max: u64) -> Vec<Arc<AdapterWeights>> {
        let floor = self.floor;
        if let Some(kept) = self.kept.get_mut(&weights.generation) {
            kept.uses += 1;
            kept.worth = floor + kept.uses;
            return Vec::new();
        }
        let bytes = weights.byte_len() as u64;
        let mut gone = Vec::new();
        while self.kept_bytes + bytes > max {
            match self.evict() {
                Some(evicted) => gone.push(evicted),
                None => return gone,
            }
        }
        let kept = Kept { weights: Arc::clone(weights), bytes, uses: 1, worth: self.floor + 1 };
        self.kept.insert(weights.generation, kept);
        self.kept_bytes += bytes;
        gone
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
    failed: moka::sync::Cache<Generation, AdapterError>,
    memory: Mutex<Memory>,
    bytes_max: u64,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl HostCache {
    pub(crate) fn new(bytes_max: u64, limits: &Limits) -> Self {
        Self {
            failed: moka::sync::Cache::builder()
                .max_capacity(limits.adapter_failures_max)
                .time_to_live(Duration::from_secs(limits.adapter_failure_ttl_s))
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
        let mut memory = self.memory();
        if let Some(weights) = memory.find(generation) {
            let gone = memory.keep(&weights, self.bytes_max);
            drop(memory);
            drop(gone);
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(weights);
        }
        if let Some(flight) = memory.flights.get(&generation).map(Arc::clone) {
            drop(memory);
            self.hits.fetch_add(1, Ordering::Relaxed);
            return flight.wait();
        }
        self.make_room(&mut memory, bytes)?;
        memory.reading += bytes;
        let flight = Arc::new(Flight::default());
        memory.flights.insert(generation, Arc::clone(&flight));
        drop(memory);
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut landing = Landing { cache: self, generation, bytes, flight, loaded: None };
        let loaded = read().map(Arc::new);
        landing.loaded = Some(loaded.clone());
        drop(landing);
        loaded
    }

    /// Sees to it that `bytes` more fit beside all that is alive, at the cache's expense.
    fn make_room(&self, memory: &mut Memory, bytes: u64) -> Result<(), AdapterError> {
        loop {
            let taken = memory.alive_bytes() + memory.reading;
            if taken + bytes <= 2 * self.bytes_max {
                return Ok(());
            }
            if memory.evict().is_none() {
                return Err(AdapterError::LimitReached {
                    limit: "host_cache_bytes",
                    max: self.bytes_max,
                    reason: format!("adapters in use take {taken} bytes of twice this limit; {bytes} more do not fit"),
                    passes: true,
                });
            }
        }
    }

    fn landed(&self, generation: Generation, bytes: u64, loaded: &Loaded) {
        if let Err(error @ AdapterError::Corrupt { .. }) = loaded {
            self.failed.insert(generation, error.clone());
        }
        let mut memory = self.memory();
        memory.reading -= bytes;
        memory.flights.remove(&generation);
        let Ok(weights) = loaded else { return };
        memory.alive.insert(generation, (Arc::downgrade(weights), bytes));
        let gone = memory.keep(weights, self.bytes_max);
        drop(memory);
        drop(gone);
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
        let released = self.memory().take(generation);
        drop(released);
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
        let memory = self.memory();
        CacheStats {
            cached_entries: memory.kept.len() as u64,
            cached_bytes: memory.kept_bytes,
            held_entries: memory.pins.len() as u64,
            held_bytes: memory.pinned_bytes(),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }
}

/// Ends a read for those who wait for it, also where it panicked.
struct Landing<'a> {
    cache: &'a HostCache,
    generation: Generation,
    bytes: u64,
    flight: Arc<Flight>,
    loaded: Option<Loaded>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let panicked = || Err(AdapterError::io("read the adapter")(std::io::Error::other("the reader panicked")));
        let loaded = self.loaded.take().unwrap_or_else(panicked);
        self.cache.landed(self.generation, self.bytes, &loaded);
        self.flight.land(loaded);
    }
}
