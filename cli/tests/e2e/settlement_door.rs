//! From usage to a paid claim through the server's settlement door, on a local chain.

use std::time::Duration;

use alloy::primitives::U256;
use alloy::sol_types::SolCall as _;
use openlora_proto::v1 as wire;
use openlora_proto::v1::get_claim_proof_request::Whose;
use openlora_settlement::contracts::{OpenToken, RewardSettlement};
use serde_json::json;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::settlement::{ANN, Home, Operator, ask};
use crate::support::{Client, Server, create_key};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server with the operator's ledger, bundles and chain.
fn serve(operator: &Home, home: tempfile::TempDir) -> Server {
    let mut settings = operator.settings.clone();
    settings.push(("OPENLORA_LEDGER_DATABASE_URL".into(), format!("sqlite://{}", operator.path("ledger.db"))));
    settings.push(("OPENLORA_SETTLEMENT_BUNDLES_DIR".into(), operator.path("bundles")));
    let settings: Vec<_> = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    Server::start_in(home, &settings)
}

async fn next(stream: &mut Streaming<wire::Epoch>) -> Result<wire::Epoch, Status> {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.expect("a message in time");
    message.map(|epoch| epoch.expect("a watch ends with a reason"))
}

/// Watches until an epoch is in a state.
async fn until(stream: &mut Streaming<wire::Epoch>, number: u64, state: wire::EpochState) -> wire::Epoch {
    loop {
        let epoch = next(stream).await.expect("the watch goes on");
        if epoch.number == number && state_of(&epoch) == state {
            return epoch;
        }
    }
}

fn state_of(epoch: &wire::Epoch) -> wire::EpochState {
    epoch.standing.as_ref().expect("a standing").state()
}

fn reason_of(status: &Status) -> String {
    status.get_details_error_info().unwrap_or_else(|| panic!("{status}")).reason
}

