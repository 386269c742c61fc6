//! What becomes of intents while the node and the network behave: prices, pools, blocks and other users of the key.

use std::time::Duration;

use alloy::primitives::{Address, Bytes, U256};
use openlora_settlement::{
    SettlementError,
    outbox::{Intent, Status},
    sender::SenderConfig,
};
use serde_json::json;

use crate::{
    anvil::{ACCOUNT, Anvil, OTHER, number},
    stage::{Stage, hashes, turn},
};

/// After this many milliseconds a transaction is stuck.
const STUCK: i64 = 60_000;
/// Longer than anything waits.
const LATER: i64 = 10 * STUCK;

fn fees(stage: &Stage, hash: &str) -> (u64, u64) {
    let sent = stage.anvil.ask("eth_getTransactionByHash", json!([hash]));
    (number(&sent["maxFeePerGas"]), number(&sent["maxPriorityFeePerGas"]))
}

#[tokio::test]
async fn an_intent_is_one_effect_and_final_no_sooner_than_its_block() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(7)).await.expect("kept");
    assert_eq!(sender.status(id).await.expect("known"), Status::Queued { waiting: None });
    let first = turn(&sender, 0).await;
    assert!(first.leads && first.signed == 1 && first.broadcast == 1, "{first:?}");
    let sent = hashes(&sender, id).await;
    assert_eq!(sent, stage.anvil.pool());
    stage.anvil.mine(1);
    assert_eq!(turn(&sender, 1).await.mined, 1);
    let Status::Mined { hash, block, succeeded: true, .. } = sender.status(id).await.expect("known") else {
        panic!("not mined")
    };
    assert_eq!(sent, [hash]);
    for i in 2..5 {
        let turn = turn(&sender, i).await;
        assert_eq!((turn.mined, turn.finalized, turn.broadcast), (0, 0, 0), "its block is the newest");
    }
    stage.anvil.mine(2);
    assert_eq!(turn(&sender, 5).await.finalized, 1);
    let status = sender.status(id).await.expect("known");
    assert_eq!(status, Status::Finalized { nonce: 0, hash, block, reverted: None });
    assert_eq!(sender.submit(&stage.count(7)).await.expect("known"), id);
    turn(&sender, LATER).await;
    assert_eq!((stage.counted(7), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn one_key_never_stands_for_two_calls() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let one = stage.count(1);
    let id = sender.submit(&one).await.expect("kept");
    let other = Intent { key: one.key.clone(), content: stage.count(2).content };
    assert!(matches!(sender.submit(&other).await, Err(SettlementError::KeyTaken { .. })));
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { .. }));
    assert!(matches!(sender.submit(&other).await, Err(SettlementError::KeyTaken { .. })));
    assert!(matches!(sender.retry(id).await, Err(SettlementError::NotFailed { .. })));
    assert_eq!((stage.counted(1), stage.counted(2)), (1, 0));
}

