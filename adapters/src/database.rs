//! The registry's database: a SQLite file by default, PostgreSQL by URL, one set of statements for both.
//!
//! Every change sees the database as if it were alone: SQLite lets one writer in at a time (`BEGIN IMMEDIATE`), PostgreSQL
//! runs it serializable, and it is tried again where another got in between. So "read what the alias stands for, decide,
//! write" is a compare-and-swap, whoever else changes it: threads here or other servers.
//!
//! SQLite writes ahead (WAL) and flushes each commit (`synchronous = FULL`): what was answered survives a power failure.
//! A flush takes longer than a change, so changes that queue while one commits share the next commit (`group.rs`).

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    AnyConnection, AnyPool, Executor,
    any::AnyPoolOptions,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};
use tokio::sync::Mutex;

use crate::{error::AdapterError, group::Group};

/// Connections held at once; readers of a SQLite file do not wait for its writer.
const CONNECTIONS_MAX: u32 = 8;
/// KiB of pages that each connection to a SQLite file keeps; the system keeps the rest of the file while there is room.
const SQLITE_CACHE_KIB: u32 = 512;
/// How long a call waits for a connection.
const ACQUIRE: Duration = Duration::from_secs(10);
/// How long a statement waits for another process that writes to the SQLite file.
const BUSY_MS: u32 = 5_000;
/// How often a transaction is tried that others got in between of.
const TRIES: usize = 16;

