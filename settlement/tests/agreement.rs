//! Random trees before two judges, Rust and the deployed contract: what one takes the other takes, and what was changed anywhere both
//! refuse. `OPENLORA_TEST_SEED` chooses other trees.

#[path = "sender/anvil.rs"]
#[expect(dead_code, reason = "shared with the sender's tests, which use all of it")]
mod anvil;

use std::path::Path;
use std::{env, fs};

use alloy::primitives::{Address, B256, Bytes, U256, hex};
use alloy::sol_types::{SolCall, SolConstructor, SolInterface as _};
use openlora_settlement::contracts::{OpenToken, RewardSettlement};
use openlora_settlement::tree::{Payout, PayoutTree, Proof, Settles, TOTAL_MAX, root_of};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use RewardSettlement::RewardSettlementErrors as Refusal;
use anvil::{Anvil, OTHER};

/// Around every power of two that a test has time for.
const SIZES: [usize; 24] =
    [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 255, 256, 257, 511, 513, 600];
/// Trees of any size up to the largest of these.
const RANDOM_TREES: usize = 12;
/// Leaves of a tree that are judged.
const JUDGED: usize = 10;

/// A claim and whether it is right.
struct Case {
    what: &'static str,
    epoch: u64,
    account: Address,
    cumulative: U256,
    index: U256,
    siblings: Vec<B256>,
}

/// A settlement contract that takes any root.
struct Stage {
    anvil: Anvil,
    settles: Settles,
}

impl Stage {
    fn new() -> Self {
        let anvil = Anvil::start();
        let supply = U256::from(TOTAL_MAX);
        let constructor = OpenToken::constructorCall { holder: OTHER, supply };
        let token = create(&anvil, &OpenToken::BYTECODE, &constructor);
        let constructor = RewardSettlement::constructorCall {
            token,
            admin: OTHER,
            proposer: OTHER,
            arbiter: OTHER,
            terms_: RewardSettlement::Terms {
                bond: alloy::primitives::aliases::U96::ZERO,
                challengeWindow: 1,
                arbitrationWindow: 1,
            },
        };
        let settlement = create(&anvil, &RewardSettlement::BYTECODE, &constructor);
        let stage = Self { anvil, settles: Settles { chain_id: 31_337, settlement, token } };
        stage.send(token, &OpenToken::transferCall { to: settlement, value: supply });
        stage
    }

    fn send<C: SolCall>(&self, to: Address, call: &C) {
        let call = json!({ "from": OTHER, "to": to, "data": Bytes::from(call.abi_encode()), "gas": "0x100000" });
        let hash = self.anvil.send(call);
        self.anvil.mine(1);
        let receipt = self.anvil.ask("eth_getTransactionReceipt", json!([hash]));
        assert_eq!(receipt["status"], "0x1", "{} reverted", C::SIGNATURE);
    }

    /// Makes a root claimable.
    fn finalize(&self, epoch: u64, root: B256) {
        let propose = RewardSettlement::proposeCall {
            epoch,
            payoutRoot: root,
            receiptsRoot: B256::ZERO,
            totalCumulative: U256::from(TOTAL_MAX),
            manifestHash: B256::ZERO,
        };
        self.send(self.settles.settlement, &propose);
        self.anvil.ask("evm_increaseTime", json!([2]));
        self.send(self.settles.settlement, &RewardSettlement::finalizeCall { epoch, payoutRoot: root });
    }

    fn ask(&self, calls: Vec<Vec<u8>>) -> Vec<Result<Value, Value>> {
        let to = self.settles.settlement;
        let params = calls.into_iter().map(|data| json!([{ "to": to, "data": Bytes::from(data) }, "latest"]));
        anvil::try_all(self.anvil.port, "eth_call", params)
    }

    /// What the contract would pay for each claim, or why it would not.
    fn judge(&self, cases: &[Case]) -> Vec<Result<U256, Refusal>> {
        let claim = |case: &Case| {
            let entry = RewardSettlement::Claim {
                epoch: case.epoch,
                account: case.account,
                cumulative: case.cumulative,
                index: case.index,
                proof: case.siblings.clone(),
            };
            RewardSettlement::claimCall { entry }.abi_encode()
        };
        let verdict = |answer: Result<Value, Value>| match answer {
            Ok(paid) => Ok(serde_json::from_value(paid).expect("a number")),
            Err(error) => {
                let data = hex::decode(error["data"].as_str().expect("why it reverted")).expect("hex");
                Err(Refusal::abi_decode(&data).expect("an error of the contract"))
            }
        };
        self.ask(cases.iter().map(claim).collect()).into_iter().map(verdict).collect()
    }

