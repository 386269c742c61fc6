//! Changes that share a transaction, and so a flush of the disk.
//!
//! The first change begins the transaction, runs, and queues again to commit it; those that queued before it did run in
//! between, one after another, each in a savepoint of its own, so that one that is refused undoes itself alone. All are
//! told after the commit, the refused too: what they were refused for may have been another's that comes to nothing.

use std::sync::Arc;

use sqlx::{Any, AnyConnection, AnyPool, Executor, pool::PoolConnection};
use tokio::sync::watch;

use crate::{
    database::{Kind, overtaken},
    error::AdapterError,
};

type Ended = Result<(), Arc<sqlx::Error>>;

/// An open transaction. Dropped, it is rolled back with its connection.
pub(crate) struct Group {
    connection: PoolConnection<Any>,
    open: bool,
    ended: watch::Sender<Option<Ended>>,
}

impl Group {
    pub(crate) async fn begin(pool: &AnyPool, kind: Kind) -> Result<Self, Arc<sqlx::Error>> {
        let mut connection = pool.acquire().await?;
        let begin = match kind {
            Kind::Sqlite => "BEGIN IMMEDIATE",
            Kind::Postgres => "BEGIN ISOLATION LEVEL SERIALIZABLE",
        };
        connection.execute(begin).await?;
        Ok(Self { connection, open: true, ended: watch::Sender::default() })
    }

    /// For those who wait for the end.
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome(self.ended.subscribe())
    }

    /// Runs `work`, undone where it returns an error.
    ///
    /// # Errors
    /// Where the whole transaction is lost.
    pub(crate) async fn run<T>(
        &mut self,
        work: &impl AsyncFn(&mut AnyConnection) -> Result<T, AdapterError>,
    ) -> Result<Result<T, AdapterError>, Arc<sqlx::Error>> {
        self.connection.execute("SAVEPOINT change").await?;
        let done = work(&mut self.connection).await;
        let end = match done {
            Ok(_) => "RELEASE SAVEPOINT change",
            Err(_) => "ROLLBACK TO SAVEPOINT change; RELEASE SAVEPOINT change",
        };
        match (&done, self.connection.execute(end).await) {
            // A full disk ends a transaction of SQLite by itself, and a lost race dooms one of PostgreSQL.
            (Err(AdapterError::Database { source, .. }), ended) if ended.is_err() || overtaken(source) => {
                Err(Arc::clone(source))
            }
            (_, Err(error)) => Err(error.into()),
            _ => Ok(done),
        }
    }

    pub(crate) async fn commit(mut self) {
        let committed = self.connection.execute("COMMIT").await;
        self.end(committed.map(drop).map_err(Arc::new)).await;
    }

    /// Tells everyone how the transaction ended, after a rollback where that is needed.
    pub(crate) async fn end(mut self, ended: Ended) {
        self.open = ended.is_err() && self.connection.execute("ROLLBACK").await.is_err();
        self.ended.send_replace(Some(ended));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.open {
            self.connection.close_on_drop();
        }
    }
}

/// How a group ends.
pub(crate) struct Outcome(watch::Receiver<Option<Ended>>);

impl Outcome {
    /// Whether the group is still there to be committed.
    pub(crate) fn is_open(&self) -> bool {
        self.0.has_changed().is_ok()
    }

