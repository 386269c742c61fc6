//! Outcomes that nobody knows, and several who send with one key.

use std::{sync::Arc, time::Duration};

use alloy::primitives::B256;
use openlora_settlement::{
    RpcConfig, RpcUrl, SettlementError,
    chain::Chain,
    outbox::Status,
    sender::{Sender, SenderConfig},
};
use openlora_types::Classify as _;
use serde_json::json;
use tokio::sync::Notify;

use crate::{
    anvil::ACCOUNT,
    proxy::{Fault, Proxy},
    stage::{Stage, hashes, signer, turn},
};

const SEND: &str = "eth_sendRawTransaction";
/// Between the beginnings of two settlements.
const LATER: i64 = 600_000;
/// Longer than a lease, shorter than it takes to be stuck.
const SILENT: i64 = 45_000;

/// A sender that gives up soon, behind a proxy.
async fn behind(stage: &Stage, proxy: &Proxy) -> Sender {
    let url = RpcUrl::parse("rpc", &proxy.url("secret")).expect("a URL");
    let config =
        RpcConfig { timeout: Duration::from_secs(2), backoff: Duration::from_millis(1), ..RpcConfig::default() };
    let chain = Chain::open(&url, 31337, config, |_| None).await.expect("anvil answers");
    Sender::new(chain, signer(), Arc::clone(&stage.database), SenderConfig::default())
}

#[tokio::test]
async fn a_broadcast_of_unknown_outcome_keeps_its_nonce_and_its_bytes() {
    let unknown = || {
        let error = r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"upstream timed out"}}"#;
        [
            Fault::LoseQuestion,
            Fault::LoseAnswer,
            Fault::RepeatQuestion,
            Fault::RepeatAnswer,
            Fault::Hold(Arc::default()),
            Fault::Say(502, "<html>bad gateway</html>".into()),
            Fault::Say(200, error.into()),
            Fault::Say(200, r#"{"jsonrpc":"2.0","id":123456,"result":"0x00"}"#.into()),
            Fault::Say(200, "{".into()),
        ]
    };
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    for (i, fault) in (1..).zip(unknown()) {
        let sender = behind(&stage, &proxy).await;
        let id = sender.submit(&stage.count(i)).await.expect("kept");
        proxy.fail(SEND, fault);
        assert_eq!(turn(&sender, i as i64 * LATER).await.signed, 1, "fault {i}");
        let sent = hashes(&sender, id).await;
        // Another process takes up what this one left.
        let next = behind(&stage, &proxy).await;
        let again = turn(&next, i as i64 * LATER + SILENT).await;
        assert_eq!((again.signed, again.broadcast), (0, 1), "fault {i}");
        assert_eq!(stage.anvil.pool(), sent, "fault {i}");
        assert!(matches!(stage.settle(&next, id).await, Status::Finalized { reverted: None, .. }), "fault {i}");
        assert_eq!((stage.counted(i), stage.anvil.nonce(ACCOUNT)), (1, i), "fault {i}");
        next.close().await.expect("closed");
    }
    assert!(proxy.is_done());
}

#[tokio::test]
async fn any_question_may_fail_at_any_time_and_the_next_turn_goes_on() {
    let methods = [
        "eth_chainId",
        "eth_getTransactionCount",
        "eth_getBlockByNumber",
        "eth_getCode",
        "eth_call",
        "eth_estimateGas",
        "eth_maxPriorityFeePerGas",
        "eth_getBalance",
        SEND,
        "eth_getTransactionReceipt",
        "eth_getTransactionByHash",
    ];
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let url = RpcUrl::parse("rpc", &proxy.url("secret")).expect("a URL");
    let config = RpcConfig { tries: 1, ..crate::stage::rpc() };
    let chain = Chain::open(&url, 31337, config, |_| None).await.expect("anvil answers");
    let sender = Sender::new(chain, signer(), Arc::clone(&stage.database), SenderConfig::default());
    for (i, method) in (1..).zip(methods) {
        let id = sender.submit(&stage.count(i)).await.expect("kept");
        for fault in [Fault::LoseQuestion, Fault::LoseAnswer, Fault::Say(503, String::new())] {
            proxy.fail(method, fault);
        }
        for later in 0..50 {
            if sender.status(id).await.expect("known").is_terminal() {
                break;
            }
            stage.anvil.mine(1);
            if let Err(error) = sender.turn_at(openlora_settlement::outbox::UnixMs(later)).await {
                assert!(error.is_retryable(), "{method}: {error}");
            }
        }
        assert!(matches!(sender.status(id).await, Ok(Status::Finalized { reverted: None, .. })), "{method}");
        assert_eq!((stage.counted(i), stage.anvil.nonce(ACCOUNT)), (1, i), "{method}");
    }
}

