//! What is done when something is asked: check, decide, and draft one row with all that follows from it.

use openlora_types::InvalidField;
use sqlx::{AnyConnection, query};

use crate::{
    account::{Account, Amount, Asset, check_text},
    config::LedgerConfig,
    draft::{Draft, Terms},
    error::LedgerError,
    row::{Body, Closed, Operation, Outcome, PRICE, Payment, Request, Row, SPLIT, Usage, Version, Written},
    tables::{self, Held, i, number, read_error, text},
    terms::{Prices, Split, Target, Tokens, divide, merge},
};

const DAY_MS: u64 = 24 * 3_600 * 1_000;

/// Decides. Holds nothing but the settings.
pub(crate) struct Writer {
    pub(crate) config: LedgerConfig,
}

impl Writer {
    /// Reads, many at once, what [`Writer::run`] will look for.
    pub(crate) async fn look_up<'a>(
        &self,
        draft: &mut Draft<'_>,
        jobs: impl Iterator<Item = (&'a str, &'a Operation)>,
    ) -> Result<(), LedgerError> {
        let (mut keys, mut receipts) = (Vec::new(), Vec::new());
        for (key, asked) in jobs {
            keys.push(idempotency(key, asked));
            if let Operation::Post(_) | Operation::Void { .. } = asked {
                keys.push(format!("open/{key}"));
            }
            match asked {
                Operation::Post(Usage { receipt: Some(receipt), .. }) => {
                    keys.push(format!("receipt/{receipt}"));
                    receipts.push(receipt.clone());
                }
                Operation::Attribute { receipt, .. } | Operation::Pool { receipt } => receipts.push(receipt.clone()),
                _ => {}
            }
        }
        draft.look_up(keys, receipts).await
    }

    /// Does what is asked, or finds that it was done. `key` is the caller's.
    pub(crate) async fn run(
        &self,
        draft: &mut Draft<'_>,
        (key, asked): (&str, &Operation),
        at_ms: u64,
    ) -> Result<Written, LedgerError> {
        let idempotency = idempotency(key, asked);
        if let Some(row) = draft.find(&idempotency).await? {
            return again(key, asked, &row);
        }
        let outcome = self.decide(draft, (key, asked), at_ms).await?;
        draft.append(idempotency, Body { asked: asked.clone(), outcome }, at_ms).await
    }

    async fn decide(
        &self,
        draft: &mut Draft<'_>,
        (key, asked): (&str, &Operation),
        at_ms: u64,
    ) -> Result<Outcome, LedgerError> {
        match asked {
            Operation::Deposit { asset, .. } => self.known_asset(draft, asset, false).await?,
            Operation::Prices { asset, .. } => self.known_asset(draft, asset, true).await?,
            Operation::Reserve(request) => return self.reserve(draft, request, at_ms).await,
            Operation::Post(usage) => return self.post(draft, key, usage).await,
            Operation::Void { .. } => return Ok(Outcome::Voided(self.open(draft, key).await?.0)),
            Operation::Attribute { receipt, shares, unattributed } => {
                return attribute(draft, receipt, shares, *unattributed).await;
            }
            Operation::Pool { receipt } => return attribute(draft, receipt, &[], 1).await,
            Operation::Payout { after, .. } => {
                return Ok(Outcome::Paid(due(draft.written().await?, after, self.config.payout_accounts_max).await?));
            }
            Operation::Seal { epoch } => return seal(draft, *epoch).await,
            Operation::Withdraw { .. }
            | Operation::Claim { .. }
            | Operation::Split { .. }
            | Operation::Quota { .. }
            | Operation::Address { .. } => {}
        }
        Ok(Outcome::Done)
    }

    /// An asset is known once prices are set in it.
    async fn known_asset(&self, draft: &mut Draft<'_>, asset: &Asset, new: bool) -> Result<(), LedgerError> {
        let db = draft.db();
        let sql = "SELECT COUNT(*) AS n FROM ledger_terms WHERE asset = $1";
        let row = query(sql).bind(asset.as_str()).fetch_one(&mut *db).await.map_err(read_error)?;
        if number(&row, "n")? > 0 {
            return Ok(());
        }
        if !new {
            let why = format!("is {asset}, which no price is set in; set prices in it first");
            return Err(InvalidField::new("asset", why).into());
        }
        let sql = "SELECT COUNT(DISTINCT asset) AS n FROM ledger_terms WHERE asset <> ''";
        let row = query(sql).fetch_one(db).await.map_err(read_error)?;
        let max = self.config.assets_max;
        if number(&row, "n")? >= max {
            return Err(LedgerError::LimitReached { limit: "assets_max", max, what: "assets with prices" });
        }
        Ok(())
    }

    async fn reserve(&self, draft: &mut Draft<'_>, request: &Request, at_ms: u64) -> Result<Outcome, LedgerError> {
        let Request { application, asset, .. } = request;
        let (prices, split) = current_terms(draft, request).await?;
        // The worst case: nothing is cached and the answer is as long as it may be.
        let worst = Tokens { prompt: request.prompt_tokens, cached: 0, completion: request.completion_tokens_max };
        let amount = prices.terms.fee(&worst)?.charged;
        let day = at_ms / DAY_MS;
        let state = draft.application(application, asset).await?;
        let max = self.config.open_reservations_max;
        if state.opened >= max {
            return Err(LedgerError::TooManyOpen { application: application.clone(), max });
        }
        if let Some(max) = state.per_day {
            let used = if day > state.day { 0 } else { state.used };
            if used.checked_add(amount).is_none_or(|sum| sum > max) {
                let (application, asset) = (application.clone(), asset.clone());
                return Err(LedgerError::OverQuota { application, asset, max, used, needed: amount });
            }
        }
        Ok(Outcome::Reserved { amount: Amount(amount), prices, split, day })
    }

    async fn post(&self, draft: &mut Draft<'_>, key: &str, usage: &Usage) -> Result<Outcome, LedgerError> {
        let (reservation, prices, split) = self.open(draft, key).await?;
        let fee = prices.terms.fee(&usage.tokens)?;
        let reserved = reservation.reserved.0;
        if fee.charged > reserved {
            return Err(LedgerError::ExceedsReservation { key: key.into(), reserved, fee: fee.charged });
        }
        if let Some(receipt) = &usage.receipt {
            let settled = draft.find(&format!("receipt/{receipt}")).await?;
            if settled.is_some() || draft.held(receipt).await?.is_some() {
                let why = format!("is {receipt}, which another request has; use a new one");
                return Err(InvalidField::new("receipt", why).into());
            }
        }
        let parts = split.terms.parts(fee, &usage.payees, usage.receipt.is_some())?;
        Ok(Outcome::Posted { reservation, fee: Amount(fee.charged), parts })
    }

    /// The open reservation `key`, its prices and its split.
    async fn open(
        &self,
        draft: &mut Draft<'_>,
        key: &str,
    ) -> Result<(Closed, Version<Prices>, Version<Split>), LedgerError> {
        let missing = || LedgerError::NotFound { what: "reservation", name: key.into() };
        let row = draft.find(&format!("open/{key}")).await?.ok_or_else(missing)?;
        let body = row.parse()?;
        let (Operation::Reserve(request), Outcome::Reserved { amount, prices, split, day }) =
            (body.asked, body.outcome)
        else {
            return Err(LedgerError::Damaged { row: row.seq, reason: "it is no reservation".into() });
        };
        let Request { application, asset, .. } = request;
        Ok((Closed { row: row.seq, application, asset, reserved: amount, day }, prices, split))
    }
}