    /// The leaves that the contract makes of accounts and amounts.
    fn leaves(&self, payouts: &[Payout]) -> Vec<B256> {
        let leaf = |payout: &Payout| {
            let (account, cumulative) = (payout.account, U256::from(payout.cumulative));
            RewardSettlement::leafHashCall { account, cumulative }.abi_encode()
        };
        let answers = self.ask(payouts.iter().map(leaf).collect()).into_iter();
        answers.map(|answer| serde_json::from_value(answer.expect("a view")).expect("a hash")).collect()
    }
}

fn create<C: SolConstructor>(anvil: &Anvil, code: &Bytes, arguments: &C) -> Address {
    let data = Bytes::from([code.as_ref(), &arguments.abi_encode()].concat());
    let hash = anvil.send(json!({ "from": OTHER, "data": data, "gas": "0x800000" }));
    anvil.mine(1);
    let receipt = anvil.ask("eth_getTransactionReceipt", json!([hash]));
    serde_json::from_value(receipt["contractAddress"].clone()).expect("created")
}

/// Amounts of every length in bits, so that they sum to at most `TOTAL_MAX`; accounts all over, and at both ends.
fn payouts(rng: &mut ChaCha8Rng, size: usize) -> Vec<Payout> {
    let mut accounts: Vec<Address> = (0..size).map(|_| Address::from(rng.random::<[u8; 20]>())).collect();
    accounts[0] = Address::with_last_byte(1);
    accounts[size - 1] = Address::repeat_byte(0xff);
    accounts.sort_unstable();
    let most = TOTAL_MAX / size as u128;
    let amount = |_| (rng.random_range(1..=most) >> rng.random_range(0..112)).max(1);
    let amounts: Vec<u128> = (0..size).map(amount).collect();
    accounts.into_iter().zip(amounts).map(|(account, cumulative)| Payout { account, cumulative }).collect()
}

/// The right claim of a leaf, first, and every way to change it.
fn cases(rng: &mut ChaCha8Rng, tree: &PayoutTree, foreign: &PayoutTree, index: usize, epoch: u64) -> Vec<Case> {
    let Payout { account, cumulative } = tree.payouts()[index];
    let Proof { siblings, .. } = tree.proof(account).expect("in the tree");
    let (depth, cumulative) = (siblings.len(), U256::from(cumulative));
    let case = |what| Case { what, epoch, account, cumulative, index: U256::from(index), siblings: siblings.clone() };
    let mut cases = vec![
        case("right"),
        Case { cumulative: cumulative + U256::from(1), ..case("one more") },
        Case { cumulative: cumulative - U256::from(1), ..case("one less") },
        Case { cumulative: cumulative | (U256::from(1) << 200), ..case("an amount beyond 128 bits") },
        Case { account: Address::from(rng.random::<[u8; 20]>()), ..case("somebody else") },
        Case { index: U256::from(index) + (U256::from(1) << depth), ..case("a place outside the tree") },
        Case { index: U256::from(index) + (U256::from(1) << 64), ..case("a place beyond 64 bits") },
        Case { siblings: [&siblings[..], &[B256::ZERO]].concat(), ..case("a level more") },
        Case { siblings: [&siblings[..], &vec![B256::ZERO; 33 - depth]].concat(), ..case("too many levels") },
        Case { siblings: foreign.proof(account).expect("the same accounts").siblings, ..case("another chain's") },
        Case { epoch: epoch + 1, ..case("an epoch to come") },
    ];
    if epoch > 1 {
        cases.push(Case { epoch: epoch - 1, ..case("the epoch before") });
    }
    if depth > 0 {
        let level = rng.random_range(0..depth);
        let mut flipped = siblings.clone();
        flipped[level].0[rng.random_range(0..32)] ^= 1 << rng.random_range(0..8);
        let mut rotated = siblings.clone();
        rotated.rotate_left(1);
        cases.extend([
            Case { index: U256::from(index ^ (1 << level)), ..case("another place") },
            Case { siblings: flipped, ..case("a bit of a sibling") },
            Case { siblings: siblings[..depth - 1].to_vec(), ..case("a level less") },
            Case { siblings: siblings[1..].to_vec(), index: U256::from(index >> 1), ..case("the level below") },
        ]);
        if rotated != siblings {
            cases.push(Case { siblings: rotated, ..case("siblings in another order") });
        }
    }
    // A tree of one leaf has no sibling in which chains could differ.
    cases.retain(|case| case.what != "another chain's" || depth > 0);
    cases
}

/// Rust's judgement of a claim from `root`; amounts and places that Rust has no type for are nobody's.
fn rust_takes(settles: &Settles, root: B256, case: &Case) -> bool {
    let (Ok(cumulative), Ok(index)) = (u128::try_from(case.cumulative), usize::try_from(case.index)) else {
        return false;
    };
    let proof = Proof { index, cumulative, siblings: case.siblings.clone() };
    root_of(settles.leaf(case.account, cumulative), &proof) == Some(root)
}

