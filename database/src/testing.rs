//! What the tests of rooms with tables share.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use sqlx::{Connection as _, Executor as _};

use crate::DatabaseUrl;

/// Runs statements in the database at `url`. Not to be called from async code.
///
/// # Panics
/// Where the database refuses.
pub fn sql(url: &str, statements: &str) {
    sqlx::any::install_default_drivers();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut connection = sqlx::AnyConnection::connect(url).await.expect("connected");
        connection.execute(statements).await.expect(statements);
        connection.close().await.expect("closed");
    });
}

/// The answer to a query of a text and two byte strings, read past the room whose table it is.
///
/// # Panics
/// Where the database refuses or the columns are others.
pub async fn rows(url: &DatabaseUrl, query: &str) -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let mut connection = sqlx::AnyConnection::connect(&url.text).await.expect("connected");
    let rows = sqlx::query_as(query).fetch_all(&mut connection).await.expect(query);
    connection.close().await.expect("closed");
    rows
}

/// Where `OPENLORA_TEST_POSTGRES` has a URL the same tests run on PostgreSQL, each folder in a schema of its own.
#[must_use]
pub fn postgres_schema(dir: &Path) -> Option<String> {
    let url = std::env::var("OPENLORA_TEST_POSTGRES").ok()?;
    let letters: String = dir.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect();
    let schema = format!("t_{}", letters.to_ascii_lowercase());
    sql(&url, &format!("CREATE SCHEMA IF NOT EXISTS {schema}"));
    Some(format!("{url}?options=-c%20search_path%3D{schema}"))
}

/// Compiles a library into `dir` that, named in `LD_PRELOAD`, makes one flush or write of a process fail with EIO: the one
/// whose number is in `FAIL_FLUSH` or `FAIL_WRITE`. The process then says `the disk failed` on its standard error.
///
/// # Panics
/// Without a C compiler.
#[must_use]
pub fn failing_disk(dir: &Path) -> PathBuf {
    let library = dir.join("failing_disk.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/failing_disk.c");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).arg("-ldl").output();
    let compiled = compiled.expect("the compiler that links Rust programs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    library
}
