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
}

impl Classify for SettlementError {
    fn is_retryable(&self) -> bool {
        false
    }

    fn fault(&self) -> Fault {
        Fault::Client
    }
}
