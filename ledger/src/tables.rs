//! The tables as SQL: the journal's rows and what is derived from them. Statements only; `write.rs` decides, `draft.rs`
//! says what is written.

use std::{collections::BTreeMap, rc::Rc};

use openlora_database::{DatabaseError, Schema, Version};
use sqlx::{
    Any, AnyConnection, Row as _,
    any::{AnyArguments, AnyRow},
    query,
    query::Query,
};

use crate::{
    account::{Account, Address, Amount, Asset},
    error::LedgerError,
    row::{Move, Row, used_after},
};

/// The tables.
pub(crate) const SCHEMA: Schema = &[Version {
    number: 1_001,
    name: "ledger",
    sqlite: include_str!("../migrations/sqlite/1001_ledger.sql"),
    postgres: include_str!("../migrations/postgres/1001_ledger.sql"),
}];

pub(crate) const READ: &str = "read the ledger";
pub(crate) const WRITE: &str = "write to the ledger";

pub(crate) fn read_error(error: sqlx::Error) -> LedgerError {
    DatabaseError::new(READ)(error).into()
}

fn write_error(error: sqlx::Error) -> LedgerError {
    DatabaseError::new(WRITE)(error).into()
}

/// What a column holds that this ledger does not write.
fn damaged(column: &str) -> LedgerError {
    read_error(sqlx::Error::Decode(
        format!("{column} is not what this program writes; run `openlora ledger verify`").into(),
    ))
}

pub(crate) fn number(row: &AnyRow, column: &str) -> Result<u64, LedgerError> {
    let value: i64 = row.try_get(column).map_err(read_error)?;
    u64::try_from(value).map_err(|_| damaged(column))
}

pub(crate) fn text(row: &AnyRow, column: &str) -> Result<String, LedgerError> {
    row.try_get(column).map_err(read_error)
}

pub(crate) fn parsed<T: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<T, LedgerError> {
    text(row, column)?.parse().map_err(|_| damaged(column))
}

pub(crate) fn bytes<const N: usize>(row: &AnyRow, column: &str) -> Result<[u8; N], LedgerError> {
    let bytes: Vec<u8> = row.try_get(column).map_err(read_error)?;
    bytes.try_into().map_err(|_| damaged(column))
}

pub(crate) fn amount(row: &AnyRow, column: &str) -> Result<u128, LedgerError> {
    Ok(u128::from_be_bytes(bytes(row, column)?))
}

/// An integer as databases have it. What is counted here stays below 2^63.
pub(crate) fn i(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The end of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) seq: u64,
    pub(crate) hash: [u8; 32],
    pub(crate) epoch: u64,
    pub(crate) epoch_row: u64,
}

pub(crate) async fn head(db: &mut AnyConnection) -> Result<Head, LedgerError> {
    let row = query("SELECT seq, hash, epoch, epoch_row FROM ledger_head").fetch_one(db).await.map_err(read_error)?;
    Ok(Head {
        seq: number(&row, "seq")?,
        hash: bytes(&row, "hash")?,
        epoch: number(&row, "epoch")?,
        epoch_row: number(&row, "epoch_row")?,
    })
}

pub(crate) async fn set_head(db: &mut AnyConnection, head: &Head) -> Result<(), LedgerError> {
    let sql = "UPDATE ledger_head SET seq = $1, hash = $2, epoch = $3, epoch_row = $4";
    let statement = query(sql).bind(i(head.seq)).bind(head.hash.to_vec()).bind(i(head.epoch)).bind(i(head.epoch_row));
    statement.execute(db).await.map(drop).map_err(write_error)
}

pub(crate) fn journal_row(row: &AnyRow) -> Result<Row, LedgerError> {
    Ok(Row {
        seq: number(row, "seq")?,
        at_ms: number(row, "at_ms")?,
        idempotency: text(row, "idempotency")?,
        body: text(row, "body")?,
        hash: bytes(row, "hash")?,
    })
}

const ROW: &str = "SELECT seq, at_ms, idempotency, body, hash FROM ledger_rows";

