//! The tables as SQL: the journal's rows and what is derived from them. Statements only; `write.rs` decides.

use std::collections::BTreeMap;

use openlora_database::{DatabaseError, Schema, Version};
use sqlx::{AnyConnection, Row as _, any::AnyRow, query};

use crate::{
    account::{Account, Amount, Asset},
    error::LedgerError,
    row::{Effect, Move, Row, used_after},
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

pub(crate) async fn insert_row(db: &mut AnyConnection, row: &Row) -> Result<(), LedgerError> {
    let sql = "INSERT INTO ledger_rows (seq, at_ms, idempotency, body, hash) VALUES ($1, $2, $3, $4, $5)";
    let statement = query(sql).bind(i(row.seq)).bind(i(row.at_ms)).bind(&row.idempotency).bind(&row.body);
    statement.bind(row.hash.to_vec()).execute(db).await.map(drop).map_err(write_error)
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

/// Lines that one statement reads or writes. SQLite looks parameters up one after another: many lines in one statement
/// take longer than in several.
const BATCH: usize = 50;

/// `($1, $2), ($3, $4)` for `rows` of `columns`, numbered from `first`.
fn places(first: usize, rows: usize, columns: usize) -> String {
    let row = |r: usize| {
        let place = |c: usize| format!("${}", first + r * columns + c);
        format!("({})", (0..columns).map(place).collect::<Vec<_>>().join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}

/// What the accounts that `moves` touch have.
async fn balances(db: &mut AnyConnection, moves: &[&Move]) -> Result<Balances, LedgerError> {
    let mut found = Balances::new();
    let mut accounts = BTreeMap::<&Asset, Vec<String>>::new();
    for step in moves {
        accounts.entry(&step.asset).or_default().extend([step.from.to_string(), step.to.to_string()]);
    }
    for (asset, mut names) in accounts {
        names.sort_unstable();
        names.dedup();
        for names in names.chunks(BATCH) {
            let sql = format!(
                "SELECT account, credits, debits FROM ledger_balances WHERE asset = $1 AND account IN {}",
                places(2, 1, names.len())
            );
            let statement = names.iter().fold(query(&sql).bind(asset.as_str()), |statement, name| statement.bind(name));
            for row in statement.fetch_all(&mut *db).await.map_err(read_error)? {
                let balance = Balance { credits: amount(&row, "credits")?, debits: amount(&row, "debits")? };
                found.insert((text(&row, "account")?, asset.to_string()), balance);
            }
        }
    }
    Ok(found)
}

/// Moves money in the balances and notes the row for each account it moved money of.
async fn apply_moves(db: &mut AnyConnection, seq: u64, moves: &[&Move]) -> Result<Balances, LedgerError> {
    if moves.is_empty() {
        return Ok(Balances::new());
    }
    let mut changed = balances(db, moves).await?;
    moves.iter().try_for_each(|step| post_move(&mut changed, step))?;
    for changed in changed.iter().collect::<Vec<_>>().chunks(BATCH) {
        let sql = format!(
            "INSERT INTO ledger_balances (account, asset, credits, debits) VALUES {} ON CONFLICT (account, asset) \
             DO UPDATE SET credits = excluded.credits, debits = excluded.debits",
            places(1, changed.len(), 4)
        );
        let statement = changed.iter().fold(query(&sql), |statement, ((account, asset), balance)| {
            let (credits, debits) = (Amount(balance.credits).to_bytes(), Amount(balance.debits).to_bytes());
            statement.bind(account).bind(asset).bind(credits).bind(debits)
        });
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    let mut accounts: Vec<_> = changed.keys().map(|(account, _)| account).collect();
    accounts.dedup();
    for accounts in accounts.chunks(BATCH) {
        let sql = format!("INSERT INTO ledger_entries (account, seq) VALUES {}", places(1, accounts.len(), 2));
        let statement = accounts.iter().fold(query(&sql), |statement, account| statement.bind(*account).bind(i(seq)));
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    Ok(changed)
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

pub(crate) async fn application(db: &mut AnyConnection, name: &str, asset: &Asset) -> Result<Application, LedgerError> {
    let sql = "SELECT per_day, day, used, opened FROM ledger_applications WHERE application = $1 AND asset = $2";
    let row = query(sql).bind(name).bind(asset.as_str()).fetch_optional(db).await.map_err(read_error)?;
    row.as_ref().map_or(Ok(Application::default()), application_row)
}

async fn set_application(
    db: &mut AnyConnection,
    name: &str,
    asset: &Asset,
    new: Application,
) -> Result<(), LedgerError> {
    let sql = "INSERT INTO ledger_applications (application, asset, per_day, day, used, opened) \
               VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (application, asset) \
               DO UPDATE SET per_day = excluded.per_day, day = excluded.day, used = excluded.used, opened = excluded.opened";
    let statement =
        query(sql).bind(name).bind(asset.as_str()).bind(new.per_day.map(|amount| Amount(amount).to_bytes()));
    let statement = statement.bind(i(new.day)).bind(Amount(new.used).to_bytes()).bind(i(new.opened));
    statement.execute(db).await.map(drop).map_err(write_error)
}

impl Application {
    /// After `add` and `take` on `day`, with `opened` more reservations. `None` where that is not possible.
    pub(crate) fn after(self, day: u64, (add, take): (u128, u128), opened: i64) -> Option<Self> {
        let (day, used) = used_after((self.day, self.used), day, add, take)?;
        Some(Self { day, used, opened: self.opened.checked_add_signed(opened)?, ..self })
    }
}

/// Makes what follows from the row `seq` in the tables.
pub(crate) async fn apply(db: &mut AnyConnection, seq: u64, effects: &[Effect]) -> Result<(), LedgerError> {
    let moves: Vec<_> =
        effects.iter().filter_map(|effect| if let Effect::Move(step) = effect { Some(step) } else { None }).collect();
    let balances = apply_moves(db, seq, &moves).await?;
    openlora_database::kill::point("after the balances");
    for effect in effects {
        apply_one(db, seq, effect).await?;
    }
    apply_leaves(db, effects, &balances).await
}

async fn apply_one(db: &mut AnyConnection, seq: u64, effect: &Effect) -> Result<(), LedgerError> {
    let statement = match effect {
        Effect::Open { name, at_ms } => query("INSERT INTO ledger_open (name, seq, at_ms) VALUES ($1, $2, $3)")
            .bind(name)
            .bind(i(seq))
            .bind(i(*at_ms)),
        Effect::Close { name } => query("DELETE FROM ledger_open WHERE name = $1").bind(name),
        Effect::Use { application: name, asset, day, add, take, opened } => {
            let old = application(db, name, asset).await?;
            let new =
                old.after(*day, (*add, *take), *opened).ok_or(LedgerError::Overflow { what: "what a day uses" })?;
            return set_application(db, name, asset, new).await;
        }
        Effect::Quota { application: name, asset, per_day } => {
            let old = application(db, name, asset).await?;
            let new = Application { per_day: per_day.map(|amount| amount.0), ..old };
            return set_application(db, name, asset, new).await;
        }
        Effect::Hold { receipt, asset, amount, at_ms } => {
            let sql = "INSERT INTO ledger_held (receipt, asset, amount, at_ms) VALUES ($1, $2, $3, $4)";
            query(sql).bind(receipt).bind(asset.as_str()).bind(amount.to_bytes()).bind(i(*at_ms))
        }
        Effect::Release { receipt } => query("DELETE FROM ledger_held WHERE receipt = $1").bind(receipt),
        Effect::Term { kind, target, asset } => {
            let sql = "INSERT INTO ledger_terms (kind, target, asset, seq) VALUES ($1, $2, $3, $4) \
                       ON CONFLICT (target, kind, asset) DO UPDATE SET seq = excluded.seq";
            query(sql).bind(*kind).bind(target).bind(asset).bind(i(seq))
        }
        Effect::Address { account, address: Some(address) } => {
            let sql = "INSERT INTO ledger_addresses (account, address) VALUES ($1, $2) \
                       ON CONFLICT (account) DO UPDATE SET address = excluded.address";
            query(sql).bind(account.to_string()).bind(address.0.to_vec())
        }
        Effect::Address { account, address: None } => {
            query("DELETE FROM ledger_addresses WHERE account = $1").bind(account.to_string())
        }
        // The head is written with the row; moves and leaves are made together.
        Effect::Seal { .. } | Effect::Move(_) | Effect::Leaf { .. } => return Ok(()),
    };
    statement.execute(db).await.map(drop).map_err(write_error)
}

pub(crate) async fn totals(db: &mut AnyConnection) -> Result<BTreeMap<Asset, u128>, LedgerError> {
    let rows = query("SELECT asset, cumulative FROM ledger_totals").fetch_all(db).await.map_err(read_error)?;
    rows.iter().map(|row| Ok((parsed(row, "asset")?, amount(row, "cumulative")?))).collect()
}

/// Writes what addresses are owed up to an epoch: all that their accounts ever got, which `balances` says.
async fn apply_leaves(db: &mut AnyConnection, effects: &[Effect], balances: &Balances) -> Result<(), LedgerError> {
    let mut leaves = BTreeMap::new();
    let mut sums = BTreeMap::new();
    for effect in effects {
        let Effect::Leaf { epoch, address, asset, amount } = effect else { continue };
        let account = (Account::Payout(*address).to_string(), asset.to_string());
        leaves.insert((*epoch, *address, asset), balances.get(&account).copied().unwrap_or_default().credits);
        if sums.is_empty() {
            sums = totals(db).await?;
        }
        let sum = sums.entry(asset.clone()).or_insert(0_u128);
        *sum = sum.checked_add(amount.0).ok_or(LedgerError::Overflow { what: "what all addresses are owed" })?;
    }
    if leaves.is_empty() {
        return Ok(());
    }
    for leaves in leaves.into_iter().collect::<Vec<_>>().chunks(BATCH) {
        let sql = format!(
            "INSERT INTO ledger_leaves (address, asset, epoch, cumulative) VALUES {} ON CONFLICT (address, asset, epoch) \
             DO UPDATE SET cumulative = excluded.cumulative",
            places(1, leaves.len(), 4)
        );
        let statement = leaves.iter().fold(query(&sql), |statement, ((epoch, address, asset), cumulative)| {
            let statement = statement.bind(address.0.to_vec()).bind(asset.as_str()).bind(i(*epoch));
            statement.bind(Amount(*cumulative).to_bytes())
        });
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    for (asset, sum) in sums {
        let sql = "INSERT INTO ledger_totals (asset, cumulative) VALUES ($1, $2) \
                   ON CONFLICT (asset) DO UPDATE SET cumulative = excluded.cumulative";
        let statement = query(sql).bind(asset.to_string()).bind(Amount(sum).to_bytes());
        statement.execute(&mut *db).await.map_err(write_error)?;
    }
    Ok(())
}