/// The key under which a row is found: reservations are opened once and closed once, receipts settled once.
fn idempotency(key: &str, asked: &Operation) -> String {
    let kind = match asked {
        Operation::Deposit { .. } => "deposit",
        Operation::Withdraw { .. } => "withdraw",
        Operation::Claim { .. } => "claim",
        Operation::Prices { .. } | Operation::Split { .. } | Operation::Quota { .. } => "set",
        Operation::Address { .. } => "address",
        Operation::Reserve(_) => "open",
        Operation::Post(_) | Operation::Void { .. } => "close",
        Operation::Attribute { .. } | Operation::Pool { .. } => "receipt",
        Operation::Payout { .. } => "payout",
        Operation::Seal { .. } => "seal",
    };
    format!("{kind}/{key}")
}

/// The answer that was given before, where the same was asked.
fn again(key: &str, asked: &Operation, row: &Row) -> Result<Written, LedgerError> {
    let (body, seq) = (row.parse()?, row.seq);
    match (&body.asked, asked) {
        (before, now) if before == now => {}
        (Operation::Void { .. }, Operation::Void { .. }) => {}
        (Operation::Void { .. }, Operation::Post(_)) => return Err(LedgerError::Voided { key: key.into(), row: seq }),
        (Operation::Post(_), Operation::Void { .. }) => return Err(LedgerError::Posted { key: key.into(), row: seq }),
        (Operation::Attribute { receipt, .. } | Operation::Pool { receipt }, _) => {
            return Err(LedgerError::Settled { receipt: receipt.clone(), row: seq });
        }
        _ => return Err(LedgerError::KeyReused { key: key.into(), row: seq }),
    }
    Ok(Written { seq, body })
}

