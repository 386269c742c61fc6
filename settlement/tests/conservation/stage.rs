//! Where the steps are done: a node with the contracts, a ledger, an outbox and published bundles in one folder.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, U256};
use alloy::signers::local::PrivateKeySigner;
use openlora_database::{Database, DatabaseUrl, testing::postgres_schema};
use openlora_ledger::{Asset, Ledger, LedgerConfig, Prices, Split, Target};
use openlora_settlement::chain::Chain;
use openlora_settlement::contracts;
use openlora_settlement::deploy::{Deployment, Plan, deploy};
use openlora_settlement::epochs::Contract;
use openlora_settlement::keys::Signer;
use openlora_settlement::outbox::SCHEMA;
use openlora_settlement::sender::{Sender, SenderConfig};
use openlora_settlement::{RpcConfig, RpcUrl};
use serde_json::json;

use crate::anvil::{ACCOUNT, Anvil, KEY};
use crate::books::{PRICES, SPLIT};

/// Seconds to challenge a proposal: more than all blocks of the test take together.
pub(crate) const WINDOW: u32 = 864_000;
/// When the ledger's clock stands still.
const NOW_MS: u64 = 1_800_000_000_000;
/// How long a transaction may stay out of a block, by the clock of the process that sends.
pub(crate) const STUCK: Duration = Duration::from_secs(10);

pub(crate) fn asset() -> Asset {
    Asset::parse("OPEN").expect("an asset")
}

/// An address of the steps.
pub(crate) fn address(number: u8) -> Address {
    Address::repeat_byte(number)
}

/// The URL of the ledger or the outbox: a file in `dir`, or a schema of PostgreSQL where the tests run on it.
pub(crate) async fn url(dir: &Path, name: &str) -> DatabaseUrl {
    let place = dir.join(name);
    let (folder, file) = (place.clone(), place.with_extension("db"));
    match tokio::task::spawn_blocking(move || postgres_schema(&folder)).await.expect("a schema") {
        Some(url) => DatabaseUrl::parse("url", &url).expect("a URL"),
        None => DatabaseUrl::sqlite(&file),
    }
}

pub(crate) async fn ledger(dir: &Path) -> Ledger {
    let url = url(dir, "ledger").await;
    Ledger::open_with_clock(&url, LedgerConfig::default(), || NOW_MS).await.expect("a ledger")
}

pub(crate) async fn chain(port: u16) -> Chain {
    let url = RpcUrl::parse("rpc", &format!("http://127.0.0.1:{port}")).expect("a URL");
    let config = RpcConfig { timeout: Duration::from_secs(30), ..RpcConfig::default() };
    Chain::open(&url, 31_337, config, contracts::describe).await.expect("a node")
}

pub(crate) async fn sender(dir: &Path, chain: Chain) -> Sender {
    let database = Database::open(&url(dir, "outbox").await, SCHEMA).await.expect("an outbox");
    let signer = Signer::Local(PrivateKeySigner::from_bytes(&KEY).expect("a key"));
    let config = SenderConfig {
        poll: Duration::from_millis(5),
        stuck_after: STUCK,
        cost_max: U256::from(10).pow(U256::from(18)),
        ..SenderConfig::default()
    };
    Sender::new(chain, signer, Arc::new(database), config)
}

/// Prices and split, two rows; every contract.
pub(crate) async fn set_up(anvil: &Anvil, dir: &Path) -> Deployment {
    let ledger = ledger(dir).await;
    let [prompt, cached, completion] = PRICES;
    let prices = Prices { prompt, cached, completion };
    ledger.set_prices("prices", &Target::Adapters, &asset(), prices).await.expect("set");
    let [owner, contributors, base_owner, parents, operator] = SPLIT;
    let split = Split { owner, contributors, base_owner, parents, operator };
    ledger.set_split("split", &Target::Adapters, split).await.expect("set");
    ledger.close().await;
    anvil.ask("evm_setAutomine", json!([true]));
    let sender = sender(dir, chain(anvil.port).await).await;
    let deployment = deploy(&sender, "test", &Plan::local(ACCOUNT, WINDOW), &mut |_, _| {}).await.expect("deployed");
    sender.close().await.expect("the lease is free");
    anvil.ask("evm_setAutomine", json!([false]));
    deployment
}

pub(crate) async fn contract(port: u16, address: Address) -> Contract {
    Contract::open(chain(port).await, address).await.expect("ours")
}
