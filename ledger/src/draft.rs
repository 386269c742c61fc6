//! What a transaction has read and is about to write.
//!
//! Most operations touch the same few lines (the head, an application, the operator's balance), and a statement costs
//! more than what it does: SQLite runs on a thread that must wake, PostgreSQL elsewhere. So operations that share a
//! transaction are decided in memory, one after another, each seeing what those before it did, and what they leave is
//! written together, many lines to a statement and each line once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
};

use openlora_database::kill;
use sqlx::AnyConnection;

use crate::{
    account::{Account, Asset},
    error::LedgerError,
    row::{Body, Effect, Move, Operation, Row, Version, Written},
    tables::{self, Application, Balances, Head, Held, Tables, post_move},
    terms::{Prices, Split},
};

/// Lines held before they are written: bounds a transaction's memory. One row's may be more.
const LINES_MAX: usize = 10_000;

/// Prices and split that hold for a request.
pub(crate) type Terms = (Version<Prices>, Version<Split>);

/// The tables as a transaction sees them.
pub(crate) struct Draft<'c> {
    db: &'c mut AnyConnection,
    head: Head,
    /// Rows to write.
    rows: Vec<Rc<Row>>,
    /// Accounts and the rows that move their money, to write.
    entries: Vec<(String, u64)>,
    /// Rows that were looked for by their idempotency keys.
    found: HashMap<String, Option<Rc<Row>>>,
    /// By the caller's name for them.
    terms: HashMap<String, Terms>,
    lines: Tables,
}

impl<'c> Draft<'c> {
    /// Nothing written yet.
    pub(crate) async fn begin(db: &'c mut AnyConnection) -> Result<Self, LedgerError> {
        let head = tables::head(db).await?;
        let (rows, entries, lines) = (Vec::new(), Vec::new(), Tables::default());
        Ok(Self { db, head, rows, entries, found: HashMap::new(), terms: HashMap::new(), lines })
    }

    /// Where the journal ends.
    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    /// The database without what is drafted, which never is a price or a split.
    pub(crate) fn db(&mut self) -> &mut AnyConnection {
        self.db
    }

    /// The database with all that is drafted in it.
    pub(crate) async fn written(&mut self) -> Result<&mut AnyConnection, LedgerError> {
        self.flush().await?;
        Ok(self.db)
    }

    /// Reads rows by their idempotency keys and what is held for receipts, many at once: those who ask one by one find
    /// them here. What is known already may be drafted and not in the tables yet.
    pub(crate) async fn look_up(
        &mut self,
        mut keys: Vec<String>,
        mut receipts: Vec<String>,
    ) -> Result<(), LedgerError> {
        keys.retain(|key| !self.found.contains_key(key));
        receipts.retain(|receipt| !self.lines.held.is_known(receipt));
        match tables::find_all(self.db, &keys).await {
            Ok(rows) => {
                self.found.extend(keys.into_iter().map(|key| (key, None)));
                self.found.extend(rows.into_iter().map(|row| (row.idempotency.clone(), Some(Rc::new(row)))));
            }
            Err(error) if error.ends_transaction() => return Err(error),
            // Who asks for the damaged one is told.
            Err(_) => {}
        }
        match tables::held_all(self.db, &receipts).await {
            Ok(held) => self.lines.held.read(receipts, held),
            Err(error) if error.ends_transaction() => return Err(error),
            Err(_) => {}
        }
        Ok(())
    }

    /// The row with an idempotency key.
    pub(crate) async fn find(&mut self, idempotency: &str) -> Result<Option<Rc<Row>>, LedgerError> {
        if let Some(known) = self.found.get(idempotency) {
            return Ok(known.clone());
        }
        let row = tables::find(self.db, idempotency).await?.map(Rc::new);
        self.found.insert(idempotency.into(), row.clone());
        Ok(row)
    }

    /// What is held for a receipt.
    pub(crate) async fn held(&mut self, receipt: &str) -> Result<Option<Held>, LedgerError> {
        let key = receipt.to_owned();
        if !self.lines.held.is_known(&key) {
            let held = tables::held_all(self.db, std::slice::from_ref(&key)).await?;
            self.lines.held.read([key.clone()], held);
        }
        Ok(self.lines.held.get(&key).cloned())
    }

    /// What an application may use and uses.
    pub(crate) async fn application(&mut self, name: &str, asset: &Asset) -> Result<Application, LedgerError> {
        let key = (name.to_owned(), asset.to_string());
        if !self.lines.applications.is_known(&key) {
            let line = tables::application(self.db, name, asset).await?;
            self.lines.applications.read([key.clone()], line.map(|line| (key.clone(), line)));
        }
        Ok(self.lines.applications.get(&key).copied().unwrap_or_default())
    }

    /// Terms that were kept under `name` since a price or split was last set.
    pub(crate) fn terms(&self, name: &str) -> Option<Terms> {
        self.terms.get(name).copied()
    }

    /// Keeps terms.
    pub(crate) fn keep_terms(&mut self, name: String, terms: Terms) {
        self.terms.insert(name, terms);
    }

    /// Appends the row after the last one, with what follows from it.
    ///
    /// # Errors
    /// What the accounts do not allow, which then has changed nothing; the database's.
    pub(crate) async fn append(&mut self, idempotency: String, body: Body, at_ms: u64) -> Result<Written, LedgerError> {
        let seq = self.head.seq + 1;
        let effects = body.effects(&idempotency, at_ms).expect("an outcome of what was asked");
        self.apply(seq, effects).await?;
        let text = serde_json::to_string(&body).expect("text, numbers and lists of them are JSON");
        let mut row = Row { seq, at_ms, idempotency, body: text, hash: [0; 32] };
        row.hash = row.hash_after(&self.head.hash);
        (self.head.seq, self.head.hash) = (seq, row.hash);
        if let Operation::Seal { epoch } = body.asked {
            (self.head.epoch, self.head.epoch_row) = (epoch, seq);
        }
        let row = Rc::new(row);
        self.found.insert(row.idempotency.clone(), Some(Rc::clone(&row)));
        self.rows.push(row);
        // Terms are read with their rows, from the tables.
        if self.lines.terms.len() > 0 || self.rows.len() + self.entries.len() + self.lines.len() > LINES_MAX {
            self.flush().await?;
        }
        Ok(Written { seq, body })
    }

