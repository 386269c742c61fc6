//! An epoch from the ledger to the accounts it pays, on a real node.

#[path = "sender/anvil.rs"]
#[expect(dead_code, reason = "shared with the sender's tests, which use all of it")]
mod anvil;
#[path = "sender/proxy.rs"]
#[expect(dead_code, reason = "shared with the sender's tests, which use all of it")]
mod proxy;

use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256, Bytes, U256};
use alloy::signers::local::PrivateKeySigner;
use alloy::sol_types::SolCall as _;
use openlora_database::{Database, DatabaseUrl};
use openlora_ledger::{
    Account, Address as PayoutAddress, Asset, Ledger, LedgerConfig, Payees, Prices, Request, Split, Target, Tokens,
    Usage,
};
use openlora_settlement::bundle::{Bundle, Epoch};
use openlora_settlement::chain::{At, Chain};
use openlora_settlement::claims::Claims;
use openlora_settlement::contracts::{self, Code, OpenToken, RewardSettlement, TimelockController};
use openlora_settlement::deploy::{Deployment, Plan, deploy};
use openlora_settlement::epochs::{Contract, Standing, bundle_of};
use openlora_settlement::keys::Signer;
use openlora_settlement::outbox::{Content, Intent, SCHEMA, Status};
use openlora_settlement::sender::{Sender, SenderConfig};
use openlora_settlement::tree::{Payout, TOTAL_MAX};
use openlora_settlement::watch::{Verdict, judge};
use openlora_settlement::{RpcConfig, RpcUrl, SettlementError};
use serde_json::{Value, json};
use tempfile::TempDir;

use anvil::{ACCOUNT, Anvil, KEY};
use proxy::{Fault, ID, Proxy};

const WINDOW: u32 = 3_600;
const CONTRIBUTORS: u64 = 60;

/// A chain with everything deployed, a ledger, and one account that may do everything.
struct Stage {
    anvil: Anvil,
    sender: Sender,
    deployment: Deployment,
    contract: Contract,
    ledger: Ledger,
    asset: Asset,
    requests: u64,
    dir: TempDir,
}

impl Stage {
    async fn new() -> Self {
        Self::with(Plan::local(ACCOUNT, WINDOW)).await
    }

    async fn with(plan: Plan) -> Self {
        let anvil = Anvil::start();
        // Every transaction is in a block at once; a block is final two blocks later.
        anvil.ask("evm_setAutomine", json!([true]));
        let dir = TempDir::new().expect("a temporary folder");
        let url = |name: &str| DatabaseUrl::sqlite(&dir.path().join(name));
        let chain = {
            let url = RpcUrl::parse("rpc", &anvil.url()).expect("a URL");
            Chain::open(&url, 31_337, RpcConfig::default(), contracts::describe).await.expect("a node")
        };
        let signer = Signer::Local(PrivateKeySigner::from_bytes(&KEY).expect("a key"));
        let database = Arc::new(Database::open(&url("outbox.db"), SCHEMA).await.expect("a database"));
        let config = SenderConfig {
            poll: Duration::from_millis(5),
            cost_max: U256::from(10).pow(U256::from(18)),
            ..SenderConfig::default()
        };
        let sender = Sender::new(chain.clone(), signer, database, config);
        let deployment = deploy(&sender, "test", &plan, &mut |_, _| {}).await.expect("deployed");
        let contract = Contract::open(chain, deployment.settlement).await.expect("ours");
        let ledger = Ledger::open(&url("ledger.db"), LedgerConfig::default()).await.expect("a ledger");
        let asset = Asset::parse("OPEN").expect("an asset");
        let prices = Prices { prompt: 1_000_000_000, cached: 500_000_000, completion: 3_000_000_000 };
        ledger.set_prices("p", &Target::Adapters, &asset, prices).await.expect("prices");
        let split = Split { owner: 3_000, contributors: 4_000, base_owner: 1_000, parents: 0, operator: 2_000 };
        ledger.set_split("s", &Target::Adapters, split).await.expect("a split");
        ledger.deposit("d", "shop", &asset, 1_000_000_000).await.expect("deposited");
        for (number, account) in
            [Account::Owner("acme".into()), Account::Operator].into_iter().chain(contributors()).enumerate()
        {
            let address = PayoutAddress(payee(number as u64).into());
            ledger.set_address(&format!("a{number}"), &account, Some(address)).await.expect("an address");
        }
        Self { anvil, sender, deployment, contract, ledger, asset, requests: 0, dir }
    }

