//! Payout trees against those of another implementation (contracts/test/vectors), and against themselves.

use alloy::primitives::{Address, B256, U256};
use openlora_settlement::SettlementError;
use openlora_settlement::tree::{Payout, PayoutTree, Proof, Settles, TOTAL_MAX, root_of};
use proptest::prelude::*;
use serde_json::Value;

fn vectors() -> (Value, Settles) {
    let text = include_str!("../../contracts/test/vectors/merkle.json");
    let vectors: Value = serde_json::from_str(text).expect("JSON");
    let address = |field: &str| vectors[field].as_str().expect(field).parse().expect(field);
    let chain_id = vectors["chainId"].as_u64().expect("a number");
    let settles = Settles { chain_id, settlement: address("settlement"), token: address("token") };
    (vectors, settles)
}

fn hash(value: &Value) -> B256 {
    value.as_str().expect("text").parse().expect("a hash")
}

/// Compares root, depth and proofs with what a vector says.
fn check(tree: &PayoutTree, settles: &Settles, vector: &Value) {
    let name = vector["name"].as_str().expect("a name");
    assert_eq!(tree.root(), hash(&vector["root"]), "{name}");
    let proofs = vector["proofs"].as_array().expect("proofs");
    assert!(!proofs.is_empty());
    for expected in proofs {
        let index = expected["index"].as_u64().expect("an index") as usize;
        let payout = tree.payouts()[index];
        let proof = tree.proof(payout.account).expect("an account of the tree");
        let siblings: Vec<B256> = expected["proof"].as_array().expect("siblings").iter().map(hash).collect();
        assert_eq!(proof, Proof { index, cumulative: payout.cumulative, siblings }, "{name} {index}");
        assert_eq!(proof.siblings.len() as u64, vector["depth"], "{name} {index}");
        assert_eq!(settles.leaf(payout.account, payout.cumulative), hash(&expected["leaf"]), "{name} {index}");
    }
}

#[test]
fn trees_are_those_of_another_implementation() {
    let (vectors, settles) = vectors();
    for vector in vectors["payouts"].as_array().expect("trees") {
        let accounts = vector["accounts"].as_array().expect("accounts").iter();
        let amounts = vector["cumulative"].as_array().expect("amounts").iter();
        let payouts: Vec<Payout> = accounts
            .zip(amounts)
            .map(|(account, cumulative)| Payout {
                account: account.as_str().expect("text").parse().expect("an address"),
                cumulative: cumulative.as_str().expect("text").parse().expect("a number"),
            })
            .collect();
        let total = payouts.iter().map(|payout| payout.cumulative).sum();
        let tree = PayoutTree::new(&settles, payouts).expect("a good tree");
        assert_eq!(tree.total(), total);
        check(&tree, &settles, vector);
    }
}

#[test]
fn a_tree_of_a_million_accounts_is_that_of_another_implementation() {
    let (vectors, settles) = vectors();
    let large = &vectors["large"];
    let count = large["count"].as_u64().expect("a number");
    assert_eq!(count, 1 << 20);
    let payouts = (1..=count).map(|i| Payout { account: account(i), cumulative: u128::from(i) * 1_000_000_000_000 });
    check(&PayoutTree::new(&settles, payouts.collect()).expect("a good tree"), &settles, large);
}

fn account(number: u64) -> Address {
    Address::from_word(U256::from(number).into())
}

fn payouts(amounts: &[u128]) -> Vec<Payout> {
    amounts.iter().zip(1..).map(|(cumulative, i)| Payout { account: account(i), cumulative: *cumulative }).collect()
}

#[test]
fn what_is_no_tree_is_refused_by_name() {
    let (_, settles) = vectors();
    let refused = |payouts| PayoutTree::new(&settles, payouts).expect_err("no tree").to_string();
    assert_eq!(refused(Vec::new()), "an epoch pays 1 to 16777216 accounts, this one 0");
    let mut twice = payouts(&[1, 2, 3]);
    twice[2].account = twice[1].account;
    let two = account(2);
    assert_eq!(refused(twice), format!("accounts must ascend and each come once: {two} comes after {two}"));
    let mut swapped = payouts(&[1, 2, 3]);
    swapped.swap(0, 1);
    assert!(matches!(PayoutTree::new(&settles, swapped), Err(SettlementError::AccountOrder { .. })));
    for amounts in [&[TOTAL_MAX, 1][..], &[u128::MAX, 1], &[1, u128::MAX]] {
        let error = PayoutTree::new(&settles, payouts(amounts)).expect_err("too much");
        assert!(matches!(error, SettlementError::TotalTooLarge { .. }), "{error}");
    }
    PayoutTree::new(&settles, payouts(&[TOTAL_MAX])).expect("the most there may be");
}

proptest! {
    /// Each account's proof leads to the root from its own leaf only; who has no leaf has no proof.
    #[test]
    fn a_proof_is_for_one_leaf(amounts in prop::collection::vec(0..1_000_u128, 1..70), other in 0..70_usize) {
        let (_, settles) = vectors();
        let tree = PayoutTree::new(&settles, payouts(&amounts)).expect("a good tree");
        for payout in tree.payouts() {
            let proof = tree.proof(payout.account).expect("in the tree");
            let leaf = settles.leaf(payout.account, payout.cumulative);
            prop_assert_eq!(root_of(leaf, &proof), Some(tree.root()));
            prop_assert_ne!(root_of(settles.leaf(payout.account, payout.cumulative + 1), &proof), Some(tree.root()));
            let elsewhere = Proof { index: other % amounts.len().next_power_of_two(), ..proof.clone() };
            prop_assert_eq!(root_of(leaf, &elsewhere) == Some(tree.root()), elsewhere.index == proof.index);
        }
        prop_assert_eq!(tree.proof(account(amounts.len() as u64 + 1)), None);
        prop_assert_eq!(tree.proof(Address::ZERO), None);
    }

    /// Any other amount, account, token, contract or chain is another root.
    #[test]
    fn a_root_is_for_one_epoch_of_one_contract(amounts in prop::collection::vec(0..1_000_u128, 1..40), at in 0..40_usize) {
        let (_, settles) = vectors();
        let root = |settles: &Settles, payouts| PayoutTree::new(settles, payouts).expect("a good tree").root();
        let own = root(&settles, payouts(&amounts));
        let mut more = payouts(&amounts);
        more[at % amounts.len()].cumulative += 1;
        let mut longer = amounts.clone();
        longer.push(0);
        let others = [
            root(&settles, more),
            root(&settles, payouts(&longer)),
            root(&Settles { chain_id: settles.chain_id + 1, ..settles }, payouts(&amounts)),
            root(&Settles { token: account(9), ..settles }, payouts(&amounts)),
            root(&Settles { settlement: account(9), ..settles }, payouts(&amounts)),
        ];
        prop_assert!(!others.contains(&own));
    }
}