#[tokio::test]
async fn many_intents_take_nonces_in_order_within_the_bounds() {
    let stage = Stage::new().await;
    let config = SenderConfig { in_flight_max: 3, queue_max: 7, ..SenderConfig::default() };
    let sender = stage.sender_by(&stage.anvil.url(), config).await;
    let mut ids = Vec::new();
    for i in 1..=7 {
        ids.push(sender.submit(&stage.count(i)).await.expect("kept"));
    }
    assert!(matches!(sender.submit(&stage.count(8)).await, Err(SettlementError::OutboxFull { max: 7 })));
    assert_eq!(turn(&sender, 0).await.signed, 3);
    assert_eq!(turn(&sender, 1).await.signed, 0);
    for (nonce, id) in ids.iter().enumerate() {
        match stage.settle(&sender, *id).await {
            Status::Finalized { nonce: found, reverted: None, .. } => assert_eq!(found, nonce as u64),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((stage.counted(0), stage.anvil.nonce(ACCOUNT)), (7, 7));
}

#[tokio::test]
async fn a_stuck_transaction_is_replaced_at_the_same_nonce_by_one_that_offers_an_eighth_more() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    assert_eq!(turn(&sender, STUCK - 1).await.replaced, 0);
    for i in 1..=3 {
        assert_eq!(turn(&sender, i * STUCK).await.replaced, 1, "after {i} minutes");
        assert_eq!(turn(&sender, (i + 1) * STUCK - 1).await.replaced, 0, "the new one has its own minute");
    }
    let sent = hashes(&sender, id).await;
    assert_eq!(sent.len(), 4);
    assert_eq!(stage.anvil.pool(), [sent[3]], "the node took each replacement");
    let (status, reread) = (stage.settle(&sender, id).await, sent[3]);
    assert!(matches!(status, Status::Finalized { nonce: 0, hash, .. } if hash == reread), "{status:?}");
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn an_earlier_transaction_of_a_nonce_counts_when_it_is_the_one_in_the_block() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    let first = hashes(&sender, id).await[0];
    let raw = stage.anvil.ask("eth_getRawTransactionByHash", json!([first]));
    turn(&sender, STUCK).await;
    let sent = hashes(&sender, id).await;
    assert_eq!((sent.len(), sent[0]), (2, first));
    let (old, new) = (fees(&stage, &stage.anvil.pool()[0].to_string()), sent[1]);
    assert_eq!(stage.anvil.pool(), [new]);
    assert!(old.0 > 0);
    // The block's producer had kept the first.
    stage.anvil.ask("anvil_dropTransaction", json!([new]));
    stage.anvil.ask("eth_sendRawTransaction", json!([raw]));
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { hash, .. } if hash == first));
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn gas_above_the_cap_is_waited_out_and_said() {
    let stage = Stage::new().await;
    let config = SenderConfig { max_fee_per_gas: 10_000_000_000, ..SenderConfig::default() };
    let sender = stage.sender_by(&stage.anvil.url(), config).await;
    let spike = || {
        stage.anvil.ask("anvil_setNextBlockBaseFeePerGas", json!(["0x2540be4000"]));
        stage.anvil.mine(1);
    };
    let calm = || {
        stage.anvil.ask("anvil_setNextBlockBaseFeePerGas", json!(["0x3b9aca00"]));
        stage.anvil.mine(1);
    };
    // Before anything is signed.
    spike();
    let id = sender.submit(&stage.count(1)).await.expect("gas is no reason to refuse");
    let waiting = turn(&sender, 0).await;
    assert_eq!((waiting.signed, waiting.broadcast), (0, 0));
    let Status::Queued { waiting: Some(why) } = sender.status(id).await.expect("known") else { panic!("not waiting") };
    assert!(why.contains("10 gwei") && why.contains("max_fee_per_gas"), "{why}");
    assert_eq!(waiting.waiting.as_ref(), Some(&why));
    calm();
    assert_eq!(turn(&sender, 1).await.signed, 1);
    // And when it is stuck.
    spike();
    let waiting = turn(&sender, STUCK + 1).await;
    assert_eq!((waiting.replaced, hashes(&sender, id).await.len()), (0, 1));
    assert!(waiting.waiting.expect("said").contains("max_fee_per_gas"));
    calm();
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn replacements_stop_at_the_cap() {
    let stage = Stage::new().await;
    let config = SenderConfig { max_fee_per_gas: 4_000_000_000, ..SenderConfig::default() };
    let sender = stage.sender_by(&stage.anvil.url(), config).await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let mut last = turn(&sender, 0).await;
    for i in 1..30 {
        last = turn(&sender, i * STUCK).await;
    }
    assert_eq!(last.replaced, 0);
    assert!(last.waiting.expect("said").contains("max_fee_per_gas"));
    let sent = hashes(&sender, id).await;
    assert!(sent.len() < 15, "{}", sent.len());
    let newest = sent.last().expect("sent").to_string();
    assert!(fees(&stage, &newest).0 <= 4_000_000_000);
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { .. }));
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn a_transaction_that_the_pool_dropped_is_broadcast_again_unchanged() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    let sent = hashes(&sender, id).await;
    stage.anvil.ask("anvil_dropTransaction", json!([sent[0]]));
    assert!(stage.anvil.pool().is_empty());
    let again = turn(&sender, 1).await;
    assert_eq!((again.broadcast, again.replaced, again.signed), (1, 0, 0));
    assert_eq!(stage.anvil.pool(), sent);
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn a_reorganisation_takes_an_intent_back_and_leaves_one_effect() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    stage.anvil.mine(1);
    assert_eq!(turn(&sender, 1).await.mined, 1);
    stage.anvil.ask("anvil_reorg", json!([1, []]));
    assert_eq!(stage.counted(1), 0, "its block is gone");
    let back = turn(&sender, 2).await;
    assert_eq!((back.taken_back, back.signed), (1, 0), "{back:?}");
    assert_eq!(hashes(&sender, id).await.len(), 1);
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 0, reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn a_transaction_that_moves_to_another_block_is_final_with_that_one() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let snapshot = stage.anvil.ask("evm_snapshot", json!([]));
    turn(&sender, 0).await;
    stage.anvil.mine(1);
    turn(&sender, 1).await;
    let Status::Mined { hash, block, .. } = sender.status(id).await.expect("known") else { panic!("not mined") };
    let raw = stage.anvil.ask("eth_getRawTransactionByHash", json!([hash]));
    stage.anvil.ask("evm_revert", json!([snapshot]));
    stage.anvil.mine(3);
    stage.anvil.ask("eth_sendRawTransaction", json!([raw]));
    stage.anvil.mine(1);
    let moved = turn(&sender, 2).await;
    assert_eq!((moved.mined, moved.finalized), (1, 0), "{moved:?}");
    match stage.settle(&sender, id).await {
        Status::Finalized { hash: same, block: other, reverted: None, .. } => {
            assert!(same == hash && other == block + 3)
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn a_revert_on_the_chain_is_final_with_its_reason_and_tried_again_only_when_told() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    stage.lock(true);
    let Status::Finalized { reverted: Some(why), nonce: 0, .. } = stage.settle(&sender, id).await else {
        panic!("went through")
    };
    assert_eq!(why, "locked");
    assert_eq!(sender.submit(&stage.count(1)).await.expect("known"), id);
    assert_eq!(turn(&sender, LATER).await.signed, 0, "not told to");
    stage.lock(false);
    stage.anvil.mine(1);
    sender.retry(id).await.expect("queued");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 1, reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 2));
}

