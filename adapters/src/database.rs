//! The registry's database: a SQLite file by default, PostgreSQL by URL, one set of statements for both.
//!
//! Every change is one transaction that sees the database as if it were alone: SQLite lets one writer in at a time (`BEGIN
//! IMMEDIATE`), PostgreSQL runs it serializable, and it is tried again where another got in between. So "read what the
//! alias stands for, decide, write" is a compare-and-swap, whoever else changes it: threads here or other servers.
//!
//! SQLite writes ahead (WAL) and flushes each commit (`synchronous = FULL`): what was answered survives a power failure.

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    AnyConnection, AnyPool, Executor,
    any::{AnyArguments, AnyPoolOptions},
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    query::Query,
};
use tokio::sync::Mutex;

use crate::error::AdapterError;

/// Connections held at once; readers of a SQLite file do not wait for its writer.
const CONNECTIONS_MAX: u32 = 8;
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
enum Kind {
    Sqlite,
    Postgres,
}

/// The open database.
pub(crate) struct Database {
    pool: AnyPool,
    kind: Kind,
    /// Writers of this process queue here: SQLite would make them nap up to 100 ms, PostgreSQL run them again.
    turn: Mutex<()>,
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

    /// Runs one statement that may be lost in a power failure, though not in a crash of this process: it is not flushed.
    pub(crate) async fn note<'q>(&self, statement: Query<'q, sqlx::Any, AnyArguments<'q>>) -> Result<(), sqlx::Error> {
        let _turn = self.turn.lock().await;
        let mut connection = self.pool.acquire().await?;
        let sqlite = self.kind == Kind::Sqlite;
        if sqlite {
            connection.execute("PRAGMA synchronous = NORMAL").await?;
        }
        let done = statement.execute(&mut *connection).await;
        if sqlite && connection.execute("PRAGMA synchronous = FULL").await.is_err() {
            // It must not serve another change.
            connection.close().await?;
        }
        done.map(drop)
    }

    /// Runs `work` in one transaction, again where another transaction got in between. `action` completes "could not …".
    ///
    /// # Errors
    /// What `work` returned, after a rollback; [`AdapterError::Database`]. Where the commit itself failed, the change may
    /// have been made all the same.
    pub(crate) async fn change<T>(
        &self,
        action: &'static str,
        work: impl AsyncFn(&mut AnyConnection) -> Result<T, AdapterError>,
    ) -> Result<T, AdapterError> {
        let begin = match self.kind {
            Kind::Sqlite => "BEGIN IMMEDIATE",
            Kind::Postgres => "BEGIN ISOLATION LEVEL SERIALIZABLE",
        };
        let _turn = self.turn.lock().await;
        for tried in 1.. {
            let mut transaction = self.pool.begin_with(begin).await.map_err(AdapterError::database(action))?;
            let done = match work(&mut transaction).await {
                Ok(value) => {
                    crate::kill::point("before the commit");
                    transaction.commit().await.map(|()| value).map_err(AdapterError::database(action))
                }
                Err(error) => {
                    // Where even the rollback fails the connection is gone, and the transaction with it.
                    let _rolled_back = transaction.rollback().await;
                    Err(error)
                }
            };
            match done {
                // Other servers were in between: the more often, the longer they are given.
                Err(error) if tried < TRIES && overtaken(&error) => {
                    tokio::time::sleep(Duration::from_millis(tried as u64)).await;
                }
                done => {
                    crate::kill::point("after the commit");
                    return done;
                }
            }
        }
        unreachable!("the last try returns")
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

async fn prepare(connection: &mut AnyConnection, kind: Kind) -> Result<(), sqlx::Error> {
    if kind == Kind::Sqlite {
        let settings = format!(
            "PRAGMA busy_timeout = {BUSY_MS}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON"
        );
        connection.execute(settings.as_str()).await?;
    }
    Ok(())
}

/// Whether the transaction lost to another and may succeed when it is run again.
fn overtaken(error: &AdapterError) -> bool {
    let AdapterError::Database { source, .. } = error else { return false };
    // PostgreSQL: serialization failure, deadlock; 23505 (unique) is how two equal inserts meet.
    let code = source.as_database_error().and_then(|error| error.code());
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
