//! What ledger and chain must say, in plain integers: follows the steps and shares no code with what is tested.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::steps::Step;

/// Units for a million tokens of a prompt, of its cached part, of an answer: none divides a million, so that fees are rounded.
pub(crate) const PRICES: [u64; 3] = [123_456_789, 12_345_679, 370_370_371];
/// Basis points of owner, contributors, base model's owner, parents, operator.
pub(crate) const SPLIT: [u32; 5] = [3_333, 3_001, 999, 667, 2_000];
/// Rows that set prices and split, before the first step.
const ROWS_BEFORE: u64 = 2;

/// What a row is kept from by the death of the process that would have written it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut;

/// What an account ever got and gave.
pub(crate) type Sums = (u128, u128);

/// A sealed epoch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Epoch {
    /// What each address is owed by it and all before it.
    pub(crate) leaves: BTreeMap<u8, u128>,
    /// Receipts charged and settled, in the order of the rows.
    pub(crate) receipts: Vec<String>,
}

impl Epoch {
    pub(crate) fn total(&self) -> u128 {
        self.leaves.values().sum()
    }
}

/// What the contracts must say.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Chain {
    /// Transactions of the account that sends.
    pub(crate) sent: u64,
    /// The last final epoch.
    pub(crate) epoch: u64,
    /// What that promises.
    pub(crate) finalized: u128,
    /// What is proposed.
    pub(crate) open: Option<u64>,
    /// What each address was paid, where it was paid.
    pub(crate) claimed: BTreeMap<u8, u128>,
    /// Tokens that came in.
    pub(crate) funded: u128,
}

impl Chain {
    pub(crate) fn paid(&self) -> u128 {
        self.claimed.values().sum()
    }
}

#[derive(Clone, Default)]
pub(crate) struct Books {
    /// Rows of the journal.
    pub(crate) rows: u64,
    pub(crate) accounts: BTreeMap<String, Sums>,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) chain: Chain,
    /// Bundles that are written.
    pub(crate) published: usize,
    /// What was done under each name: asked again it is done already.
    done: HashMap<String, Step>,
    /// Reservations: whose, how much.
    open: HashMap<String, (String, u128)>,
    /// Receipts whose part is held.
    held: HashMap<String, u128>,
    addresses: BTreeMap<String, u8>,
    leaves: BTreeMap<u8, u128>,
    receipts: Vec<String>,
    sealed_row: u64,
    /// Claims in the chain's order, and how many of them the ledger has.
    claims: Vec<(u8, u128)>,
    noted: usize,
    /// Whether what is proposed can be finalized.
    window_over: bool,
    funds: BTreeSet<String>,
}

/// Whole shares of `amount` by `weights`; what is left over goes one each to the largest fractions, to the first of equal ones.
fn shares(amount: u128, weights: &[u64]) -> Vec<u128> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let mut shares: Vec<u128> = weights.iter().map(|weight| amount * u128::from(*weight) / total).collect();
    let fraction = |i: usize| amount * u128::from(weights[i]) % total;
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| fraction(*b).cmp(&fraction(*a)).then(a.cmp(b)));
    let left = amount - shares.iter().sum::<u128>();
    for i in order.into_iter().take(left as usize) {
        shares[i] += 1;
    }
    shares
}

/// What is charged, and what of it is shared.
fn fee(prompt: u64, cached: u64, completion: u64) -> (u128, u128) {
    let [prompt_price, cached_price, completion_price] = PRICES.map(u128::from);
    let millionths = u128::from(prompt - cached) * prompt_price
        + u128::from(cached) * cached_price
        + u128::from(completion) * completion_price;
    (millionths.div_ceil(1_000_000), millionths / 1_000_000)
}

impl Books {
    /// The chain has the contracts, deployed with `sent` transactions.
    pub(crate) fn new(sent: u64) -> Self {
        Self { rows: ROWS_BEFORE, chain: Chain { sent, ..Chain::default() }, ..Self::default() }
    }

