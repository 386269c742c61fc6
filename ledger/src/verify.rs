//! Derives everything again from the journal and compares: the chain, the rules, and every table.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{AnyConnection, any::AnyRow, query};

use crate::{
    account::Amount,
    error::LedgerError,
    ledger::Ledger,
    row::{Body, Effect, Operation, Outcome, Row},
    tables::{self, Application, Balances, Head, amount, application_row, bytes, number, post_move, read_error, text},
    terms::Tokens,
    write::shares_of,
};

/// Rows read at once.
const PAGE: usize = 1_000;

/// A ledger in which everything fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Rows of the journal.
    pub rows: u64,
    /// The hash of the last, to be compared with one kept elsewhere.
    pub head: [u8; 32],
    /// Balances derived again, one for each account and asset.
    pub balances: u64,
    /// Epochs sealed.
    pub epochs: u64,
}

/// A table as its primary key and the rest, both as text: small, or as large as the accounts are many.
type Table = BTreeMap<String, String>;

/// The tables as they follow from the rows so far.
#[derive(Default)]
struct Replay {
    head: Option<Head>,
    balances: Balances,
    applications: BTreeMap<(String, String), Application>,
    /// What each row that set prices or a split set.
    versions: BTreeMap<u64, Operation>,
    /// Outcomes of the reservations that are open, by their rows.
    reserved: BTreeMap<u64, Outcome>,
    open: Table,
    held: Table,
    terms: Table,
    addresses: Table,
    leaves: Table,
    totals: BTreeMap<String, u128>,
    /// Sum of [`entry_digest`].
    entries: u128,
}

impl Ledger {
    /// Reads the whole journal, as it is when this is called, and finds the first row that does not fit: edited, deleted,
    /// inserted or moved by hand, or with an outcome that the rules do not give; then any table that is not what the rows
    /// make of it. `progress` is told the rows done and the rows there are. Takes memory for accounts, open
    /// reservations, held receipts and leaves, not for rows.
    ///
    /// # Errors
    /// [`LedgerError::Damaged`] with the row (for a table: the last row), [`LedgerError::Database`].
    pub async fn verify(&self, mut progress: impl FnMut(u64, u64)) -> Result<Verified, LedgerError> {
        let mut snapshot = self.db.snapshot().await?;
        let db = &mut *snapshot;
        let head = tables::head(db).await?;
        let mut replay = Replay::default();
        let mut last = Head { seq: 0, hash: [0; 32], epoch: 0, epoch_row: 0 };
        loop {
            let rows = tables::rows(db, last.seq, PAGE).await?;
            for row in &rows {
                last = replay.row(row, last).map_err(|error| damaged_at(row.seq, last.seq + 1, error))?;
            }
            progress(last.seq, head.seq);
            if rows.len() < PAGE {
                break;
            }
        }
        if last != head {
            let (row, reason) = (last.seq.min(head.seq) + 1, format!("the head says row {} is the last", head.seq));
            return Err(LedgerError::Damaged { row, reason });
        }
        replay.head = Some(head);
        replay.compare(db).await?;
        let balances = replay.balances.len() as u64;
        Ok(Verified { rows: head.seq, head: head.hash, balances, epochs: head.epoch })
    }
}

/// The error for the row `found` where `expected` was next.
fn damaged_at(found: u64, expected: u64, error: LedgerError) -> LedgerError {
    match error {
        LedgerError::Database(_) | LedgerError::Damaged { .. } => error,
        other => LedgerError::Damaged { row: found.min(expected), reason: other.to_string() },
    }
}

fn wrong(row: u64, reason: impl Into<String>) -> LedgerError {
    LedgerError::Damaged { row, reason: reason.into() }
}

