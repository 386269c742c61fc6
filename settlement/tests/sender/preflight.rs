//! What is refused before anything is sent.

use std::collections::BTreeMap;

use alloy::primitives::{B256, Bytes, U256, keccak256};
use openlora_settlement::{
    RpcUrl, SettlementError,
    chain::Chain,
    outbox::{Intent, Status},
    sender::{Sender, SenderConfig},
};
use serde_json::json;

use crate::{
    anvil::{ACCOUNT, OTHER},
    stage::{Stage, rpc, turn},
};

/// The error for an intent of which nothing is kept and nothing sent.
async fn refused(stage: &Stage, sender: &Sender, intent: &Intent) -> SettlementError {
    let error = sender.submit(intent).await.expect_err("to be refused");
    assert_eq!(sender.find(&intent.key).await.expect("asked"), None);
    turn(sender, 0).await;
    assert_eq!((stage.anvil.nonce(ACCOUNT), stage.anvil.pool().len()), (0, 0));
    error
}

#[tokio::test]
async fn a_node_of_another_chain_is_refused_at_the_start_and_later() {
    let stage = Stage::new().await;
    let url = RpcUrl::parse("rpc", &stage.anvil.url()).expect("a URL");
    let error = Chain::open(&url, 10, rpc(), |_| None).await.expect_err("chain 31337");
    assert!(matches!(error, SettlementError::WrongChain { expected: 10, found: 31337 }), "{error}");
    let sender = stage.sender().await;
    stage.anvil.ask("anvil_setChainId", json!([10]));
    assert!(matches!(sender.submit(&stage.count(1)).await, Err(SettlementError::WrongChain { .. })));
    assert!(matches!(sender.turn().await, Err(SettlementError::WrongChain { .. })));
    assert_eq!(stage.anvil.nonce(ACCOUNT), 0);
}

#[tokio::test]
async fn an_address_without_the_contract_or_with_another_is_refused_with_the_next_command() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let mut nowhere = stage.count(1);
    nowhere.content.to = Some(OTHER);
    nowhere.content.done = None;
    let error = refused(&stage, &sender, &nowhere).await;
    assert!(matches!(error, SettlementError::NoCode { address: OTHER, chain: 31337 }));
    assert!(error.to_string().contains("openlora chain deploy"), "{error}");

    let code: Bytes =
        serde_json::from_value(stage.anvil.ask("eth_getCode", json!([stage.counter, "latest"]))).expect("code");
    for (hash, fine) in [(B256::repeat_byte(1), false), (keccak256(&code), true)] {
        let config = SenderConfig { code: BTreeMap::from([(stage.counter, hash)]), ..SenderConfig::default() };
        let sender = stage.sender_by(&stage.anvil.url(), config).await;
        if fine {
            sender.submit(&stage.count(1)).await.expect("the contract that was deployed");
        } else {
            let error = refused(&stage, &sender, &stage.count(1)).await;
            assert!(matches!(error, SettlementError::OtherCode { expected, .. } if expected == hash));
            assert!(error.to_string().contains("openlora chain deploy"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_call_that_the_contract_refuses_is_not_sent_and_the_reason_told() {
    let stage = Stage::new().await;
    stage.lock(true);
    stage.anvil.mine(1);
    let sender = stage.sender().await;
    let error = refused(&stage, &sender, &stage.count(1)).await;
    assert!(matches!(&error, SettlementError::WouldRevert { reason } if reason == "locked"), "{error:?}");
    assert!(error.to_string().contains("openlora settle status"), "{error}");
}

#[tokio::test]
async fn a_call_that_is_refused_only_at_its_turn_is_kept_with_the_reason() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    stage.lock(true);
    stage.anvil.mine(1);
    turn(&sender, 0).await;
    let Status::Refused { reason } = sender.status(id).await.expect("known") else { panic!("sent") };
    assert!(reason.contains("locked"), "{reason}");
    assert_eq!(stage.anvil.nonce(ACCOUNT), 0);
    stage.lock(false);
    stage.anvil.mine(1);
    sender.retry(id).await.expect("queued");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { reverted: None, .. }));
    assert_eq!(stage.counted(1), 1);
}

#[tokio::test]
async fn more_gas_than_allowed_is_refused() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let mut intent = stage.count(1);
    intent.content.gas_max = 30_000;
    let error = refused(&stage, &sender, &intent).await;
    assert!(matches!(error, SettlementError::GasTooHigh { needed, max: 30_000 } if needed > 30_000), "{error}");
}

#[tokio::test]
async fn an_account_that_cannot_pay_the_worst_case_is_told_how_much_it_lacks() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let has = U256::from(10_000_000_000_000_u64);
    stage.anvil.ask("anvil_setBalance", json!([ACCOUNT, has]));
    let error = refused(&stage, &sender, &stage.count(1)).await;
    let SettlementError::Balance { account: ACCOUNT, needed, has: found } = error else { panic!("{error}") };
    assert!(found == has && needed > has);
    // Enough for one, and not for two at once: the second waits.
    stage.anvil.ask("anvil_setBalance", json!([ACCOUNT, needed]));
    let (one, two) =
        (sender.submit(&stage.count(1)).await.expect("kept"), sender.submit(&stage.count(2)).await.expect("kept"));
    assert_eq!(turn(&sender, 1).await.signed, 1);
    let Status::Queued { waiting: Some(why) } = sender.status(two).await.expect("known") else { panic!("not waiting") };
    assert!(why.contains(&ACCOUNT.to_string()), "{why}");
    assert!(matches!(stage.settle(&sender, one).await, Status::Finalized { .. }));
    stage.anvil.ask("anvil_setBalance", json!([ACCOUNT, needed * U256::from(10)]));
    assert!(matches!(stage.settle(&sender, two).await, Status::Finalized { .. }));
    assert_eq!((stage.counted(1), stage.counted(2)), (1, 1));
}

#[tokio::test]
async fn fields_have_bounds() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    for key in [String::new(), "k".repeat(201)] {
        let error = refused(&stage, &sender, &Intent { key, ..stage.count(1) }).await;
        assert!(error.to_string().contains("1 to 200 bytes"), "{error}");
    }
    let mut intent = stage.count(1);
    intent.content.data = vec![1; (120 << 10) + 1].into();
    let error = refused(&stage, &sender, &intent).await;
    assert!(error.to_string().contains("122881 bytes"), "{error}");
}
