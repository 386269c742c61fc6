//! A node with a contract that counts what happened, and senders for it.

use std::{path::Path, sync::Arc, time::Duration};

use alloy::{
    hex,
    primitives::{Address, B256, Bytes, U256},
    signers::local::PrivateKeySigner,
};
use openlora_database::{Database, DatabaseUrl, testing};
use openlora_settlement::{
    RpcConfig, RpcUrl,
    chain::Chain,
    keys::Signer,
    outbox::{Content, Done, Intent, IntentId, SCHEMA, Status, UnixMs},
    sender::{Sender, SenderConfig, Turn},
};
use serde_json::json;
use tempfile::TempDir;

use crate::anvil::{ACCOUNT, Anvil, KEY, OTHER};

/// Creates the contract. It counts how often each number was given to it, so that what happened twice is seen:
///
/// ```text
/// calldata         effect
/// (none)           returns how often anything was counted
/// 1 byte           locks it (not 0) or unlocks it (0)
/// word k, not 0    counts k; reverts with Error("locked") while it is locked
/// words k, 0       returns how often k was counted
/// ```
const COUNTER: &str = "606a8060095f395ff33615601d573660011460235736602014602c575f35545b5f5260205ff35b5f546016565b5f355f1a5f1955005b\
                       5f19546044575f35805460010190555f546001015f55005b6308c379a060e01b5f5260206004526006602452656c6f636b656460d01b\
                       60445260645ffd";
/// When the tests' clock begins.
pub(crate) const START: i64 = 1_000_000;

pub(crate) struct Stage {
    pub(crate) anvil: Anvil,
    pub(crate) counter: Address,
    pub(crate) dir: TempDir,
    pub(crate) database: Arc<Database>,
}

/// The outbox of a folder, on PostgreSQL where the tests are given one.
pub(crate) async fn database(dir: &Path) -> Arc<Database> {
    let folder = dir.to_owned();
    let shared = tokio::task::spawn_blocking(move || testing::postgres_schema(&folder)).await.expect("a schema");
    let url = match shared {
        Some(url) => DatabaseUrl::parse("url", &url).expect("a URL"),
        None => DatabaseUrl::sqlite(&dir.join("outbox.db")),
    };
    Arc::new(Database::open(&url, SCHEMA).await.expect("opened"))
}

/// No pauses that a test would wait for.
pub(crate) fn rpc() -> RpcConfig {
    RpcConfig { timeout: Duration::from_secs(20), backoff: Duration::from_millis(1), ..RpcConfig::default() }
}

pub(crate) async fn chain(url: &str) -> Chain {
    let url = RpcUrl::parse("rpc", url).expect("a URL");
    Chain::open(&url, 31337, rpc(), |_| None).await.expect("anvil answers")
}

pub(crate) fn signer() -> Signer {
    Signer::Local(PrivateKeySigner::from_bytes(&KEY).expect("a key"))
}

pub(crate) fn word(number: u64) -> Bytes {
    B256::from(U256::from(number)).into()
}

fn two_words(number: u64) -> Bytes {
    [word(number), word(0)].concat().into()
}

/// Counts `number`, once.
pub(crate) fn count(counter: Address, number: u64) -> Intent {
    let done = Done { to: counter, data: two_words(number), at_least: U256::from(1) };
    let content =
        Content { to: Some(counter), data: word(number), value: U256::ZERO, gas_max: 200_000, done: Some(done) };
    Intent { key: format!("count {number}"), content }
}

impl Stage {
    pub(crate) async fn new() -> Self {
        let anvil = Anvil::start();
        let code = hex::decode(COUNTER).expect("hex");
        let hash = anvil.send(json!({ "from": OTHER, "data": Bytes::from(code), "gas": "0x100000" }));
        anvil.mine(1);
        let receipt = anvil.ask("eth_getTransactionReceipt", json!([hash]));
        let counter = serde_json::from_value(receipt["contractAddress"].clone()).expect("created");
        let dir = TempDir::new().expect("a temporary folder");
        let database = database(dir.path()).await;
        Self { anvil, counter, dir, database }
    }

    /// A sender that speaks to anvil.
    pub(crate) async fn sender(&self) -> Sender {
        self.sender_by(&self.anvil.url(), SenderConfig::default()).await
    }

    pub(crate) async fn sender_by(&self, url: &str, config: SenderConfig) -> Sender {
        Sender::new(chain(url).await, signer(), Arc::clone(&self.database), config)
    }

    pub(crate) fn count(&self, number: u64) -> Intent {
        count(self.counter, number)
    }

    /// How often a number was counted; with 0, how often any was.
    pub(crate) fn counted(&self, number: u64) -> u64 {
        self.anvil.view(self.counter, &two_words(number)).to()
    }

    /// Somebody else locks or unlocks the contract, and offers more than others.
    pub(crate) fn lock(&self, locked: bool) {
        let data = Bytes::from(vec![u8::from(locked)]);
        let fee = format!("{:#x}", 90_000_000_000_u64);
        let sent = json!({ "from": OTHER, "to": self.counter, "data": data, "gas": "0x20000", "maxFeePerGas": fee,
            "maxPriorityFeePerGas": fee });
        self.anvil.send(sent);
    }

    /// The same key sends something from elsewhere.
    pub(crate) fn elsewhere(&self, nonce: u64, to: Address, data: &Bytes) -> B256 {
        let fee = format!("{:#x}", 90_000_000_000_u64);
        self.anvil
            .send(json!({ "from": ACCOUNT, "to": to, "data": data, "nonce": format!("{nonce:#x}"), "gas": "0x20000",
            "maxFeePerGas": fee, "maxPriorityFeePerGas": fee }))
    }

    /// Takes turns, each with a new block, until nothing more happens to the intent.
    pub(crate) async fn settle(&self, sender: &Sender, id: IntentId) -> Status {
        let mut status = sender.status(id).await.expect("known");
        for i in 1.. {
            if status.is_terminal() {
                break;
            }
            assert!(i < 60, "never settled: {status:?}");
            self.anvil.mine(1);
            turn(sender, i).await;
            status = sender.status(id).await.expect("known");
        }
        status
    }
}

/// A turn `later` milliseconds after the clock began.
pub(crate) async fn turn(sender: &Sender, later: i64) -> Turn {
    sender.turn_at(UnixMs(START + later)).await.expect("a turn")
}

/// The hashes of an intent that is on its way.
pub(crate) async fn hashes(sender: &Sender, id: IntentId) -> Vec<B256> {
    match sender.status(id).await.expect("known") {
        Status::Broadcast { hashes, .. } => hashes,
        other => panic!("not on its way: {other:?}"),
    }
}