/// What accounts with an address have: the first after `after` that fit in a row.
pub(crate) async fn due(db: &mut AnyConnection, after: &str, limit: usize) -> Result<Vec<Payment>, LedgerError> {
    // Whole accounts only: an account has at most one line for each asset. SQLite takes the tables of a CROSS JOIN in
    // the order they are named; left to itself it reads every balance for each page.
    let sql = "SELECT b.account, b.asset, b.credits, b.debits, a.address FROM \
               (SELECT account, address FROM ledger_addresses WHERE account > $1 AND EXISTS (SELECT 1 FROM \
               ledger_balances d WHERE d.account = ledger_addresses.account AND d.credits <> d.debits) \
               ORDER BY account LIMIT $2) a CROSS JOIN ledger_balances b \
               WHERE b.account = a.account AND b.credits <> b.debits ORDER BY b.account, b.asset";
    let rows = query(sql).bind(after).bind(i(limit as u64)).fetch_all(db).await.map_err(read_error)?;
    let mut payments = Vec::with_capacity(rows.len());
    for row in &rows {
        let (credits, debits) = (tables::amount(row, "credits")?, tables::amount(row, "debits")?);
        payments.push(Payment {
            account: tables::parsed(row, "account")?,
            asset: tables::parsed(row, "asset")?,
            amount: Amount(credits.saturating_sub(debits)),
            address: crate::account::Address(tables::bytes(row, "address")?),
        });
    }
    Ok(payments)
}

/// Prices and split that hold for `request` now, each with the row that set it.
async fn current_terms(draft: &mut Draft<'_>, request: &Request) -> Result<Terms, LedgerError> {
    let generation = request.generation.clone().map(Target::Generation);
    let default = if generation.is_some() { Target::Adapters } else { Target::Base };
    // The most specific first; without a generation it is the base model, whatever it was called.
    let alias = request.alias.clone().filter(|_| generation.is_some()).map(Target::Alias);
    let targets: Vec<_> = generation.into_iter().chain(alias).chain([default]).map(|target| target.text()).collect();
    let name = format!("{} {}", request.asset, targets.join(" "));
    if let Some(terms) = draft.terms(&name) {
        return Ok(terms);
    }
    let db = draft.db();
    let last = targets.last().expect("the default");
    let (first, second) = (&targets[0], targets.get(1).unwrap_or(last));
    let sql = "SELECT t.kind, t.target, r.seq, r.body FROM ledger_terms t JOIN ledger_rows r ON r.seq = t.seq \
               WHERE t.target IN ($1, $2, $3) AND t.asset IN ($4, '')";
    let statement = query(sql).bind(first).bind(second).bind(last).bind(request.asset.as_str());
    let rows = statement.fetch_all(db).await.map_err(read_error)?;
    let find = async |wanted: &str| -> Result<Option<(u64, Operation)>, LedgerError> {
        for target in &targets {
            for row in &rows {
                if text(row, "kind")? == wanted && text(row, "target")? == *target {
                    let seq = number(row, "seq")?;
                    let body = serde_json::from_str::<Body>(&text(row, "body")?);
                    let bad =
                        |error| LedgerError::Damaged { row: seq, reason: format!("its body cannot be read: {error}") };
                    return Ok(Some((seq, body.map_err(bad)?.asked)));
                }
            }
        }
        Ok(None)
    };
    let missing = |what: String| LedgerError::NoTerms { what, target: targets[0].clone() };
    let wrong = |row| LedgerError::Damaged { row, reason: "it sets other terms than the table says".into() };
    let prices = match find(PRICE).await?.ok_or_else(|| missing(format!("price in {}", request.asset)))? {
        (row, Operation::Prices { prices, .. }) => Version { row, terms: prices },
        (row, _) => return Err(wrong(row)),
    };
    let split = match find(SPLIT).await?.ok_or_else(|| missing("split".into()))? {
        (row, Operation::Split { split, .. }) => Version { row, terms: split },
        (row, _) => return Err(wrong(row)),
    };
    draft.keep_terms(name, (prices, split));
    Ok((prices, split))
}

/// Divides what is held for a receipt by its share table.
async fn attribute(
    draft: &mut Draft<'_>,
    receipt: &str,
    shares: &[(String, u64)],
    unattributed: u64,
) -> Result<Outcome, LedgerError> {
    let missing = || LedgerError::NotFound { what: "held receipt", name: receipt.into() };
    let Held { asset, amount, .. } = draft.held(receipt).await?.ok_or_else(missing)?;
    Ok(Outcome::Settled { asset, amount: Amount(amount), parts: shares_of(amount, shares, unattributed)? })
}