    /// Some requests whose answers two contributors each shaped.
    async fn work(&mut self, requests: u64) {
        for _ in 0..requests {
            self.requests += 1;
            let (number, key) = (self.requests, format!("r{}", self.requests));
            let request = Request {
                application: "shop".into(),
                asset: self.asset.clone(),
                generation: Some("ab".repeat(32)),
                alias: Some("acme/cwe".into()),
                prompt_tokens: 100,
                completion_tokens_max: 50,
            };
            self.ledger.reserve(&key, &request).await.expect("reserved");
            let usage = Usage {
                request_id: key.clone(),
                receipt: Some(format!("receipt-{number}")),
                tokens: Tokens { prompt: 100, cached: 10, completion: number % 50 },
                payees: Payees { owner: Some("acme".into()), ..Payees::default() },
            };
            self.ledger.post(&key, &usage).await.expect("posted");
            let name = |i: u64| format!("contributor-{}", i % CONTRIBUTORS);
            let shares = vec![(name(number), 3), (name(number + 7), 1)];
            self.ledger.attribute(&format!("receipt-{number}"), shares, 1).await.expect("attributed");
        }
    }

    async fn seal(&self) -> Bundle {
        let epoch = self.ledger.seal().await.expect("something to seal");
        self.bundle(epoch.number).await
    }

    async fn bundle(&self, number: u64) -> Bundle {
        bundle_of(&self.ledger, number, self.contract.settles(), &self.asset).await.expect("a bundle")
    }

    /// Sends an intent and sees it final.
    async fn send(&self, intent: Intent) -> Status {
        let id = self.contract.submit(&self.sender, intent).await.expect("taken");
        let waiting = self.sender.wait_finalized(id, |status| {
            if matches!(status, Status::Mined { .. }) {
                self.anvil.mine(3);
            }
        });
        waiting.await.expect("a sound node")
    }

    async fn succeeds(&self, intent: Option<Intent>) {
        let status = self.send(intent.expect("something to send")).await;
        assert!(matches!(status, Status::Finalized { reverted: None, .. }), "{status:?}");
    }

    /// A call of no epoch's.
    async fn call(&self, to: Address, call: Bytes, value: U256) {
        let key = format!("test {}", alloy::primitives::keccak256(&call));
        let content = Content { to: Some(to), data: call, value, gas_max: 500_000, done: None };
        self.succeeds(Some(Intent { key, content })).await;
    }

    async fn fund(&self, amount: u128) {
        let call = OpenToken::transferCall { to: self.deployment.settlement, value: U256::from(amount) };
        self.call(self.deployment.token, call.abi_encode().into(), U256::ZERO).await;
    }

    fn now(&self) -> u64 {
        let block: Value = self.anvil.ask("eth_getBlockByNumber", json!(["latest", false]));
        anvil::number(&block["timestamp"])
    }

    fn pass(&self, seconds: u32) {
        self.anvil.ask("evm_increaseTime", json!([seconds]));
        self.anvil.mine(1);
    }

    async fn finalize(&self, bundle: &Bundle) {
        self.pass(WINDOW);
        let intent = self.contract.finalize(bundle, self.now()).await.expect("due");
        self.succeeds(intent).await;
    }

    /// Has every account of an epoch paid.
    async fn pay(&self, bundle: &Bundle) {
        let accounts: Vec<Address> = bundle.tree().payouts().iter().map(|payout| payout.account).collect();
        for accounts in accounts.chunks(20) {
            if let Some(intent) = self.contract.claim(bundle, accounts).await.expect("final") {
                self.succeeds(Some(intent)).await;
            }
        }
    }

