//! What a chain is asked: its head, code, balances, nonces, receipts, and what a call would do.

use std::{fmt, ops::RangeInclusive};

use alloy::{
    consensus::constants::KECCAK_EMPTY,
    primitives::{Address, B256, Bytes, TxKind, U64, U256, keccak256},
    sol_types::{Panic, Revert, SolError as _},
};
use openlora_types::Classify as _;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    SettlementError,
    fees::{GAS_PRICE_ORACLE, Market},
    rpc::{Rpc, RpcConfig, RpcError, RpcUrl},
};

alloy::sol! {
    /// The OP stack's predeploy, since Fjord and before.
    interface GasPriceOracle {
        function getL1FeeUpperBound(uint256 unsignedTxSize) external view returns (uint256);
        function getL1Fee(bytes memory data) external view returns (uint256);
    }
}

/// Which state a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// What no reorganisation takes back.
    Finalized,
    /// The newest block.
    Latest,
    /// With what waits in the node's pool.
    Pending,
    /// After a block.
    Block(u64),
}

impl At {
    fn param(self) -> Value {
        match self {
            Self::Finalized => "finalized".into(),
            Self::Latest => "latest".into(),
            Self::Pending => "pending".into(),
            Self::Block(number) => json!(U64::from(number)),
        }
    }
}

/// A call as a transaction would make it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Who pays.
    pub from: Address,
    /// What is called, or that a contract is created.
    pub to: TxKind,
    /// Selector and arguments, or the new contract's code.
    pub data: Bytes,
    /// Wei given along.
    pub value: U256,
}

impl Call {
    fn param(&self) -> Value {
        let mut call = json!({ "from": self.from, "data": self.data, "value": self.value });
        if let (TxKind::Call(to), Some(call)) = (self.to, call.as_object_mut()) {
            call.insert("to".into(), json!(to));
        }
        call
    }
}

/// Where a transaction is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receipt {
    /// Of the transaction.
    pub transaction_hash: B256,
    /// The block it is in.
    pub block_hash: B256,
    block_number: U64,
    status: U64,
    gas_used: U64,
}

impl Receipt {
    /// Number of its block.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block_number.to()
    }

    /// Whether it did not revert.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.status == U64::from(1)
    }

    /// Gas that was paid for.
    #[must_use]
    pub fn gas_used(&self) -> u64 {
        self.gas_used.to()
    }
}

/// An event of a contract.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    /// The event's signature and its indexed values.
    pub topics: Vec<B256>,
    /// Its other values.
    pub data: Bytes,
    /// The transaction it is of.
    pub transaction_hash: B256,
    block_number: U64,
    log_index: U64,
}

impl Log {
    /// Number of its block.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block_number.to()
    }

    /// Its place among the events of its block.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.log_index.to()
    }
}

/// A block's place and base fee.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Block {
    /// Its hash.
    pub hash: B256,
    number: U64,
    base_fee_per_gas: Option<U256>,
}

impl Block {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number.to()
    }
}

/// Why a call would not go through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reverted(pub String);

impl fmt::Display for Reverted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a contract's own error from its bytes.
pub type Decode = fn(&[u8]) -> Option<String>;

/// A node of one chain.
#[derive(Clone, Debug)]
pub struct Chain {
    rpc: Rpc,
    id: u64,
    decode: Decode,
}

impl Chain {
    /// Connects to a node of the chain with the id `id`. `decode` names contracts' own errors.
    ///
    /// # Errors
    /// [`SettlementError::WrongChain`] where it is another's; [`SettlementError::Rpc`].
    pub async fn open(url: &RpcUrl, id: u64, config: RpcConfig, decode: Decode) -> Result<Self, SettlementError> {
        let chain = Self { rpc: Rpc::new(url, config)?, id, decode };
        chain.check_id().await?;
        Ok(chain)
    }