/// The row with an idempotency key.
pub(crate) async fn find(db: &mut AnyConnection, idempotency: &str) -> Result<Option<Row>, LedgerError> {
    let sql = format!("{ROW} WHERE idempotency = $1");
    let row = query(&sql).bind(idempotency).fetch_optional(db).await.map_err(read_error)?;
    row.as_ref().map(journal_row).transpose()
}

/// At most `limit` rows after `after`, ascending.
pub(crate) async fn rows(db: &mut AnyConnection, after: u64, limit: usize) -> Result<Vec<Row>, LedgerError> {
    let sql = format!("{ROW} WHERE seq > $1 ORDER BY seq LIMIT $2");
    let rows = query(&sql).bind(i(after)).bind(i(limit as u64)).fetch_all(db).await.map_err(read_error)?;
    rows.iter().map(journal_row).collect()
}

/// At most `limit` rows after `after` and up to `last` that closed a reservation or settled a receipt, ascending.
pub(crate) async fn charges(
    db: &mut AnyConnection,
    after: u64,
    last: u64,
    limit: usize,
) -> Result<Vec<Row>, LedgerError> {
    let sql = format!(
        "{ROW} WHERE seq > $1 AND seq <= $2 AND (idempotency LIKE 'close/%' OR idempotency LIKE 'receipt/%') \
         ORDER BY seq LIMIT $3"
    );
    let statement = query(&sql).bind(i(after)).bind(i(last)).bind(i(limit as u64));
    statement.fetch_all(db).await.map_err(read_error)?.iter().map(journal_row).collect()
}

/// The rows with these idempotency keys, in any order.
pub(crate) async fn find_all(db: &mut AnyConnection, idempotency: &[String]) -> Result<Vec<Row>, LedgerError> {
    let mut found = Vec::new();
    for keys in idempotency.chunks(BATCH) {
        let sql = format!("{ROW} WHERE idempotency IN {}", places(db, 1, keys.len()));
        let statement = keys.iter().fold(query(&sql), |statement, key| statement.bind(key));
        for row in statement.fetch_all(&mut *db).await.map_err(read_error)? {
            found.push(journal_row(&row)?);
        }
    }
    Ok(found)
}

/// Sums of what an account ever got and gave, in one asset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Balance {
    pub(crate) credits: u128,
    pub(crate) debits: u128,
}

pub(crate) type Balances = BTreeMap<(String, String), Balance>;

/// Adds a move to both its accounts.
pub(crate) fn post_move(balances: &mut Balances, step: &Move) -> Result<(), LedgerError> {
    for (account, credit) in [(&step.from, false), (&step.to, true)] {
        let balance = balances.entry((account.to_string(), step.asset.to_string())).or_default();
        let sum = if credit { &mut balance.credits } else { &mut balance.debits };
        *sum = sum.checked_add(step.amount.0).ok_or(LedgerError::Overflow { what: "the sum of an account" })?;
        if balance.debits > balance.credits && *account != Account::World {
            return Err(LedgerError::Unfunded {
                account: account.clone(),
                asset: step.asset.clone(),
                available: balance.credits + step.amount.0 - balance.debits,
                needed: step.amount.0,
            });
        }
    }
    Ok(())
}

/// What the accounts have of the assets; those that never moved any are left out.
pub(crate) async fn balances(db: &mut AnyConnection, accounts: &[(String, String)]) -> Result<Balances, LedgerError> {
    let mut by_asset = BTreeMap::<&str, Vec<&str>>::new();
    for (account, asset) in accounts {
        by_asset.entry(asset).or_default().push(account);
    }
    let mut found = Balances::new();
    for (asset, accounts) in by_asset {
        for accounts in accounts.chunks(BATCH) {
            let (names, last) = (places(db, 1, accounts.len()), place(db, accounts.len() + 1));
            let sql = format!(
                "SELECT account, credits, debits FROM ledger_balances WHERE account IN {names} AND asset = {last}"
            );
            let statement = accounts.iter().fold(query(&sql), |statement, name| statement.bind(*name)).bind(asset);
            for row in statement.fetch_all(&mut *db).await.map_err(read_error)? {
                let balance = Balance { credits: amount(&row, "credits")?, debits: amount(&row, "debits")? };
                found.insert((text(&row, "account")?, asset.to_owned()), balance);
            }
        }
    }
    Ok(found)
}