    /// Fails unless every account has been paid what the epoch says, and the contract paid nobody else.
    async fn assert_paid(&self, bundle: &Bundle) {
        for Payout { account, cumulative } in bundle.tree().payouts() {
            let has = self.contract.balance(*account, At::Latest).await.expect("a balance");
            assert_eq!(has, U256::from(*cumulative), "{account}");
        }
        let state = self.contract.state(At::Latest).await.expect("a state");
        assert_eq!((state.claimed, state.finalized), (U256::from(bundle.tree().total()), state.claimed));
    }
}

fn contributors() -> impl Iterator<Item = Account> {
    (0..CONTRIBUTORS).map(|i| Account::Contributor(format!("contributor-{i}")))
}

fn payee(number: u64) -> Address {
    Address::from_word(U256::from(0xaaaa_0000 + number).into())
}

#[tokio::test]
async fn everything_is_deployed_as_compiled_and_only_the_governor_is_left_in_charge() {
    let stage = Stage::new().await;
    let Deployment { token, timelock, governor, settlement, datanets, models, .. } = stage.deployment;
    let chain = stage.contract.chain();
    for (code, address) in [
        (Code::TOKEN, token),
        (Code::TIMELOCK, timelock),
        (Code::GOVERNOR, governor),
        (Code::SETTLEMENT, settlement),
        (Code::DATANETS, datanets),
        (Code::MODELS, models),
    ] {
        let found = chain.code(address).await.expect("code");
        assert!(code.is(&found), "{}", code.name);
        assert!(!code.is(&found[1..]) && !code.is(&[]), "{}", code.name);
    }
    let holds = async |role: &str, account: Address| {
        let role = if role.is_empty() { B256::ZERO } else { alloy::primitives::keccak256(role) };
        let call = TimelockController::hasRoleCall { role, account };
        let answer =
            chain.view(timelock, call.abi_encode().into(), At::Latest).await.expect("asked").expect("answered");
        TimelockController::hasRoleCall::abi_decode_returns(&answer).expect("a truth")
    };
    assert!(holds("PROPOSER_ROLE", governor).await && holds("CANCELLER_ROLE", governor).await);
    assert!(holds("EXECUTOR_ROLE", Address::ZERO).await && holds("", timelock).await);
    assert!(!holds("", ACCOUNT).await && !holds("PROPOSER_ROLE", ACCOUNT).await);
    // Called again it changes nothing.
    let nonce = stage.anvil.nonce(ACCOUNT);
    let again = deploy(&stage.sender, "test", &Plan::local(ACCOUNT, WINDOW), &mut |_, _| {}).await.expect("known");
    assert_eq!((again, stage.anvil.nonce(ACCOUNT)), (stage.deployment, nonce));
}

