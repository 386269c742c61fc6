//! What the desk promises without a chain; with one: tests/e2e/settlement_door.rs.

use std::path::Path;

use openlora_settlement::bundle::Epoch;
use openlora_settlement::tree::{Payout, Settles};

use super::*;
use crate::{config, ledger};

fn address(number: u64) -> tree::Address {
    let mut bytes = [0; 20];
    bytes[12..].copy_from_slice(&number.to_be_bytes());
    bytes.into()
}

/// An epoch where account N has earned N.
fn bundle(number: u64, accounts: u64) -> Arc<Bundle> {
    let settles = Settles { chain_id: 10, settlement: address(1 << 40), token: address(1 << 41) };
    let payouts = (1..=accounts).map(|n| Payout { account: address(n), cumulative: n.into() }).collect();
    let (ledger_head, receipts) = ([number as u8; 32].into(), Vec::new());
    let epoch = Epoch { number, rows: (number, number), ledger_head, sealed_unix_s: 5, payouts, receipts };
    Arc::new(Bundle::new(&settles, epoch).expect("a good epoch"))
}

const CONTRACT: (&str, &str) = ("OPENLORA_SETTLEMENT_CONTRACT", "0x00000000000000000000000000000000000c0001");
/// Where nothing listens.
const RPC: (&str, &str) = ("OPENLORA_SETTLEMENT_RPC_URL", "http://127.0.0.1:1");
const CHAIN: (&str, &str) = ("OPENLORA_SETTLEMENT_CHAIN_ID", "31337");

async fn open(folder: &Path, settings: &[(&str, &str)]) -> Result<Option<Desk>> {
    let environment = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let config = config::load(None, environment, &[], folder).expect("good settings").config;
    let asset = ledger::asset(&config).expect("an asset");
    let ledger = ledger::open(&config).await.expect("a ledger");
    Desk::open(&config, &Books { ledger, asset, charge: false, base_owner: None })
}

#[tokio::test]
async fn what_is_not_set_or_does_not_answer_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(open(folder.path(), &[]).await.expect("no chain is asked for").is_none());
    let bad = ("OPENLORA_SETTLEMENT_CONTRACT", "0x12");
    for (settings, setting) in [
        (&[CONTRACT][..], "settlement.rpc_url"),
        (&[CONTRACT, RPC], "settlement.chain_id"),
        (&[bad, RPC, CHAIN], "settlement.contract"),
        (&[CONTRACT, ("OPENLORA_SETTLEMENT_RPC_URL", "node"), CHAIN], "settlement.rpc_url"),
    ] {
        let refused = open(folder.path(), settings).await.err().expect("refused at the start");
        assert!(refused.to_string().contains(setting), "{refused}");
    }
    let desk = open(folder.path(), &[CONTRACT, RPC, CHAIN]).await.expect("a node may come later").expect("a desk");
    let keyless = desk.propose(None).await.expect_err("no key");
    assert!(matches!(keyless, EpochsError::NotConfigured { setting: "settlement.keystore", .. }), "{keyless}");
    for refused in [desk.seal().await.err(), desk.proof(own(address(1)), None).await.err()] {
        assert!(matches!(refused, Some(EpochsError::Unavailable { what: "the chain's node" })), "{refused:?}");
    }
    let standings = desk.standings(&[1, 2]).await;
    assert_eq!(standings.len(), 2);
    for Standing { payout_root, place } in standings {
        assert!(payout_root.is_none() && matches!(place, Place::Unknown { .. }), "{place:?}");
    }
}