/// What an application may use and uses of an asset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Application {
    pub(crate) per_day: Option<u128>,
    pub(crate) day: u64,
    pub(crate) used: u128,
    pub(crate) opened: u64,
}

pub(crate) fn application_row(row: &AnyRow) -> Result<Application, LedgerError> {
    let per_day: Option<Vec<u8>> = row.try_get("per_day").map_err(read_error)?;
    let per_day = per_day.map(|bytes| Amount::from_bytes(&bytes).ok_or_else(|| damaged("per_day"))).transpose()?;
    Ok(Application {
        per_day: per_day.map(|amount| amount.0),
        day: number(row, "day")?,
        used: amount(row, "used")?,
        opened: number(row, "opened")?,
    })
}

pub(crate) async fn application(
    db: &mut AnyConnection,
    name: &str,
    asset: &Asset,
) -> Result<Option<Application>, LedgerError> {
    let sql = "SELECT per_day, day, used, opened FROM ledger_applications WHERE application = $1 AND asset = $2";
    let row = query(sql).bind(name).bind(asset.as_str()).fetch_optional(db).await.map_err(read_error)?;
    row.as_ref().map(application_row).transpose()
}

impl Application {
    /// After `add` and `take` on `day`, with `opened` more reservations. `None` where that is not possible.
    pub(crate) fn after(self, day: u64, (add, take): (u128, u128), opened: i64) -> Option<Self> {
        let (day, used) = used_after((self.day, self.used), day, add, take)?;
        Some(Self { day, used, opened: self.opened.checked_add_signed(opened)?, ..self })
    }
}

/// A contributors' part that nobody has divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) asset: Asset,
    pub(crate) amount: u128,
    pub(crate) at_ms: u64,
}

/// What is held for each of these receipts; those with nothing are left out.
pub(crate) async fn held_all(db: &mut AnyConnection, receipts: &[String]) -> Result<Vec<(String, Held)>, LedgerError> {
    let mut found = Vec::new();
    for receipts in receipts.chunks(BATCH) {
        let sql = format!(
            "SELECT receipt, asset, amount, at_ms FROM ledger_held WHERE receipt IN {}",
            places(db, 1, receipts.len())
        );
        let statement = receipts.iter().fold(query(&sql), |statement, receipt| statement.bind(receipt));
        for row in statement.fetch_all(&mut *db).await.map_err(read_error)? {
            let (asset, amount) = (parsed(&row, "asset")?, amount(&row, "amount")?);
            found.push((text(&row, "receipt")?, Held { asset, amount, at_ms: number(&row, "at_ms")? }));
        }
    }
    Ok(found)
}

pub(crate) async fn totals(db: &mut AnyConnection) -> Result<BTreeMap<Asset, u128>, LedgerError> {
    let rows = query("SELECT asset, cumulative FROM ledger_totals").fetch_all(db).await.map_err(read_error)?;
    rows.iter().map(|row| Ok((parsed(row, "asset")?, amount(row, "cumulative")?))).collect()
}