#[tokio::test]
async fn what_epochs_say_is_paid_exactly_once() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    stage.work(70).await;
    let first = stage.seal().await;
    assert_eq!(first.tree().payouts().len() as u64, CONTRIBUTORS + 2);
    let unfunded = contract.propose(&first).await.expect_err("no tokens");
    let missing = U256::from(first.tree().total());
    assert!(matches!(&unfunded, SettlementError::Unfunded { missing: m, .. } if *m == missing), "{unfunded}");
    stage.fund(first.tree().total()).await;

    let (epoch, root) = (1, first.tree().root());
    assert_eq!(contract.standing(epoch, root, At::Latest).await.expect("asked"), Standing::Due);
    assert!(matches!(contract.finalize(&first, stage.now()).await, Err(SettlementError::NotProposed { epoch: 1 })));
    assert!(matches!(contract.claim(&first, &[payee(0)]).await, Err(SettlementError::NotFinal { epoch: 1 })));
    stage.succeeds(contract.propose(&first).await.expect("due")).await;
    assert!(matches!(contract.standing(epoch, root, At::Latest).await, Ok(Standing::Proposed { .. })));
    assert!(contract.propose(&first).await.expect("proposed").is_none(), "once");
    assert!(matches!(contract.finalize(&first, stage.now()).await, Err(SettlementError::WindowOpen { .. })));
    let open = contract.state(At::Latest).await.expect("a state").open.expect("a proposal");
    assert_eq!(judge(&open, &stage.ledger, contract.settles(), &stage.asset).await.expect("judged"), Verdict::Right);
    stage.finalize(&first).await;
    assert_eq!(contract.standing(epoch, root, At::Latest).await.expect("asked"), Standing::Finalized);
    assert!(contract.finalize(&first, stage.now()).await.expect("final").is_none(), "once");
    stage.pay(&first).await;
    stage.assert_paid(&first).await;
    assert!(contract.claim(&first, &[payee(0), payee(1)]).await.expect("paid").is_none(), "once");
    assert!(contract.claim(&first, &[ACCOUNT]).await.expect("no leaf").is_none());

    // A later epoch has all that was earned so far: it pays the difference, to some for two epochs at once.
    stage.work(40).await;
    let second = stage.seal().await;
    second.follows(&first).expect("it goes on");
    let third_is_early = Bundle::new(contract.settles(), Epoch { number: 3, ..epoch_of(&second) }).expect("a bundle");
    assert!(matches!(contract.propose(&third_is_early).await, Err(SettlementError::NotDue { epoch: 3, next: 2 })));
    stage.fund(second.tree().total() - first.tree().total()).await;
    stage.succeeds(contract.propose(&second).await.expect("due")).await;
    stage.finalize(&second).await;
    // One by itself, through its own claim.
    stage.succeeds(contract.claim(&second, &[payee(22)]).await.expect("final")).await;
    stage.pay(&second).await;
    stage.assert_paid(&second).await;
    stage.ledger.verify(|_, _| {}).await.expect("a sound ledger");
    assert_eq!(stage.bundle(1).await.to_json(), first.to_json(), "an epoch never changes");
}

/// The same content under other roots.
fn epoch_of(bundle: &Bundle) -> Epoch {
    let manifest = bundle.manifest();
    Epoch {
        number: manifest.epoch,
        rows: (manifest.first_row, manifest.last_row),
        ledger_head: manifest.ledger_head,
        sealed_unix_s: manifest.sealed_unix_s,
        payouts: bundle.tree().payouts().to_vec(),
        receipts: bundle.receipts().to_vec(),
    }
}

/// An epoch that no ledger had to be filled for.
fn made_up(stage: &Stage, number: u64, payouts: &[(Address, u128)]) -> Result<Bundle, SettlementError> {
    let mut payouts: Vec<Payout> =
        payouts.iter().map(|&(account, cumulative)| Payout { account, cumulative }).collect();
    payouts.sort();
    let (rows, sealed_unix_s) = ((number, number), 1_800_000_000);
    let epoch = Epoch { number, rows, ledger_head: B256::ZERO, sealed_unix_s, payouts, receipts: Vec::new() };
    Bundle::new(stage.contract.settles(), epoch)
}

/// Reverts whatever it is asked.
const UNWILLING: &str = "6003600c60003960036000f35f5ffd";

