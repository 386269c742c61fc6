//! Changes that share a transaction, and so a flush of the disk.
//!
//! The first change begins the transaction, runs, and queues again to commit it; those that queued before it did run in
//! between, one after another, each in a savepoint of its own, so that one that is refused undoes itself alone. All are
//! told after the commit, the refused too: what they were refused for may have been another's that comes to nothing.
//! The first needs no savepoint, which costs a copy of every page that it changes: refused, it undoes the transaction.

use std::sync::Arc;

use sqlx::{Any, AnyConnection, AnyPool, Executor, pool::PoolConnection};
use tokio::sync::watch;

use crate::{Failure, overtaken, url::Kind};

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

    /// Runs the first `work` of the transaction; where it returns an error the transaction is to be rolled back.
    ///
    /// # Errors
    /// Where it lost to another and may be run again.
    pub(crate) async fn run_first<T, E: Failure>(
        &mut self,
        work: &mut impl AsyncFnMut(&mut AnyConnection) -> Result<T, E>,
    ) -> Result<Result<T, E>, Arc<sqlx::Error>> {
        let done = work(&mut self.connection).await;
        match done.as_ref().err().and_then(Failure::database) {
            Some(error) if overtaken(&error.source) => Err(Arc::clone(&error.source)),
            _ => Ok(done),
        }
    }

    /// Runs `work` after others, undone where it returns an error.
    ///
    /// # Errors
    /// Where the whole transaction is lost.
    pub(crate) async fn run<T, E: Failure>(
        &mut self,
        work: &mut impl AsyncFnMut(&mut AnyConnection) -> Result<T, E>,
    ) -> Result<Result<T, E>, Arc<sqlx::Error>> {
        self.connection.execute("SAVEPOINT change").await?;
        let done = work(&mut self.connection).await;
        let end = match done {
            Ok(_) => "RELEASE SAVEPOINT change",
            Err(_) => "ROLLBACK TO SAVEPOINT change; RELEASE SAVEPOINT change",
        };
        let failed = done.as_ref().err().and_then(Failure::database).map(|error| Arc::clone(&error.source));
        match (failed, self.connection.execute(end).await) {
            // A full disk ends a transaction of SQLite by itself, and a lost race dooms one of PostgreSQL.
            (Some(source), ended) if ended.is_err() || overtaken(&source) => Err(source),
            (_, Err(error)) => Err(error.into()),
            _ => Ok(done),
        }
    }

    pub(crate) async fn roll_back(mut self) {
        self.open = self.connection.execute("ROLLBACK").await.is_err();
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