#[tokio::test]
async fn a_node_that_wants_more_for_a_replacement_is_offered_more() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let sender = behind(&stage, &proxy).await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    let says = |text: &str| format!(r#"{{"jsonrpc":"2.0","id":1,"error":{{"code":-32000,"message":"{text}"}}}}"#);
    proxy.fail(SEND, Fault::Say(200, says("replacement transaction underpriced")));
    assert_eq!(turn(&sender, 60_000).await.replaced, 1);
    // The node has the first alone: the second is offered again, refused again, and a third is made.
    proxy.fail(SEND, Fault::Say(200, says("replacement transaction underpriced")));
    assert_eq!(turn(&sender, 60_001).await.replaced, 1);
    let sent = hashes(&sender, id).await;
    assert_eq!((sent.len(), stage.anvil.pool()), (3, vec![sent[2]]));
    stage.anvil.ask("anvil_dropTransaction", json!([sent[2]]));
    proxy.fail(SEND, Fault::Say(200, says("nonce too low")));
    let used = turn(&sender, 60_002).await;
    assert_eq!((used.signed, used.broadcast, used.replaced), (0, 1, 0), "receipts will tell");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 0, reverted: None, .. }));
    assert_eq!((stage.counted(1), stage.anvil.nonce(ACCOUNT)), (1, 1));
}

#[tokio::test]
async fn questions_are_asked_again_a_bounded_number_of_times() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let sender = behind(&stage, &proxy).await;
    let before = proxy.seen("eth_chainId");
    let limited = r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32005,"message":"too many requests"}}"#;
    let faults = [Fault::LoseAnswer, Fault::Say(503, "busy".into()), Fault::Say(429, limited.into())];
    for fault in faults.clone() {
        proxy.fail("eth_chainId", fault);
    }
    sender.chain().check_id().await.expect("the fourth try is answered");
    assert_eq!(proxy.seen("eth_chainId") - before, 4);
    for fault in [Fault::LoseQuestion].into_iter().chain(faults) {
        proxy.fail("eth_chainId", fault);
    }
    let error = sender.chain().check_id().await.expect_err("no more tries");
    assert!(error.is_retryable() && error.to_string().contains("too many requests"), "{error}");
    assert_eq!(proxy.seen("eth_chainId") - before, 8);
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let sender = behind(&stage, &proxy).await;
    for _ in 0..4 {
        proxy.fail("eth_getBalance", Fault::Say(200, " ".repeat(5 << 20)));
    }
    let error = sender.chain().balance(ACCOUNT).await.expect_err("5 MiB");
    assert!(error.to_string().contains("response_bytes_max"), "{error}");
}

#[tokio::test]
async fn of_two_senders_one_works_and_the_other_takes_over_when_it_falls_silent() {
    let stage = Stage::new().await;
    let (first, second) = (stage.sender().await, stage.sender().await);
    let id = first.submit(&stage.count(1)).await.expect("kept");
    assert_eq!(second.submit(&stage.count(1)).await.expect("the same"), id);
    let lease = 30_000;
    assert!(turn(&first, 0).await.leads);
    let other = second.submit(&stage.count(2)).await.expect("kept");
    assert!(!turn(&second, lease - 1).await.leads);
    assert_eq!(second.status(other).await.expect("known"), Status::Queued { waiting: None });
    let taken = turn(&second, lease).await;
    assert!(taken.leads && taken.signed == 1, "{taken:?}");
    // The first one's clock is behind, and it does not know yet.
    assert!(!turn(&first, 1).await.leads);
    assert!(matches!(stage.settle(&second, other).await, Status::Finalized { nonce: 1, .. }));
    assert!(matches!(second.status(id).await, Ok(Status::Finalized { nonce: 0, .. })));
    second.close().await.expect("closed");
    assert!(turn(&first, 2).await.leads, "at once");
    assert_eq!((stage.counted(0), stage.anvil.nonce(ACCOUNT)), (2, 2));
}

