//! What is done, drawn from a seed: the same list for the process that does it and for the books that follow it.

use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;

/// Steps that are drawn; those that bring everything to its end come on top.
pub(crate) const RANDOM_STEPS: usize = 10_000;
/// Addresses that are paid to, each the same byte twenty times, from 1 on. Fewer than accounts: some share one.
pub(crate) const ADDRESSES: u8 = 24;
/// Contributors, of whom some never get an address.
const CONTRIBUTORS: usize = 40;
/// How far back a step may name what an earlier one opened.
const BACK: usize = 60;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    Deposit {
        key: String,
        application: String,
        amount: u128,
    },
    Reserve {
        key: String,
        application: String,
        prompt: u64,
        completion: u64,
    },
    Post {
        key: String,
        prompt: u64,
        cached: u64,
        completion: u64,
        owner: Option<String>,
        parents: Vec<String>,
    },
    Void {
        key: String,
    },
    Attribute {
        receipt: String,
        shares: Vec<(String, u64)>,
        unattributed: u64,
    },
    Address {
        key: String,
        account: String,
        to: Option<u8>,
    },
    Seal,
    /// Writes the bundles of sealed epochs that have none.
    Publish,
    /// Tokens for the contract.
    Fund {
        key: String,
        amount: u128,
    },
    /// Proposes what is due.
    Propose,
    /// The chain's time moves by a challenge window.
    Pass,
    /// Finalizes what is proposed.
    Finalize,
    /// Has these addresses paid from the last final epoch or `back` before it.
    Claim {
        addresses: Vec<u8>,
        back: u64,
    },
    /// Somebody else has an address paid.
    ClaimByAnother {
        address: u8,
    },
    /// Takes down in the ledger what the chain has paid.
    Note,
}

impl Step {
    /// Whether it is one of those that the ledger takes many of at once. All others are done alone.
    pub(crate) fn is_written_together(&self) -> bool {
        use Step::{Address, Attribute, Deposit, Post, Reserve, Void};
        matches!(self, Deposit { .. } | Reserve { .. } | Post { .. } | Void { .. } | Attribute { .. } | Address { .. })
    }
}

/// Random steps, and at the end those after which nobody is owed anything that is not paid.
pub(crate) fn steps(seed: u64) -> Vec<Step> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut steps = first_addresses();
    while steps.len() < RANDOM_STEPS {
        let n = steps.len();
        let step = match rng.random_range(0..100) {
            0..6 => of_an_epoch(&mut rng, n),
            6..10 => steps[n - rng.random_range(1..=BACK.min(n))].clone(),
            _ => of_the_ledger(&mut rng, n),
        };
        steps.push(step);
    }
    steps.extend([Step::Seal, Step::Publish, Step::Fund { key: "last".into(), amount: 1_000_000_000_000 }]);
    // As many as may be sealed and not final; what is too much finds nothing to do.
    for _ in 0..RANDOM_STEPS / 200 {
        steps.extend([Step::Pass, Step::Finalize, Step::Propose]);
    }
    steps.extend([Step::Claim { addresses: (1..=ADDRESSES).collect(), back: 0 }, Step::Note]);
    steps
}

/// Enough for a first epoch that pays somebody.
fn first_addresses() -> Vec<Step> {
    let to = |(n, account): (usize, &str)| Step::Address {
        key: format!("first{n}"),
        account: account.into(),
        to: Some(n as u8 + 1),
    };
    ["owner/acme", "operator", "contributor/c1", "contributor/c2"].into_iter().enumerate().map(to).collect()
}

fn of_an_epoch(rng: &mut ChaCha8Rng, n: usize) -> Step {
    match rng.random_range(0..22) {
        0 => Step::Seal,
        1..3 => Step::Publish,
        3..5 => Step::Fund { key: n.to_string(), amount: rng.random_range(1..10_000_000) },
        5..8 => Step::Propose,
        8..11 => Step::Pass,
        11..14 => Step::Finalize,
        14..19 => {
            let count = if rng.random() { 1 } else { rng.random_range(2..12) };
            // Some of them twice.
            let addresses = (0..count).map(|_| rng.random_range(1..=ADDRESSES)).collect();
            Step::Claim { addresses, back: *[0, 0, 0, 1, 1, 2].choose(rng).expect("some") }
        }
        19 => Step::ClaimByAnother { address: rng.random_range(1..=ADDRESSES) },
        _ => Step::Note,
    }
}

fn of_the_ledger(rng: &mut ChaCha8Rng, n: usize) -> Step {
    let key = format!("k{}", rng.random_range(n.saturating_sub(BACK)..=n));
    let new = format!("k{n}");
    let application = format!("app{}", rng.random_range(0..4));
    match rng.random_range(0..40) {
        0..4 => Step::Deposit { key: new, application, amount: rng.random_range(1..150_000) },
        4..19 => {
            let (prompt, completion) = (rng.random_range(0..200), rng.random_range(0..50));
            Step::Reserve { key: new, application, prompt, completion }
        }
        19..31 => {
            let prompt = rng.random_range(0..150);
            let parents = (0..rng.random_range(0..4)).map(|_| name(rng, &["acme", "old", "zeta"])).collect();
            let owner = rng.random_bool(0.9).then(|| name(rng, &["acme", "zeta"]));
            let (cached, completion) = (rng.random_range(0..=prompt), rng.random_range(0..40));
            Step::Post { key, prompt, cached, completion, owner, parents }
        }
        31..34 => Step::Void { key },
        34..39 => {
            let mut names: Vec<String> = (0..CONTRIBUTORS).map(|n| format!("c{n}")).collect();
            let shares = (0..rng.random_range(0..6))
                .map(|_| (names.swap_remove(rng.random_range(0..names.len())), rng.random_range(0..1_000)))
                .collect();
            Step::Attribute { receipt: key, shares, unattributed: rng.random_range(0..100) }
        }
        _ => {
            let account = match rng.random_range(0..4) {
                0 => name(rng, &["owner/acme", "owner/old", "owner/zeta", "base/smol", "operator", "pool", "dust"]),
                _ => format!("contributor/c{}", rng.random_range(0..CONTRIBUTORS)),
            };
            let to = rng.random_bool(0.9).then(|| rng.random_range(1..=ADDRESSES));
            Step::Address { key: new, account, to }
        }
    }
}

fn name(rng: &mut ChaCha8Rng, of: &[&str]) -> String {
    (*of.choose(rng).expect("some")).to_owned()
}
