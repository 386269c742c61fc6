//! What is looked at before a nonce is spent: whether it happened already, whether the contract is the right one, whether
//! the call would go through, what it costs and whether the account has that.

use alloy::{
    consensus::TxEip1559,
    primitives::{Address, TxKind, U256},
};

use crate::{
    SettlementError,
    chain::{At, Call, Chain},
    fees::Fees,
    outbox::{Content, Done},
    rpc::RpcError,
    sender::SenderConfig,
    transaction,
};

/// What is to be done with an intent now.
pub(crate) enum Verdict {
    /// Sign this, with a nonce.
    Ready(TxEip1559),
    /// Try again later.
    Wait(String),
    /// Not sent: sending would only cost.
    Refuse(SettlementError),
    /// Its effect is there; for ever where `finally`.
    Done {
        /// Whether no reorganisation takes it back.
        finally: bool,
    },
}

/// Looks at an intent of `account`, which owes `owed` wei at most for what it has sent.
pub(crate) async fn judge(
    chain: &Chain,
    config: &SenderConfig,
    account: Address,
    content: &Content,
    owed: U256,
) -> Result<Verdict, SettlementError> {
    match done(chain, content.done.as_ref()).await {
        Ok(None) => {}
        Ok(Some(finally)) => return Ok(Verdict::Done { finally }),
        Err(error @ SettlementError::DoneView { .. }) => return Ok(Verdict::Refuse(error)),
        Err(error) => return Err(error),
    }
    if let Some(refused) = code(chain, config, content).await? {
        return Ok(Verdict::Refuse(refused));
    }
    let has = chain.balance(account).await?;
    if has < content.value {
        // Trying the call would only tell that it fails.
        return Ok(Verdict::Refuse(SettlementError::Balance { account, needed: content.value, has }));
    }
    let to = content.to.map_or(TxKind::Create, TxKind::Call);
    let call = Call { from: account, to, data: content.data.clone(), value: content.value };
    let gas = match chain.estimate_gas(&call).await? {
        Ok(gas) if gas > content.gas_max => {
            return Ok(Verdict::Refuse(SettlementError::GasTooHigh { needed: gas, max: content.gas_max }));
        }
        // The state may be another when it runs.
        Ok(gas) => gas.saturating_add(gas / 4).min(content.gas_max),
        Err(reverted) => {
            // Estimating tells less of the reason than calling does.
            let reason = chain.call(&call, At::Latest).await?.err().unwrap_or(reverted).0;
            return Ok(Verdict::Refuse(SettlementError::WouldRevert { reason }));
        }
    };
    let fees = match chain.market().await?.offer(config.max_fee_per_gas) {
        Ok(fees) => fees,
        Err(above) => return Ok(Verdict::Wait(above.to_string())),
    };
    let transaction = TxEip1559 {
        chain_id: chain.id(),
        gas_limit: gas,
        max_fee_per_gas: fees.max_fee,
        max_priority_fee_per_gas: fees.tip,
        to,
        value: content.value,
        input: content.data.clone(),
        ..TxEip1559::default()
    };
    let data_fee = chain.data_fee_max(&transaction::unsigned(&transaction)).await?;
    if let Some(why) = too_dear(config, fees, gas, data_fee) {
        return Ok(Verdict::Wait(why));
    }
    let needed = owed.saturating_add(transaction::takes_max(&transaction)).saturating_add(data_fee);
    if has < needed {
        return Ok(Verdict::Refuse(SettlementError::Balance { account, needed, has }));
    }
    Ok(Verdict::Ready(transaction))
}

/// Why a transaction is not worth its price, where it is not.
pub(crate) fn too_dear(config: &SenderConfig, fees: Fees, gas: u64, data_fee: U256) -> Option<String> {
    let (cost, cap) = (fees.cost_max(gas, data_fee), config.cost_max);
    (cost > cap).then(|| format!("it may cost {cost} wei, more than the {cap} of cost_max; waiting for gas to fall"))
}

/// Whether an effect is there, and if so whether for ever.
async fn done(chain: &Chain, done: Option<&Done>) -> Result<Option<bool>, SettlementError> {
    let Some(done) = done else { return Ok(None) };
    if !reached(chain, done, At::Latest).await? {
        return Ok(None);
    }
    match reached(chain, done, At::Finalized).await {
        // A node without that old state cannot tell: then it is asked again later.
        Err(SettlementError::Rpc(RpcError::Refused { .. })) => Ok(Some(false)),
        answer => answer.map(Some),
    }
}

async fn reached(chain: &Chain, done: &Done, at: At) -> Result<bool, SettlementError> {
    match chain.view(done.to, done.data.clone(), at).await? {
        // Without code nothing is returned: the contract is not there yet.
        Ok(answer) => Ok(answer.get(..32).is_some_and(|word| U256::from_be_slice(word) >= done.at_least)),
        Err(reverted) => Err(SettlementError::DoneView { to: done.to, reason: reverted.0 }),
    }
}

/// Why the contract called is not the one that was meant, where it is not.
async fn code(
    chain: &Chain,
    config: &SenderConfig,
    content: &Content,
) -> Result<Option<SettlementError>, SettlementError> {
    let Some(address) = content.to else { return Ok(None) };
    let expected = config.code.get(&address).copied();
    if content.data.is_empty() && expected.is_none() {
        return Ok(None);
    }
    Ok(match (chain.code_hash(address).await?, expected) {
        (None, _) => Some(SettlementError::NoCode { address, chain: chain.id() }),
        (Some(found), Some(expected)) if found != expected => {
            Some(SettlementError::OtherCode { address, expected, found })
        }
        _ => None,
    })
}