/// Every schema there was, oldest first: version, name, SQLite, PostgreSQL. Released ones are never edited.
const MIGRATIONS: &[(i64, &str, &str, &str)] = &[(
    1,
    "registry",
    include_str!("../migrations/sqlite/0001_registry.sql"),
    include_str!("../migrations/postgres/0001_registry.sql"),
)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// The open database.
pub(crate) struct Database {
    pool: AnyPool,
    kind: Kind,
    /// Writers of this process queue here, in order: SQLite would make them nap up to 100 ms, PostgreSQL run them again.
    /// Holds the transaction that is open between two of them.
    turn: Mutex<Option<Group>>,
}

impl Database {
    /// Opens the database at `url` and brings its tables up to date.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] for a URL of another kind, [`AdapterError::Database`] where it cannot be reached or
    /// written, or has been used by a newer release.
    pub(crate) async fn open(url: &str) -> Result<Self, AdapterError> {
        let kind = match url.split_once(':') {
            Some(("sqlite", _)) => Kind::Sqlite,
            Some(("postgres" | "postgresql", _)) => Kind::Postgres,
            // The URL may hold a password, so it is not repeated.
            _ => {
                let why = "must begin with sqlite: or postgres:, or be empty for a SQLite file in the data folder";
                return Err(AdapterError::invalid("adapters.database_url", why));
            }
        };
        sqlx::any::install_default_drivers();
        let options = AnyPoolOptions::new().max_connections(CONNECTIONS_MAX).acquire_timeout(ACQUIRE);
        // A connection to a file does not break while nobody looks.
        let options = options.test_before_acquire(kind == Kind::Postgres);
        let options = options.after_connect(move |connection, _| Box::pin(prepare(connection, kind)));
        let pool = options.connect(url).await.map_err(AdapterError::database("open the registry's database"))?;
        let database = Self { pool, kind, turn: Mutex::default() };
        database.migrate().await?;
        Ok(database)
    }

    async fn migrate(&self) -> Result<(), AdapterError> {
        let migrations = MIGRATIONS.iter().map(|&(version, name, sqlite, postgres)| {
            let sql = if self.kind == Kind::Sqlite { sqlite } else { postgres };
            Migration::new(version, name.into(), MigrationType::Simple, sql.into(), false)
        });
        let migrator = Migrator { migrations: migrations.collect(), ..Migrator::DEFAULT };
        let newest = MIGRATIONS.last().map_or(0, |migration| migration.0);
        migrator.run(&self.pool).await.map_err(|error| {
            let source = match error {
                MigrateError::VersionMissing(found) => sqlx::Error::Configuration(
                    format!(
                        "its tables have version {found} and this program knows them up to version {newest}; start the \
                         newer release that made them, or restore a backup from before it"
                    )
                    .into(),
                ),
                MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error,
                other => sqlx::Error::Migrate(Box::new(other)),
            };
            AdapterError::database("bring the registry's tables up to date")(source)
        })
    }

    /// Whether other servers may use the database too.
    pub(crate) fn is_shared(&self) -> bool {
        self.kind == Kind::Postgres
    }

    /// For statements that only read.
    pub(crate) fn reader(&self) -> &AnyPool {
        &self.pool
    }

    /// Runs `work` alone in a transaction or after others in theirs, again where another server got in between; returns
    /// when it is on the disk. Not to be dropped halfway. `action` completes "could not …".
    ///
    /// # Errors
    /// What `work` returned, which then has changed nothing; [`AdapterError::Database`]. Where the commit itself failed,
    /// the change may have been made all the same.
    pub(crate) async fn change<T>(
        &self,
        action: &'static str,
        work: impl AsyncFn(&mut AnyConnection) -> Result<T, AdapterError>,
    ) -> Result<T, AdapterError> {
        for tried in 1.. {
            match self.once(&work).await {
                // Other servers were in between: the more often, the longer they are given.
                Err(error) if tried < TRIES && overtaken(&error) => {
                    tokio::time::sleep(Duration::from_millis(tried as u64)).await;
                }
                done => return done.unwrap_or_else(|source| Err(AdapterError::Database { action, source })),
            }
        }
        unreachable!("the last try returns")
    }

    /// What `work` returned, once its transaction is committed; or why that was not possible.
    async fn once<T>(
        &self,
        work: &impl AsyncFn(&mut AnyConnection) -> Result<T, AdapterError>,
    ) -> Result<Result<T, AdapterError>, Arc<sqlx::Error>> {
        let mut turn = self.turn.lock().await;
        let (mut group, first) = match turn.take() {
            Some(group) => {
                crate::kill::point("between changes");
                (group, false)
            }
            None => (Group::begin(&self.pool, self.kind).await?, true),
        };
        let mut outcome = group.outcome();
        let done = match group.run(work).await {
            Ok(done) => done,
            Err(error) => {
                group.end(Err(Arc::clone(&error))).await;
                return Err(error);
            }
        };
        *turn = Some(group);
        drop(turn);
        if first {
            // Whoever queued meanwhile comes before: the lock is fair.
            let mut turn = self.turn.lock().await;
            if outcome.is_open() {
                crate::kill::point("between changes and commit");
                turn.take().expect("an open group waits for its turn").commit().await;
            }
        }
        outcome.told().await.map(|()| done)
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

async fn prepare(connection: &mut AnyConnection, kind: Kind) -> Result<(), sqlx::Error> {
    if kind == Kind::Sqlite {
        let settings = format!(
            "PRAGMA busy_timeout = {BUSY_MS}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
             PRAGMA foreign_keys = ON; PRAGMA cache_size = -{SQLITE_CACHE_KIB}"
        );
        connection.execute(settings.as_str()).await?;
    }
    Ok(())
}

/// Whether the transaction lost to another and may succeed when it is run again.
pub(crate) fn overtaken(error: &sqlx::Error) -> bool {
    // PostgreSQL: serialization failure, deadlock; 23505 (unique) is how two equal inserts meet.
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| ["40001", "40P01", "23505"].contains(&&*code))
}

/// The URL of a SQLite file, created if missing.
pub(crate) fn sqlite_url(file: &Path) -> String {
    use std::{fmt::Write, os::unix::ffi::OsStrExt};
    let mut url = String::from("sqlite://");
    for &byte in file.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            url.push(byte.into());
        } else {
            // Writing to a String cannot fail.
            let _written = write!(url, "%{byte:02X}");
        }
    }
    url.push_str("?mode=rwc");
    url
}

impl AdapterError {
    /// Wraps an error of the database; `action` completes "could not …".
    pub(crate) fn database(action: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database { action, source: Arc::new(source) }
    }
}