/// What is derived from the rows: lines that were read or are to be written.
#[derive(Default)]
pub(crate) struct Tables {
    pub(crate) balances: Lines<(String, String), Balance>,
    pub(crate) applications: Lines<(String, String), Application>,
    /// The row and time of open reservations.
    pub(crate) open: Lines<String, (u64, u64)>,
    pub(crate) held: Lines<String, Held>,
    /// Rows by target, kind and asset.
    pub(crate) terms: Lines<(String, &'static str, String), u64>,
    pub(crate) addresses: Lines<String, Address>,
    pub(crate) leaves: Lines<(Address, Asset, u64), u128>,
    pub(crate) totals: Lines<Asset, u128>,
}

impl Tables {
    /// How many are held, but for those that are few always.
    pub(crate) fn len(&self) -> usize {
        self.balances.len() + self.applications.len() + self.open.len() + self.held.len() + self.leaves.len()
    }
}

/// Lines of a table by their primary keys: some as they were read, some to be written.
pub(crate) struct Lines<K, V>(BTreeMap<K, Line<V>>);

struct Line<V> {
    /// None where the table has no such line.
    value: Option<V>,
    changed: bool,
}

impl<K, V> Default for Lines<K, V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, V> Lines<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_known(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key)?.value.as_ref()
    }

    /// Notes what the table has for `keys`: `found` and no other line.
    pub(crate) fn read(&mut self, keys: impl IntoIterator<Item = K>, found: impl IntoIterator<Item = (K, V)>) {
        self.0.extend(keys.into_iter().map(|key| (key, Line { value: None, changed: false })));
        self.0.extend(found.into_iter().map(|(key, value)| (key, Line { value: Some(value), changed: false })));
    }

    /// Notes what is to be written; `None` removes the line.
    pub(crate) fn set(&mut self, key: K, value: Option<V>) {
        self.0.insert(key, Line { value, changed: true });
    }

    /// What is to be written and what to be removed.
    fn changes(&self) -> (Vec<(&K, &V)>, Vec<&K>) {
        let (mut set, mut removed) = (Vec::new(), Vec::new());
        for (key, line) in self.0.iter().filter(|(_, line)| line.changed) {
            match &line.value {
                Some(value) => set.push((key, value)),
                None => removed.push(key),
            }
        }
        (set, removed)
    }
}

/// Lines that one statement reads or writes.
const BATCH: usize = 100;

/// The place of a statement's `n`-th parameter. SQLite looks numbered ones up one after another, for each that is bound.
fn place(db: &AnyConnection, n: usize) -> String {
    if db.backend_name() == "SQLite" { "?".into() } else { format!("${n}") }
}

