//! Epochs: what the rows since the last seal owe, moved to addresses and never changed again.

use sqlx::query;

use crate::{
    account::{Address, Amount, Asset},
    error::LedgerError,
    ledger::{Ledger, mismatch},
    row::{Operation, Outcome},
    tables::{self, Head, amount, bytes, i, parsed, read_error},
    write::due,
};

/// A sealed epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// 1, 2, 3, …
    pub number: u64,
    /// The journal's row that sealed it: the one after `last`.
    pub row: u64,
    /// Its first row.
    pub first: u64,
    /// Its last row.
    pub last: u64,
    /// The hash of its last row.
    pub head: [u8; 32],
    /// When it was sealed, milliseconds since 1970.
    pub sealed_at_ms: u64,
    /// For each asset, ascending: what all addresses are owed by this epoch and those before it, claims not deducted.
    pub cumulative: Vec<(Asset, Amount)>,
    /// Of that, what this epoch added; assets it added nothing in are left out.
    pub paid: Vec<(Asset, Amount)>,
}

/// What an address is owed by all epochs up to one, claims not deducted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Whom.
    pub address: Address,
    /// In what.
    pub asset: Asset,
    /// How much; never less in a later epoch.
    pub cumulative: u128,
}

/// A receipt that an epoch's payments rest on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The receipt.
    pub receipt: String,
    /// The row that charged its request (`settled` false) or divided its part (`settled` true).
    pub row: u64,
    /// Which.
    pub settled: bool,
    /// The row's hash in the journal.
    pub hash: [u8; 32],
}

/// The leaves of an epoch, page by page: ascending by address, then asset.
pub struct Fold<'l> {
    ledger: &'l Ledger,
    epoch: u64,
    after: (Vec<u8>, String),
}

/// The receipts of an epoch, page by page: ascending by row.
pub struct Receipts<'l> {
    ledger: &'l Ledger,
    after: u64,
    last: u64,
}

impl Ledger {
    /// Closes the rows since the last epoch. First every paid account with an address has what it holds moved there, in
    /// rows of at most `payout_accounts_max` accounts, so that requests go on between them; then one row closes the
    /// epoch. Interrupted, it is finished by the next call. What an account gets after its payout is paid in the next.
    ///
    /// # Errors
    /// [`LedgerError::EmptyEpoch`] where nothing but claims was written since the last, [`LedgerError::NobodyPaid`] where it would be the
    /// first and no address is owed anything; [`LedgerError::Database`];
    /// [`LedgerError::KeyReused`] where another server seals at the same time, which changes nothing.
    pub async fn seal(&self) -> Result<Epoch, LedgerError> {
        let head = self.head().await?;
        if !self.has_news(head.epoch_row).await? {
            return Err(LedgerError::EmptyEpoch { last: head.epoch });
        }
        let epoch = head.epoch + 1;
        let mut after = String::new();
        while self.is_due(&after).await? {
            let key = format!("{epoch}/{}", self.head().await?.seq);
            let written = self.write(&key, Operation::Payout { epoch, after: after.clone() }).await?;
            openlora_database::kill::point("between payouts and seal");
            let Outcome::Paid(payments) = written.body.outcome else { return Err(mismatch(written.seq)) };
            let Some(last) = payments.last() else { break };
            after = last.account.to_string();
        }
        self.write(&epoch.to_string(), Operation::Seal { epoch }).await?;
        self.epoch(epoch).await
    }

    async fn head(&self) -> Result<Head, LedgerError> {
        tables::head(&mut *self.connection().await?).await
    }

    /// Whether anything but claims was written since an epoch's row: claims are of what epochs have paid already.
    async fn has_news(&self, epoch_row: u64) -> Result<bool, LedgerError> {
        let sql = "SELECT seq FROM ledger_rows WHERE seq > $1 AND idempotency NOT LIKE 'claim/%' ORDER BY seq LIMIT 1";
        let found = query(sql).bind(i(epoch_row)).fetch_optional(self.db.reader()).await.map_err(read_error)?;
        Ok(found.is_some())
    }

    async fn is_due(&self, after: &str) -> Result<bool, LedgerError> {
        Ok(!due(&mut *self.connection().await?, after, 1).await?.is_empty())
    }

    /// The newest epoch's number, 0 where none was sealed.
    ///
    /// # Errors
    /// [`LedgerError::Database`].
    pub async fn last_epoch(&self) -> Result<u64, LedgerError> {
        Ok(self.head().await?.epoch)
    }