#[tokio::test]
async fn accounts_that_are_contracts_are_paid_and_one_that_cannot_be_holds_up_nobody() {
    let stage = Stage::new().await;
    let Deployment { token, timelock, settlement, .. } = stage.deployment;
    let code: Bytes = UNWILLING.parse().expect("hex");
    let hash = stage.anvil.send(json!({ "from": anvil::OTHER, "data": code, "gas": "0x100000" }));
    stage.anvil.mine(1);
    let receipt = stage.anvil.ask("eth_getTransactionReceipt", json!([hash]));
    let unwilling: Address = serde_json::from_value(receipt["contractAddress"].clone()).expect("created");
    let call = json!({ "from": ACCOUNT, "to": unwilling });
    let refused = anvil::try_all(stage.anvil.port, "eth_call", [json!([call, "latest"])]).remove(0);
    assert!(refused.is_err(), "it takes no call: {refused:?}");

    // No token pays to the zero address; the others are paid in the same batch.
    let accounts = [unwilling, timelock, token, settlement, payee(0), Address::ZERO];
    let bundle = made_up(&stage, 1, &accounts.map(|account| (account, 100))).expect("a bundle");
    stage.fund(600).await;
    stage.succeeds(stage.contract.propose(&bundle).await.expect("due")).await;
    stage.finalize(&bundle).await;
    stage.succeeds(stage.contract.claim(&bundle, &[unwilling]).await.expect("final")).await;
    stage.succeeds(stage.contract.claim(&bundle, &accounts).await.expect("final")).await;
    for account in accounts {
        let paid = if account == Address::ZERO { 0 } else { 100 };
        let (claimed, has) = (
            stage.contract.claimed(account, At::Latest).await.expect("told"),
            stage.contract.balance(account, At::Latest).await.expect("told"),
        );
        // The contract has what it paid to itself and what the zero address cannot have.
        let has = if account == settlement { has - U256::from(100) } else { has };
        assert_eq!((claimed, has), (U256::from(paid), U256::from(paid)), "{account}");
    }
    let alone = stage.contract.claim(&bundle, &[Address::ZERO]).await.expect("final").expect("not paid");
    let error = stage.contract.submit(&stage.sender, alone).await.expect_err("never paid").to_string();
    assert!(error.contains("ERC20InvalidReceiver"), "{error}");
}

#[tokio::test]
async fn the_most_that_the_contract_keeps_is_paid_and_more_is_refused_by_name() {
    let mut plan = Plan::local(ACCOUNT, WINDOW);
    plan.supply = U256::from(TOTAL_MAX);
    let stage = Stage::with(plan).await;
    let contract = &stage.contract;
    let one = payee(1);
    stage.fund(TOTAL_MAX).await;
    // One account: the leaf is the root and the proof is empty.
    let mut bundles = Vec::new();
    for (number, amount) in [(1, 1), (2, TOTAL_MAX), (3, TOTAL_MAX)] {
        let bundle = made_up(&stage, number, &[(one, amount)]).expect("a bundle");
        assert_eq!(bundle.tree().root(), contract.settles().leaf(one, amount));
        stage.succeeds(contract.propose(&bundle).await.expect("due")).await;
        stage.finalize(&bundle).await;
        bundles.push(bundle);
    }
    let old = contract.claim(&bundles[0], &[one]).await.expect_err("not one of the last two");
    assert!(matches!(old, SettlementError::Superseded { epoch: 1, last: 3 }), "{old}");
    stage.pay(&bundles[1]).await;
    stage.assert_paid(&bundles[2]).await;

    let refused = |payouts: &[(Address, u128)]| made_up(&stage, 4, payouts).expect_err("no bundle");
    for payouts in [&[(one, TOTAL_MAX + 1)][..], &[(one, TOTAL_MAX), (payee(2), 1)], &[(one, u128::MAX), (payee(2), 1)]]
    {
        assert!(matches!(refused(payouts), SettlementError::TotalTooLarge { max: TOTAL_MAX, .. }));
    }
    assert!(matches!(refused(&[]), SettlementError::Accounts { given: 0, .. }));
    let twice = refused(&[(one, 1), (one, 2)]);
    assert!(matches!(twice, SettlementError::AccountOrder { account, after } if account == one && after == one));
}

/// An epoch, sealed and funded, and the same with what an account earned paid to the proposer.
async fn right_and_wrong(stage: &mut Stage) -> (Bundle, Bundle) {
    stage.work(5).await;
    let right = stage.seal().await;
    stage.fund(right.tree().total()).await;
    let mut stolen = epoch_of(&right);
    let last = stolen.payouts.len() - 1;
    stolen.payouts[last].account = Address::repeat_byte(0xff);
    let wrong = Bundle::new(stage.contract.settles(), stolen).expect("a tree as any");
    (right, wrong)
}

