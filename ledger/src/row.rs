//! A row of the journal: what was asked, what came of it, and what follows for every account and table.

use serde::{Deserialize, Serialize};

use crate::{
    account::{Account, Address, Amount, Asset},
    error::LedgerError,
    terms::{Payees, Prices, Split, Target, Tokens},
};

/// What is asked of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Operation {
    Deposit { application: String, asset: Asset, amount: Amount },
    Withdraw { application: String, asset: Asset, amount: Amount },
    Claim { address: Address, asset: Asset, amount: Amount },
    Prices { target: Target, asset: Asset, prices: Prices },
    Split { target: Target, split: Split },
    Quota { application: String, asset: Asset, per_day: Option<Amount> },
    Address { account: Account, address: Option<Address> },
    Reserve(Request),
    Post(Usage),
    Void { expired: bool },
    Attribute { receipt: String, shares: Vec<(String, u64)>, unattributed: u64 },
    Pool { receipt: String },
    Payout { epoch: u64, after: String },
    Seal { epoch: u64 },
}

/// A request before it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Who pays: the caller's name as the server knows it.
    pub application: String,
    /// In what.
    pub asset: Asset,
    /// The adapter's generation, 64 hexadecimal digits; none for the base model.
    pub generation: Option<String>,
    /// The alias it was asked for by.
    pub alias: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens the answer may have at most, all samples together.
    pub completion_tokens_max: u64,
}

/// What a request used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// The request's id, for people.
    pub request_id: String,
    /// What its contributors will be named by; none where nobody will name any.
    pub receipt: Option<String>,
    /// Tokens used.
    pub tokens: Tokens,
    /// Whom the fee goes to.
    pub payees: Payees,
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Outcome {
    Done,
    Reserved { amount: Amount, prices: Version<Prices>, split: Version<Split>, day: u64 },
    Posted { reservation: Closed, fee: Amount, parts: Vec<(Account, Amount)> },
    Voided(Closed),
    Settled { asset: Asset, amount: Amount, parts: Vec<(Account, Amount)> },
    Paid(Vec<Payment>),
    Sealed { first: u64, last: u64, head: String, totals: Vec<(Asset, Amount)> },
}

/// Terms and the row that set them: the row's number is the version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version<T> {
    /// The journal's row.
    pub row: u64,
    /// What it set.
    pub terms: T,
}

/// The reservation that a row closes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Closed {
    pub(crate) row: u64,
    pub(crate) application: String,
    pub(crate) asset: Asset,
    pub(crate) reserved: Amount,
    pub(crate) day: u64,
}

/// What an account had at a seal, moved to the address it had then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Payment {
    pub(crate) account: Account,
    pub(crate) asset: Asset,
    pub(crate) amount: Amount,
    pub(crate) address: Address,
}

/// The text of a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Body {
    pub(crate) asked: Operation,
    pub(crate) outcome: Outcome,
}

/// A row that is in the journal now, and what it says.
pub(crate) struct Written {
    pub(crate) seq: u64,
    pub(crate) body: Body,
}

/// A row as it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) seq: u64,
    pub(crate) at_ms: u64,
    pub(crate) idempotency: String,
    pub(crate) body: String,
    pub(crate) hash: [u8; 32],
}

