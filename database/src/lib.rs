//! A database for the rooms that keep tables: a SQLite file by default, PostgreSQL by URL, one set of statements for both.
//!
//! Every change sees the database as if it were alone: SQLite lets one writer in at a time (`BEGIN IMMEDIATE`), PostgreSQL
//! runs it serializable, and it is tried again where another got in between. So "read, decide, write" is a
//! compare-and-swap, whoever else changes it: threads here or other servers.
//!
//! SQLite writes ahead (WAL) and flushes each commit (`synchronous = FULL`): what was answered survives a power failure.
//! A flush takes longer than a change, so changes that queue while one commits share the next commit (`group.rs`).
//!
//! This room knows transactions and migrations; the tables and what is in them belong to the rooms that use it. Where to
//! start: [`Database::change`].

mod error;
mod group;
pub mod kill;
#[cfg(feature = "testing")]
pub mod testing;
mod url;

use std::{sync::Arc, time::Duration};

use sqlx::{
    Any, AnyConnection, AnyPool, Executor, Row as _, Transaction,
    any::AnyPoolOptions,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};
use tokio::sync::Mutex;

pub use error::{DatabaseError, Failure};
use group::Group;
pub use url::DatabaseUrl;
use url::Kind;

/// Connections held at once; readers of a SQLite file do not wait for its writer.
const CONNECTIONS_MAX: u32 = 8;
/// KiB of pages that each connection to a SQLite file keeps; the system keeps the rest of the file while there is room.
const SQLITE_CACHE_KIB: u32 = 2_048;
/// How long a call waits for a connection.
const ACQUIRE: Duration = Duration::from_secs(10);
/// How long a statement waits for another process that writes to the SQLite file.
const BUSY_MS: u32 = 5_000;
/// How often a transaction is tried that others got in between of.
const TRIES: usize = 16;

/// The tables of one room: every schema they had, oldest first. Released ones are never edited.
///
/// Rooms may share a database: the versions of each lie in a thousand of their own (1 to 999, 1001 to 1999, …).
pub type Schema = &'static [Version];

/// One step of a [`Schema`].
#[derive(Clone, Copy, Debug)]
pub struct Version {
    /// Ascending.
    pub number: i64,
    /// For people.
    pub name: &'static str,
    /// Statements for SQLite.
    pub sqlite: &'static str,
    /// The same for PostgreSQL.
    pub postgres: &'static str,
}

/// Versions of one room.
const ROOM: i64 = 1_000;

/// The open database.
pub struct Database {
    pool: AnyPool,
    kind: Kind,
    /// Writers of this process queue here, in order: SQLite would make them nap up to 100 ms, PostgreSQL run them again.
    /// Holds the transaction that is open between two of them.
    turn: Mutex<Option<Group>>,
}

impl Database {
    /// Opens the database at `url` and brings the tables of `schema` up to date.
    ///
    /// # Errors
    /// [`DatabaseError`] where it cannot be reached or written, or has been used by a newer release.
    pub async fn open(url: &DatabaseUrl, schema: Schema) -> Result<Self, DatabaseError> {
        sqlx::any::install_default_drivers();
        let kind = url.kind;
        let options = AnyPoolOptions::new().max_connections(CONNECTIONS_MAX).acquire_timeout(ACQUIRE);
        // A connection to a file does not break while nobody looks.
        let options = options.test_before_acquire(kind == Kind::Postgres);
        let options = options.after_connect(move |connection, _| Box::pin(prepare(connection, kind)));
        let pool = options.connect(&url.text).await.map_err(DatabaseError::new("open the database"))?;
        let database = Self { pool, kind, turn: Mutex::default() };
        database.migrate(schema).await.map_err(DatabaseError::new("bring the tables up to date"))?;
        Ok(database)
    }

    async fn migrate(&self, schema: Schema) -> Result<(), sqlx::Error> {
        let migrations = schema.iter().map(|version| {
            let sql = if self.kind == Kind::Sqlite { version.sqlite } else { version.postgres };
            Migration::new(version.number, version.name.into(), MigrationType::Simple, sql.into(), false)
        });
        // Other rooms' versions are missing in this schema; those of a newer release are looked for below.
        let migrator = Migrator { migrations: migrations.collect(), ignore_missing: true, ..Migrator::DEFAULT };
        migrator.run(&self.pool).await.map_err(|error| match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error,
            other => sqlx::Error::Migrate(Box::new(other)),
        })?;
        let newest = schema.last().map_or(0, |version| version.number);
        let sql = "SELECT COALESCE(MAX(version), 0) AS found FROM _sqlx_migrations WHERE version > $1 AND version < $2";
        let row = sqlx::query(sql).bind(newest).bind((newest / ROOM + 1) * ROOM).fetch_one(&self.pool).await?;
        match row.try_get::<i64, _>("found")? {
            0 => Ok(()),
            found => Err(sqlx::Error::Configuration(
                format!(
                    "its tables have version {found} and this program knows them up to version {newest}; start the \
                     newer release that made them, or restore a backup from before it"
                )
                .into(),
            )),
        }
    }

    /// Whether other servers may use the database too.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.kind == Kind::Postgres
    }

    /// For statements that only read.
    #[must_use]
    pub fn reader(&self) -> &AnyPool {
        &self.pool
    }

    /// A transaction that only reads, and sees the database as it was when it began. Rolled back when dropped.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn snapshot(&self) -> Result<Transaction<'static, Any>, DatabaseError> {
        let begin = match self.kind {
            Kind::Sqlite => "BEGIN",
            Kind::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        self.pool.begin_with(begin).await.map_err(DatabaseError::new("begin to read"))
    }

    /// Runs `work` alone in a transaction or after others in theirs, again where another server got in between; returns
    /// when it is on the disk. Not to be dropped halfway. `action` completes "could not …".
    ///
    /// # Errors
    /// What `work` returned, which then has changed nothing; [`DatabaseError`]. Where the commit itself failed,
    /// the change may have been made all the same.
    pub async fn change<T, E: Failure>(
        &self,
        action: &'static str,
        mut work: impl AsyncFnMut(&mut AnyConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        for tried in 1.. {
            match self.once(&mut work).await {
                // Other servers were in between: the more often, the longer they are given.
                Err(error) if tried < TRIES && overtaken(&error) => {
                    tokio::time::sleep(Duration::from_millis(tried as u64)).await;
                }
                done => return done.unwrap_or_else(|source| Err(DatabaseError { action, source }.into())),
            }
        }
        unreachable!("the last try returns")
    }

    /// What `work` returned, once its transaction is committed; or why that was not possible.
    async fn once<T, E: Failure>(
        &self,
        work: &mut impl AsyncFnMut(&mut AnyConnection) -> Result<T, E>,
    ) -> Result<Result<T, E>, Arc<sqlx::Error>> {
        let mut turn = self.turn.lock().await;
        let (mut group, first) = match turn.take() {
            Some(group) => {
                kill::point("between changes");
                (group, false)
            }
            None => (Group::begin(&self.pool, self.kind).await?, true),
        };
        let mut outcome = group.outcome();
        let done = if first { group.run_first(work).await } else { group.run(work).await };
        let done = match done {
            Ok(done) if first && done.is_err() => {
                group.roll_back().await;
                return Ok(done);
            }
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
                kill::point("between changes and commit");
                turn.take().expect("an open group waits for its turn").commit().await;
                kill::point("between commit and answer");
            }
        }
        outcome.told().await.map(|()| done)
    }

    /// Ends all connections.
    pub async fn close(&self) {
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