impl Replay {
    /// Checks `row` after `last` and makes what follows from it.
    fn row(&mut self, row: &Row, last: Head) -> Result<Head, LedgerError> {
        let seq = last.seq + 1;
        if row.seq != seq {
            return Err(wrong(seq, format!("it is missing; the next one is row {}", row.seq)));
        }
        if row.hash != row.hash_after(&last.hash) {
            return Err(wrong(seq, "its hash is not that of the row before it and its content"));
        }
        let body = row.parse()?;
        self.check_rules(row, &body, &last)?;
        let unfit = || wrong(seq, "its outcome is not one of what was asked");
        let mut touched = BTreeSet::new();
        for effect in body.effects(&row.idempotency, row.at_ms).ok_or_else(unfit)? {
            if let Effect::Move(step) = &effect {
                touched.extend([step.from.to_string(), step.to.to_string()]);
            }
            self.apply(seq, &effect)?;
        }
        let digests = touched.iter().map(|account| entry_digest(account, seq));
        self.entries = digests.fold(self.entries, u128::wrapping_add);
        let mut head = Head { seq, hash: row.hash, ..last };
        match (body.asked, body.outcome) {
            (Operation::Seal { epoch }, _) => (head.epoch, head.epoch_row) = (epoch, seq),
            (terms @ (Operation::Prices { .. } | Operation::Split { .. }), _) => drop(self.versions.insert(seq, terms)),
            (_, reserved @ Outcome::Reserved { .. }) => drop(self.reserved.insert(seq, reserved)),
            (_, Outcome::Posted { reservation, .. } | Outcome::Voided(reservation)) => {
                self.reserved.remove(&reservation.row);
            }
            _ => {}
        }
        Ok(head)
    }

    /// Whether the outcome is what the rules give for what was asked, as far as the row says it all.
    fn check_rules(&self, row: &Row, body: &Body, last: &Head) -> Result<(), LedgerError> {
        let fits = match (&body.asked, &body.outcome) {
            (Operation::Reserve(request), Outcome::Reserved { amount, prices, split, .. }) => {
                let completion = request.completion_tokens_max;
                let worst = Tokens { prompt: request.prompt_tokens, cached: 0, completion };
                let set = (self.versions.get(&prices.row), self.versions.get(&split.row));
                matches!(set, (Some(Operation::Prices { prices: set, .. }), Some(Operation::Split { split: how, .. }))
                    if (*set, *how) == (prices.terms, split.terms))
                    && prices.terms.fee(&worst)?.charged == amount.0
            }
            (Operation::Post(usage), Outcome::Posted { reservation, fee, parts }) => {
                let Some(Outcome::Reserved { amount, prices, split, .. }) = self.reserved.get(&reservation.row) else {
                    return Err(wrong(row.seq, "it closes a reservation that is not open"));
                };
                let due = prices.terms.fee(&usage.tokens)?;
                due.charged == fee.0
                    && reservation.reserved == *amount
                    && split.terms.parts(due, &usage.payees, usage.receipt.is_some())? == *parts
                    && self.opened_by(row, reservation.row)
            }
            (Operation::Void { .. }, Outcome::Voided(reservation)) => self.opened_by(row, reservation.row),
            (Operation::Attribute { receipt, shares, unattributed }, Outcome::Settled { asset, amount, parts }) => {
                self.held.get(receipt).is_some_and(|held| held.starts_with(&format!("{asset} {amount} ")))
                    && shares_of(amount.0, shares, *unattributed)? == *parts
            }
            (Operation::Pool { receipt }, Outcome::Settled { asset, amount, parts }) => {
                self.held.get(receipt).is_some_and(|held| held.starts_with(&format!("{asset} {amount} ")))
                    && shares_of(amount.0, &[], 1)? == *parts
            }
            (Operation::Payout { epoch, .. }, Outcome::Paid(payments)) => {
                let at = |account: &str| self.addresses.get(account).cloned();
                *epoch == last.epoch + 1
                    && payments.iter().all(|paid| at(&paid.account.to_string()) == Some(paid.address.to_string()))
            }
            (Operation::Seal { epoch }, Outcome::Sealed { first, last: end, head, totals }) => {
                let sums: Vec<_> = totals.iter().map(|(asset, sum)| (asset.to_string(), sum.0)).collect();
                let hash = blake3::Hash::from_bytes(last.hash).to_hex();
                (*epoch, *first, *end) == (last.epoch + 1, last.epoch_row + 1, last.seq)
                    && *head == hash.as_str()
                    && sums == self.totals.clone().into_iter().collect::<Vec<_>>()
            }
            _ => true,
        };
        if fits { Ok(()) } else { Err(wrong(row.seq, "its outcome is not what the rules give")) }
    }

