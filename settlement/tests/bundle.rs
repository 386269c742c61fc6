//! What an epoch publishes: recomputed from itself, and nothing in it can be changed unnoticed.

use alloy::primitives::{Address, B256, U256};
use openlora_settlement::SettlementError;
use openlora_settlement::bundle::{Bundle, Epoch, Receipt};
use openlora_settlement::tree::{Payout, Settles};
use serde_json::{Value, json};

const SETTLES: Settles =
    Settles { chain_id: 10, settlement: Address::repeat_byte(0x5e), token: Address::repeat_byte(0x70) };

fn account(number: u64) -> Address {
    Address::from_word(U256::from(number).into())
}

fn epoch(number: u64) -> Epoch {
    let payouts = (1..=4).map(|i| Payout { account: account(i), cumulative: u128::from(100 * i * number) });
    let receipts = (0..3).map(|i| Receipt { id: format!("answer-{number}-{i}"), hash: B256::repeat_byte(i) });
    Epoch {
        number,
        rows: (number * 50 - 49, number * 50),
        ledger_head: B256::repeat_byte(7),
        sealed_unix_s: 1_800_000_000 + number,
        payouts: payouts.collect(),
        receipts: receipts.collect(),
    }
}

fn bundle(epoch: Epoch) -> Bundle {
    Bundle::new(&SETTLES, epoch).expect("a good epoch")
}

fn read(file: &Value) -> Result<Bundle, SettlementError> {
    Bundle::from_json(&serde_json::to_vec(file).expect("JSON"))
}

#[test]
fn a_bundle_comes_back_byte_for_byte() {
    for receipts in [0, 1, 3] {
        let mut epoch = epoch(2);
        epoch.receipts.truncate(receipts);
        let bundle = bundle(epoch);
        let json = bundle.to_json();
        let back = Bundle::from_json(&json).expect("just written");
        assert_eq!(back.manifest(), bundle.manifest());
        assert_eq!((back.receipts(), back.tree().payouts()), (bundle.receipts(), bundle.tree().payouts()));
        assert_eq!(back.to_json(), json);
        assert_eq!(bundle.manifest().receipts_root.is_zero(), receipts == 0);
    }
}

/// The hashes were computed with Python's json (sorted keys, no white space) and a keccak256 of its own.
#[test]
fn the_manifest_is_hashed_in_its_canonical_form() {
    let bundle = bundle(epoch(2));
    let file: Value = serde_json::from_slice(&bundle.to_json()).expect("JSON");
    let object = file["manifest"].as_object().expect("an object");
    let names: Vec<&String> = object.keys().collect();
    assert!(names.is_sorted(), "{names:?}");
    assert_eq!(bundle.manifest().hash().to_string(), MANIFEST_HASH);
    assert_eq!(bundle.manifest().receipts_root.to_string(), RECEIPTS_ROOT);
    assert_eq!(file["manifest_hash"], MANIFEST_HASH);
}

const MANIFEST_HASH: &str = "0xa428dfdb33e61b7a4c7c410a880c6b14dbc5f1b801ccc2831f3f98cf1909d20d";
const RECEIPTS_ROOT: &str = "0x38a4424c0cea916f1142a2724f344402f28bd4d77ec4bb018d0847895b7bf1b3";

