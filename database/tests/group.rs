//! Changes in company: one commit for those that queue, and each is told the truth whatever ends the transaction.

use std::{cell::Cell, panic::AssertUnwindSafe};

use futures_util::FutureExt as _;
use openlora_database::{Database, DatabaseError, DatabaseUrl, Failure, Schema, Version, testing::postgres_schema};
use sqlx::{AnyConnection, Executor as _, Row as _, query};
use tempfile::TempDir;

/// A table of names, each with a count, and one that must name them.
const SCHEMA: Schema = &[Version {
    number: 1,
    name: "tests",
    sqlite: "CREATE TABLE owners (owner TEXT NOT NULL PRIMARY KEY, adapters BIGINT NOT NULL); \
             CREATE TABLE aliases (owner TEXT NOT NULL REFERENCES owners (owner))",
    postgres: "CREATE TABLE owners (owner TEXT NOT NULL PRIMARY KEY, adapters BIGINT NOT NULL)",
}];

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("refused on purpose")]
    OnPurpose,
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Failure for Refused {
    fn database(&self) -> Option<&DatabaseError> {
        match self {
            Self::OnPurpose => None,
            Self::Database(error) => Some(error),
        }
    }
}

async fn database() -> (Database, TempDir) {
    let dir = TempDir::new().expect("a temporary folder");
    let url = DatabaseUrl::sqlite(&dir.path().join("test.db"));
    (Database::open(&url, SCHEMA).await.expect("opened"), dir)
}

async fn add(db: &mut AnyConnection, owner: &str) -> Result<(), Refused> {
    let insert = query("INSERT INTO owners (owner, adapters) VALUES ($1, 0)").bind(owner);
    insert.execute(db).await.map_err(DatabaseError::new("add an owner"))?;
    Ok(())
}

/// Adds `first` once the others of its test have queued.
async fn first_of_several(db: &mut AnyConnection) -> Result<(), Refused> {
    tokio::task::yield_now().await;
    add(db, "first").await
}

/// What a connection outside the transaction sees.
async fn owners(db: &Database) -> Vec<String> {
    let rows = query("SELECT owner FROM owners ORDER BY owner").fetch_all(db.reader()).await.expect("read");
    rows.iter().map(|row| row.get("owner")).collect()
}

#[tokio::test]
async fn changes_that_queue_are_told_after_one_commit_and_a_refused_one_undoes_itself_alone() {
    let (db, _dir) = database().await;
    let told = Cell::new(0);
    let count = |_: &Result<(), Refused>| told.set(told.get() + 1);
    // The three queue in this order; the second and third run in the first one's transaction.
    let nothing_yet = async || assert_eq!((owners(&db).await.len(), told.get()), (0, 0));
    let first = db.change("add", first_of_several);
    let second = db.change("add", async |connection| {
        add(connection, "second").await?;
        nothing_yet().await;
        Err(Refused::OnPurpose)
    });
    let third = db.change("add", async |connection| {
        nothing_yet().await;
        add(connection, "third").await
    });
    let (first, second, third) = tokio::join!(first.inspect(count), second.inspect(count), third.inspect(count));
    assert!(first.is_ok() && third.is_ok() && told.get() == 3);
    assert!(matches!(second, Err(Refused::OnPurpose)), "{second:?}");
    assert_eq!(owners(&db).await, ["first", "third"]);
}