impl Row {
    /// BLAKE3 of the previous row's hash and all of this row: docs/ledger.md has the layout.
    pub(crate) fn hash_after(&self, previous: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(previous).update(&self.seq.to_be_bytes()).update(&self.at_ms.to_be_bytes());
        for text in [&self.idempotency, &self.body] {
            hasher.update(&(text.len() as u64).to_be_bytes()).update(text.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    pub(crate) fn parse(&self) -> Result<Body, LedgerError> {
        let bad = |error| LedgerError::Damaged { row: self.seq, reason: format!("its body cannot be read: {error}") };
        serde_json::from_str(&self.body).map_err(bad)
    }
}

/// One consequence of a row. The writer makes it in the tables, `verify` in memory, and the two are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Move(Move),
    Open {
        name: String,
        at_ms: u64,
    },
    Close {
        name: String,
    },
    /// An application's quota: `add` and `take` on `day`, and reservations opened less those closed.
    Use {
        application: String,
        asset: Asset,
        day: u64,
        add: u128,
        take: u128,
        opened: i64,
    },
    Quota {
        application: String,
        asset: Asset,
        per_day: Option<Amount>,
    },
    Hold {
        receipt: String,
        asset: Asset,
        amount: Amount,
        at_ms: u64,
    },
    Release {
        receipt: String,
    },
    Term {
        kind: &'static str,
        target: String,
        asset: String,
    },
    Address {
        account: Account,
        address: Option<Address>,
    },
    Leaf {
        epoch: u64,
        address: Address,
        asset: Asset,
        amount: Amount,
    },
    Seal {
        epoch: u64,
    },
}

/// Money that goes from one account to another: a debit and a credit of the same amount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) asset: Asset,
    pub(crate) from: Account,
    pub(crate) to: Account,
    pub(crate) amount: Amount,
}

pub(crate) const PRICE: &str = "price";
pub(crate) const SPLIT: &str = "split";

impl Body {
    /// What follows from this row, `idempotency` and `at_ms` being its own. `None` where the outcome is not one of
    /// what was asked.
    pub(crate) fn effects(&self, idempotency: &str, at_ms: u64) -> Option<Vec<Effect>> {
        let name = idempotency.split_once('/').map_or(idempotency, |(_, name)| name).to_owned();
        let step = |asset: &Asset, from: &Account, to: &Account, amount: Amount| {
            Effect::Move(Move { asset: asset.clone(), from: from.clone(), to: to.clone(), amount })
        };
        Some(match (&self.asked, &self.outcome) {
            (Operation::Deposit { application, asset, amount }, Outcome::Done) => {
                vec![step(asset, &Account::World, &Account::Application(application.clone()), *amount)]
            }
            (Operation::Withdraw { application, asset, amount }, Outcome::Done) => {
                vec![step(asset, &Account::Application(application.clone()), &Account::World, *amount)]
            }
            (Operation::Claim { address, asset, amount }, Outcome::Done) => {
                vec![step(asset, &Account::Payout(*address), &Account::World, *amount)]
            }
            (Operation::Prices { target, asset, .. }, Outcome::Done) => {
                vec![Effect::Term { kind: PRICE, target: target.text(), asset: asset.to_string() }]
            }
            (Operation::Split { target, .. }, Outcome::Done) => {
                vec![Effect::Term { kind: SPLIT, target: target.text(), asset: String::new() }]
            }
            (Operation::Quota { application, asset, per_day }, Outcome::Done) => {
                vec![Effect::Quota { application: application.clone(), asset: asset.clone(), per_day: *per_day }]
            }
            (Operation::Address { account, address }, Outcome::Done) => {
                vec![Effect::Address { account: account.clone(), address: *address }]
            }
            (Operation::Reserve(request), Outcome::Reserved { amount, day, .. }) => {
                let (Request { application, asset, .. }, who) = (request, request.application.clone());
                let pending = Account::Pending(who.clone());
                let (application, add) = (application.clone(), amount.0);
                vec![
                    step(asset, &Account::Application(who), &pending, *amount),
                    Effect::Open { name, at_ms },
                    Effect::Use { application, asset: asset.clone(), day: *day, add, take: 0, opened: 1 },
                ]
            }
            (Operation::Post(usage), Outcome::Posted { reservation, fee, parts }) => {
                let mut effects = reservation.close(name, *fee)?;
                let pending = Account::Pending(reservation.application.clone());
                effects.extend(parts.iter().map(|(to, amount)| step(&reservation.asset, &pending, to, *amount)));
                if let Some((_, held)) = parts.iter().find(|(to, _)| *to == Account::Held) {
                    let (receipt, asset) = (usage.receipt.clone()?, reservation.asset.clone());
                    effects.push(Effect::Hold { receipt, asset, amount: *held, at_ms });
                }
                effects
            }
            (Operation::Void { .. }, Outcome::Voided(reservation)) => reservation.close(name, Amount(0))?,
            (
                Operation::Attribute { receipt, .. } | Operation::Pool { receipt },
                Outcome::Settled { asset, parts, .. },
            ) => {
                let mut effects = vec![Effect::Release { receipt: receipt.clone() }];
                effects.extend(parts.iter().map(|(to, amount)| step(asset, &Account::Held, to, *amount)));
                effects
            }
            (Operation::Payout { epoch, .. }, Outcome::Paid(payments)) => {
                let each = |Payment { account, asset, amount, address }: &Payment| {
                    let (epoch, amount, address) = (*epoch, *amount, *address);
                    let leaf = Effect::Leaf { epoch, address, asset: asset.clone(), amount };
                    [step(asset, account, &Account::Payout(address), amount), leaf]
                };
                payments.iter().flat_map(each).collect()
            }
            (Operation::Seal { epoch }, Outcome::Sealed { .. }) => vec![Effect::Seal { epoch: *epoch }],
            _ => return None,
        })
    }
}

impl Closed {
    /// What is not charged goes back to the application and its quota.
    fn close(&self, name: String, fee: Amount) -> Option<Vec<Effect>> {
        let rest = self.reserved.0.checked_sub(fee.0)?;
        let (application, asset) = (self.application.clone(), self.asset.clone());
        let (from, to) = (Account::Pending(application.clone()), Account::Application(application.clone()));
        Some(vec![
            Effect::Close { name },
            Effect::Move(Move { asset: asset.clone(), from, to, amount: Amount(rest) }),
            Effect::Use { application, asset, day: self.day, add: 0, take: rest, opened: -1 },
        ])
    }
}

/// What an application has used of its day after `add` and `take` on `day`.
pub(crate) fn used_after((day, used): (u64, u128), on: u64, add: u128, take: u128) -> Option<(u64, u128)> {
    if on < day {
        return Some((day, used));
    }
    let before = if on == day { used } else { 0 };
    // What is given back on another day than it was reserved was not counted on it.
    Some((on, before.checked_add(add)?.saturating_sub(take)))
}
