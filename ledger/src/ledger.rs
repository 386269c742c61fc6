//! The ledger as its users have it.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use openlora_database::{Database, DatabaseUrl};
use openlora_types::InvalidField;
use sqlx::query;
use tokio::sync::{mpsc, oneshot};

use crate::{
    account::{Account, Address, Amount, Asset},
    config::LedgerConfig,
    error::LedgerError,
    queue::{Job, write_all},
    row::{Operation, Outcome, Request, Usage, Version, Written},
    tables::{SCHEMA, i, read_error, text},
    terms::{Prices, Split, Target},
    write::Writer,
};

/// Milliseconds since 1970.
pub type Clock = fn() -> u64;

/// What a request may spend: it is in the application's pending account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The journal's row.
    pub row: u64,
    /// What is reserved.
    pub amount: u128,
    /// What it will be priced with, whatever is set meanwhile.
    pub prices: Version<Prices>,
    /// How the fee will be split.
    pub split: Version<Split>,
}

/// A request that was charged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Posted {
    /// The journal's row.
    pub row: u64,
    /// What the application paid.
    pub fee: u128,
    /// What of its reservation it got back.
    pub returned: u128,
    /// Who got what: ascending by account, sums to `fee`.
    pub parts: Vec<(Account, Amount)>,
}

/// A receipt whose part was divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The journal's row.
    pub row: u64,
    /// What was divided.
    pub amount: u128,
    /// Who got what: ascending by account, sums to `amount`.
    pub parts: Vec<(Account, Amount)>,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Reservations voided for their age.
    pub voided: usize,
    /// Receipts whose part went to the pool.
    pub pooled: usize,
}

/// The open ledger. Cheap to clone; may be used from many tasks, and on PostgreSQL from many servers.
#[derive(Clone)]
pub struct Ledger {
    pub(crate) db: Arc<Database>,
    pub(crate) writer: Arc<Writer>,
    clock: Clock,
    jobs: mpsc::Sender<Job>,
}

impl Ledger {
    /// Opens the ledger in the database at `url` and brings its tables up to date. Must be called, as everything else
    /// here, within a tokio runtime.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`] for settings out of range, [`LedgerError::Database`].
    pub async fn open(url: &DatabaseUrl, config: LedgerConfig) -> Result<Self, LedgerError> {
        Self::open_with_clock(url, config, || {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
        })
        .await
    }

    /// As [`Ledger::open`], with a clock of the caller's.
    ///
    /// # Errors
    /// As [`Ledger::open`].
    pub async fn open_with_clock(url: &DatabaseUrl, config: LedgerConfig, clock: Clock) -> Result<Self, LedgerError> {
        config.check()?;
        let db = Arc::new(Database::open(url, SCHEMA).await?);
        let writer = Arc::new(Writer { config });
        let (jobs, queue) = mpsc::channel(writer.config.writes_max);
        let (own_db, own_writer) = (Arc::clone(&db), Arc::clone(&writer));
        let thread = std::thread::Builder::new().name("ledger".into());
        thread.spawn(move || write_all(&own_db, &own_writer, queue)).map_err(|_| LedgerError::Stopped)?;
        Ok(Self { db, writer, clock, jobs })
    }

    /// Ends all connections. What was answered is on the disk with or without this.
    pub async fn close(&self) {
        self.db.close().await;
    }

    /// Hands `asked` to the writer's thread, so that a caller who goes away does not stop a transaction that others share.
    pub(crate) async fn write(&self, key: &str, asked: Operation) -> Result<Written, LedgerError> {
        asked.check(key, &self.writer.config)?;
        let (answer, answered) = oneshot::channel();
        let job = Job { key: key.into(), asked, at_ms: (self.clock)(), answer };
        self.jobs.send(job).await.map_err(|_| LedgerError::Stopped)?;
        answered.await.unwrap_or(Err(LedgerError::Stopped))
    }