#[test]
fn whatever_is_changed_in_a_bundle_is_named() {
    let file: Value = serde_json::from_slice(&bundle(epoch(2)).to_json()).expect("JSON");
    let root = |byte| Value::from(B256::repeat_byte(byte).to_string());
    let changes = [
        ("/manifest/accounts", json!(5), "accounts"),
        ("/manifest/receipts", json!(2), "receipts"),
        ("/manifest/total", json!("1999"), "total"),
        ("/manifest/payout_root", root(1), "payout_root"),
        ("/manifest/receipts_root", root(1), "receipts_root"),
        ("/manifest/epoch", json!(3), "manifest_hash"),
        ("/manifest/first_row", json!(50), "manifest_hash"),
        ("/manifest/last_row", json!(101), "manifest_hash"),
        ("/manifest/sealed_unix_s", json!(1), "manifest_hash"),
        ("/manifest/ledger_head", root(8), "manifest_hash"),
        // Part of every leaf.
        ("/manifest/chain_id", json!(11), "payout_root"),
        ("/manifest/settlement", json!(account(1)), "payout_root"),
        ("/manifest/token", json!(account(1)), "payout_root"),
        ("/manifest_hash", root(1), "manifest_hash"),
        ("/payouts/1/1", json!("401"), "total"),
        ("/payouts/0/0", json!(account(0)), "payout_root"),
        ("/receipts/2/0", json!("answer-2-9"), "receipts_root"),
        ("/receipts/2/1", root(9), "receipts_root"),
    ];
    for (at, value, named) in changes {
        let mut changed = file.clone();
        *changed.pointer_mut(at).expect(at) = value;
        match read(&changed) {
            Err(SettlementError::BundleMismatch { field, .. }) => assert_eq!(field, named, "{at}"),
            other => panic!("{at}: {other:?}"),
        }
    }
    // Two amounts that sum to the same.
    let mut changed = file.clone();
    changed["payouts"][0][1] = json!("201");
    changed["payouts"][1][1] = json!("399");
    let error = read(&changed).expect_err("other leaves").to_string();
    assert!(error.starts_with("the bundle says payout_root 0x"), "{error}");
}

#[test]
fn what_is_no_bundle_is_refused_with_the_reason() {
    let file: Value = serde_json::from_slice(&bundle(epoch(1)).to_json()).expect("JSON");
    let changed = |at: &str, value: Value| {
        let mut changed = file.clone();
        *changed.pointer_mut(at).expect(at) = value;
        read(&changed).expect_err(at).to_string()
    };
    for (at, value, says) in [
        ("/manifest/format", json!("openlora-epoch-v2"), "this program reads \"openlora-epoch-v1\""),
        ("/manifest/total", json!("0100"), "\"0100\" is no amount"),
        ("/manifest/total", json!("-1"), "\"-1\" is no amount"),
        ("/payouts/0/1", json!("+5"), "\"+5\" is no amount"),
        ("/payouts/0/1", json!("340282366920938463463374607431768211456"), "is no amount"),
        ("/payouts/0/1", json!(5), "expected a string"),
        ("/payouts/0/0", json!("0x12"), "invalid"),
        ("/payouts", json!([]), "an epoch pays 1 to"),
        ("/receipts/0/0", json!("x".repeat(257)), "at most 256 bytes"),
    ] {
        let error = changed(at, value);
        assert!(error.contains(says), "{at}: {error}");
    }
    let mut twice = file.clone();
    let first = twice["payouts"][0].clone();
    twice["payouts"].as_array_mut().expect("a list").insert(0, first);
    assert!(matches!(read(&twice), Err(SettlementError::AccountOrder { .. })));
    let mut more = file.clone();
    more["manifest"]["note"] = json!("x");
    assert!(read(&more).expect_err("a field too many").to_string().contains("unknown field `note`"));
    assert!(matches!(Bundle::from_json(b"{\"manifest\":"), Err(SettlementError::BundleFormat { .. })));
}

#[test]
fn an_epoch_goes_on_where_the_one_before_ended() {
    let first = bundle(epoch(1));
    bundle(epoch(2)).follows(&first).expect("the next");
    let refused = |change: &dyn Fn(&mut Epoch)| {
        let mut next = epoch(2);
        change(&mut next);
        bundle(next).follows(&first).expect_err("not the next").to_string()
    };
    let starts = "epoch 2 does not follow epoch 1: ";
    assert_eq!(refused(&|epoch| epoch.number = 3), "epoch 3 does not follow epoch 1: its number is not the next");
    assert_eq!(
        refused(&|epoch| epoch.rows.0 = 52),
        format!("{starts}it has rows 52 to 100 of the ledger, the one before ended at 50")
    );
    assert!(refused(&|epoch| epoch.rows.1 = 50).contains("rows 51 to 50"));
    let (two, three) = (account(2), account(3));
    assert_eq!(
        refused(&|epoch| epoch.payouts[1].cumulative = 199),
        format!("{starts}{two} had earned 200 and now has 199")
    );
    assert_eq!(refused(&|epoch| epoch.payouts.truncate(2)), format!("{starts}{three} had earned 300 and now has 0"));
    let elsewhere = Bundle::new(&Settles { chain_id: 1, ..SETTLES }, epoch(2)).expect("a good epoch");
    assert!(elsewhere.follows(&first).expect_err("another chain").to_string().contains("another chain"));
}