#[test]
fn servers_that_change_the_same_row_in_groups_lose_no_change() {
    let dir = TempDir::new().expect("a temporary folder");
    let url = match postgres_schema(dir.path()) {
        Some(url) => DatabaseUrl::parse("url", &url).expect("a URL"),
        None => DatabaseUrl::sqlite(&dir.path().join("test.db")),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let servers = [0; 2].map(|_| runtime.block_on(Database::open(&url, SCHEMA)).expect("opened"));
    let one_more = async |db: &mut AnyConnection| {
        let read = query("SELECT adapters FROM owners WHERE owner = 'o'").fetch_one(&mut *db).await;
        let read: i64 = read.map_err(DatabaseError::new("read"))?.get("adapters");
        let write = query("UPDATE owners SET adapters = $1 WHERE owner = 'o'").bind(read + 1).execute(db).await;
        write.map_err(DatabaseError::new("write"))?;
        Ok::<_, Refused>(())
    };
    runtime.block_on(servers[0].change("add", async |db| add(db, "o").await)).expect("added");
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
    let read = query("SELECT adapters FROM owners WHERE owner = 'o'").fetch_one(servers[0].reader());
    assert_eq!(runtime.block_on(read).expect("read").get::<i64, _>("adapters"), 120);
}

#[tokio::test]
async fn where_the_commit_fails_all_are_told_and_nothing_is_changed() {
    let (db, _dir) = database().await;
    let first = db.change("add", first_of_several);
    let second = db.change("name", async |db| {
        let dangling = "PRAGMA defer_foreign_keys = ON; INSERT INTO aliases VALUES ('none')";
        db.execute(dangling).await.map_err(DatabaseError::new("name"))?;
        Ok(())
    });
    let third = db.change("refuse", async |_| Err::<(), _>(Refused::OnPurpose));
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
    let first = db.change("add", first_of_several);
    let second = db.change("fill", async |db| {
        // Taken as the number of pages there are; the next one is refused as on a full disk.
        db.execute("PRAGMA max_page_count = 1").await.map_err(DatabaseError::new("limit"))?;
        let mut added = Ok(());
        for i in 0..100 {
            added = added.and(add(db, &format!("{i}{}", "x".repeat(4_000))).await);
        }
        db.execute("PRAGMA max_page_count = 4294967294").await.map_err(DatabaseError::new("unlimit"))?;
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
    let first = db.change("add", first_of_several);
    let second = AssertUnwindSafe(db.change("panic", async |_| -> Result<(), Refused> { panic!("on purpose") }));
    let third = db.change("add", async |db| add(db, "third").await);
    let (first, second, third) = tokio::join!(first, second.catch_unwind(), third);
    assert!(matches!(first, Err(Refused::Database(_))) && second.is_err() && third.is_ok());
    assert_eq!(owners(&db).await, ["third"]);
}

#[tokio::test]
async fn rooms_share_a_database_and_neither_takes_the_others_tables_for_a_newer_release() {
    const OTHER: Schema = &[Version {
        number: 1_001,
        name: "other",
        sqlite: "CREATE TABLE others (name TEXT)",
        postgres: "CREATE TABLE others (name TEXT)",
    }];
    const NEWER: Schema = &[SCHEMA[0], Version { number: 2, name: "newer", sqlite: "", postgres: "" }];
    let dir = TempDir::new().expect("a temporary folder");
    let url = DatabaseUrl::sqlite(&dir.path().join("test.db"));
    for schema in [SCHEMA, OTHER, SCHEMA, NEWER, OTHER] {
        Database::open(&url, schema).await.expect("its own tables are as it knows them").close().await;
    }
    let error = Database::open(&url, SCHEMA).await.err().expect("version 2 is of a newer release").to_string();
    assert!(error.contains("version 2 ") && error.contains("up to version 1"), "{error}");
}

#[tokio::test]
async fn a_snapshot_does_not_see_what_is_committed_after_it_began() {
    let (db, _dir) = database().await;
    let mut snapshot = db.snapshot().await.expect("begun");
    let count = "SELECT COUNT(*) AS n FROM owners";
    let before: i64 = query(count).fetch_one(&mut *snapshot).await.expect("read").get("n");
    db.change("add", async |db| add(db, "late").await).await.expect("added");
    let after: i64 = query(count).fetch_one(&mut *snapshot).await.expect("read").get("n");
    assert_eq!((before, after, owners(&db).await.len()), (0, 0, 1));
}