    /// Adds to what an application has prepaid, in an asset that prices are set in. Returns the row.
    ///
    /// # Errors
    /// [`LedgerError::Invalid`], [`LedgerError::KeyReused`], [`LedgerError::Overflow`], [`LedgerError::Database`]; as
    /// everything that writes here: the same key with the same content has the answer it had, and changes nothing.
    pub async fn deposit(&self, key: &str, application: &str, asset: &Asset, amount: u128) -> Result<u64, LedgerError> {
        let (application, asset, amount) = (application.into(), asset.clone(), Amount(amount));
        Ok(self.write(key, Operation::Deposit { application, asset, amount }).await?.seq)
    }

    /// Gives an application back what it does not use. Returns the row.
    ///
    /// # Errors
    /// [`LedgerError::Unfunded`] and as [`Ledger::deposit`].
    pub async fn withdraw(
        &self,
        key: &str,
        application: &str,
        asset: &Asset,
        amount: u128,
    ) -> Result<u64, LedgerError> {
        let (application, asset, amount) = (application.into(), asset.clone(), Amount(amount));
        Ok(self.write(key, Operation::Withdraw { application, asset, amount }).await?.seq)
    }

    /// Notes that `address` was paid on the chain. Returns the row.
    ///
    /// # Errors
    /// [`LedgerError::Unfunded`] where sealed epochs owe it less, and as [`Ledger::deposit`].
    pub async fn claimed(&self, key: &str, address: Address, asset: &Asset, amount: u128) -> Result<u64, LedgerError> {
        let (asset, amount) = (asset.clone(), Amount(amount));
        Ok(self.write(key, Operation::Claim { address, asset, amount }).await?.seq)
    }

    /// Sets prices from now on. Returns the row, which is the version.
    ///
    /// # Errors
    /// [`LedgerError::LimitReached`] for one asset too many, and as [`Ledger::deposit`].
    pub async fn set_prices(
        &self,
        key: &str,
        target: &Target,
        asset: &Asset,
        prices: Prices,
    ) -> Result<u64, LedgerError> {
        let (target, asset) = (target.clone(), asset.clone());
        Ok(self.write(key, Operation::Prices { target, asset, prices }).await?.seq)
    }

    /// Sets the split from now on. Returns the row, which is the version.
    ///
    /// # Errors
    /// As [`Ledger::deposit`].
    pub async fn set_split(&self, key: &str, target: &Target, split: Split) -> Result<u64, LedgerError> {
        Ok(self.write(key, Operation::Split { target: target.clone(), split }).await?.seq)
    }

    /// Sets what an application may spend in a day (UTC), reservations included; `None`: what it has. Returns the row.
    ///
    /// # Errors
    /// As [`Ledger::deposit`].
    pub async fn set_quota(
        &self,
        key: &str,
        application: &str,
        asset: &Asset,
        per_day: Option<u128>,
    ) -> Result<u64, LedgerError> {
        let (application, asset, per_day) = (application.into(), asset.clone(), per_day.map(Amount));
        Ok(self.write(key, Operation::Quota { application, asset, per_day }).await?.seq)
    }

    /// Sets where an account is paid from the next seal on; `None`: nowhere, so that what it gets accrues. Returns the
    /// row.
    ///
    /// # Errors
    /// As [`Ledger::deposit`].
    pub async fn set_address(
        &self,
        key: &str,
        account: &Account,
        address: Option<Address>,
    ) -> Result<u64, LedgerError> {
        Ok(self.write(key, Operation::Address { account: account.clone(), address }).await?.seq)
    }

    /// Sets aside what `request` may cost at most, by the prices that hold now.
    ///
    /// # Errors
    /// [`LedgerError::Unfunded`], [`LedgerError::OverQuota`], [`LedgerError::TooManyOpen`], [`LedgerError::NoTerms`], and
    /// as [`Ledger::deposit`].
    pub async fn reserve(&self, key: &str, request: &Request) -> Result<Reservation, LedgerError> {
        let written = self.write(key, Operation::Reserve(request.clone())).await?;
        match written.body.outcome {
            Outcome::Reserved { amount, prices, split, .. } => {
                Ok(Reservation { row: written.seq, amount: amount.0, prices, split })
            }
            _ => Err(mismatch(written.seq)),
        }
    }