#[tokio::test]
async fn a_nonce_that_another_wallet_took_is_given_up_when_final_and_the_intent_sent_again() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    stage.elsewhere(0, OTHER, &Bytes::new());
    stage.anvil.mine(1);
    let waiting = turn(&sender, 1).await;
    assert_eq!((waiting.lost, waiting.signed), (0, 0), "it could come back");
    assert!(waiting.waiting.expect("said").contains("nonce 0"));
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 1, reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 2));
}

#[tokio::test]
async fn what_another_wallet_did_with_the_nonce_is_not_done_again() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let intent = stage.count(1);
    let id = sender.submit(&intent).await.expect("kept");
    turn(&sender, 0).await;
    stage.elsewhere(0, stage.counter, &intent.content.data);
    assert_eq!(stage.settle(&sender, id).await, Status::DoneElsewhere);
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
    // Known before it is sent, too.
    let other = Intent { key: "the same by another name".into(), ..intent };
    let id = sender.submit(&other).await.expect("kept");
    assert_eq!(stage.settle(&sender, id).await, Status::DoneElsewhere);
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn a_lost_nonce_whose_effect_no_view_tells_of_is_left_to_a_person() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let mut intent = stage.count(1);
    intent.content.done = None;
    let id = sender.submit(&intent).await.expect("kept");
    turn(&sender, 0).await;
    stage.elsewhere(0, OTHER, &Bytes::new());
    let Status::Refused { reason } = stage.settle(&sender, id).await else { panic!("sent again unseen") };
    assert!(reason.contains("nonce 0") && reason.contains("retry"), "{reason}");
    assert_eq!(turn(&sender, LATER).await.signed, 0);
    sender.retry(id).await.expect("queued");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 1, .. }));
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn nonces_used_elsewhere_are_passed_over_and_a_gap_is_filled() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    stage.elsewhere(0, OTHER, &Bytes::new());
    stage.anvil.mine(1);
    // One waits in the pool; what is sent now comes after it.
    let foreign = stage.elsewhere(1, OTHER, &Bytes::new());
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    assert!(matches!(sender.status(id).await.expect("known"), Status::Broadcast { nonce: 2, .. }));
    stage.anvil.ask("anvil_dropTransaction", json!([foreign]));
    let filled = turn(&sender, 1).await;
    assert_eq!(filled.gaps_filled, 1, "{filled:?}");
    assert_eq!(turn(&sender, 2).await.gaps_filled, 0, "once");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 2, reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 3));
}

