//! What callers say to the store, and what it tells them.

use openlora_types::{Generation, InvalidField, Limits};

use crate::registry::{Lineage, check_words};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The name that aliases are owned under.
    pub name: String,
    /// Whether they may see and change everybody's.
    pub admin: bool,
}

impl Actor {
    pub(crate) fn may_change(&self, owner: &str) -> bool {
        self.admin || self.name == owner
    }
}

/// How an adapter is registered. A bool converts to one that may replace, or not, and says nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Whether an alias that is taken is pointed at the new adapter.
    pub replace: bool,
    /// Words to find it by; empty: those the alias has.
    pub tags: Vec<String>,
    /// Where it came from.
    pub lineage: Lineage,
}

impl From<bool> for Registration {
    fn from(replace: bool) -> Self {
        Self { replace, ..Self::default() }
    }
}

impl Registration {
    pub(crate) fn check(&self, limits: &Limits) -> Result<(), InvalidField> {
        check_words("tags", &self.tags, limits)?;
        self.lineage.check(limits)
    }
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
    /// Words its owner gave it.
    pub tags: Vec<String>,
    /// Where it came from.
    pub lineage: Lineage,
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
    /// Generations that pins hold in memory.
    pub held_entries: u64,
    /// Bytes of those; at most half of `host_cache_bytes`.
    pub held_bytes: u64,
    /// Leases out.
    pub leases: u64,
    /// Loads that did not read the store.
    pub hits: u64,
    /// Loads that read the store.
    pub misses: u64,
}
