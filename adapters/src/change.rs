//! The store's changes of the registry: who may, what is checked, and what follows. Each is one transaction.

use openlora_database::kill;
use openlora_types::{Alias, Generation};
use sqlx::AnyConnection;
use tempfile::TempDir;
use tracing::warn;

use crate::{
    error::AdapterError,
    info::{Actor, AdapterInfo, Registration},
    registry::{self, Known, Lineage, Quota, Record},
    store::{AdapterStore, Inner, missing},
    sweep::{self, Core},
};

/// What an alias is to become.
struct Pointing<'a> {
    alias: &'a Alias,
    known: &'a Known,
    tags: &'a [String],
    lineage: Lineage,
}

/// What a change did.
struct Done {
    record: Record,
    /// A pinned generation that an alias stood for and no longer does.
    unpinned: Option<Generation>,
    /// Generations that nothing names any more.
    gone: Vec<Generation>,
}

impl AdapterStore {
    /// Takes the alias away, with its history; files that no other alias names go too, with the last lease on them.
    ///
    /// # Errors
    /// [`AdapterError::NotFound`], [`AdapterError::PermissionDenied`], [`AdapterError::Database`].
    pub fn unregister(&self, alias: &str, actor: &Actor) -> Result<Generation, AdapterError> {
        let inner = &self.inner;
        let done = inner.block_on(inner.core.db.change("unregister the adapter", async |db| {
            let record = owned(db, alias, actor).await?;
            let named = registry::remove(db, &record).await?;
            inner.charge(db, &record.owner, -1, (record.current.summary.bytes, 0)).await?;
            let gone = registry::collect(db, &named, sweep::now()).await?;
            let unpinned = record.pinned.then_some(record.current.generation);
            kill::point("before the commit");
            Ok::<_, AdapterError>(Done { record, unpinned, gone })
        }))?;
        kill::point("after the commit");
        let generation = done.record.current.generation;
        inner.block_on(inner.settle(&done, false));
        Ok(generation)
    }

    /// Points `alias` at a generation that is here already: one the alias remembers, or one of another alias that the
    /// actor may change. `expected` is what the alias must stand for now; `None`: it must be new.
    ///
    /// # Errors
    /// [`AdapterError::AlreadyExists`], [`AdapterError::Conflict`], [`AdapterError::NotFound`],
    /// [`AdapterError::PermissionDenied`], [`AdapterError::LimitReached`], [`AdapterError::Database`].
    pub fn set_alias(
        &self,
        alias: &Alias,
        generation: Generation,
        expected: Option<Generation>,
        actor: &Actor,
    ) -> Result<AdapterInfo, AdapterError> {
        let inner = &self.inner;
        let done = inner.block_on(inner.core.db.change("point the alias elsewhere", async |db| {
            let old = match expected {
                None => inner.may_write(db, alias, actor, false).await?,
                Some(expected) => {
                    let record = owned(db, alias.as_str(), actor).await?;
                    let found = record.current.generation;
                    if found != expected {
                        return Err(AdapterError::Conflict { alias: alias.to_string(), expected, found });
                    }
                    Some(record)
                }
            };
            // A hash alone gives no access.
            let owner = (!actor.admin).then_some(actor.name.as_str());
            let lineage = registry::lineage_of(db, alias, generation, owner).await?;
            let known = registry::generation(&mut *db, generation).await?;
            let (Some(lineage), Some(known)) = (lineage, known) else {
                return Err(missing(&format!("{alias}@{generation}")));
            };
            inner.point(db, Pointing { alias, known: &known, tags: &[], lineage }, old, actor).await
        }))?;
        inner.block_on(inner.settle(&done, false));
        Ok(inner.info(done.record))
    }

    /// Keeps what `alias` stands for in memory (it is read now), or lets it go again. A pin follows its alias.
    ///
    /// # Errors
    /// As [`Self::resolve`] and [`crate::Lease::load`], and [`AdapterError::PermissionDenied`],
    /// [`AdapterError::LimitReached`] for `pins_max` or for half of `host_cache_bytes`.
    pub fn pin(&self, alias: &str, pinned: bool, actor: &Actor) -> Result<AdapterInfo, AdapterError> {
        let inner = &self.inner;
        let allowed = async { owned(&mut *inner.connection().await?, alias, actor).await };
        let record = inner.block_on(allowed)?;
        if pinned && !record.pinned {
            inner.block_on(async { inner.check_pins(&mut *inner.connection().await?, &record.owner).await })?;
        }
        let weights = if pinned { Some(self.resolve(alias)?.load()?) } else { None };
        if let Some(weights) = &weights {
            inner.cache.pin(weights)?;
        }
        let done = inner.block_on(inner.core.db.change("pin the adapter", async |db| {
            let mut record = owned(db, alias, actor).await?;
            if pinned && !record.pinned {
                inner.check_pins(db, &record.owner).await?;
            }
            record.pinned = pinned;
            registry::update(db, &record).await?;
            Ok::<_, AdapterError>(record)
        }));
        inner.names.changed(alias);
        // Undoes the pin where the record could not be written, and does it where it was taken away.
        let touched = weights.map(|weights| weights.generation);
        let current = done.as_ref().ok().map(|record| record.current.generation);
        for generation in touched.into_iter().chain(current) {
            inner.block_on(inner.unpin_unless_wanted(generation));
        }
        done.map(|record| inner.info(record))
    }