    /// Makes what follows from the row `seq`: first what may be refused, then the rest.
    async fn apply(&mut self, seq: u64, effects: Vec<Effect>) -> Result<(), LedgerError> {
        let balances = self.moved(&effects).await?;
        let application = self.used(&effects).await?;
        let totals = self.owed(&effects).await?;
        let mut accounts: Vec<_> = balances.keys().map(|(account, _)| account.clone()).collect();
        accounts.dedup();
        self.entries.extend(accounts.into_iter().map(|account| (account, seq)));
        let Tables { open, held, terms, addresses, leaves, .. } = &mut self.lines;
        for effect in effects {
            match effect {
                Effect::Open { name, at_ms } => open.set(name, Some((seq, at_ms))),
                Effect::Close { name } => open.set(name, None),
                Effect::Hold { receipt, asset, amount, at_ms } => {
                    held.set(receipt, Some(Held { asset, amount: amount.0, at_ms }));
                }
                Effect::Release { receipt } => held.set(receipt, None),
                Effect::Term { kind, target, asset } => terms.set((target, kind, asset), Some(seq)),
                Effect::Address { account, address } => addresses.set(account.to_string(), address),
                Effect::Leaf { epoch, address, asset, .. } => {
                    // All that the address ever got.
                    let account = (Account::Payout(address).to_string(), asset.to_string());
                    let credits = balances.get(&account).copied().unwrap_or_default().credits;
                    leaves.set((address, asset, epoch), Some(credits));
                }
                Effect::Move(_) | Effect::Use { .. } | Effect::Quota { .. } | Effect::Seal { .. } => {}
            }
        }
        balances.into_iter().for_each(|(key, balance)| self.lines.balances.set(key, Some(balance)));
        application.into_iter().for_each(|(key, line)| self.lines.applications.set(key, Some(line)));
        totals.into_iter().for_each(|(asset, sum)| self.lines.totals.set(asset, Some(sum)));
        Ok(())
    }

    /// The balances of all accounts that money moves between, after it.
    async fn moved(&mut self, effects: &[Effect]) -> Result<Balances, LedgerError> {
        let moves: Vec<&Move> = effects
            .iter()
            .filter_map(|effect| if let Effect::Move(step) = effect { Some(step) } else { None })
            .collect();
        let ends = |step: &&Move| [&step.from, &step.to].map(|account| (account.to_string(), step.asset.to_string()));
        let touched: BTreeSet<_> = moves.iter().flat_map(ends).collect();
        let known = &mut self.lines.balances;
        let unknown: Vec<_> = touched.iter().filter(|key| !known.is_known(key)).cloned().collect();
        if !unknown.is_empty() {
            let read = tables::balances(self.db, &unknown).await?;
            known.read(unknown, read);
        }
        let mut balances: Balances =
            touched.into_iter().filter_map(|key| known.get(&key).copied().map(|balance| (key, balance))).collect();
        moves.into_iter().try_for_each(|step| post_move(&mut balances, step))?;
        Ok(balances)
    }

    /// What an application uses of its quota after `effects`, of which one at most is about that.
    async fn used(&mut self, effects: &[Effect]) -> Result<Option<((String, String), Application)>, LedgerError> {
        for effect in effects {
            let (name, asset, after) = match effect {
                Effect::Use { application: name, asset, day, add, take, opened } => {
                    let after = self.application(name, asset).await?.after(*day, (*add, *take), *opened);
                    (name, asset, after.ok_or(LedgerError::Overflow { what: "what a day uses" })?)
                }
                Effect::Quota { application: name, asset, per_day } => {
                    let per_day = per_day.map(|amount| amount.0);
                    (name, asset, Application { per_day, ..self.application(name, asset).await? })
                }
                _ => continue,
            };
            return Ok(Some(((name.clone(), asset.to_string()), after)));
        }
        Ok(None)
    }

    /// The sums of the leaves after `effects`.
    async fn owed(&mut self, effects: &[Effect]) -> Result<BTreeMap<Asset, u128>, LedgerError> {
        let mut sums = BTreeMap::new();
        for effect in effects {
            let Effect::Leaf { asset, amount, .. } = effect else { continue };
            if sums.is_empty() {
                sums = tables::totals(self.written().await?).await?;
            }
            let sum = sums.entry(asset.clone()).or_insert(0_u128);
            *sum = sum.checked_add(amount.0).ok_or(LedgerError::Overflow { what: "what all addresses are owed" })?;
        }
        Ok(sums)
    }

    /// Writes what is drafted and forgets what was read, so that a long transaction holds little.
    pub(crate) async fn flush(&mut self) -> Result<(), LedgerError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        tables::insert_rows(self.db, &self.rows).await?;
        kill::point("after the row");
        tables::set_balances(self.db, &self.lines.balances).await?;
        kill::point("after the balances");
        tables::insert_entries(self.db, &self.entries).await?;
        tables::set_lines(self.db, &self.lines).await?;
        tables::set_head(self.db, &self.head).await?;
        kill::point("before the commit");
        self.rows.clear();
        self.entries.clear();
        self.found.clear();
        self.terms.clear();
        self.lines = Tables::default();
        Ok(())
    }
}