    /// Whether the reservation that `row` closes is open and was made in the row `opened`.
    fn opened_by(&self, row: &Row, opened: u64) -> bool {
        let name = row.idempotency.strip_prefix("close/").unwrap_or_default();
        self.open.get(name).is_some_and(|open| open.starts_with(&format!("{opened} ")))
    }

    fn apply(&mut self, seq: u64, effect: &Effect) -> Result<(), LedgerError> {
        match effect {
            Effect::Move(step) => post_move(&mut self.balances, step)?,
            Effect::Open { name, at_ms } => drop(self.open.insert(name.clone(), format!("{seq} {at_ms}"))),
            Effect::Close { name } => drop(self.open.remove(name)),
            Effect::Use { application, asset, day, add, take, opened } => {
                let state = self.applications.entry((application.clone(), asset.to_string())).or_default();
                let after = state.after(*day, (*add, *take), *opened);
                *state = after.ok_or_else(|| wrong(seq, "it closes more than is open"))?;
            }
            Effect::Quota { application, asset, per_day } => {
                let state = self.applications.entry((application.clone(), asset.to_string())).or_default();
                state.per_day = per_day.map(|amount| amount.0);
            }
            Effect::Hold { receipt, asset, amount, at_ms } => {
                self.held.insert(receipt.clone(), format!("{asset} {amount} {at_ms}"));
            }
            Effect::Release { receipt } => drop(self.held.remove(receipt)),
            Effect::Term { kind, target, asset } => {
                self.terms.insert(format!("{kind}\n{target}\n{asset}"), seq.to_string());
            }
            Effect::Address { account, address: Some(address) } => {
                self.addresses.insert(account.to_string(), address.to_string());
            }
            Effect::Address { account, address: None } => drop(self.addresses.remove(&account.to_string())),
            Effect::Leaf { epoch, address, asset, amount } => {
                let owed = (crate::account::Account::Payout(*address).to_string(), asset.to_string());
                let credits = self.balances.get(&owed).copied().unwrap_or_default().credits;
                self.leaves.insert(format!("{address}\n{asset}\n{epoch}"), credits.to_string());
                let sum = self.totals.entry(asset.to_string()).or_default();
                *sum =
                    sum.checked_add(amount.0).ok_or(LedgerError::Overflow { what: "what all addresses are owed" })?;
            }
            Effect::Seal { .. } => {}
        }
        Ok(())
    }

