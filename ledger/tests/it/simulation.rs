//! Ten thousand random operations, some of them repeated and some wrong, with restarts, against books kept in memory.

use std::collections::{BTreeMap, HashMap};

use openlora_ledger::{Account, Ledger, LedgerConfig, LedgerError, Tokens};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use crate::{
    bench::{NOW_MS, address, available, open, request, set_terms, url, usage, usd},
    epochs::leaves,
};

const OPERATIONS: usize = 10_000;
const BETWEEN_RESTARTS: usize = 997;
/// Operations that are in flight together.
const TOGETHER: usize = 20;

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Deposit { key: String, application: String, amount: u128 },
    Reserve { key: String, application: String, prompt: u64, completion: u64 },
    Post { key: String, tokens: Tokens },
    Void { key: String },
    Attribute { receipt: String, shares: Vec<(String, u64)>, unattributed: u64 },
}

/// What the books in memory say: only what matters for totals.
#[derive(Default)]
struct Books {
    /// What was done under each key of each kind: asked again it is done already.
    done: HashMap<String, Step>,
    deposited: u128,
    prepaid: BTreeMap<String, u128>,
    /// Reservations: whose, how much.
    open: HashMap<String, (String, u128)>,
    /// Receipts whose part is held.
    held: HashMap<String, u128>,
    fees: u128,
    owner: u128,
    operator: u128,
    contributors: u128,
    pool: u128,
}

fn cost(tokens: Tokens) -> u128 {
    u128::from(tokens.prompt - tokens.cached) * 100
        + u128::from(tokens.cached) * 10
        + u128::from(tokens.completion) * 300
}

/// The five parts of a fee; all are whole units here.
fn split(fee: u128) -> [u128; 5] {
    openlora_ledger::divide(fee, &[4_000, 3_000, 1_000, 500, 1_500]).expect("divided").try_into().expect("five")
}

impl Books {
    /// Whether the ledger must have done `step`, which is done here too.
    fn follow(&mut self, step: &Step) -> bool {
        let name = match step {
            Step::Deposit { key, .. } => format!("deposit {key}"),
            Step::Reserve { key, .. } => format!("open {key}"),
            Step::Post { key, .. } | Step::Void { key } => format!("close {key}"),
            Step::Attribute { receipt, .. } => format!("receipt {receipt}"),
        };
        if self.done.get(&name) == Some(step) {
            return true;
        }
        let done = self.change(step);
        if done {
            self.done.insert(name, step.clone());
        }
        done
    }

    fn change(&mut self, step: &Step) -> bool {
        match step {
            Step::Deposit { application, amount, .. } => {
                self.deposited += amount;
                *self.prepaid.entry(application.clone()).or_default() += amount;
            }
            Step::Reserve { key, application, prompt, completion } => {
                let needed = cost(Tokens { prompt: *prompt, cached: 0, completion: *completion });
                let prepaid = self.prepaid.entry(application.clone()).or_default();
                if *prepaid < needed {
                    return false;
                }
                *prepaid -= needed;
                self.open.insert(key.clone(), (application.clone(), needed));
            }
            Step::Post { key, tokens } => {
                let Some((_, reserved)) = self.open.get(key) else { return false };
                let fee = cost(*tokens);
                if fee > *reserved {
                    return false;
                }
                let (application, reserved) = self.open.remove(key).expect("asked");
                *self.prepaid.entry(application).or_default() += reserved - fee;
                let [owner, contributors, _, parents, operator] = split(fee);
                self.fees += fee;
                self.owner += owner + parents;
                self.operator += operator;
                if contributors > 0 {
                    self.held.insert(key.clone(), contributors);
                }
            }
            Step::Void { key } => {
                let Some((application, reserved)) = self.open.remove(key) else { return false };
                *self.prepaid.entry(application).or_default() += reserved;
            }
            Step::Attribute { receipt, shares, unattributed } => {
                let Some(held) = self.held.remove(receipt) else { return false };
                let weights: Vec<_> = shares.iter().map(|share| share.1).chain([*unattributed]).collect();
                let pool = openlora_ledger::divide(held, &weights).expect("divided").pop().expect("the pool's");
                self.pool += pool;
                self.contributors += held - pool;
            }
        }
        true
    }

    async fn check(&self, ledger: &Ledger, seed: u64) {
        for (application, prepaid) in &self.prepaid {
            assert_eq!(available(ledger, &format!("application/{application}")).await, *prepaid, "seed {seed}");
        }
        let held = self.held.values().sum::<u128>();
        assert_eq!(available(ledger, "held").await, held, "seed {seed}");
        let world = ledger.balance(&Account::World, &usd()).await.expect("read");
        assert_eq!((world.debits, world.credits), (self.deposited, 0), "seed {seed}");
        let got = async |account: &str| {
            ledger.balance(&account.parse().expect("an account"), &usd()).await.expect("read").credits
        };
        assert_eq!(got("owner/acme").await + got("owner/old").await, self.owner, "seed {seed}");
        assert_eq!((got("operator").await, got("pool").await), (self.operator, self.pool), "seed {seed}");
        let mut contributors = 0;
        for n in 0..5 {
            contributors += got(&format!("contributor/c{n}")).await;
        }
        assert_eq!(contributors, self.contributors, "seed {seed}");
        let base = got("base/smol").await;
        assert_eq!(self.owner + self.operator + self.pool + contributors + base + held, self.fees, "seed {seed}");
    }
}