    /// Waits for the end.
    pub(crate) async fn told(&mut self) -> Ended {
        match self.0.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().expect("waited for"),
            // A change panicked and took the transaction along.
            Err(_) => Err(Arc::new(sqlx::Error::WorkerCrashed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, panic::AssertUnwindSafe};

    use futures_util::FutureExt as _;
    use sqlx::query;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        crash_tests::make,
        database::{Database, sqlite_url},
        registry::{self, Quota},
    };

    async fn database() -> (Database, TempDir) {
        let dir = TempDir::new().expect("a temporary folder");
        let db = Database::open(&sqlite_url(&dir.path().join("registry.db"))).await.expect("opened");
        (db, dir)
    }

    async fn add(db: &mut AnyConnection, owner: &str) -> Result<(), AdapterError> {
        let insert = query("INSERT INTO owners (owner, adapters, bytes) VALUES ($1, 0, 0)").bind(owner);
        insert.execute(db).await.map(drop).map_err(AdapterError::database("add an owner"))
    }

    /// What a connection outside the transaction sees.
    async fn owners(db: &Database) -> Vec<String> {
        let rows = query("SELECT owner FROM owners ORDER BY owner").fetch_all(db.reader()).await.expect("read");
        rows.iter().map(|row| sqlx::Row::get(row, "owner")).collect()
    }

    fn refusal() -> AdapterError {
        AdapterError::NotFound { name: "x".into() }
    }

    #[tokio::test]
    async fn changes_that_queue_are_told_after_one_commit_and_a_refused_one_undoes_itself_alone() {
        let (db, _dir) = database().await;
        let told = Cell::new(0);
        let count = |_: &Result<(), AdapterError>| told.set(told.get() + 1);
        // The three queue in this order; the second and third run in the first one's transaction.
        let nothing_yet = async || assert_eq!((owners(&db).await.len(), told.get()), (0, 0));
        let first = db.change("add", async |db| add(db, "first").await);
        let second = db.change("add", async |connection| {
            add(connection, "second").await?;
            nothing_yet().await;
            Err(refusal())
        });
        let third = db.change("add", async |connection| {
            nothing_yet().await;
            add(connection, "third").await
        });
        let (first, second, third) = tokio::join!(first.inspect(count), second.inspect(count), third.inspect(count));
        assert!(first.is_ok() && third.is_ok() && told.get() == 3);
        assert!(matches!(second, Err(AdapterError::NotFound { .. })), "{second:?}");
        assert_eq!(owners(&db).await, ["first", "third"]);
    }

    #[test]
    fn servers_that_change_the_same_row_in_groups_lose_no_change() {
        let dir = TempDir::new().expect("a temporary folder");
        let url = make::postgres_schema(dir.path()).unwrap_or_else(|| sqlite_url(&dir.path().join("registry.db")));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let servers = [0; 2].map(|_| runtime.block_on(Database::open(&url)).expect("opened"));
        let one_more = async |db: &mut AnyConnection| {
            let quota = registry::quota(&mut *db, "o").await?;
            registry::set_quota(db, "o", Quota { adapters: quota.adapters + 1, ..quota }).await
        };
        std::thread::scope(|scope| {
            for server in servers.iter().cycle().take(6) {
                let (runtime, one_more) = (&runtime, &one_more);
                scope.spawn(move || {
                    for _ in 0..20 {
                        runtime.block_on(server.change("count", one_more)).expect("counted");
                    }
                });
            }
        });
        assert_eq!(runtime.block_on(registry::quota(servers[0].reader(), "o")).expect("read").adapters, 120);
    }

    #[tokio::test]
    async fn where_the_commit_fails_all_are_told_and_nothing_is_changed() {
        let (db, _dir) = database().await;
        let first = db.change("add", async |db| add(db, "first").await);
        let second = db.change("name", async |db| {
            let dangling =
                "PRAGMA defer_foreign_keys = ON; INSERT INTO aliases VALUES ('a', 'none', 'o', 0, 0, '[]', '{}')";
            db.execute(dangling).await.map(drop).map_err(AdapterError::database("name"))
        });
        let third = db.change("refuse", async |_| Err::<(), _>(refusal()));
        let (first, second, third) = tokio::join!(first, second, third);
        for (told, action) in [(first, "add"), (second, "name"), (third, "refuse")] {
            let error = told.expect_err(action).to_string();
            assert!(error.contains(&format!("could not {action}")) && error.contains("FOREIGN KEY"), "{error}");
        }
        db.change("add", async |db| add(db, "next").await).await.expect("the next transaction is another");
        assert_eq!(owners(&db).await, ["next"]);
    }

    #[tokio::test]
    async fn a_full_disk_fails_the_changes_of_its_transaction_and_no_later_one() {
        let (db, _dir) = database().await;
        let first = db.change("add", async |db| add(db, "first").await);
        let second = db.change("fill", async |db| {
            // Taken as the number of pages there are; the next one is refused as on a full disk.
            db.execute("PRAGMA max_page_count = 1").await.map_err(AdapterError::database("limit"))?;
            let mut added = Ok(());
            for i in 0..100 {
                added = added.and(add(db, &format!("{i}{}", "x".repeat(4_000))).await);
            }
            db.execute("PRAGMA max_page_count = 4294967294").await.map_err(AdapterError::database("unlimit"))?;
            added
        });
        let third = db.change("add", async |db| add(db, "third").await);
        let (first, second, third) = tokio::join!(first, second, third);
        // SQLite has ended the transaction by itself, and with it the first change.
        for told in [first, second] {
            let error = told.expect_err("full").to_string();
            assert!(error.contains("full"), "{error}");
        }
        third.expect("in a transaction of its own");
        db.change("add", async |db| add(db, "next").await).await.expect("there is room again");
        assert_eq!(owners(&db).await, ["next", "third"]);
    }

    #[tokio::test]
    async fn a_change_that_panics_takes_its_transaction_along_and_no_later_one() {
        let (db, _dir) = database().await;
        let first = db.change("add", async |db| add(db, "first").await);
        let second =
            AssertUnwindSafe(db.change("panic", async |_| -> Result<(), AdapterError> { panic!("on purpose") }));
        let third = db.change("add", async |db| add(db, "third").await);
        let (first, second, third) = tokio::join!(first, second.catch_unwind(), third);
        assert!(matches!(first, Err(AdapterError::Database { .. })) && second.is_err() && third.is_ok());
        assert_eq!(owners(&db).await, ["third"]);
    }
}
