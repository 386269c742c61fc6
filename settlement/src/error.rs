//! What can go wrong between a ledger and a chain.

use alloy::primitives::Address;
use openlora_types::{Classify, Fault};

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
    /// A leaf of 0.
    #[error("{account} has earned nothing and must not be in the tree")]
    NothingEarned {
        /// Its account.
        account: Address,
    },
    /// A sum that the contract cannot keep.
    #[error("the payouts up to {account} sum to more than {max}, the most a settlement contract keeps")]
    TotalTooLarge {
        /// Where the sum became too large.
        account: Address,
        /// The most.
        max: u128,
    },
}

impl Classify for SettlementError {
    fn is_retryable(&self) -> bool {
        false
    }

    fn fault(&self) -> Fault {
        Fault::Client
    }
}
