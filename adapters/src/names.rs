//! What names were found to stand for: a bounded memory in front of the registry.
//!
//! A change made through this store is seen at once by the next lookup here. Where the database is shared, another
//! server's change is seen when the entry is [`SHARED_TTL`] old.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use openlora_types::Limits;

use crate::registry::Known;

/// How long an entry is believed where other servers change the registry too.
const SHARED_TTL: Duration = Duration::from_secs(1);

/// What an alias stands for, whose it is, and whether it is pinned.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) known: Arc<Known>,
    pub(crate) owner: Arc<str>,
    pub(crate) pinned: bool,
}

pub(crate) struct Names {
    found: moka::sync::Cache<String, Named>,
    /// Counts changes of the registry, so that a lookup from before one is not kept after it.
    epoch: Mutex<u64>,
}

impl Names {
    pub(crate) fn new(limits: &Limits, shared: bool) -> Self {
        let found = moka::sync::Cache::builder().max_capacity(limits.names_cached_max);
        let found = if shared { found.time_to_live(SHARED_TTL).build() } else { found.build() };
        Self { found, epoch: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many changes there were; taken before a lookup.
    pub(crate) fn epoch(&self) -> u64 {
        *self.lock()
    }

    pub(crate) fn get(&self, alias: &str) -> Option<Named> {
        self.found.get(alias)
    }

    /// Keeps what a lookup found that began at `epoch`.
    pub(crate) fn keep(&self, alias: &str, named: &Named, epoch: u64) {
        let now = self.lock();
        if *now == epoch {
            self.found.insert(alias.to_owned(), named.clone());
        }
    }

    /// Forgets `alias`, which has changed.
    pub(crate) fn changed(&self, alias: &str) {
        let mut now = self.lock();
        *now += 1;
        self.found.invalidate(alias);
    }
}