    /// Charges what the request of reservation `key` used, and gives back the rest.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], [`LedgerError::Voided`], [`LedgerError::ExceedsReservation`], and as
    /// [`Ledger::deposit`].
    pub async fn post(&self, key: &str, usage: &Usage) -> Result<Posted, LedgerError> {
        let written = self.write(key, Operation::Post(usage.clone())).await?;
        match written.body.outcome {
            Outcome::Posted { reservation, fee, parts } => {
                Ok(Posted { row: written.seq, fee: fee.0, returned: reservation.reserved.0 - fee.0, parts })
            }
            _ => Err(mismatch(written.seq)),
        }
    }

    /// Gives the whole of reservation `key` back. Returns the row.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], [`LedgerError::Posted`], and as [`Ledger::deposit`].
    pub async fn void(&self, key: &str) -> Result<u64, LedgerError> {
        Ok(self.write(key, Operation::Void { expired: false }).await?.seq)
    }

    /// Divides what is held for `receipt` among `shares`, contributors and their weights, and the pool, whose weight is
    /// `unattributed`. All weights 0: it goes to the pool. Once only; the order of `shares` does not matter.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`] where nothing is held for it, [`LedgerError::Settled`] where another table was there
    /// first, [`LedgerError::Overflow`] where the weights sum to 2^64 or more, and as [`Ledger::deposit`].
    pub async fn attribute(
        &self,
        receipt: &str,
        mut shares: Vec<(String, u64)>,
        unattributed: u64,
    ) -> Result<Settled, LedgerError> {
        shares.sort_unstable();
        let asked = Operation::Attribute { receipt: receipt.into(), shares, unattributed };
        let written = self.write(receipt, asked).await?;
        match written.body.outcome {
            Outcome::Settled { amount, parts, .. } => Ok(Settled { row: written.seq, amount: amount.0, parts }),
            _ => Err(mismatch(written.seq)),
        }
    }

    /// Voids reservations that grew too old and gives parts that nobody attributed to the pool, at most
    /// `sweep_rows_max` of each. To be called from time to time.
    ///
    /// # Errors
    /// [`LedgerError::Database`].
    pub async fn sweep(&self) -> Result<Swept, LedgerError> {
        let config = &self.writer.config;
        let mut swept = Swept::default();
        let old = "SELECT name AS found FROM ledger_open WHERE at_ms <= $1 ORDER BY at_ms, name LIMIT $2";
        for key in self.older(old, config.reservation_age_s).await? {
            match self.write(&key, Operation::Void { expired: true }).await {
                Ok(_) => swept.voided += 1,
                // Its request ended meanwhile.
                Err(LedgerError::Posted { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let old = "SELECT receipt AS found FROM ledger_held WHERE at_ms <= $1 ORDER BY at_ms, receipt LIMIT $2";
        for receipt in self.older(old, config.unattributed_after_s).await? {
            match self.write(&receipt, Operation::Pool { receipt: receipt.clone() }).await {
                Ok(_) => swept.pooled += 1,
                // Its table came meanwhile.
                Err(LedgerError::Settled { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(swept)
    }

    async fn older(&self, sql: &str, age_s: u64) -> Result<Vec<String>, LedgerError> {
        let before = (self.clock)().saturating_sub(age_s.saturating_mul(1_000));
        let statement = query(sql).bind(i(before)).bind(i(self.writer.config.sweep_rows_max as u64));
        let rows = statement.fetch_all(self.db.reader()).await.map_err(read_error)?;
        rows.iter().map(|row| text(row, "found")).collect()
    }

    /// The bound of a listing.
    pub(crate) fn page(&self, limit: usize) -> Result<usize, LedgerError> {
        let max = self.writer.config.page_rows_max;
        if limit == 0 || limit > max {
            return Err(InvalidField::new("limit", format!("must be 1 to {max} (page_rows_max)")).into());
        }
        Ok(limit)
    }
}

pub(crate) fn mismatch(row: u64) -> LedgerError {
    LedgerError::Damaged { row, reason: "its outcome is not one of what was asked".into() }
}