    /// Does `step`, up to the row `until`. Whether it must have been done, then or earlier.
    pub(crate) fn follow(&mut self, step: &Step, until: u64) -> Result<bool, Cut> {
        let name = match step {
            Step::Deposit { key, .. } => format!("deposit {key}"),
            Step::Reserve { key, .. } => format!("open {key}"),
            Step::Post { key, .. } | Step::Void { key } => format!("close {key}"),
            Step::Attribute { receipt, .. } => format!("receipt {receipt}"),
            Step::Address { key, .. } => format!("address {key}"),
            Step::Seal => return self.seal(until),
            Step::Note => return self.note(until),
            _ => return Ok(self.on_chain(step)),
        };
        if let Some(before) = self.done.get(&name) {
            return Ok(before == step);
        }
        if !self.would(step) {
            return Ok(false);
        }
        self.row(until)?;
        self.write(step);
        self.done.insert(name, step.clone());
        Ok(true)
    }

    fn row(&mut self, until: u64) -> Result<(), Cut> {
        if self.rows == until {
            return Err(Cut);
        }
        self.rows += 1;
        Ok(())
    }

    fn has(&self, account: &str) -> u128 {
        self.accounts.get(account).map_or(0, |(got, gave)| got - gave)
    }

    fn give(&mut self, from: &str, to: &str, amount: u128) {
        assert!(from == "world" || self.has(from) >= amount, "{from} has no {amount}");
        self.accounts.entry(from.into()).or_default().1 += amount;
        self.accounts.entry(to.into()).or_default().0 += amount;
    }

    /// Whether a step that is new can be done.
    fn would(&self, step: &Step) -> bool {
        match step {
            Step::Reserve { application, prompt, completion, .. } => {
                self.has(&format!("application/{application}")) >= fee(*prompt, 0, *completion).0
            }
            Step::Post { key, prompt, cached, completion, .. } => {
                self.open.get(key).is_some_and(|(_, reserved)| fee(*prompt, *cached, *completion).0 <= *reserved)
            }
            Step::Void { key } => self.open.contains_key(key),
            Step::Attribute { receipt, .. } => self.held.contains_key(receipt),
            _ => true,
        }
    }

    fn write(&mut self, step: &Step) {
        match step {
            Step::Deposit { application, amount, .. } => {
                self.give("world", &format!("application/{application}"), *amount);
            }
            Step::Reserve { key, application, prompt, completion } => {
                let (needed, _) = fee(*prompt, 0, *completion);
                self.give(&format!("application/{application}"), &format!("pending/{application}"), needed);
                self.open.insert(key.clone(), (application.clone(), needed));
            }
            Step::Post { key, prompt, cached, completion, owner, parents } => {
                self.post(key, fee(*prompt, *cached, *completion), owner.as_deref(), parents);
            }
            Step::Void { key } => self.close(key, 0),
            Step::Attribute { receipt, shares, unattributed } => self.attribute(receipt, shares, *unattributed),
            Step::Address { account, to, .. } => match to {
                Some(to) => drop(self.addresses.insert(account.clone(), *to)),
                None => drop(self.addresses.remove(account)),
            },
            other => unreachable!("{other:?} is no row of its own"),
        }
    }

    /// What is not charged goes back.
    fn close(&mut self, key: &str, charged: u128) {
        let (application, reserved) = self.open.remove(key).expect("looked for");
        let rest = reserved - charged;
        self.give(&format!("pending/{application}"), &format!("application/{application}"), rest);
    }

    fn post(&mut self, key: &str, (charged, shared): (u128, u128), owner: Option<&str>, parents: &[String]) {
        let pending = format!("pending/{}", self.open[key].0);
        self.close(key, charged);
        let parts = shares(shared, &SPLIT.map(u64::from));
        let owner = owner.map_or("pool".into(), |owner| format!("owner/{owner}"));
        self.give(&pending, &owner, parts[0]);
        self.give(&pending, "held", parts[1]);
        self.give(&pending, "base/smol", parts[2]);
        self.give(&pending, "operator", parts[4]);
        self.give(&pending, "dust", charged - shared);
        if parts[1] > 0 {
            self.held.insert(key.into(), parts[1]);
        }
        let mut parents = parents.to_vec();
        parents.sort();
        match parents.len() {
            0 => self.give(&pending, "pool", parts[3]),
            count => {
                for (parent, part) in parents.iter().zip(shares(parts[3], &vec![1; count])) {
                    self.give(&pending, &format!("owner/{parent}"), part);
                }
            }
        }
        self.receipts.push(key.into());
    }

