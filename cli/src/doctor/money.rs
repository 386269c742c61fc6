//! The lines on the ledger, the chain, the key that pays and the local chain. What is not set up is no fault; what is set up and does
//! not work is.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use openlora_settlement::chain::{At, Chain};
use openlora_settlement::contracts;
use openlora_settlement::epochs::Contract;
use openlora_settlement::{RpcConfig, RpcUrl, SettlementError};

use crate::config::{self, Config};
use crate::{block_on, chain, ledger};

/// How long a database or a node may take for everything that is asked of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Permissions of others than the owner.
const OTHERS: u32 = 0o077;

type Line = (&'static str, Result<String>);

pub(super) fn lines(config: &Config) -> Vec<Line> {
    let mut lines = vec![("ledger", block_on(in_time("ledger.database_url", ledger(config))))];
    let connected = match config.settlement.rpc_url.as_str() {
        "" => {
            lines.push(("chain", Ok("not configured; `openlora chain dev` starts one on this machine".into())));
            None
        }
        _ => match block_on(in_time("settlement.rpc_url", connect(config))) {
            Ok(connected) => {
                lines.push(("chain", Ok(connected.detail.clone())));
                Some(connected)
            }
            Err(error) => {
                lines.push(("chain", Err(error)));
                None
            }
        },
    };
    lines.push(("keystore", keystore(config, connected.as_ref())));
    let program = config::home().and_then(|home| chain::anvil(&home));
    // Whoever has a chain needs no local one.
    lines.push(("anvil", Ok(program.map_or_else(|missing| format!("{missing}"), |found| found.display().to_string()))));
    lines
}

async fn in_time<T>(setting: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.unwrap_or_else(|_| bail!("no answer within {} s; check {setting}", PATIENCE.as_secs()))
}

async fn ledger(config: &Config) -> Result<String> {
    let settings = &config.ledger;
    if settings.database_url.is_empty() && !settings.default_file.exists() {
        return Ok(format!("none yet; `openlora ledger deposit` begins one in {}", settings.default_file.display()));
    }
    let ledger = ledger::open(config).await?;
    let detail = match ledger.last_epoch().await? {
        0 => "opens; no epoch is sealed".to_owned(),
        last => format!("opens; {last} epochs sealed, the last in row {}", ledger.epoch(last).await?.row),
    };
    ledger.close().await;
    Ok(detail)
}

/// A node that answered.
struct Connected {
    chain: Chain,
    contract: Option<Contract>,
    detail: String,
}

async fn connect(config: &Config) -> Result<Connected> {
    let settings = &config.settlement;
    let url = RpcUrl::parse("settlement.rpc_url", &settings.rpc_url)?;
    if settings.chain_id == 0 {
        bail!("settlement.chain_id must be set to the id of the chain at {url}");
    }
    let patience = RpcConfig { timeout: PATIENCE, tries: 1, ..RpcConfig::default() };
    let chain = Chain::open(&url, settings.chain_id, patience, contracts::describe).await;
    let chain = chain.map_err(|error| match error {
        SettlementError::Rpc(silent) => anyhow!("{silent}; start the node, or correct settlement.rpc_url"),
        other => other.into(),
    })?;
    let at = format!("chain {} at {url}", chain.id());
    if settings.contract.is_empty() {
        let detail = format!("{at}; settlement.contract is not set, `openlora chain deploy` makes one");
        return Ok(Connected { chain, contract: None, detail });
    }
    let address = settings.contract.parse().context("settlement.contract")?;
    let contract = Contract::open(chain.clone(), address).await?;
    let epoch = contract.state(At::Latest).await?.epoch;
    let detail = format!("{at}, contract {address}, {epoch} epochs final");
    Ok(Connected { chain, contract: Some(contract), detail })
}

fn keystore(config: &Config, connected: Option<&Connected>) -> Result<String> {
    let settings = &config.settlement;
    if settings.keystore.as_os_str().is_empty() && settings.kms_key.is_empty() {
        return Ok(
            "not configured; set settlement.keystore and settlement.password_file, `openlora chain key` makes them"
                .into(),
        );
    }
    if !settings.keystore.as_os_str().is_empty() {
        own(&settings.keystore)?;
    }
    let account = block_on(in_time("settlement.kms_key", chain::configured_signer(config)))?.address();
    let Some(Connected { chain, contract, .. }) = connected else { return Ok(format!("account {account}")) };
    block_on(in_time("settlement.rpc_url", async {
        let wei = chain.balance(account).await?;
        if wei.is_zero() {
            bail!("account {account} has 0 wei on chain {}; send it some, transactions cost gas", chain.id());
        }
        let proposes = match contract {
            Some(contract) if contract.may_propose(account, At::Latest).await? => ", may propose epochs",
            Some(_) => ", may not propose epochs (it does not hold PROPOSER_ROLE)",
            None => "",
        };
        Ok(format!("account {account}, {wei} wei{proposes}"))
    }))
}

/// Fails where others may read a file.
fn own(file: &Path) -> Result<()> {
    let mode = fs::metadata(file).with_context(|| file.display().to_string())?.permissions().mode();
    if mode & OTHERS != 0 {
        bail!(
            "the mode {:o} of {} lets others read it; run: chmod 600 {}",
            mode & 0o777,
            file.display(),
            file.display()
        );
    }
    Ok(())
}