    /// Compares every table with what the rows make of it.
    async fn compare(&mut self, db: &mut AnyConnection) -> Result<(), LedgerError> {
        let last = self.head.map_or(0, |head| head.seq);
        let balances = self.balances.iter().map(|((account, asset), sums)| {
            (format!("{account}\n{asset}"), format!("{} {}", sums.credits, sums.debits))
        });
        let applications = self
            .applications
            .iter()
            .map(|((application, asset), state)| (format!("{application}\n{asset}"), format!("{state:?}")));
        let totals = self.totals.iter().map(|(asset, sum)| (asset.clone(), sum.to_string()));
        let key = |row: &AnyRow, columns: &[&str]| -> Result<String, LedgerError> {
            let parts: Result<Vec<_>, _> = columns.iter().map(|column| text(row, column)).collect();
            Ok(parts?.join("\n"))
        };
        let (balances, applications, totals) = (balances.collect(), applications.collect(), totals.collect());
        same(db, "ledger_balances", last, balances, |row| {
            let sums = format!("{} {}", amount(row, "credits")?, amount(row, "debits")?);
            Ok((key(row, &["account", "asset"])?, sums))
        })
        .await?;
        same(db, "ledger_applications", last, applications, |row| {
            Ok((key(row, &["application", "asset"])?, format!("{:?}", application_row(row)?)))
        })
        .await?;
        same(db, "ledger_totals", last, totals, |row| {
            Ok((key(row, &["asset"])?, amount(row, "cumulative")?.to_string()))
        })
        .await?;
        same(db, "ledger_open", last, std::mem::take(&mut self.open), |row| {
            Ok((key(row, &["name"])?, format!("{} {}", number(row, "seq")?, number(row, "at_ms")?)))
        })
        .await?;
        same(db, "ledger_held", last, std::mem::take(&mut self.held), |row| {
            let (asset, amount) = (text(row, "asset")?, amount(row, "amount")?);
            Ok((key(row, &["receipt"])?, format!("{asset} {amount} {}", number(row, "at_ms")?)))
        })
        .await?;
        same(db, "ledger_terms", last, std::mem::take(&mut self.terms), |row| {
            Ok((key(row, &["kind", "target", "asset"])?, number(row, "seq")?.to_string()))
        })
        .await?;
        same(db, "ledger_addresses", last, std::mem::take(&mut self.addresses), |row| {
            Ok((key(row, &["account"])?, crate::account::Address(bytes(row, "address")?).to_string()))
        })
        .await?;
        same(db, "ledger_leaves", last, std::mem::take(&mut self.leaves), |row| {
            let address = crate::account::Address(bytes(row, "address")?);
            let place = format!("{address}\n{}\n{}", text(row, "asset")?, number(row, "epoch")?);
            Ok((place, Amount(amount(row, "cumulative")?).to_string()))
        })
        .await?;
        self.compare_entries(db, last).await
    }

    /// The index of entries is too long to keep: a sum over all its rows, in any order, is compared instead.
    async fn compare_entries(&self, db: &mut AnyConnection, last: u64) -> Result<(), LedgerError> {
        use futures_util::TryStreamExt as _;

        let mut found = 0_u128;
        let mut rows = query("SELECT account, seq FROM ledger_entries").fetch(db);
        while let Some(row) = rows.try_next().await.map_err(read_error)? {
            found = found.wrapping_add(entry_digest(&text(&row, "account")?, number(&row, "seq")?));
        }
        if found == self.entries {
            return Ok(());
        }
        Err(wrong(last, "ledger_entries does not name exactly the rows that move each account's money"))
    }
}

/// 16 bytes that stand for an entry of the index.
fn entry_digest(account: &str, seq: u64) -> u128 {
    let mut hasher = blake3::Hasher::new();
    let digest = hasher.update(&seq.to_be_bytes()).update(account.as_bytes()).finalize();
    u128::from_be_bytes(*digest.as_bytes().first_chunk().expect("32 bytes"))
}

/// Compares the table `name` with `expected`, page by page of nothing but its rows.
async fn same(
    db: &mut AnyConnection,
    name: &str,
    last: u64,
    mut expected: Table,
    line: impl Fn(&AnyRow) -> Result<(String, String), LedgerError>,
) -> Result<(), LedgerError> {
    use futures_util::TryStreamExt as _;

    let sql = format!("SELECT * FROM {name}");
    let mut rows = query(&sql).fetch(db);
    while let Some(row) = rows.try_next().await.map_err(read_error)? {
        let (place, found) = line(&row)?;
        if expected.remove(&place).is_none_or(|expected| expected != found) {
            let place = place.replace('\n', " ");
            return Err(wrong(
                last,
                format!("{name} has {place}: {found}, which does not follow from the rows up to it"),
            ));
        }
    }
    match expected.pop_first() {
        Some((place, value)) => {
            let place = place.replace('\n', " ");
            Err(wrong(last, format!("{name} lacks {place}: {value}, which follows from the rows up to it")))
        }
        None => Ok(()),
    }
}