#[tokio::test]
async fn a_sender_that_was_overtaken_while_the_node_was_silent_gives_no_nonce_away() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let (slow, quick) = (stage.sender_by(&proxy.url("secret"), SenderConfig::default()).await, stage.sender().await);
    for (method, i) in [("eth_getTransactionCount", 1), ("eth_estimateGas", 2), ("eth_getBalance", 3), (SEND, 4)] {
        let id = slow.submit(&stage.count(i)).await.expect("kept");
        let go_on = Arc::new(Notify::new());
        proxy.fail(method, Fault::Hold(Arc::clone(&go_on)));
        let now = i as i64 * LATER;
        let overtake = async {
            while !proxy.is_done() {
                tokio::task::yield_now().await;
            }
            let overtaking = turn(&quick, now + SILENT).await;
            assert!(overtaking.leads, "{method}");
            assert_eq!(overtaking.signed, usize::from(method != SEND), "{method}");
            go_on.notify_one();
        };
        let (late, ()) = tokio::join!(turn(&slow, now), overtake);
        // What was kept before it was overtaken is sent.
        let kept = method == SEND;
        assert_eq!((late.leads, late.signed), (kept, usize::from(kept)), "{method}");
        assert!(matches!(stage.settle(&quick, id).await, Status::Finalized { reverted: None, .. }), "{method}");
        assert_eq!((stage.counted(i), stage.anvil.nonce(ACCOUNT)), (1, i), "{method}");
        quick.close().await.expect("closed");
    }
}

#[tokio::test]
async fn a_receipt_of_a_block_that_is_not_part_of_the_chain_counts_for_nothing() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let sender = behind(&stage, &proxy).await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    let hash = hashes(&sender, id).await[0];
    let stale = json!({ "jsonrpc": "2.0", "id": "the question's", "result": { "transactionHash": hash, "blockHash": B256::ZERO,
        "blockNumber": "0x0", "status": "0x1", "gasUsed": "0x5208" } });
    proxy.fail("eth_getTransactionReceipt", Fault::Say(200, stale.to_string()));
    let unmoved = turn(&sender, 1).await;
    assert!(proxy.is_done());
    assert_eq!((unmoved.mined, unmoved.finalized), (0, 0), "block 0 is final, and another");
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { hash: found, .. } if found == hash));
    assert_eq!(stage.counted(1), 1);
}

/// As a server runs it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_is_shared_by_threads() {
    let stage = Stage::new().await;
    let sender = Arc::new(stage.sender().await);
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let turns = [0, 1, 2].map(|later| {
        let sender = Arc::clone(&sender);
        tokio::task::spawn_blocking(move || tokio::runtime::Handle::current().block_on(turn(&sender, later)))
    });
    let mut signed = 0;
    for turn in turns {
        signed += turn.await.expect("no panic").signed;
    }
    assert_eq!(signed, 1);
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 0, .. }));
}

#[tokio::test]
async fn turns_of_one_sender_at_the_same_time_come_one_after_another() {
    let stage = Stage::new().await;
    let sender = stage.sender().await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    let turns = tokio::join!(turn(&sender, 0), turn(&sender, 0), turn(&sender, 0));
    assert_eq!(turns.0.signed + turns.1.signed + turns.2.signed, 1);
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { nonce: 0, .. }));
    assert_eq!(stage.anvil.nonce(ACCOUNT), 1);
}

#[tokio::test]
async fn an_error_says_which_question_of_which_host_and_no_more() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let sender = stage.sender_by(&proxy.url("s3cret-key"), SenderConfig::default()).await;
    let echo =
        r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"no project s3cret-key at /v2/s3cret-key"}}"#;
    let page = "<html>s3cret-key</html>";
    for fault in [Fault::Say(401, echo.into()), Fault::Say(200, page.into()), Fault::LoseAnswer] {
        for _ in 0..4 {
            proxy.fail("eth_chainId", fault.clone());
        }
        let error = loop {
            if let Err(error) = sender.chain().check_id().await {
                break error;
            }
        };
        let shown = format!("{error} {error:?} {sender:?}");
        assert!(shown.contains("http://127.0.0.1:") && shown.contains("eth_chainId"), "{shown}");
        assert!(!shown.contains("s3cret-key") && !shown.contains("user"), "{shown}");
        assert!(matches!(error, SettlementError::Rpc(_)));
        while !proxy.is_done() {
            let _used_up = sender.chain().check_id().await;
        }
    }
}
