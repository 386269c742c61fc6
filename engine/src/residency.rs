//! Adapters on the device: loaded by whoever submits a request for one, never by the step thread; kept, least recently
//! used first to go, while their bytes and those that requests still hold fit the budget.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openlora_types::Generation;

use crate::EngineError;

/// An adapter on the device. Its bytes count until the last holder lets go.
pub(crate) struct Resident<A> {
    pub(crate) adapter: A,
    bytes: usize,
    live_bytes: Arc<AtomicUsize>,
}

impl<A> Drop for Resident<A> {
    fn drop(&mut self) {
        self.live_bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

pub(crate) struct Residency<A> {
    bytes_max: usize,
    live_bytes: Arc<AtomicUsize>,
    // Serialises loads: at most one adapter exceeds the budget for the time of its check, and two requests for the same
    // generation load it once.
    loading: Mutex<()>,
    entries: Mutex<Entries<A>>,
}

struct Entries<A> {
    by_generation: HashMap<Generation, Entry<A>>,
    uses: u64,
    loads: u64,
    evictions: u64,
}

struct Entry<A> {
    resident: Arc<Resident<A>>,
    last_use: u64,
}

impl<A> Entry<A> {
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.resident) == 1
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ResidencyStats {
    pub(crate) adapters: usize,
    pub(crate) bytes: usize,
    pub(crate) loads: u64,
    pub(crate) evictions: u64,
}

impl<A> Residency<A> {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let entries = Entries { by_generation: HashMap::new(), uses: 0, loads: 0, evictions: 0 };
        Self { bytes_max, live_bytes: Arc::default(), loading: Mutex::new(()), entries: Mutex::new(entries) }
    }

    /// The resident adapter, brought in by `load` (which also says its size) where it is not there yet.
    pub(crate) fn get_or_load(
        &self,
        generation: Generation,
        load: impl FnOnce() -> Result<(A, usize), EngineError>,
    ) -> Result<Arc<Resident<A>>, EngineError> {
        if let Some(resident) = self.lock().touch(generation) {
            return Ok(resident);
        }
        let _turn = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resident) = self.lock().touch(generation) {
            return Ok(resident);
        }
        let (adapter, bytes) = load()?;
        if bytes > self.bytes_max {
            let why = format!(
                "it takes {bytes} bytes on the device and the limit engine.adapter_bytes is {}",
                self.bytes_max
            );
            return Err(EngineError::Adapter(why));
        }
        self.live_bytes.fetch_add(bytes, Ordering::AcqRel);
        let resident = Arc::new(Resident { adapter, bytes, live_bytes: Arc::clone(&self.live_bytes) });
        let mut entries = self.lock();
        // Idle adapters go only where that makes room enough. What requests let go of meanwhile only makes more.
        let used = self.live_bytes.load(Ordering::Acquire).saturating_sub(entries.idle_bytes() + bytes);
        if used + bytes > self.bytes_max {
            return Err(EngineError::AdapterMemory { needed: bytes, used, max: self.bytes_max });
        }
        while self.live_bytes.load(Ordering::Acquire) > self.bytes_max && entries.evict_one() {}
        entries.loads += 1;
        entries.uses += 1;
        let entry = Entry { resident: Arc::clone(&resident), last_use: entries.uses };
        entries.by_generation.insert(generation, entry);
        Ok(resident)
    }

    pub(crate) fn stats(&self) -> ResidencyStats {
        let entries = self.lock();
        ResidencyStats {
            adapters: entries.by_generation.len(),
            bytes: self.live_bytes.load(Ordering::Acquire),
            loads: entries.loads,
            evictions: entries.evictions,
        }
    }

    // The map is consistent between any two statements, so a panic elsewhere while it was held does no harm.
    fn lock(&self) -> MutexGuard<'_, Entries<A>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A> Entries<A> {
    fn touch(&mut self, generation: Generation) -> Option<Arc<Resident<A>>> {
        self.uses += 1;
        let uses = self.uses;
        let entry = self.by_generation.get_mut(&generation)?;
        entry.last_use = uses;
        Some(Arc::clone(&entry.resident))
    }

    /// Bytes of the adapters that no request holds. None of them can be taken while this is borrowed.
    fn idle_bytes(&self) -> usize {
        self.by_generation.values().filter(|entry| entry.is_idle()).map(|entry| entry.resident.bytes).sum()
    }

    /// Drops the least recently used adapter that no request holds.
    fn evict_one(&mut self) -> bool {
        let idle = self.by_generation.iter().filter(|(_, entry)| entry.is_idle());
        let Some(generation) = idle.min_by_key(|(_, entry)| entry.last_use).map(|(generation, _)| *generation) else {
            return false;
        };
        self.by_generation.remove(&generation);
        self.evictions += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(n: u8) -> Generation {
        Generation([n; 32])
    }

    fn load(residency: &Residency<u8>, n: u8, bytes: usize) -> Result<Arc<Resident<u8>>, EngineError> {
        residency.get_or_load(generation(n), || Ok((n, bytes)))
    }

    #[test]
    fn the_least_recently_used_idle_adapter_makes_room() {
        let residency = Residency::new(100);
        let held = load(&residency, 1, 40).unwrap();
        drop(load(&residency, 2, 30).unwrap());
        drop(load(&residency, 3, 30).unwrap());
        drop(residency.get_or_load(generation(2), || panic!("2 is resident")).unwrap());
        drop(load(&residency, 4, 20).unwrap());
        let stats = residency.stats();
        assert_eq!(stats, ResidencyStats { adapters: 3, bytes: 90, loads: 4, evictions: 1 });
        drop(residency.get_or_load(generation(2), || panic!("3 was older than 2")).unwrap());
        assert_eq!(held.adapter, 1);
    }

    #[test]
    fn adapters_that_requests_hold_are_never_dropped_and_a_full_device_is_an_error() {
        let residency = Residency::new(100);
        let held = load(&residency, 1, 80).unwrap();
        let Err(EngineError::AdapterMemory { needed: 30, used: 80, max: 100 }) = load(&residency, 2, 30).map(|_| ())
        else {
            panic!("80 + 30 bytes do not fit 100");
        };
        assert_eq!(residency.stats().bytes, 80, "the refused adapter is gone");
        drop(held);
        load(&residency, 2, 30).unwrap();
        assert_eq!(residency.stats(), ResidencyStats { adapters: 1, bytes: 30, loads: 2, evictions: 1 });
    }

    #[test]
    fn an_adapter_that_cannot_fit_drives_no_other_out() {
        let residency = Residency::new(100);
        let _held = load(&residency, 1, 60).unwrap();
        drop(load(&residency, 2, 30).unwrap());
        let Err(EngineError::AdapterMemory { needed: 50, used: 60, max: 100 }) = load(&residency, 3, 50).map(|_| ())
        else {
            panic!("60 bytes in use and 50 more do not fit 100");
        };
        // Larger than the device: waiting cannot help, so this is not the retryable error.
        assert!(matches!(load(&residency, 4, 101).map(|_| ()), Err(EngineError::Adapter(_))));
        assert_eq!(residency.stats(), ResidencyStats { adapters: 2, bytes: 90, loads: 2, evictions: 0 });
    }

    #[test]
    fn a_failed_load_leaves_nothing_behind() {
        let residency: Residency<u8> = Residency::new(100);
        let failed = residency.get_or_load(generation(1), || Err(EngineError::Adapter("broken".into())));
        assert!(matches!(failed, Err(EngineError::Adapter(_))));
        assert_eq!(residency.stats(), ResidencyStats { adapters: 0, bytes: 0, loads: 0, evictions: 0 });
    }
}