    /// Bounds what `owner` may have; `None` leaves a bound to the configuration.
    ///
    /// # Errors
    /// [`AdapterError::QuotaDenied`] for anybody but administrators, [`AdapterError::Database`].
    pub fn set_quota(
        &self,
        owner: &str,
        adapters_max: Option<u64>,
        bytes_max: Option<u64>,
        actor: &Actor,
    ) -> Result<Quota, AdapterError> {
        if !actor.admin {
            return Err(AdapterError::QuotaDenied { owner: owner.to_owned() });
        }
        self.inner.block_on(self.inner.core.db.change("set the quota", async |db| {
            let quota = Quota { adapters_max, bytes_max, ..registry::quota(&mut *db, owner).await? };
            registry::set_quota(db, owner, quota).await?;
            Ok(quota)
        }))
    }
}

impl Inner {
    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Any>, AdapterError> {
        self.core.db.reader().acquire().await.map_err(AdapterError::database("reach the registry's database"))
    }

    /// Refuses early what the registration's own transaction would refuse, before anything is copied.
    pub(crate) fn may_begin(
        &self,
        alias: &Alias,
        actor: &Actor,
        registration: &Registration,
    ) -> Result<(), AdapterError> {
        registration.check(&self.limits)?;
        self.block_on(async {
            self.may_write(&mut *self.connection().await?, alias, actor, registration.replace).await.map(drop)
        })
    }

    /// Whether `actor` may point `alias` at something; returns what it stands for now.
    async fn may_write(
        &self,
        db: &mut AnyConnection,
        alias: &Alias,
        actor: &Actor,
        replace: bool,
    ) -> Result<Option<Record>, AdapterError> {
        let taken = |reason| AdapterError::AlreadyExists { alias: alias.to_string(), reason };
        if alias.as_str() == self.shape.name {
            return Err(taken("is the base model's own name; choose another"));
        }
        match registry::find(&mut *db, alias.as_str()).await? {
            Some(_) if !replace => Err(taken("is taken; ask to replace it, or choose another")),
            Some(record) if !actor.may_change(&record.owner) => {
                Err(AdapterError::PermissionDenied { alias: alias.to_string() })
            }
            Some(record) => Ok(Some(record)),
            None => {
                let (count, max) = (registry::aliases(&mut *db).await?, self.limits.adapters_max as u64);
                refuse_over("adapters_max", max, count + 1, || {
                    format!("{count} aliases are registered; unregister one first")
                })?;
                Ok(None)
            }
        }
    }

    /// Verifies a staged folder and publishes it under `alias`.
    pub(crate) fn admit(
        &self,
        staged: TempDir,
        alias: &Alias,
        actor: &Actor,
        registration: &Registration,
    ) -> Result<AdapterInfo, AdapterError> {
        let known = self.verify(&staged)?;
        self.block_on(async {
            let published = self.place(staged, &known, alias, actor, registration).await;
            if published.is_err()
                && let Err(error) = self.take_back(&known.location).await
            {
                warn!(%error, "could not remove the files of a registration that failed; the next start does");
            }
            let (done, loosened) = published?;
            self.cache.forgive(known.generation);
            self.settle(&done, loosened).await;
            Ok(self.info(done.record))
        })
    }

    /// Notes where the files go, puts them there and publishes them.
    async fn place(
        &self,
        staged: TempDir,
        known: &Known,
        alias: &Alias,
        actor: &Actor,
        registration: &Registration,
    ) -> Result<(Done, bool), AdapterError> {
        let Core { db, files, .. } = &*self.core;
        // The disk does both at once.
        let note = registry::stage(db, &known.location, known.generation, sweep::now());
        let (noted, flushed) = tokio::join!(note, files.flush(&staged));
        noted.and(flushed)?;
        kill::point("before the files");
        files.put(staged, &known.location).await?;
        kill::point("after the files");
        self.publish(known, alias, actor, registration).await
    }

    async fn publish(
        &self,
        known: &Known,
        alias: &Alias,
        actor: &Actor,
        registration: &Registration,
    ) -> Result<(Done, bool), AdapterError> {
        let change = self.core.db.change("register the adapter", async |db| {
            let old = self.may_write(db, alias, actor, registration.replace).await?;
            let loosened = registry::publish(db, known, sweep::now()).await?;
            let same = old.as_ref().filter(|old| old.current.generation == known.generation);
            let lineage = match same {
                // Fresh files for what the alias stands for already: where it came from stays unless said anew.
                Some(old) if registration.lineage == Lineage::default() => old.lineage.clone(),
                _ => registration.lineage.clone(),
            };
            let pointing = Pointing { alias, known, tags: &registration.tags, lineage };
            let done = self.point(db, pointing, old, actor).await?;
            kill::point("before the commit");
            Ok::<_, AdapterError>((done, loosened))
        });
        let published = change.await?;
        kill::point("after the commit");
        Ok(published)
    }