fn draw(rng: &mut ChaCha8Rng, n: usize) -> Step {
    let key = format!("k{}", rng.random_range(n.saturating_sub(60)..=n));
    let new = format!("k{n}");
    let application = format!("app{}", rng.random_range(0..4));
    match rng.random_range(0..10) {
        0 => Step::Deposit { key: new, application, amount: rng.random_range(1..100_000) },
        1..5 => {
            let (prompt, completion) = (rng.random_range(0..200), rng.random_range(0..50));
            Step::Reserve { key: new, application, prompt, completion }
        }
        5..8 => {
            let prompt = rng.random_range(0..150);
            let tokens = Tokens { prompt, cached: rng.random_range(0..=prompt), completion: rng.random_range(0..40) };
            Step::Post { key, tokens }
        }
        8 => Step::Void { key },
        _ => {
            let names = rng.random_range(0..5);
            let shares = (0..names).map(|n| (format!("c{n}"), rng.random_range(1..1_000))).collect();
            Step::Attribute { receipt: key, shares, unattributed: rng.random_range(1..100) }
        }
    }
}

async fn ask(ledger: &Ledger, step: &Step) -> Result<(), LedgerError> {
    match step {
        Step::Deposit { key, application, amount } => ledger.deposit(key, application, &usd(), *amount).await.map(drop),
        Step::Reserve { key, application, prompt, completion } => {
            ledger.reserve(key, &request(application, *prompt, *completion)).await.map(drop)
        }
        Step::Post { key, tokens } => {
            let asked = openlora_ledger::Usage { tokens: *tokens, ..usage(Some(key), 0, 0, 0) };
            ledger.post(key, &asked).await.map(drop)
        }
        Step::Void { key } => ledger.void(key).await.map(drop),
        Step::Attribute { receipt, shares, unattributed } => {
            ledger.attribute(receipt, shares.clone(), *unattributed).await.map(drop)
        }
    }
}

#[tokio::test]
async fn ten_thousand_random_operations_conserve_every_unit_through_restarts() {
    let seed = std::env::var("OPENLORA_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dir = TempDir::new().expect("a temporary folder");
    let url = url(dir.path());
    let mut ledger = open(&url, LedgerConfig::default(), || NOW_MS).await;
    set_terms(&ledger).await;
    let (mut books, mut epochs) = (Books::default(), 0);
    let mut owed = BTreeMap::new();
    let mut n = 0;
    while n < OPERATIONS {
        let steps: Vec<_> = (0..TOGETHER).map(|i| draw(&mut rng, n + i)).collect();
        // One task each, started in order on one thread: they queue for the writer in that order.
        let tasks = steps.iter().map(|step| {
            let (ledger, step) = (ledger.clone(), step.clone());
            tokio::spawn(async move { ask(&ledger, &step).await })
        });
        let mut outcomes = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            outcomes.push(task.await.expect("ended"));
        }
        for (step, outcome) in steps.iter().zip(&outcomes) {
            assert_eq!(books.follow(step), outcome.is_ok(), "seed {seed}: {step:?}: {outcome:?}");
            // Asked again, it changes nothing.
            if outcome.is_ok() && rng.random_range(0..20) == 0 {
                ask(&ledger, step).await.expect("as before");
            }
        }
        if n / BETWEEN_RESTARTS != (n + TOGETHER) / BETWEEN_RESTARTS {
            // Dropped with an operation in flight, as a crash would.
            let (late, key) = (ledger.clone(), format!("late{n}"));
            let task = tokio::spawn(async move { late.deposit(&key, "app0", &usd(), 1).await });
            tokio::task::yield_now().await;
            task.abort();
            drop(ledger);
            ledger = open(&url, LedgerConfig::default(), || NOW_MS).await;
            assert!(books.follow(&Step::Deposit { key: format!("late{n}"), application: "app0".into(), amount: 1 }));
            ledger.deposit(&format!("late{n}"), "app0", &usd(), 1).await.expect("there, or done now");
            let account = Account::Contributor(format!("c{}", epochs % 5));
            ledger.set_address(&n.to_string(), &account, Some(address(epochs as u8 % 3 + 1))).await.expect("set");
            ledger.seal().await.expect("sealed");
            epochs += 1;
            for leaf in leaves(&ledger, epochs).await {
                let before = owed.insert((leaf.address, leaf.asset), leaf.cumulative).unwrap_or(0);
                assert!(before <= leaf.cumulative, "seed {seed}: an address is owed less than before");
            }
            books.check(&ledger, seed).await;
        }
        n += TOGETHER;
    }
    books.check(&ledger, seed).await;
    assert_eq!(ledger.verify(|_, _| ()).await.expect("whole").epochs, epochs, "seed {seed}");
}