    /// A sealed epoch.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], [`LedgerError::Database`].
    pub async fn epoch(&self, number: u64) -> Result<Epoch, LedgerError> {
        let missing = || LedgerError::NotFound { what: "epoch", name: number.to_string() };
        let db = &mut *self.connection().await?;
        let row = tables::find(db, &format!("seal/{number}")).await?.ok_or_else(missing)?;
        let before = match number {
            1 => Vec::new(),
            _ => match tables::find(db, &format!("seal/{}", number - 1)).await?.ok_or_else(missing)?.parse()?.outcome {
                Outcome::Sealed { totals, .. } => totals,
                _ => return Err(mismatch(row.seq)),
            },
        };
        let Outcome::Sealed { first, last, head, totals } = row.parse()?.outcome else { return Err(mismatch(row.seq)) };
        let head = blake3::Hash::from_hex(&head).map_err(|_| mismatch(row.seq))?;
        let mut paid = totals.clone();
        for (asset, sum) in &mut paid {
            let old = before.iter().find(|(old, _)| old == asset).map_or(0, |(_, old)| old.0);
            sum.0 = sum.0.checked_sub(old).ok_or_else(|| mismatch(row.seq))?;
        }
        paid.retain(|(_, sum)| sum.0 > 0);
        let (head, sealed_at_ms) = (*head.as_bytes(), row.at_ms);
        Ok(Epoch { number, row: row.seq, first, last, head, sealed_at_ms, cumulative: totals, paid })
    }

    /// What every address is owed by all epochs up to `epoch`. The same whenever it is asked.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`] where it is not sealed, [`LedgerError::Database`].
    pub async fn fold(&self, epoch: u64) -> Result<Fold<'_>, LedgerError> {
        self.epoch(epoch).await?;
        Ok(Fold { ledger: self, epoch, after: (Vec::new(), String::new()) })
    }

    /// The receipts charged or settled in `epoch`.
    ///
    /// # Errors
    /// As [`Ledger::fold`].
    pub async fn receipts(&self, epoch: u64) -> Result<Receipts<'_>, LedgerError> {
        let epoch = self.epoch(epoch).await?;
        Ok(Receipts { ledger: self, after: epoch.first - 1, last: epoch.last })
    }
}

impl Fold<'_> {
    /// The next leaves, at most `page_rows_max`; none at the end.
    ///
    /// # Errors
    /// [`LedgerError::Database`].
    pub async fn next(&mut self) -> Result<Vec<Leaf>, LedgerError> {
        let sql = "SELECT address, asset, cumulative FROM ledger_leaves l WHERE epoch <= $1 \
                   AND (address, asset) > ($2, $3) AND NOT EXISTS (SELECT 1 FROM ledger_leaves n \
                   WHERE n.address = l.address AND n.asset = l.asset AND n.epoch > l.epoch AND n.epoch <= $1) \
                   ORDER BY address, asset LIMIT $4";
        let limit = i(self.ledger.writer.config.page_rows_max as u64);
        let statement =
            query(sql).bind(i(self.epoch)).bind(self.after.0.clone()).bind(self.after.1.clone()).bind(limit);
        let rows = statement.fetch_all(self.ledger.db.reader()).await.map_err(read_error)?;
        let leaf = |row| {
            Ok(Leaf {
                address: Address(bytes(row, "address")?),
                asset: parsed(row, "asset")?,
                cumulative: amount(row, "cumulative")?,
            })
        };
        let leaves = rows.iter().map(leaf).collect::<Result<Vec<_>, LedgerError>>()?;
        if let Some(last) = leaves.last() {
            self.after = (last.address.0.to_vec(), last.asset.to_string());
        }
        Ok(leaves)
    }
}

impl Receipts<'_> {
    /// The next receipts, at most `page_rows_max`; none at the end.
    ///
    /// # Errors
    /// [`LedgerError::Database`], [`LedgerError::Damaged`].
    pub async fn next(&mut self) -> Result<Vec<Evidence>, LedgerError> {
        let mut found = Vec::new();
        while found.is_empty() && self.after < self.last {
            let limit = self.ledger.writer.config.page_rows_max;
            let rows = tables::charges(&mut *self.ledger.connection().await?, self.after, self.last, limit).await?;
            for row in &rows {
                let (receipt, settled) = match row.parse()?.asked {
                    Operation::Post(usage) => (usage.receipt, false),
                    Operation::Attribute { receipt, .. } | Operation::Pool { receipt } => (Some(receipt), true),
                    _ => continue,
                };
                let of_row = |receipt| Evidence { receipt, row: row.seq, settled, hash: row.hash };
                found.extend(receipt.map(of_row));
            }
            self.after = rows.last().map_or(self.last, |row| row.seq);
        }
        Ok(found)
    }
}