    fn attribute(&mut self, receipt: &str, table: &[(String, u64)], unattributed: u64) {
        let held = self.held.remove(receipt).expect("looked for");
        let mut weights: Vec<(String, u64)> =
            table.iter().map(|(name, weight)| (format!("contributor/{name}"), *weight)).collect();
        weights.push(("pool".into(), unattributed));
        weights.sort();
        if weights.iter().all(|(_, weight)| *weight == 0) {
            weights = vec![("pool".into(), 1)];
        }
        let parts = shares(held, &weights.iter().map(|(_, weight)| *weight).collect::<Vec<_>>());
        for ((account, _), part) in weights.iter().zip(parts) {
            self.give("held", account, part);
        }
        self.receipts.push(receipt.into());
    }

    /// One row that pays, where there is anything to pay, and one that closes.
    fn seal(&mut self, until: u64) -> Result<bool, Cut> {
        if self.rows == self.sealed_row {
            return Ok(false);
        }
        let due: Vec<(String, u8)> = self.addresses.iter().map(|(account, to)| (account.clone(), *to)).collect();
        let due: Vec<(String, u8)> = due.into_iter().filter(|(account, _)| self.has(account) > 0).collect();
        if !due.is_empty() {
            self.row(until)?;
            for (account, to) in due {
                let amount = self.has(&account);
                self.give(&account, &payout(to), amount);
                *self.leaves.entry(to).or_default() += amount;
            }
        }
        if self.leaves.is_empty() {
            return Ok(false);
        }
        self.row(until)?;
        self.sealed_row = self.rows;
        self.epochs.push(Epoch { leaves: self.leaves.clone(), receipts: std::mem::take(&mut self.receipts) });
        Ok(true)
    }

    fn note(&mut self, until: u64) -> Result<bool, Cut> {
        while let Some(&(address, amount)) = self.claims.get(self.noted) {
            self.row(until)?;
            self.give(&payout(address), "world", amount);
            self.noted += 1;
        }
        Ok(true)
    }

    fn epoch(&self, number: u64) -> &Epoch {
        &self.epochs[number as usize - 1]
    }

    fn on_chain(&mut self, step: &Step) -> bool {
        match step {
            Step::Publish => self.published = self.epochs.len(),
            Step::Fund { key, amount } => {
                if self.funds.insert(key.clone()) {
                    self.chain.sent += 1;
                    self.chain.funded += amount;
                }
            }
            Step::Pass => self.window_over = true,
            Step::Propose => return self.propose(),
            Step::Finalize => return self.finalize(),
            Step::Claim { addresses, back } => return self.claim(addresses, *back, true),
            Step::ClaimByAnother { address } => return self.claim(&[*address], 0, false),
            other => unreachable!("{other:?} is the ledger's"),
        }
        true
    }

    fn propose(&mut self) -> bool {
        if self.chain.open.is_some() {
            return true;
        }
        let next = self.chain.epoch + 1;
        if next > self.published as u64 || self.chain.funded < self.epoch(next).total() {
            return false;
        }
        self.chain.sent += 1;
        self.chain.open = Some(next);
        self.window_over = false;
        true
    }

    fn finalize(&mut self) -> bool {
        let Some(open) = self.chain.open.filter(|_| self.window_over) else { return false };
        self.chain.sent += 1;
        self.chain.open = None;
        self.chain.epoch = open;
        self.chain.finalized = self.epoch(open).total();
        true
    }

    /// Amounts are cumulative: an address is paid what it was not paid yet. The contract takes the last two epochs.
    fn claim(&mut self, addresses: &[u8], back: u64, ours: bool) -> bool {
        if back >= self.chain.epoch.min(2) {
            return false;
        }
        let leaves = &self.epochs[(self.chain.epoch - back) as usize - 1].leaves;
        let mut any = false;
        for address in addresses {
            let owed = leaves.get(address).copied().unwrap_or_default();
            let claimed = self.chain.claimed.entry(*address).or_default();
            if owed > *claimed {
                self.claims.push((*address, owed - *claimed));
                *claimed = owed;
                any = true;
            }
        }
        self.chain.claimed.retain(|_, claimed| *claimed > 0);
        self.chain.sent += u64::from(any && ours);
        true
    }
}

pub(crate) fn payout(address: u8) -> String {
    format!("payout/0x{}", format!("{address:02x}").repeat(20))
}