    /// The chain's id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether the node still is one of this chain.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn check_id(&self) -> Result<(), SettlementError> {
        let found: U64 = self.rpc.ask("eth_chainId", ()).await?;
        let (expected, found) = (self.id, found.to());
        if found == expected { Ok(()) } else { Err(SettlementError::WrongChain { expected, found }) }
    }

    /// A block, if there is one.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn block(&self, at: At) -> Result<Option<Block>, RpcError> {
        self.rpc.ask("eth_getBlockByNumber", (at.param(), false)).await
    }

    /// A contract's code; nothing where there is none.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn code(&self, account: Address) -> Result<Bytes, RpcError> {
        self.rpc.ask("eth_getCode", (account, At::Latest.param())).await
    }

    /// The keccak of a contract's code; nothing where there is none.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn code_hash(&self, account: Address) -> Result<Option<B256>, RpcError> {
        let code = self.code(account).await?;
        Ok(Some(keccak256(&code)).filter(|&hash| hash != KECCAK_EMPTY))
    }

    /// Whether a contract was there. Nodes refuse states that they have forgotten.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn has_code(&self, account: Address, at: At) -> Result<bool, RpcError> {
        let code: Bytes = self.rpc.ask("eth_getCode", (account, at.param())).await?;
        Ok(!code.is_empty())
    }

    /// A contract's events of one kind in some blocks, in the chain's order. Nodes refuse to be asked for too many blocks.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn logs(
        &self,
        contract: Address,
        event: B256,
        blocks: RangeInclusive<u64>,
    ) -> Result<Vec<Log>, RpcError> {
        let (from, to) = (At::Block(*blocks.start()).param(), At::Block(*blocks.end()).param());
        let filter = json!({ "address": contract, "topics": [event], "fromBlock": from, "toBlock": to });
        let mut logs: Vec<Log> = self.rpc.ask("eth_getLogs", (filter,)).await?;
        logs.sort_by_key(|log| (log.block(), log.index()));
        Ok(logs)
    }

    /// Wei of an account.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn balance(&self, account: Address) -> Result<U256, RpcError> {
        self.rpc.ask("eth_getBalance", (account, At::Latest.param())).await
    }

    /// How many nonces an account has used; the next one's number.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn nonce(&self, account: Address, at: At) -> Result<u64, RpcError> {
        let nonce: U64 = self.rpc.ask("eth_getTransactionCount", (account, at.param())).await?;
        Ok(nonce.to())
    }

    /// What gas costs now.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn market(&self) -> Result<Market, RpcError> {
        let head = self.block(At::Latest).await?;
        let base_fee = head.and_then(|head| head.base_fee_per_gas).unwrap_or_default();
        let tip: U256 = self.rpc.ask("eth_maxPriorityFeePerGas", ()).await?;
        Ok(Market { base_fee: base_fee.saturating_to(), tip: tip.saturating_to() })
    }

    /// What a call returns, or why it reverts.
    ///
    /// # Errors
    /// [`RpcError`] where it could not be tried.
    pub async fn call(&self, call: &Call, at: At) -> Result<Result<Bytes, Reverted>, RpcError> {
        self.tried(self.rpc.ask("eth_call", (call.param(), at.param())).await)
    }

    /// What a view of a contract returns, or why it reverts.
    ///
    /// # Errors
    /// [`RpcError`] where it could not be tried.
    pub async fn view(&self, to: Address, data: Bytes, at: At) -> Result<Result<Bytes, Reverted>, RpcError> {
        let call = Call { from: Address::ZERO, to: TxKind::Call(to), data, value: U256::ZERO };
        self.call(&call, at).await
    }

    /// How much gas a call uses, or why it reverts.
    ///
    /// # Errors
    /// [`RpcError`] where it could not be tried.
    pub async fn estimate_gas(&self, call: &Call) -> Result<Result<u64, Reverted>, RpcError> {
        let gas = self.rpc.ask::<U64>("eth_estimateGas", (call.param(), At::Latest.param())).await;
        self.tried(gas.map(|gas| gas.to()))
    }

    /// The most that the bytes of a transaction may cost on the Layer-1 below, in wei; 0 where no such fee is charged.
    ///
    /// # Errors
    /// [`RpcError`], also where the predeploy is there and does not say.
    pub async fn data_fee_max(&self, unsigned: &[u8]) -> Result<U256, RpcError> {
        use alloy::sol_types::SolCall as _;
        if self.code_hash(GAS_PRICE_ORACLE).await?.is_none() {
            return Ok(U256::ZERO);
        }
        let newer = GasPriceOracle::getL1FeeUpperBoundCall { unsignedTxSize: U256::from(unsigned.len()) }.abi_encode();
        let older = GasPriceOracle::getL1FeeCall { data: unsigned.to_vec().into() }.abi_encode();
        for question in [newer, older] {
            if let Ok(answer) = self.view(GAS_PRICE_ORACLE, question.into(), At::Latest).await?
                && let Some(fee) = answer.get(..32)
            {
                return Ok(U256::from_be_slice(fee));
            }
        }
        Err(self.rpc.unknown("eth_call", "the gas price oracle answers neither getL1FeeUpperBound nor getL1Fee"))
    }

    /// Where a transaction is, if it is in a block of the chain as the node sees it now.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn receipt(&self, hash: B256) -> Result<Option<Receipt>, RpcError> {
        let Some(receipt) = self.rpc.ask::<Option<Receipt>>("eth_getTransactionReceipt", (hash,)).await? else {
            return Ok(None);
        };
        // Some nodes keep receipts of blocks that are no longer part of the chain.
        let block = self.block(At::Block(receipt.block())).await?;
        Ok(block.filter(|block| block.hash == receipt.block_hash).map(|_| receipt))
    }

    /// Whether the node has a transaction, in a block or in its pool.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn knows(&self, hash: B256) -> Result<bool, RpcError> {
        Ok(self.rpc.ask::<Option<Value>>("eth_getTransactionByHash", (hash,)).await?.is_some())
    }

    /// Hands signed bytes to the node, once. An error says little: the node may have them all the same.
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn broadcast(&self, raw: &[u8]) -> Result<(), RpcError> {
        self.rpc.ask_once::<Value>("eth_sendRawTransaction", (Bytes::copy_from_slice(raw),)).await.map(drop)
    }

    /// Tells a call that reverts from one that could not be tried.
    fn tried<T>(&self, done: Result<T, RpcError>) -> Result<Result<T, Reverted>, RpcError> {
        match done {
            Ok(value) => Ok(Ok(value)),
            Err(error) if error.is_retryable() => Err(error),
            Err(RpcError::Refused { code, message, data, .. }) if is_execution(code, &message, data.as_ref()) => {
                Ok(Err(self.reverted(&message, data.as_ref())))
            }
            Err(error) => Err(error),
        }
    }

    /// The reason in a revert's bytes, or the node's words.
    fn reverted(&self, message: &str, data: Option<&Bytes>) -> Reverted {
        let Some(data) = data.filter(|data| !data.is_empty()) else {
            return Reverted(message.to_owned());
        };
        let known = Revert::abi_decode(data).map(|revert| revert.reason).ok();
        let known = known.or_else(|| Panic::abi_decode(data).map(|panic| panic.to_string()).ok());
        let shown = &data[..data.len().min(68)];
        let known = known.or_else(|| (self.decode)(data));
        Reverted(known.unwrap_or_else(|| format!("unknown error {}", alloy::hex::encode_prefixed(shown))))
    }
}

/// Whether a node speaks of what the contract did, and not of the question or of itself. Geth has the code 3 for reverts
/// alone, so words must do for the rest.
fn is_execution(code: i64, message: &str, data: Option<&Bytes>) -> bool {
    let message = message.to_ascii_lowercase();
    let words = ["revert", "out of gas", "gas required", "opcode", "insufficient funds", "stack ", "evm error"];
    code == 3 || data.is_some() || words.iter().any(|word| message.contains(word))
}