/// What the contract is called with for a proof as it came over the wire.
fn claim(proof: &wire::ClaimProof) -> String {
    let entry = RewardSettlement::Claim {
        epoch: proof.epoch,
        account: proof.account.parse().expect("an address"),
        cumulative: proof.cumulative.parse().expect("an amount"),
        index: U256::from(proof.index),
        proof: proof.proof.iter().map(|hash| hash.parse().expect("a hash")).collect(),
    };
    alloy::hex::encode_prefixed(RewardSettlement::claimCall { entry }.abi_encode())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_is_sealed_proposed_watched_and_claimed_over_grpc() {
    let Operator { home: operator, chain } = Operator::new();
    // 400 units; ann's are three fifths of a half.
    operator.earn(0..1);
    let home = tempfile::tempdir().expect("a folder");
    let keys = [("operator", "ops"), ("contributor", "ann"), ("app", "shop")];
    let [ops, ann, shop] = keys.map(|(role, name)| create_key(home.path(), role, name));
    let mut server = serve(&operator, home);
    let [ops, ann, shop] =
        [server.client_with(&ops).await, server.client_with(&ann).await, server.client_with(&shop).await];
    let rpc =
        operator.settings.iter().find(|(name, _)| name == "OPENLORA_SETTLEMENT_RPC_URL").expect("a node").1.clone();

    own_accounts_alone(&ann, &shop).await;
    let mut watch = shop.settlement().watch_epochs(wire::WatchEpochsRequest {}).await.expect("watched").into_inner();
    sealed_once(&ops).await;
    until(&mut watch, 1, wire::EpochState::Due).await;
    proposed_once_it_is_funded(&operator, &ops).await;
    let proposed = until(&mut watch, 1, wire::EpochState::Proposed).await;
    let early = ann.settlement().get_claim_proof(wire::GetClaimProofRequest::default()).await.expect_err("not final");
    assert_eq!((early.code(), reason_of(&early).as_str()), (Code::FailedPrecondition, "NO_FINAL_EPOCH"));
    assert_eq!(operator.json(&["settle", "finalize", "--wait"])[0]["final"], true);
    let last = until(&mut watch, 1, wire::EpochState::Finalized).await;
    let root = |epoch: &wire::Epoch| epoch.standing.clone().expect("a standing").payout_root;
    assert_eq!(root(&last), root(&proposed));
    let verified = operator.json(&["settle", "verify", &operator.path("bundles/epoch-1.json")]);
    assert_eq!(verified[0]["manifest"]["payout_root"], root(&last));

    paid_by_the_proof(&rpc, &ann, &shop).await;
    sent_without_its_caller(&operator, &rpc, &ops, &mut watch).await;
    drop(chain);
    the_ledger_is_shown_without_the_chain(&ops, &ann, &mut watch).await;

    server.signal("-TERM");
    let end = loop {
        if let Err(end) = next(&mut watch).await {
            break end;
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{end}");
    drop((ops, ann, shop, watch));
    assert_eq!(server.wait(Duration::from_secs(40)), Some(0));
}

async fn sealed_once(ops: &Client) {
    for is_new in [true, false] {
        let sealed = ops.settlement().seal_epoch(wire::SealEpochRequest {}).await.expect("sealed").into_inner();
        let epoch = sealed.epoch.expect("an epoch");
        assert_eq!((sealed.sealed, epoch.number, state_of(&epoch)), (is_new, 1, wire::EpochState::Due));
        assert_eq!((epoch.totals.len(), epoch.totals[0].cumulative.as_str()), (1, "280"));
    }
}

async fn the_ledger_is_shown_without_the_chain(ops: &Client, ann: &Client, watch: &mut Streaming<wire::Epoch>) {
    until(watch, 2, wire::EpochState::Unknown).await;
    let listed = ann.settlement().list_epochs(wire::ListEpochsRequest::default()).await.expect("a list").into_inner();
    assert_eq!(listed.epochs.iter().map(|epoch| epoch.number).collect::<Vec<_>>(), [2, 1]);
    let standing = listed.epochs[0].standing.clone().expect("a standing");
    assert_eq!(standing.reason, "the chain's node is not available; the server's log says why");
    assert_eq!(standing.payout_root.len(), 66, "its bundle is here");
    let refused = ops.settlement().propose_epoch(wire::ProposeEpochRequest::default()).await.expect_err("no node");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.get_details_retry_info().is_some());
}

async fn own_accounts_alone(ann: &Client, shop: &Client) {
    let asked = |account: &str| wire::GetBalanceRequest { account: account.into() };
    let balance = ann.settlement().get_balance(asked("")).await.expect("her own").into_inner();
    assert_eq!((balance.account.as_str(), balance.available.as_str()), ("contributor/ann", "120"));
    let foreign = ann.settlement().get_balance(asked("application/shop")).await.expect_err("another's");
    assert_eq!((foreign.code(), reason_of(&foreign).as_str()), (Code::PermissionDenied, "NOT_YOUR_ACCOUNT"));
    let balance = shop.settlement().get_balance(asked("")).await.expect("its own").into_inner();
    assert_eq!((balance.account.as_str(), balance.available.as_str()), ("application/shop", "999600"));
    let refused = ann.settlement().seal_epoch(wire::SealEpochRequest {}).await.expect_err("operators seal");
    assert_eq!(refused.code(), Code::PermissionDenied);
}

async fn proposed_once_it_is_funded(operator: &Home, ops: &Client) {
    let propose = || async { ops.settlement().propose_epoch(wire::ProposeEpochRequest::default()).await };
    let unfunded = propose().await.expect_err("no tokens");
    assert_eq!((unfunded.code(), reason_of(&unfunded).as_str()), (Code::FailedPrecondition, "SETTLEMENT_UNFUNDED"));
    operator.json(&["settle", "fund", "1000", "--key", "tokens"]);
    let first = propose().await.expect("proposed").into_inner();
    assert_eq!(first.transaction.len(), 66);
    assert_eq!(state_of(&first.epoch.expect("an epoch")), wire::EpochState::Proposed);
    let again = propose().await.expect("proposed before").into_inner();
    assert_eq!((again.transaction.as_str(), again.epoch.expect("an epoch").number), ("", 1));
}

/// The contract pays for the proof as it stands, to its account, whoever sends it; and for nothing else.
async fn paid_by_the_proof(rpc: &str, ann: &Client, shop: &Client) {
    let proof =
        ann.settlement().get_claim_proof(wire::GetClaimProofRequest::default()).await.expect("hers").into_inner();
    assert_eq!((proof.epoch, proof.account.as_str(), proof.cumulative.as_str()), (1, ANN, "120"));
    let whose = Some(Whose::Address(ANN.into()));
    let foreign = shop.settlement().get_claim_proof(wire::GetClaimProofRequest { whose, epoch: None }).await;
    assert_eq!(foreign.expect_err("not the shop's").code(), Code::PermissionDenied);
    let ask = |method: &str, params| ask(rpc, method, params).unwrap_or_else(|error| panic!("{method}: {error}"));
    // Whose key the node has; no account of ours.
    let from = ask("eth_accounts", json!([]))[0].clone();
    let call = |proof: &wire::ClaimProof| json!({"from": from, "to": proof.settlement, "data": claim(proof)});
    let more = wire::ClaimProof { cumulative: "121".into(), ..proof.clone() };
    crate::settlement::ask(rpc, "eth_call", json!([call(&more), "latest"])).expect_err("a claim of more reverts");
    let hash = ask("eth_sendTransaction", json!([call(&proof)]));
    let mined = async {
        loop {
            let receipt = ask("eth_getTransactionReceipt", json!([hash]));
            if !receipt.is_null() {
                return receipt;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let receipt = tokio::time::timeout(PATIENCE, mined).await.expect("a block");
    assert_eq!(receipt["status"], "0x1", "{receipt}");
    let balance = OpenToken::balanceOfCall { account: ANN.parse().expect("an address") }.abi_encode();
    let balance = json!([{"to": proof.token, "data": alloy::hex::encode_prefixed(balance)}, "latest"]);
    let balance: U256 = serde_json::from_value(ask("eth_call", balance)).expect("a word");
    assert_eq!(balance, U256::from(120));
}

/// While there are no blocks no proposal ends; its caller has long gone when there are again.
async fn sent_without_its_caller(operator: &Home, rpc: &str, ops: &Client, watch: &mut Streaming<wire::Epoch>) {
    operator.earn(1..2);
    ops.settlement().seal_epoch(wire::SealEpochRequest {}).await.expect("sealed");
    until(watch, 2, wire::EpochState::Due).await;
    ask(rpc, "evm_setIntervalMining", json!([0])).expect("no more blocks");
    let mut short = tonic::Request::new(wire::ProposeEpochRequest { epoch: Some(2) });
    short.set_timeout(Duration::from_secs(2));
    let late = ops.settlement().propose_epoch(short).await.expect_err("no block comes");
    assert!(matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled), "{late}");
    ask(rpc, "evm_setIntervalMining", json!([1])).expect("blocks again");
    until(watch, 2, wire::EpochState::Proposed).await;
}