#[tokio::test]
async fn a_contract_is_created_where_the_nonce_says() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let mut intent = stage.count(1);
    // Returns no code but one byte: STOP.
    intent.content = openlora_settlement::outbox::Content {
        to: None,
        data: alloy::primitives::bytes!("0x60015ff3"),
        done: None,
        ..intent.content
    };
    let id = sender.submit(&intent).await.expect("kept");
    let Status::Finalized { nonce, reverted: None, .. } = stage.settle(&sender, id).await else {
        panic!("not created")
    };
    let code = stage.anvil.ask("eth_getCode", json!([ACCOUNT.create(nonce), "latest"]));
    assert_eq!(code, json!("0x00"));
}

#[tokio::test]
async fn waiting_for_the_end_tells_every_change() {
    let stage = Stage::new().await;
    let config = SenderConfig { poll: Duration::from_millis(1), ..SenderConfig::default() };
    let sender = stage.sender_by(&stage.anvil.url(), config).await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let mut told = Vec::new();
    let end = sender.wait_finalized(id, |status| {
        stage.anvil.mine(1);
        told.push(status.clone());
    });
    // The last block is mined by nobody's wish.
    let blocks = async {
        loop {
            stage.anvil.mine(1);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let end = tokio::select! { end = end => end.expect("settled"), () = blocks => unreachable!() };
    assert!(matches!(end, Status::Finalized { reverted: None, .. }));
    assert_eq!(told.last(), Some(&end));
    assert!(told.windows(2).all(|pair| pair[0] != pair[1]), "{told:?}");
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn a_chain_that_was_started_anew_is_not_mistaken_for_the_old_one() {
    let stage = Stage::new().await;
    let fresh = stage.anvil.ask("evm_snapshot", json!([]));
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { .. }));
    stage.anvil.ask("evm_revert", json!([fresh]));
    let error = sender.turn().await.expect_err("rolled back");
    assert!(
        matches!(error, SettlementError::RolledBack { nonce: 0, latest: 0, account } if account == ACCOUNT),
        "{error}"
    );
}

#[tokio::test]
async fn what_was_signed_for_one_chain_is_not_sent_to_another_with_its_id() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    let other = Anvil::start_with(&["--timestamp", "1000000000"]);
    let moved = stage.sender_by(&other.url(), SenderConfig::default()).await;
    sender.close().await.expect("closed");
    let error = moved.turn().await.expect_err("another first block");
    assert!(matches!(error, SettlementError::OtherChain { id: 31337, .. }), "{error}");
    assert!(other.pool().is_empty());
}

#[tokio::test]
async fn the_fee_for_the_bytes_counts_where_the_oracle_has_code() {
    let stage = Stage::new().await;
    let oracle: Address = openlora_settlement::fees::GAS_PRICE_ORACLE;
    let says = |wei: U256| {
        // PUSH32 wei, PUSH0, MSTORE, PUSH1 32, PUSH0, RETURN
        let code = [&[0x7F][..], &wei.to_be_bytes::<32>(), &[0x5F, 0x52, 0x60, 0x20, 0x5F, 0xF3]].concat();
        stage.anvil.ask("anvil_setCode", json!([oracle, Bytes::from(code)]));
    };
    let sender = stage.sender().await;
    assert_eq!(sender.chain().data_fee_max(&[0; 100]).await.ok(), Some(U256::ZERO), "no oracle, no fee");
    says(SenderConfig::default().cost_max);
    assert_eq!(sender.chain().data_fee_max(&[0; 100]).await.ok(), Some(SenderConfig::default().cost_max));
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let waiting = turn(&sender, 0).await;
    assert!(waiting.signed == 0 && waiting.waiting.expect("said").contains("cost_max"));
    says(U256::from(1_000_000));
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { .. }));
    assert_eq!(stage.counted(1), 1);
}
