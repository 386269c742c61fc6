//! What an account has, and where it came from.

use openlora_database::DatabaseError;
use sqlx::{Any, pool::PoolConnection, query};

use crate::{
    account::{Account, Address, Asset},
    error::LedgerError,
    ledger::{Ledger, mismatch},
    row::Effect,
    tables::{READ, amount, bytes, i, journal_row, read_error},
};

/// What an account has of an asset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// All it ever got.
    pub credits: u128,
    /// All it ever gave. More than `credits` for [`Account::World`] only.
    pub debits: u128,
}

impl Holding {
    /// What is left; 0 for the world.
    #[must_use]
    pub fn available(&self) -> u128 {
        self.credits.saturating_sub(self.debits)
    }
}

/// One movement of an account's money.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The journal's row.
    pub row: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// The row's kind and key, such as `close/KEY`.
    pub what: String,
    /// In what.
    pub asset: Asset,
    /// What came, from whom or to whom.
    pub other: Account,
    /// Whether the account got it.
    pub credit: bool,
    /// How much.
    pub amount: u128,
}

/// Which end of a listing comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The newest row first.
    Newest,
    /// The oldest row first.
    Oldest,
}

impl Ledger {
    pub(crate) async fn connection(&self) -> Result<PoolConnection<Any>, LedgerError> {
        Ok(self.db.reader().acquire().await.map_err(DatabaseError::new(READ))?)
    }

    /// What `account` has of `asset`.
    ///
    /// # Errors
    /// [`LedgerError::Database`].
    pub async fn balance(&self, account: &Account, asset: &Asset) -> Result<Holding, LedgerError> {
        let sql = "SELECT credits, debits FROM ledger_balances WHERE account = $1 AND asset = $2";
        let statement = query(sql).bind(account.to_string()).bind(asset.as_str());
        let row = statement.fetch_optional(self.db.reader()).await.map_err(read_error)?;
        let holding = |row| Ok(Holding { credits: amount(&row, "credits")?, debits: amount(&row, "debits")? });
        row.map_or(Ok(Holding::default()), holding)
    }

    /// Where `account` is paid from the next seal on; none where what it gets accrues.
    ///
    /// # Errors
    /// [`LedgerError::Database`].
    pub async fn address(&self, account: &Account) -> Result<Option<Address>, LedgerError> {
        let statement = query("SELECT address FROM ledger_addresses WHERE account = $1").bind(account.to_string());
        let row = statement.fetch_optional(self.db.reader()).await.map_err(read_error)?;
        row.map(|row| Ok(Address(bytes(&row, "address")?))).transpose()
    }

    /// The account's movements in at most `limit` rows beyond the row `cursor` (`None`: from the end that `order`
    /// names), and the cursor of the next page. A row has several entries where it moves money several times.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] on `limit`, [`LedgerError::Database`], [`LedgerError::Damaged`].
    pub async fn entries(
        &self,
        account: &Account,
        order: Order,
        cursor: Option<u64>,
        limit: usize,
    ) -> Result<(Vec<Entry>, Option<u64>), LedgerError> {
        let limit = self.page(limit)?;
        let (beyond, direction, start) = match order {
            Order::Newest => ("<", "DESC", u64::MAX),
            Order::Oldest => (">", "ASC", 0),
        };
        let sql = format!(
            "SELECT r.seq, r.at_ms, r.idempotency, r.body, r.hash FROM ledger_entries e JOIN ledger_rows r \
             ON r.seq = e.seq WHERE e.account = $1 AND e.seq {beyond} $2 ORDER BY e.seq {direction} LIMIT $3"
        );
        let statement = query(&sql).bind(account.to_string()).bind(i(cursor.unwrap_or(start))).bind(i(limit as u64));
        let rows = statement.fetch_all(self.db.reader()).await.map_err(read_error)?;
        let mut entries = Vec::new();
        let mut next = None;
        for row in &rows {
            let row = journal_row(row)?;
            let effects = row.parse()?.effects(&row.idempotency, row.at_ms).ok_or_else(|| mismatch(row.seq))?;
            for effect in effects {
                let Effect::Move(step) = effect else { continue };
                let (other, credit) = match (step.from == *account, step.to == *account) {
                    (true, _) => (step.to, false),
                    (_, true) => (step.from, true),
                    _ => continue,
                };
                let (what, asset, amount) = (row.idempotency.clone(), step.asset, step.amount.0);
                entries.push(Entry { row: row.seq, at_ms: row.at_ms, what, asset, other, credit, amount });
            }
            next = Some(row.seq);
        }
        Ok((entries, next.filter(|_| rows.len() == limit)))
    }
}
