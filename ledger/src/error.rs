//! What can go wrong in this room.

use openlora_database::{DatabaseError, Failure};
use openlora_types::{Classify, Fault, InvalidField};

use crate::account::{Account, Asset};

/// Every error of this room.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// A field was refused, by name. INVALID_ARGUMENT.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The key was used before, for something else. ALREADY_EXISTS.
    #[error("key {key} was used in row {row} with other content; use a new key for a new operation")]
    KeyReused {
        /// The key.
        key: String,
        /// Where.
        row: u64,
    },
    /// The account has less than was asked of it. FAILED_PRECONDITION.
    #[error("{account} has {available} {asset} and {needed} are needed; deposit the difference first")]
    Unfunded {
        /// Whose.
        account: Account,
        /// Of what.
        asset: Asset,
        /// What it has.
        available: u128,
        /// What it would take.
        needed: u128,
    },
    /// The application's quota for the day is used up. RESOURCE_EXHAUSTED.
    #[error(
        "application {application} may spend {max} {asset} a day, has {used} in use and asks for {needed} more; wait for midnight UTC or ask for a larger quota"
    )]
    OverQuota {
        /// Whose.
        application: String,
        /// In what.
        asset: Asset,
        /// The quota.
        max: u128,
        /// Spent and reserved today.
        used: u128,
        /// Asked for.
        needed: u128,
    },
    /// The application has too many requests open. RESOURCE_EXHAUSTED.
    #[error(
        "application {application} has {max} reservations open, the limit open_reservations_max; post or void some"
    )]
    TooManyOpen {
        /// Whose.
        application: String,
        /// The limit.
        max: u64,
    },
    /// A bound of the ledger is reached. FAILED_PRECONDITION.
    #[error("there are {max} {what}, the limit {limit}; raise it in the settings")]
    LimitReached {
        /// The limit's name.
        limit: &'static str,
        /// Its value.
        max: u64,
        /// Of what.
        what: &'static str,
    },
    /// No price or split is set. FAILED_PRECONDITION.
    #[error("no {what} is set for {target}; set one first, or a default")]
    NoTerms {
        /// `price in ASSET` or `split`.
        what: String,
        /// For what.
        target: String,
    },
    /// There is no such reservation, receipt or epoch. NOT_FOUND.
    #[error("there is no {what} {name} in the ledger")]
    NotFound {
        /// Of what kind.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The reservation was voided: asked for, or because it grew too old. FAILED_PRECONDITION.
    #[error("reservation {key} was voided in row {row}; its usage is not charged")]
    Voided {
        /// The reservation's key.
        key: String,
        /// Where.
        row: u64,
    },
    /// The reservation was posted and cannot be voided. FAILED_PRECONDITION.
    #[error("reservation {key} was posted in row {row} and stays so")]
    Posted {
        /// The reservation's key.
        key: String,
        /// Where.
        row: u64,
    },
    /// The usage costs more than was reserved. FAILED_PRECONDITION.
    #[error("the usage costs {fee} and reservation {key} holds {reserved}; post at most what was reserved for")]
    ExceedsReservation {
        /// The reservation's key.
        key: String,
        /// What it holds.
        reserved: u128,
        /// What the usage costs.
        fee: u128,
    },
    /// The receipt's part is paid already: by another table, or to the pool. FAILED_PRECONDITION.
    #[error("receipt {receipt} was settled in row {row} and is not settled again")]
    Settled {
        /// The receipt.
        receipt: String,
        /// Where.
        row: u64,
    },
    /// Nothing but claims was written since the last epoch. FAILED_PRECONDITION.
    #[error("nothing but claims was written since epoch {last} was sealed; seal again when something was")]
    EmptyEpoch {
        /// The last epoch, 0 where there is none.
        last: u64,
    },
    /// An epoch that would pay nobody, and none before it did. FAILED_PRECONDITION.
    #[error(
        "no account that has earned anything has an address, so the epoch would pay nobody; set one with `openlora ledger address` and \
         seal again"
    )]
    NobodyPaid,
    /// A sum passed 2^128, or weights do not sum. INVALID_ARGUMENT.
    #[error("{what} does not fit its type; use smaller numbers")]
    Overflow {
        /// Of what.
        what: &'static str,
    },
    /// What the database holds is not what this ledger wrote. INTERNAL.
    #[error("row {row} does not fit: {reason}; stop writing and run `openlora ledger verify`")]
    Damaged {
        /// The first row that does not fit.
        row: u64,
        /// What is wrong.
        reason: String,
    },
    /// The database refused something or cannot be reached. UNAVAILABLE.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The task that wrote ended without an answer. UNAVAILABLE.
    #[error("the ledger stopped while writing; ask again with the same key")]
    Stopped,
}

impl LedgerError {
    /// Whether the transaction is lost in which this came up; what else is wrong concerns who asked alone.
    pub(crate) fn ends_transaction(&self) -> bool {
        // A value that is not what this program writes is the operation's that reads it.
        self.database()
            .is_some_and(|error| !matches!(*error.source, sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. }))
    }
}

impl Failure for LedgerError {
    fn database(&self) -> Option<&DatabaseError> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

impl Classify for LedgerError {
    fn is_retryable(&self) -> bool {
        matches!(self, Self::Database(_) | Self::Stopped | Self::OverQuota { .. } | Self::TooManyOpen { .. })
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Database(_) | Self::Stopped | Self::Damaged { .. } | Self::LimitReached { .. } => Fault::Server,
            _ => Fault::Client,
        }
    }
}
