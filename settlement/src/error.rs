//! What can go wrong between a ledger and a chain.

use alloy::primitives::{Address, B256, U256};
use openlora_database::{DatabaseError, Failure};
use openlora_ledger::LedgerError;
use openlora_types::{Classify, Fault, InvalidField};

use crate::{keys::KeyError, rpc::RpcError};

/// Why an epoch cannot be settled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettlementError {
    /// A tree of none or of too many.
    #[error("an epoch pays 1 to {max} accounts, this one {given}")]
    Accounts {
        /// Accounts of the epoch.
        given: usize,
        /// The most.
        max: usize,
    },
    /// Accounts that are not strictly ascending.
    #[error("accounts must ascend and each come once: {account} comes after {after}")]
    AccountOrder {
        /// The account out of order.
        account: Address,
        /// The one before it.
        after: Address,
    },
    /// A sum that the contract cannot keep.
    #[error("the payouts up to {account} sum to more than {max}, the most a settlement contract keeps")]
    TotalTooLarge {
        /// Where the sum became too large.
        account: Address,
        /// The most.
        max: u128,
    },
    /// More receipts than a bundle takes.
    #[error("an epoch has at most {max} receipts, this one {given}; their ids at most {bytes_max} bytes")]
    Receipts {
        /// Receipts of the epoch.
        given: usize,
        /// The most.
        max: usize,
        /// Bytes of an id at most.
        bytes_max: usize,
    },
    /// A file that is no bundle.
    #[error("the bundle cannot be read: {reason}")]
    BundleFormat {
        /// What is wrong with it.
        reason: String,
    },
    /// A bundle that contradicts itself.
    #[error("the bundle says {field} {said}, but what is in it gives {computed}: it was changed or is incomplete")]
    BundleMismatch {
        /// The field.
        field: &'static str,
        /// What the file says.
        said: String,
        /// What its lists give.
        computed: String,
    },
    /// Another bundle is published already.
    #[error(
        "{place} is another bundle of epoch {epoch}, which is never replaced; set settlement.bundles_url, or settlement.bundles_dir, \
         to a place of this ledger and contract alone"
    )]
    BundleTaken {
        /// Its number.
        epoch: u64,
        /// Where.
        place: String,
    },
    /// Where bundles are kept does not answer, or refuses.
    #[error("{place}: {source}")]
    Bundles {
        /// What was read or written.
        place: String,
        /// Why not.
        source: object_store::Error,
    },
    /// A bundle that does not go on where the one before it ended.
    #[error("epoch {epoch} does not follow epoch {previous}: {reason}")]
    NotNext {
        /// The later epoch.
        epoch: u64,
        /// The earlier one.
        previous: u64,
        /// What does not fit.
        reason: String,
    },
    /// The database refused something or cannot be reached.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// There is no key, or it did not sign.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A node did not answer.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// A node of another chain.
    #[error(
        "the node is one of chain {found}, not of chain {expected}; set settlement.rpc_url to a node of that chain or \
         settlement.chain_id to the node's, `openlora doctor` compares them"
    )]
    WrongChain {
        /// As configured.
        expected: u64,
        /// The node's.
        found: u64,
    },
    /// A field of a request.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// An address without a contract.
    #[error("there is no contract at {address} on chain {chain}; run `openlora chain deploy`, or correct the address")]
    NoCode {
        /// As configured.
        address: Address,
        /// The chain's id.
        chain: u64,
    },
    /// Another contract than the one that was deployed.
    #[error(
        "the contract at {address} has code with the hash {found} instead of {expected}; correct the address, or run \
         `openlora chain deploy`"
    )]
    OtherCode {
        /// As configured.
        address: Address,
        /// Keccak of the code that was deployed.
        expected: B256,
        /// Keccak of the code found.
        found: B256,
    },
    /// A call that would only cost.
    #[error("the contract would refuse it: {reason}; `openlora settle status` tells the state of the epochs")]
    WouldRevert {
        /// The contract's reason.
        reason: String,
    },
    /// A call that uses more than it may.
    #[error("it needs {needed} gas and may use {max} (gas_max)")]
    GasTooHigh {
        /// As the node estimates.
        needed: u64,
        /// The intent's bound.
        max: u64,
    },
    /// An account that cannot pay.
    #[error(
        "{account} has {has} wei and may need {needed}; send it at least {}, `openlora doctor` tells what it has",
        needed - has
    )]
    Balance {
        /// Who pays.
        account: Address,
        /// For everything that is under way, at worst.
        needed: U256,
        /// The balance.
        has: U256,
    },
    /// A view that was to tell whether an intent is done.
    #[error("{to} does not tell whether it has happened: {reason}")]
    DoneView {
        /// The contract.
        to: Address,
        /// Its reason.
        reason: String,
    },
    /// One key for two calls.
    #[error("the key `{key}` stands for another call already; give this one a key of its own")]
    KeyTaken {
        /// The key.
        key: String,
    },
    /// A bound of the outbox.
    #[error("{max} intents wait to be final (queue_max); `openlora settle status` tells what for")]
    OutboxFull {
        /// The bound.
        max: usize,
    },
    /// No intent of this account.
    #[error("there is no intent {id} of this account")]
    UnknownIntent {
        /// Its number.
        id: i64,
    },
    /// An intent that cannot be retried.
    #[error("intent {id} has not failed; only one that was refused or reverted can be tried again")]
    NotFailed {
        /// Its number.
        id: i64,
    },
    /// The ledger's.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A contract that does not answer as ours does.
    #[error("{to} does not answer {call}: {reason}")]
    View {
        /// The contract.
        to: Address,
        /// What it was asked.
        call: &'static str,
        /// What came of it.
        reason: String,
    },
    /// Code that is not ours.
    #[error(
        "the contract at {address} is not this release's {name}; correct the address, or run `openlora chain deploy`"
    )]
    NotOurs {
        /// As configured.
        address: Address,
        /// What was expected there.
        name: &'static str,
    },
    /// A bundle of another contract.
    #[error(
        "the bundle of epoch {epoch} is of another chain, contract or token than {ours}; set settlement.bundles_url, or \
         settlement.bundles_dir, to a place of this contract alone and run `openlora settle seal`"
    )]
    OtherContract {
        /// Its number.
        epoch: u64,
        /// As configured.
        ours: Address,
    },
    /// An epoch before whose turn it is.
    #[error("the contract takes epoch {next} next, not {epoch}; `openlora settle status` tells what is under way")]
    NotDue {
        /// The epoch.
        epoch: u64,
        /// What comes before it.
        next: u64,
    },
    /// Another root than ours.
    #[error("epoch {epoch} has the root {other} on the chain and {root} here; `openlora settle verify` compares them")]
    OtherRoot {
        /// The epoch.
        epoch: u64,
        /// The bundle's.
        root: B256,
        /// The chain's.
        other: B256,
    },
    /// Tokens are missing.
    #[error(
        "epoch {epoch} pays {missing} more units than are there: send that much of the token {token} to {to} first"
    )]
    Unfunded {
        /// The epoch.
        epoch: u64,
        /// In the token's smallest unit.
        missing: U256,
        /// The token.
        token: Address,
        /// The contract.
        to: Address,
    },
    /// An epoch that was not proposed.
    #[error("epoch {epoch} is not proposed; run `openlora settle propose`")]
    NotProposed {
        /// The epoch.
        epoch: u64,
    },
    /// A disputed epoch.
    #[error("epoch {epoch} is disputed by {challenger}; the arbiter has until {resolvable_until} (seconds since 1970)")]
    InDispute {
        /// The epoch.
        epoch: u64,
        /// Who challenged it.
        challenger: Address,
        /// Seconds since 1970.
        resolvable_until: u64,
    },
    /// An epoch that may still be challenged.
    #[error("epoch {epoch} can be finalized in {seconds} s; `openlora settle finalize --wait` waits for it")]
    WindowOpen {
        /// The epoch.
        epoch: u64,
        /// Until then.
        seconds: u64,
    },
    /// An epoch that nothing can be claimed from yet.
    #[error("epoch {epoch} is not final; `openlora settle status` tells where it is")]
    NotFinal {
        /// The epoch.
        epoch: u64,
    },
    /// An epoch that nothing can be claimed from any more: later ones have all that was earned in it.
    #[error("the contract pays from its last two epochs, {epoch} is not one of them; claim from epoch {last}")]
    Superseded {
        /// The epoch.
        epoch: u64,
        /// The last final one.
        last: u64,
    },
    /// The chain paid what the ledger does not owe.
    #[error(
        "{account} was paid {amount} in {transaction} and the ledger owes it {owed}; `openlora ledger verify` and `openlora settle \
         verify` of the epoch tell which of the two is wrong"
    )]
    Unowed {
        /// Who was paid.
        account: Address,
        /// How much, in the token's smallest unit.
        amount: u128,
        /// By the ledger.
        owed: u128,
        /// The claim.
        transaction: B256,
    },
    /// Claims that the node does not tell of.
    #[error(
        "{account} has been paid {paid} and the node tells of {noted} only; set settlement.rpc_url to a node that keeps all events"
    )]
    ClaimsMissing {
        /// Who was paid.
        account: Address,
        /// By the events.
        noted: u128,
        /// By the contract.
        paid: U256,
    },
    /// A step of a deployment that failed.
    #[error("{what} was not deployed: {reason}; `openlora chain deploy` goes on from there once that is mended")]
    NotDeployed {
        /// The step.
        what: String,
        /// Why.
        reason: String,
    },
    /// A local chain that does not start.
    #[error("{program} does not start: {reason}; scripts/fetch-anvil.sh fetches it")]
    NoAnvil {
        /// The program.
        program: String,
        /// Why.
        reason: String,
    },
    /// Another process sends for the account now.
    #[error("another process sends for {account} now")]
    LeaseLost {
        /// Who pays.
        account: String,
    },
    /// Another chain with the same id, such as a local one that was started anew.
    #[error(
        "the node's chain {id} begins with block {found} and this database was used with one that begins with {expected}; use \
         a database of its own for each chain"
    )]
    OtherChain {
        /// The id of both.
        id: u64,
        /// The first block's hash as it was.
        expected: B256,
        /// The first block's hash now.
        found: B256,
    },
    /// A chain that has forgotten what was final.
    #[error(
        "nonce {nonce} of {account} was final and the chain has used only {latest}: it was started anew or is another one \
         with the same id; use a database of its own for it"
    )]
    RolledBack {
        /// Who pays.
        account: Address,
        /// The highest final one.
        nonce: u64,
        /// Nonces used on the chain.
        latest: u64,
    },
    /// Bytes of the outbox that are none of a transaction.
    #[error("the bytes kept of transaction {hash} are broken; restore the database from a backup")]
    BrokenTransaction {
        /// Its hash.
        hash: B256,
    },
}

impl Failure for SettlementError {
    fn database(&self) -> Option<&DatabaseError> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

impl Classify for SettlementError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Database(error) => error.is_retryable(),
            Self::Rpc(error) => error.is_retryable(),
            Self::Ledger(error) => error.is_retryable(),
            Self::WindowOpen { .. } | Self::Bundles { .. } => true,
            Self::OutboxFull { .. } | Self::Balance { .. } => true,
            _ => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Database(error) => error.fault(),
            Self::Rpc(error) => error.fault(),
            Self::Ledger(error) => error.fault(),
            Self::BrokenTransaction { .. } | Self::Bundles { .. } => Fault::Server,
            _ => Fault::Client,
        }
    }
}
