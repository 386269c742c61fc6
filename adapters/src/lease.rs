//! A request's hold on a generation, before and after its weights are read.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openlora_types::{AdapterSizes, AdapterWeights, Generation};
use tokio::sync::Notify;

use crate::{error::AdapterError, names::Named, registry::Known, store::Inner};

/// A request's hold on one generation: while any lease lives, its files stay where they are, whatever happens to the
/// alias. It holds no weights: [`Self::load`] gives them. Clone it for each holder; each is counted.
#[derive(Clone)]
pub struct Lease {
    known: Arc<Known>,
    owner: Arc<str>,
    /// Whether the alias was pinned: then the first load keeps the weights in memory.
    pinned: bool,
    store: Arc<Inner>,
    _hold: Hold,
}

impl Lease {
    pub(crate) fn new(store: Arc<Inner>, named: Named) -> Self {
        let hold = store.core.leases.hold(named.known.generation);
        Self { known: named.known, owner: named.owner, pinned: named.pinned, store, _hold: hold }
    }

    /// The generation's identity.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.known.generation
    }

    /// Who owns the alias that it was asked for by.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The sizes of its sites.
    #[must_use]
    pub fn sizes(&self) -> &Arc<AdapterSizes> {
        &self.known.summary.sizes
    }

    /// Bytes of its factors in host memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.known.summary.bytes
    }

    /// The weights: from the host cache, or read from the store and verified, once for all who ask at the same time.
    /// Blocks; not to be called on a thread that runs async tasks.
    ///
    /// # Errors
    /// [`AdapterError::Corrupt`] where the files are damaged or gone, remembered for `adapter_failure_ttl_s`;
    /// [`AdapterError::LimitReached`] where weights in use fill the memory, which passes; [`AdapterError::Io`] and
    /// [`AdapterError::Database`] where store or registry do not answer.
    pub fn load(&self) -> Result<Arc<AdapterWeights>, AdapterError> {
        self.store.load(&self.known, self.pinned)
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("generation", &self.generation()).finish_non_exhaustive()
    }
}

/// Counts the leases of this process. Only leased generations take memory.
#[derive(Default)]
pub(crate) struct Leases {
    counts: Mutex<HashMap<Generation, Count>>,
    /// Told when the last lease on a generation ends whose files wait to be removed.
    pub(crate) released: Notify,
}

#[derive(Default)]
struct Count {
    leases: u32,
    /// Whether the files are to be removed when the last lease ends.
    doomed: bool,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, HashMap<Generation, Count>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(self: &Arc<Self>, generation: Generation) -> Hold {
        self.lock().entry(generation).or_default().leases += 1;
        Hold { leases: Arc::clone(self), generation }
    }

    pub(crate) fn of(&self, generation: Generation) -> u32 {
        self.lock().get(&generation).map_or(0, |count| count.leases)
    }

    pub(crate) fn total(&self) -> u64 {
        self.lock().values().map(|count| u64::from(count.leases)).sum()
    }

    /// Whether `generation` is leased; then the last lease's end is told.
    pub(crate) fn doom(&self, generation: Generation) -> bool {
        let mut counts = self.lock();
        let found = counts.get_mut(&generation);
        found.map(|count| count.doomed = true).is_some()
    }
}

struct Hold {
    leases: Arc<Leases>,
    generation: Generation,
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.leases.hold(self.generation)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut counts = self.leases.lock();
        let count = counts.get_mut(&self.generation).expect("a generation with holders is counted");
        count.leases -= 1;
        if count.leases == 0 {
            let doomed = count.doomed;
            counts.remove(&self.generation);
            if doomed {
                self.leases.released.notify_one();
            }
        }
    }
}