#[test]
fn rust_and_the_contract_take_the_same_proofs() {
    let seed = env::var("OPENLORA_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("OPENLORA_TEST_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let stage = Stage::new();
    let elsewhere = Settles { chain_id: 10, ..stage.settles };
    let largest = SIZES[SIZES.len() - 1];
    let random: Vec<usize> = (0..RANDOM_TREES).map(|_| rng.random_range(1..=largest)).collect();
    // Of the epochs to come and past, as they are known.
    let mut roots = vec![B256::ZERO];
    let mut judged = 0;
    for (epoch, size) in (1..).zip(SIZES.into_iter().chain(random)) {
        let payouts = payouts(&mut rng, size);
        let tree = PayoutTree::new(&stage.settles, payouts.clone()).expect("a good tree");
        let foreign = PayoutTree::new(&elsewhere, payouts).expect("a good tree");
        stage.finalize(epoch, tree.root());
        roots.push(tree.root());
        let last = size - 1;
        let places = [0, last].into_iter().chain((2..JUDGED).map(|_| rng.random_range(0..=last)));
        let places: Vec<usize> = places.collect();
        let cases: Vec<Case> =
            places.iter().flat_map(|index| cases(&mut rng, &tree, &foreign, *index, epoch)).collect();
        for (case, verdict) in cases.iter().zip(stage.judge(&cases)) {
            let what = format!("seed {seed}, {size} leaves, {} at {}", case.what, case.index);
            let right = case.what == "right";
            let root = roots.get(case.epoch as usize).copied().unwrap_or_default();
            assert_eq!(rust_takes(&stage.settles, root, case), right, "{what}: Rust");
            match verdict {
                Ok(paid) => assert!(right && paid == case.cumulative, "{what}: {paid}"),
                Err(refusal) => assert!(!right && fits(case.what, &refusal), "{what}: {refusal:?}"),
            }
            judged += 1;
        }
    }
    assert!(judged > 4_000, "{judged}");
}

/// Whether that is what the contract should find wrong.
fn fits(what: &str, refusal: &Refusal) -> bool {
    match what {
        "a place outside the tree" | "a place beyond 64 bits" => matches!(refusal, Refusal::IndexOutsideTree(_)),
        "too many levels" => matches!(refusal, Refusal::ProofTooLong(_)),
        "an epoch to come" => matches!(refusal, Refusal::EpochNotClaimable(_)),
        // The last leaf of a tree may lie outside one of a level less.
        "a level less" => matches!(refusal, Refusal::InvalidProof(_) | Refusal::IndexOutsideTree(_)),
        _ => matches!(refusal, Refusal::InvalidProof(_)),
    }
}

#[test]
fn rust_and_the_contract_hash_every_leaf_alike() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let stage = Stage::new();
    let mut payouts: Vec<Payout> = (0..1_000)
        .map(|_| Payout {
            account: Address::from(rng.random::<[u8; 20]>()),
            cumulative: rng.random::<u128>() >> rng.random_range(0..128),
        })
        .collect();
    for account in [Address::ZERO, Address::with_last_byte(1), Address::repeat_byte(0xff), stage.settles.settlement] {
        payouts.extend([0, 1, TOTAL_MAX, u128::MAX].map(|cumulative| Payout { account, cumulative }));
    }
    let expected = stage.leaves(&payouts);
    for (payout, leaf) in payouts.iter().zip(expected) {
        assert_eq!(stage.settles.leaf(payout.account, payout.cumulative), leaf, "{payout:?}");
    }
}

/// What the Solidity side's own fuzzer drew, and what the contract and its library made of it.
#[test]
#[ignore = "contracts/build.sh leaves what it reads; test.sh runs it afterwards"]
fn what_the_contracts_fuzzer_drew_hashes_alike() {
    let drawn = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/cache/fuzzed.txt");
    let drawn = fs::read_to_string(drawn).expect("run contracts/build.sh first");
    let mut lines = 0;
    for line in drawn.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [chain_id, settlement, token, account, cumulative, index, leaf, root, siblings @ ..] = &words[..] else {
            panic!("{line}");
        };
        let hash = |text: &str| text.parse::<B256>().expect("a hash");
        let address = |text: &str| text.parse::<Address>().expect("an address");
        let settles = Settles {
            chain_id: chain_id.parse().expect("a number"),
            settlement: address(settlement),
            token: address(token),
        };
        let cumulative = cumulative.parse().expect("a number");
        assert_eq!(settles.leaf(address(account), cumulative), hash(leaf), "{line}");
        let siblings = siblings.iter().map(|sibling| hash(sibling)).collect();
        let proof = Proof { index: index.parse().expect("a number"), cumulative, siblings };
        assert_eq!(root_of(hash(leaf), &proof), Some(hash(root)), "{line}");
        lines += 1;
    }
    assert!(lines >= 256, "{lines}");
}
