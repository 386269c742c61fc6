//! Removes files that no generation names: what a crash left on its way in, and what was let go of.
//!
//! Where database or store are other servers' too, nobody can tell whose registration is still on its way or whose
//! requests still read: there files wait for [`STAGED_GRACE_S`] and [`REMOVED_GRACE_S`].

use std::{sync::Arc, time::UNIX_EPOCH};

use openlora_database::{Database, kill};
use tracing::warn;

use crate::{error::AdapterError, files::Files, lease::Leases, registry};

/// How long another server's registration may take to put its files.
const STAGED_GRACE_S: i64 = 3_600;
/// How long another server's requests may take to read files that were let go of.
const REMOVED_GRACE_S: i64 = 600;
/// Rows read at a time.
const PAGE: i64 = 256;

/// The parts of the store that outlive a call.
pub(crate) struct Core {
    pub(crate) db: Database,
    pub(crate) files: Files,
    pub(crate) leases: Arc<Leases>,
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() as i64)
}

/// Removes what the last process left behind.
pub(crate) async fn recover(core: &Core) -> Result<(), AdapterError> {
    let shared = core.db.is_shared() && core.files.is_shared();
    let removed = sweep(core, if shared { now() - STAGED_GRACE_S } else { i64::MAX }).await?;
    if removed > 0 {
        warn!(removed, "removed adapters' files that were unfinished or let go of");
    }
    Ok(())
}

/// Removes what was let go of, but for files that leases keep.
pub(crate) async fn let_go(core: &Core) {
    // No staged row is as old as this: what is on its way in stays.
    if let Err(error) = sweep(core, -1).await {
        // The change itself is done and durable; a later sweep removes the files.
        warn!(%error, "could not remove files that no adapter needs");
    }
}

/// Removes files whenever the last lease on them ends.
pub(crate) async fn run(core: Arc<Core>) {
    loop {
        core.leases.released.notified().await;
        let_go(&core).await;
    }
}

async fn sweep(core: &Core, staged_before: i64) -> Result<u64, AdapterError> {
    let shared = core.db.is_shared() && core.files.is_shared();
    let removed_before = if shared { now() - REMOVED_GRACE_S } else { i64::MAX };
    let (mut after, mut removed) = (String::new(), 0);
    loop {
        let page = registry::loose(&core.db, &after, (removed_before, staged_before), PAGE).await?;
        let Some(last) = page.last() else { return Ok(removed) };
        after = last.location.clone();
        for loose in &page {
            if !core.leases.doom(loose.generation) {
                remove(core, &loose.location).await?;
                removed += 1;
            }
        }
    }
}

/// Removes the files of a loose location, then its row: a crash in between leaves the row.
pub(crate) async fn remove(core: &Core, location: &str) -> Result<(), AdapterError> {
    core.files.remove(location).await?;
    kill::point("between files and row");
    registry::swept(&core.db, location).await
}