/// `($1, $2), ($3, $4)` for `rows` of `columns`.
fn places(db: &AnyConnection, rows: usize, columns: usize) -> String {
    let row = |r: usize| {
        let places: Vec<_> = (1..=columns).map(|c| place(db, r * columns + c)).collect();
        format!("({})", places.join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}

type Statement<'q> = Query<'q, Any, AnyArguments<'q>>;

/// Writes lines whose values `bind` gives, [`BATCH`] at once. `into` is the table and its columns; `or` says what becomes
/// of a line that is there.
async fn insert<T>(
    db: &mut AnyConnection,
    into: &str,
    or: &str,
    lines: &[T],
    bind: impl for<'q> Fn(Statement<'q>, &'q T) -> Statement<'q>,
) -> Result<(), LedgerError> {
    let columns = into.matches(',').count() + 1;
    for lines in lines.chunks(BATCH) {
        let sql = format!("INSERT INTO {into} VALUES {} {or}", places(db, lines.len(), columns));
        let statement = lines.iter().fold(query(&sql), &bind);
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    Ok(())
}

/// Removes the lines that have `keys` in `column`.
async fn delete(db: &mut AnyConnection, table: &str, column: &str, keys: &[&String]) -> Result<(), LedgerError> {
    for keys in keys.chunks(BATCH) {
        let sql = format!("DELETE FROM {table} WHERE {column} IN {}", places(db, 1, keys.len()));
        let statement = keys.iter().fold(query(&sql), |statement, key| statement.bind(*key));
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    Ok(())
}

pub(crate) async fn insert_rows(db: &mut AnyConnection, rows: &[Rc<Row>]) -> Result<(), LedgerError> {
    let into = "ledger_rows (seq, at_ms, idempotency, body, hash)";
    insert(db, into, "", rows, |statement, row| {
        let statement = statement.bind(i(row.seq)).bind(i(row.at_ms)).bind(&row.idempotency).bind(&row.body);
        statement.bind(&row.hash[..])
    })
    .await
}

/// Notes the row for each account that it moves money of.
pub(crate) async fn insert_entries(db: &mut AnyConnection, entries: &[(String, u64)]) -> Result<(), LedgerError> {
    let into = "ledger_entries (account, seq)";
    insert(db, into, "", entries, |statement, (account, seq)| statement.bind(account).bind(i(*seq))).await
}

pub(crate) async fn set_balances(
    db: &mut AnyConnection,
    balances: &Lines<(String, String), Balance>,
) -> Result<(), LedgerError> {
    let into = "ledger_balances (account, asset, credits, debits)";
    let or = "ON CONFLICT (account, asset) DO UPDATE SET credits = excluded.credits, debits = excluded.debits";
    insert(db, into, or, &balances.changes().0, |statement, ((account, asset), balance)| {
        let (credits, debits) = (Amount(balance.credits).to_bytes(), Amount(balance.debits).to_bytes());
        statement.bind(account).bind(asset).bind(credits).bind(debits)
    })
    .await
}

/// Writes what changed of all other tables that are derived from the rows.
pub(crate) async fn set_lines(db: &mut AnyConnection, lines: &Tables) -> Result<(), LedgerError> {
    set_applications(db, &lines.applications).await?;
    let (opened, closed) = lines.open.changes();
    insert(db, "ledger_open (name, seq, at_ms)", "", &opened, |statement, (name, (seq, at_ms))| {
        statement.bind(name).bind(i(*seq)).bind(i(*at_ms))
    })
    .await?;
    delete(db, "ledger_open", "name", &closed).await?;
    let (held, released) = lines.held.changes();
    insert(db, "ledger_held (receipt, asset, amount, at_ms)", "", &held, |statement, (receipt, held)| {
        let statement = statement.bind(receipt).bind(held.asset.as_str());
        statement.bind(Amount(held.amount).to_bytes()).bind(i(held.at_ms))
    })
    .await?;
    delete(db, "ledger_held", "receipt", &released).await?;
    let (addresses, removed) = lines.addresses.changes();
    let or = "ON CONFLICT (account) DO UPDATE SET address = excluded.address";
    insert(db, "ledger_addresses (account, address)", or, &addresses, |statement, (account, address)| {
        statement.bind(account).bind(&address.0[..])
    })
    .await?;
    delete(db, "ledger_addresses", "account", &removed).await?;
    let or = "ON CONFLICT (target, kind, asset) DO UPDATE SET seq = excluded.seq";
    let terms = lines.terms.changes().0;
    insert(db, "ledger_terms (target, kind, asset, seq)", or, &terms, |statement, ((target, kind, asset), seq)| {
        statement.bind(target).bind(*kind).bind(asset).bind(i(**seq))
    })
    .await?;
    set_leaves(db, lines).await
}

async fn set_applications(
    db: &mut AnyConnection,
    applications: &Lines<(String, String), Application>,
) -> Result<(), LedgerError> {
    let into = "ledger_applications (application, asset, per_day, day, used, opened)";
    let or = "ON CONFLICT (application, asset) DO UPDATE SET per_day = excluded.per_day, day = excluded.day, \
              used = excluded.used, opened = excluded.opened";
    insert(db, into, or, &applications.changes().0, |statement, ((name, asset), new)| {
        let per_day = new.per_day.map(|amount| Amount(amount).to_bytes());
        let statement = statement.bind(name).bind(asset).bind(per_day).bind(i(new.day));
        statement.bind(Amount(new.used).to_bytes()).bind(i(new.opened))
    })
    .await
}

/// Writes what addresses are owed, and the sums of it.
async fn set_leaves(db: &mut AnyConnection, lines: &Tables) -> Result<(), LedgerError> {
    let into = "ledger_leaves (address, asset, epoch, cumulative)";
    let or = "ON CONFLICT (address, asset, epoch) DO UPDATE SET cumulative = excluded.cumulative";
    let leaves = lines.leaves.changes().0;
    insert(db, into, or, &leaves, |statement, ((address, asset, epoch), cumulative)| {
        let statement = statement.bind(&address.0[..]).bind(asset.as_str()).bind(i(*epoch));
        statement.bind(Amount(**cumulative).to_bytes())
    })
    .await?;
    let or = "ON CONFLICT (asset) DO UPDATE SET cumulative = excluded.cumulative";
    insert(db, "ledger_totals (asset, cumulative)", or, &lines.totals.changes().0, |statement, (asset, sum)| {
        statement.bind(asset.as_str()).bind(Amount(**sum).to_bytes())
    })
    .await
}