/// The parts of `amount` that a share table gives; all to the pool where all weights are 0.
pub(crate) fn shares_of(
    amount: u128,
    shares: &[(String, u64)],
    unattributed: u64,
) -> Result<Vec<(Account, Amount)>, LedgerError> {
    let mut weights: Vec<_> =
        shares.iter().map(|(name, weight)| (Account::Contributor(name.clone()), *weight)).collect();
    weights.push((Account::Pool, unattributed));
    weights.sort_by_cached_key(|(account, _)| account.to_string());
    if weights.iter().all(|(_, weight)| *weight == 0) {
        return merge(vec![(Account::Pool, amount)]);
    }
    let amounts = divide(amount, &weights.iter().map(|(_, weight)| *weight).collect::<Vec<_>>())?;
    merge(weights.into_iter().map(|(account, _)| account).zip(amounts).collect())
}

async fn seal(draft: &mut Draft<'_>, epoch: u64) -> Result<Outcome, LedgerError> {
    let head = *draft.head();
    if head.seq == head.epoch_row {
        return Err(LedgerError::EmptyEpoch { last: head.epoch });
    }
    if epoch != head.epoch + 1 {
        return Err(LedgerError::NotFound { what: "open epoch", name: epoch.to_string() });
    }
    let totals = tables::totals(draft.written().await?).await?;
    let totals: Vec<_> = totals.into_iter().map(|(asset, sum)| (asset, Amount(sum))).collect();
    // An epoch without payouts has no tree: the chain would wait for it for ever. What there is goes to the first with one.
    if totals.is_empty() {
        return Err(LedgerError::NobodyPaid);
    }
    let hash = blake3::Hash::from_bytes(head.hash).to_hex().to_string();
    Ok(Outcome::Sealed { first: head.epoch_row + 1, last: head.seq, head: hash, totals })
}

impl Operation {
    /// Refuses what is wrong whatever the ledger says.
    pub(crate) fn check(&self, key: &str, config: &LedgerConfig) -> Result<(), InvalidField> {
        check_text("key", key)?;
        match self {
            Self::Deposit { application, amount, .. } | Self::Withdraw { application, amount, .. } => {
                check_text("application", application)?;
                positive(*amount)
            }
            Self::Claim { amount, .. } => positive(*amount),
            Self::Prices { target, prices, .. } => target.check().and_then(|()| prices.check()),
            Self::Split { target, split } => target.check().and_then(|()| split.check()),
            Self::Quota { application, .. } => check_text("application", application),
            Self::Address { account, .. } if !account.is_paid() => {
                let why = format!(
                    "is {account}, which is never paid out; only owner/, contributor/, base/, operator, pool and dust are"
                );
                Err(InvalidField::new("account", why))
            }
            Self::Address { address: Some(address), .. } if address.0 == [0; 20] => {
                let why = "is the zero address, which no token pays to; give the account's own, or none";
                Err(InvalidField::new("address", why))
            }
            Self::Address { account, .. } => account.check("account"),
            Self::Reserve(request) => {
                check_text("application", &request.application)?;
                if let Some(generation) = &request.generation {
                    openlora_types::Generation::from_hex(generation)?;
                }
                request.alias.iter().try_for_each(|alias| check_text("alias", alias))
            }
            Self::Post(usage) => {
                check_text("request_id", &usage.request_id)?;
                usage.receipt.iter().try_for_each(|receipt| check_text("receipt", receipt))?;
                usage.payees.check(config.parents_max)
            }
            Self::Attribute { receipt, shares, .. } => {
                check_text("receipt", receipt)?;
                check_shares(shares, config.shares_max)
            }
            Self::Pool { receipt } => check_text("receipt", receipt),
            Self::Void { .. } | Self::Payout { .. } | Self::Seal { .. } => Ok(()),
        }
    }
}

fn positive(amount: Amount) -> Result<(), InvalidField> {
    if amount.0 == 0 {
        return Err(InvalidField::new("amount", "must be at least 1"));
    }
    Ok(())
}

fn check_shares(shares: &[(String, u64)], max: usize) -> Result<(), InvalidField> {
    if shares.len() > max {
        let why = format!("has {} entries; the limit shares_max is {max}", shares.len());
        return Err(InvalidField::new("shares", why));
    }
    let mut names = std::collections::BTreeSet::new();
    for (name, _) in shares {
        check_text("shares", name)?;
        if !names.insert(name) {
            return Err(InvalidField::new(
                "shares",
                format!("names {name} twice; add up the weights of a contributor"),
            ));
        }
    }
    Ok(())
}