#[tokio::test]
async fn a_wrong_root_is_noticed_challenged_and_never_paid_from() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    let (right, wrong) = right_and_wrong(&mut stage).await;
    assert_eq!(wrong.tree().total(), right.tree().total());
    stage.succeeds(contract.propose(&wrong).await.expect("due")).await;
    let error = contract.propose(&right).await.expect_err("another is open");
    assert!(matches!(error, SettlementError::OtherRoot { epoch: 1, .. }), "{error}");

    let open = contract.state(At::Latest).await.expect("a state").open.expect("a proposal");
    let verdict = judge(&open, &stage.ledger, contract.settles(), &stage.asset).await.expect("judged");
    let (said, computed) = (wrong.tree().root().to_string(), right.tree().root().to_string());
    assert_eq!(verdict, Verdict::Wrong { field: "payout_root", said, computed });
    stage.succeeds(Some(contract.challenge(&open, right.manifest().hash()))).await;
    assert!(matches!(contract.finalize(&wrong, u64::MAX).await, Err(SettlementError::InDispute { epoch: 1, .. })));
    let resolve = RewardSettlement::resolveCall { epoch: 1, payoutRoot: open.root, upheld: true };
    stage.call(stage.deployment.settlement, resolve.abi_encode().into(), U256::ZERO).await;
    assert_eq!(contract.standing(1, right.tree().root(), At::Latest).await.expect("asked"), Standing::Due);

    stage.succeeds(contract.propose(&right).await.expect("due")).await;
    stage.finalize(&right).await;
    assert!(matches!(
        contract.claim(&wrong, &[Address::repeat_byte(0xff)]).await,
        Err(SettlementError::OtherRoot { .. })
    ));
    stage.pay(&right).await;
    stage.assert_paid(&right).await;
    assert_eq!(contract.balance(Address::repeat_byte(0xff), At::Latest).await.expect("a balance"), U256::ZERO);
}

/// A root that was rejected because nobody ruled in time is right all the same, and is proposed again.
#[tokio::test]
async fn the_same_root_can_be_proposed_again_after_a_rejection() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    stage.work(3).await;
    let bundle = stage.seal().await;
    stage.fund(bundle.tree().total()).await;
    for _ in 0..2 {
        stage.succeeds(contract.propose(&bundle).await.expect("due")).await;
        let open = contract.state(At::Latest).await.expect("a state").open.expect("a proposal");
        stage.succeeds(Some(contract.challenge(&open, B256::ZERO))).await;
        stage.pass(WINDOW);
        let expire = RewardSettlement::expireCall { epoch: 1, payoutRoot: open.root };
        let content = Content {
            to: Some(stage.deployment.settlement),
            data: expire.abi_encode().into(),
            value: U256::ZERO,
            gas_max: 500_000,
            done: None,
        };
        stage.succeeds(Some(Intent { key: "expire".into(), content })).await;
    }
    stage.succeeds(contract.propose(&bundle).await.expect("due")).await;
    stage.finalize(&bundle).await;
    stage.pay(&bundle).await;
    stage.assert_paid(&bundle).await;
}

#[tokio::test]
async fn a_proposal_of_an_epoch_that_is_not_sealed_is_unknown() {
    let mut stage = Stage::new().await;
    stage.work(1).await;
    let first = stage.seal().await;
    stage.fund(first.tree().total()).await;
    let elsewhere = DatabaseUrl::sqlite(&stage.dir.path().join("other.db"));
    let elsewhere = Ledger::open(&elsewhere, LedgerConfig::default()).await.expect("a ledger");
    stage.succeeds(stage.contract.propose(&first).await.expect("due")).await;
    let open = stage.contract.state(At::Latest).await.expect("a state").open.expect("a proposal");
    let verdict = judge(&open, &elsewhere, stage.contract.settles(), &stage.asset).await.expect("judged");
    assert_eq!(verdict, Verdict::Unknown { last: 0 });
}

#[tokio::test]
async fn what_is_not_our_contract_is_refused_by_name() {
    let stage = Stage::new().await;
    let chain = stage.contract.chain().clone();
    let error = Contract::open(chain.clone(), stage.deployment.token).await.expect_err("a token").to_string();
    assert!(
        error.contains("is not this release's RewardSettlement") && error.contains("openlora chain deploy"),
        "{error}"
    );
    let error = Contract::open(chain, payee(0)).await.expect_err("nothing").to_string();
    assert!(error.contains("there is no contract at"), "{error}");
}

