//! What the settlement door needs of whoever brings epochs to a chain. The composition root supplies it: this room knows the
//! ledger, and neither trees nor chains.

use openlora_ledger::{Address, LedgerError};
use openlora_types::{Classify, Fault};

/// Epochs on their way from the ledger to a contract. What is begun here goes on when its caller has gone.
#[tonic::async_trait]
pub trait Epochs: Send + Sync {
    /// Closes the ledger's rows since the last epoch, where there are any, and publishes every bundle that is missing.
    ///
    /// # Errors
    /// [`EpochsError`]; what was sealed stays, and the next call publishes it.
    async fn seal(&self) -> Result<Sealed, EpochsError>;

    /// Proposes a sealed epoch, the next that is due where none is named, and waits until that is in a block. One that was
    /// proposed before is left as it is.
    ///
    /// # Errors
    /// [`EpochsError`].
    async fn propose(&self, epoch: Option<u64>) -> Result<Proposed, EpochsError>;

    /// Where the roots of these epochs are, one for each. What cannot be told is [`Place::Unknown`]; answers within seconds
    /// whatever the chain does.
    async fn standings(&self, epochs: &[u64]) -> Vec<Standing>;

    /// What the contract takes to pay `account`, by an epoch or the last final one.
    ///
    /// # Errors
    /// [`EpochsError`].
    async fn proof(&self, account: Address, epoch: Option<u64>) -> Result<ClaimProof, EpochsError>;
}

/// What [`Epochs::seal`] found or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The last epoch.
    pub epoch: u64,
    /// Whether this call sealed it.
    pub new: bool,
}

/// What [`Epochs::propose`] found or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// Which.
    pub epoch: u64,
    /// The transaction that this call brought into a block; none where it was proposed before.
    pub transaction: Option<[u8; 32]>,
}

/// Where an epoch's root is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The root over its payouts; none where its bundle could not be read.
    pub payout_root: Option<[u8; 32]>,
    /// Where it is.
    pub place: Place,
}

/// How far an epoch is on the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It cannot be told now.
    Unknown {
        /// Why not, for everybody to read.
        reason: String,
    },
    /// Others come before it.
    Behind,
    /// The contract takes it next.
    Due,
    /// It can be challenged until this second (of 1970) and finalized from then on.
    Proposed {
        /// Seconds since 1970.
        finalizable_unix_s: u64,
    },
    /// It is challenged; the arbiter has until this second.
    Disputed {
        /// Who challenged it.
        challenger: Address,
        /// Seconds since 1970.
        resolvable_until_unix_s: u64,
    },
    /// Accounts can claim from it.
    Finalized,
    /// Another root has its number.
    OtherRoot {
        /// That root.
        root: [u8; 32],
        /// Whether it is final, or only proposed.
        is_final: bool,
    },
}

/// The argument of the contract's `claim`, and where to send it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimProof {
    /// Which.
    pub epoch: u64,
    /// Who is paid.
    pub account: Address,
    /// All it has earned so far, in the token's smallest unit.
    pub cumulative: u128,
    /// Its place in the tree.
    pub index: u64,
    /// From the bottom up.
    pub siblings: Vec<[u8; 32]>,
    /// EIP-155 id.
    pub chain_id: u64,
    /// The contract.
    pub settlement: Address,
    /// What it pays out.
    pub token: Address,
}

/// Why an epoch does not get on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EpochsError {
    /// A setting without which it cannot be done.
    #[error("{setting} is not set; {next}")]
    NotConfigured {
        /// The setting.
        setting: &'static str,
        /// What to do about it.
        next: &'static str,
    },
    /// No such thing, or not yet.
    #[error("there is no {what} {name}{next}")]
    NotFound {
        /// Of what kind.
        what: &'static str,
        /// Its name.
        name: String,
        /// What to do about it, after a semicolon; may be empty.
        next: &'static str,
    },
    /// The chain, its contract, the keys or the order of epochs do not allow it.
    #[error("{message}")]
    Refused {
        /// For programs, such as `EPOCH_NOT_DUE`.
        reason: &'static str,
        /// For people, the next step included.
        message: String,
    },
    /// Something behind this process does not answer.
    #[error("{what} is not available; the server's log says why")]
    Unavailable {
        /// `the chain's node`, say.
        what: &'static str,
    },
    /// Too much at once.
    #[error("{max} calls about epochs are under way")]
    Busy {
        /// The most.
        max: usize,
    },
    /// The ledger's.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// What should not happen; the log has more.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Classify for EpochsError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Ledger(error) => error.is_retryable(),
            Self::Unavailable { .. } | Self::Busy { .. } => true,
            _ => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Ledger(error) => error.fault(),
            Self::Unavailable { .. } => Fault::Upstream,
            Self::Busy { .. } | Self::Internal(_) => Fault::Server,
            _ => Fault::Client,
        }
    }
}