#[tokio::test]
async fn what_was_begun_ends_without_its_caller_and_only_so_much_is_begun() {
    let folder = tempfile::tempdir().expect("a folder");
    let desk = open(folder.path(), &[CONTRACT, RPC, CHAIN]).await.expect("settings").expect("a desk");
    let desk = Arc::new(desk);
    let (begun, mut begins) = mpsc::channel(JOBS_MAX);
    let (go, _) = tokio::sync::broadcast::channel::<()>(1);
    let (ended, mut ends) = mpsc::channel(JOBS_MAX);
    let callers = (0..JOBS_MAX).map(|_| {
        let (desk, begun, ended, mut may_end) = (Arc::clone(&desk), begun.clone(), ended.clone(), go.subscribe());
        tokio::spawn(async move {
            let work = async move {
                begun.send(()).await.expect("the test listens");
                may_end.recv().await.expect("the test says so");
                ended.send(()).await.expect("the test listens");
                Ok(())
            };
            desk.ask(|_| work).await
        })
    });
    let callers: Vec<_> = callers.collect();
    for _ in 0..JOBS_MAX {
        begins.recv().await.expect("it begins");
    }
    let full = desk.ask(async |_| Ok(())).await.expect_err("no room");
    assert!(matches!(full, EpochsError::Busy { max: JOBS_MAX }), "{full}");
    callers.iter().for_each(tokio::task::JoinHandle::abort);
    go.send(()).expect("all wait");
    for _ in 0..JOBS_MAX {
        ends.recv().await.expect("it ends");
    }
}

#[test]
fn a_question_about_an_old_epoch_does_not_push_the_last_one_out() {
    let shelf = Shelf::default();
    let has = |epoch| shelf.find(epoch).map(|bundle| bundle.manifest().epoch);
    assert_eq!((has(None), has(Some(3))), (None, None));
    shelf.lock().last = Some((3, Instant::now()));
    for (put, kept, gone) in [(3, vec![3], 1), (1, vec![3, 1], 2), (2, vec![3, 2], 1), (3, vec![3], 2)] {
        shelf.put(bundle(put, 1));
        assert_eq!((kept.iter().map(|&epoch| has(Some(epoch))).collect::<Vec<_>>(), has(Some(gone))), {
            (kept.iter().map(|&epoch| Some(epoch)).collect(), None)
        });
        assert_eq!((has(None), shelf.lock().bundles.len()), (Some(3), kept.len()));
    }
    // What the contract said a while ago may be old: it is asked again.
    shelf.lock().last = Some((3, Instant::now() - FRESH));
    assert_eq!((has(None), has(Some(3))), (None, Some(3)));
}

#[test]
fn a_proof_is_the_contracts_argument_and_who_earned_nothing_has_none() {
    let bundle = bundle(7, 5);
    let proof = prove(&bundle, own(address(4))).expect("it earned something");
    assert_eq!((proof.epoch, proof.cumulative, proof.index, proof.siblings.len()), (7, 4, 3, 3));
    assert_eq!((proof.chain_id, proof.settlement, proof.token), (10, own(address(1 << 40)), own(address(1 << 41))));
    let nothing = prove(&bundle, own(address(6))).expect_err("it earned nothing").to_string();
    assert!(nothing.contains("in epoch 7; it has earned nothing"), "{nothing}");
}

#[test]
fn callers_are_told_what_they_can_do_something_about_and_no_more() {
    let settlement = |error: SettlementError| told(&anyhow::Error::from(error).context("somewhere"));
    let early = SettlementError::NotDue { epoch: 3, next: 2 };
    let EpochsError::Refused { reason, message } = settlement(early) else { panic!("it can be told") };
    assert!(reason == "EPOCH_NOT_DUE" && message.contains("epoch 2 next"), "{message}");
    let secret = KeyError::WrongPassword { file: "/secret/path".into() };
    for (error, what) in [
        (settlement(SettlementError::BundleFormat { reason: "/secret/path".into() }), "place of bundles"),
        (told(&anyhow::Error::from(secret)), "settlement.keystore"),
    ] {
        assert!(matches!(error, EpochsError::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains(what) && !error.to_string().contains("secret"), "{error}");
    }
    let empty = settlement(LedgerError::EmptyEpoch { last: 0 }.into());
    assert!(matches!(empty, EpochsError::Ledger(LedgerError::EmptyEpoch { last: 0 })), "{empty}");
}