/// What a payout account of the ledger holds.
async fn unclaimed(stage: &Stage, account: Address) -> u128 {
    let account = Account::Payout(PayoutAddress(account.into()));
    stage.ledger.balance(&account, &stage.asset).await.expect("a balance").available()
}

const NOBODY: [Address; 0] = [];

/// Accounts of the claims that were noted now.
async fn noted(claims: &mut Claims) -> Vec<Address> {
    let mut accounts = Vec::new();
    claims.note(|claim| accounts.push(claim.account)).await.expect("noted");
    accounts
}

#[tokio::test]
async fn claims_by_anybody_are_noted_once_whoever_looks_and_how_often() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    let fresh = |stage: &Stage| Claims::new(stage.contract.clone(), stage.ledger.clone(), stage.asset.clone());
    stage.work(20).await;
    let bundle = stage.seal().await;
    stage.fund(bundle.tree().total()).await;
    stage.succeeds(contract.propose(&bundle).await.expect("due")).await;
    stage.finalize(&bundle).await;
    let mut claims = fresh(&stage);
    assert_eq!(noted(&mut claims).await, NOBODY);

    // Somebody with a key of their own, whom our sender knows nothing of.
    let (first, second, third) = (payee(0), payee(3), payee(4));
    let by_other = |account| {
        let proof = bundle.tree().proof(account).expect("a leaf");
        let cumulative = U256::from(proof.cumulative);
        let (epoch, index) = (1, U256::from(proof.index));
        let entry = RewardSettlement::Claim { epoch, account, cumulative, index, proof: proof.siblings };
        let data = RewardSettlement::claimCall { entry }.abi_encode();
        stage.anvil.send(json!({ "from": anvil::OTHER, "to": stage.deployment.settlement, "data": Bytes::from(data) }));
    };
    by_other(first);
    assert_eq!(noted(&mut claims).await, NOBODY, "a block that is not final may be taken back");
    stage.anvil.mine(2);
    assert_eq!(noted(&mut claims).await, [first]);
    assert_eq!(unclaimed(&stage, first).await, 0);
    assert_eq!(unclaimed(&stage, second).await, bundle.tree().cumulative(second));
    assert_eq!(noted(&mut claims).await, NOBODY);

    // Another process, which has the ledger alone to go by, and both at once.
    by_other(second);
    by_other(third);
    stage.anvil.mine(2);
    let mut other = fresh(&stage);
    let (one, two) = tokio::join!(noted(&mut claims), noted(&mut other));
    assert!([&one, &two].iter().all(|noted| noted.iter().all(|account| [second, third].contains(account))));
    assert_eq!(noted(&mut fresh(&stage)).await, NOBODY);
    for account in [first, second, third] {
        assert_eq!(unclaimed(&stage, account).await, 0, "{account}");
    }
    stage.ledger.verify(|_, _| {}).await.expect("a sound ledger");
}

#[tokio::test]
async fn a_claim_of_more_than_the_ledger_owes_is_an_error_by_name() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    let (_, wrong) = right_and_wrong(&mut stage).await;
    stage.succeeds(contract.propose(&wrong).await.expect("due")).await;
    // Nobody challenged it.
    stage.finalize(&wrong).await;
    stage.succeeds(contract.claim(&wrong, &[payee(0)]).await.expect("final")).await;
    stage.succeeds(contract.claim(&wrong, &[Address::repeat_byte(0xff)]).await.expect("final")).await;

    let elsewhere = DatabaseUrl::sqlite(&stage.dir.path().join("behind.db"));
    let behind = Ledger::open(&elsewhere, LedgerConfig::default()).await.expect("a ledger");
    let mut behind = Claims::new(contract.clone(), behind, stage.asset.clone());
    assert_eq!(noted(&mut behind).await, NOBODY, "a ledger that has not sealed the epoch waits");

    let mut claims = Claims::new(contract, stage.ledger.clone(), stage.asset.clone());
    for round in 0..2 {
        let mut accounts = Vec::new();
        let error = claims.note(|claim| accounts.push(claim.account)).await.expect_err("it is not owed");
        assert!(matches!(error, SettlementError::Unowed { owed: 0, .. }), "{error}");
        assert_eq!(accounts, [payee(0)][..usize::from(round == 0)], "what came before is noted, once");
    }
}