    /// Removes the files of a registration that failed, unless its transaction took effect all the same.
    async fn take_back(&self, location: &str) -> Result<(), AdapterError> {
        if registry::is_loose(&self.core.db, location).await? {
            sweep::remove(&self.core, location).await?;
        }
        Ok(())
    }

    /// Writes the alias's new record and lets go of what only the old one named.
    async fn point(
        &self,
        db: &mut AnyConnection,
        to: Pointing<'_>,
        old: Option<Record>,
        actor: &Actor,
    ) -> Result<Done, AdapterError> {
        let (known, now) = (to.known, sweep::now());
        let tags = to.tags.to_vec();
        let Some(old) = old else {
            let record = Record {
                alias: to.alias.to_string(),
                owner: actor.name.clone(),
                created_unix_s: u64::try_from(now).unwrap_or(0),
                pinned: false,
                tags,
                lineage: to.lineage,
                current: known.clone(),
            };
            self.charge(db, &record.owner, 1, (0, known.summary.bytes)).await?;
            registry::insert(db, &record).await?;
            return Ok(Done { record, unpinned: None, gone: Vec::new() });
        };
        let moved = old.current.generation != known.generation;
        let mut gone = Vec::new();
        let record = Record {
            tags: if tags.is_empty() { old.tags.clone() } else { tags },
            lineage: to.lineage,
            current: known.clone(),
            ..old.clone()
        };
        registry::update(db, &record).await?;
        if moved {
            self.charge(db, &old.owner, 0, (old.current.summary.bytes, known.summary.bytes)).await?;
            let history = self.limits.alias_history_max;
            let dropped = registry::remember(db, &old, known.generation, history).await?;
            gone = registry::collect(db, &dropped, now).await?;
        }
        let unpinned = (moved && old.pinned).then_some(old.current.generation);
        Ok(Done { record, unpinned, gone })
    }

    /// What follows a change that is done: memory is told, and files that nothing names any more go.
    async fn settle(&self, done: &Done, loosened: bool) {
        self.names.changed(&done.record.alias);
        for &generation in &done.gone {
            self.cache.forget(generation);
        }
        if let Some(generation) = done.unpinned {
            self.unpin_unless_wanted(generation).await;
        }
        if loosened || !done.gone.is_empty() {
            sweep::let_go(&self.core).await;
        }
    }

    /// Counts an owner's aliases by `adapters` more and their bytes from `bytes.0` to `bytes.1`, within their bounds.
    async fn charge(
        &self,
        db: &mut AnyConnection,
        owner: &str,
        adapters: i64,
        (less, more): (u64, u64),
    ) -> Result<(), AdapterError> {
        let old = registry::quota(&mut *db, owner).await?;
        let new = Quota {
            adapters: old.adapters.saturating_add_signed(adapters),
            bytes: old.bytes.saturating_sub(less) + more,
            ..old
        };
        if new.adapters > old.adapters {
            let max = old.adapters_max.unwrap_or(self.limits.owner_adapters_max);
            refuse_over("owner_adapters_max", max, new.adapters, || {
                format!("{owner} has {} aliases; unregister one first", old.adapters)
            })?;
        }
        if new.bytes > old.bytes {
            let max = old.bytes_max.unwrap_or(self.limits.owner_bytes_max);
            refuse_over("owner_bytes_max", max, new.bytes, || {
                format!(
                    "the adapters of {owner} take {} bytes and {more} more do not fit; unregister one first",
                    old.bytes
                )
            })?;
        }
        registry::set_quota(db, owner, new).await
    }

    async fn check_pins(&self, db: &mut AnyConnection, owner: &str) -> Result<(), AdapterError> {
        let (pins, max) = (registry::pins(db, owner).await?, self.limits.pins_max as u64);
        refuse_over("pins_max", max, pins + 1, || format!("{owner} has {pins} pins; let one go first"))
    }
}

async fn owned(db: &mut AnyConnection, alias: &str, actor: &Actor) -> Result<Record, AdapterError> {
    let record = registry::find(db, alias).await?.ok_or_else(|| missing(alias))?;
    if actor.may_change(&record.owner) {
        return Ok(record);
    }
    Err(AdapterError::PermissionDenied { alias: record.alias })
}

fn refuse_over(
    limit: &'static str,
    max: u64,
    wanted: u64,
    reason: impl FnOnce() -> String,
) -> Result<(), AdapterError> {
    if wanted <= max {
        return Ok(());
    }
    Err(AdapterError::LimitReached { limit, max, reason: reason(), passes: false })
}