/// As after the ledger was restored from a backup, or where a node had told of too little.
#[tokio::test]
async fn a_claim_that_was_left_out_is_found_again() {
    let mut stage = Stage::new().await;
    let contract = stage.contract.clone();
    stage.work(5).await;
    let first = stage.seal().await;
    stage.fund(first.tree().total()).await;
    stage.succeeds(contract.propose(&first).await.expect("due")).await;
    stage.finalize(&first).await;
    stage.succeeds(contract.claim(&first, &[payee(0)]).await.expect("final")).await;
    stage.work(5).await;
    let second = stage.seal().await;
    stage.fund(second.tree().total() - first.tree().total()).await;
    stage.succeeds(contract.propose(&second).await.expect("due")).await;
    stage.finalize(&second).await;
    let before: Value = stage.anvil.ask("eth_blockNumber", json!([]));
    stage.succeeds(contract.claim(&second, &[payee(1)]).await.expect("final")).await;
    stage.succeeds(contract.claim(&second, &[payee(0)]).await.expect("final")).await;

    // The newest claim alone is noted: going on from there, the oldest is not met.
    let blocks = anvil::number(&before)..=u64::MAX >> 1;
    let event = <RewardSettlement::Claimed as alloy::sol_types::SolEvent>::SIGNATURE_HASH;
    let logs = contract.chain().logs(stage.deployment.settlement, event, blocks).await.expect("events");
    let newest = logs.first().expect("a claim");
    let key = format!("{}/{}", newest.transaction_hash, newest.index());
    let paid = second.tree().cumulative(payee(1));
    stage.ledger.claimed(&key, PayoutAddress(payee(1).into()), &stage.asset, paid).await.expect("owed");

    let mut claims = Claims::new(contract, stage.ledger.clone(), stage.asset.clone());
    assert_eq!(noted(&mut claims).await, [payee(0), payee(0)]);
    for account in [payee(0), payee(1)] {
        assert_eq!(unclaimed(&stage, account).await, 0, "{account}");
    }
}

#[tokio::test]
async fn a_node_that_refuses_many_blocks_is_asked_for_fewer() {
    let mut stage = Stage::new().await;
    stage.work(5).await;
    let bundle = stage.seal().await;
    stage.fund(bundle.tree().total()).await;
    stage.succeeds(stage.contract.propose(&bundle).await.expect("due")).await;
    stage.finalize(&bundle).await;
    for account in [payee(0), payee(1)] {
        stage.succeeds(stage.contract.claim(&bundle, &[account]).await.expect("final")).await;
    }
    let proxy = Proxy::start(stage.anvil.port).await;
    let url = RpcUrl::parse("rpc", &proxy.url("secret")).expect("a URL");
    let config = RpcConfig { response_bytes_max: 100 << 10, tries: 1, ..RpcConfig::default() };
    let chain = Chain::open(&url, 31_337, config, contracts::describe).await.expect("a node");
    let contract = Contract::open(chain, stage.deployment.settlement).await.expect("ours");
    let refusal = json!({ "jsonrpc": "2.0", "id": 0, "error": { "code": -32000, "message": "block range too wide" } });
    proxy.fail("eth_getLogs", Fault::Say(200, refusal.to_string().replace("\"id\":0", &format!("\"id\":{ID}"))));
    proxy.fail("eth_getLogs", Fault::Say(200, " ".repeat(200 << 10)));
    let mut claims = Claims::new(contract, stage.ledger.clone(), stage.asset.clone());
    assert_eq!(noted(&mut claims).await, [payee(0), payee(1)]);
    assert!(proxy.is_done() && proxy.seen("eth_getLogs") >= 2 + 4, "two halvings: four pieces or more");
}
