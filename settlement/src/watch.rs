//! Whether what is proposed on the chain is what the ledger says: anyone with a copy of the ledger can tell, and a wrong root can
//! be challenged until its window is over.

use openlora_ledger::{Asset, Ledger};

use crate::epochs::{Open, bundle_of};
use crate::error::SettlementError;
use crate::tree::Settles;

/// What is to be thought of a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is what the ledger says.
    Right,
    /// It is not.
    Wrong {
        /// The first field that differs.
        field: &'static str,
        /// On the chain.
        said: String,
        /// From the ledger.
        computed: String,
    },
    /// The ledger has not sealed that epoch: it is behind, or the proposal is made up.
    Unknown {
        /// The newest epoch of the ledger.
        last: u64,
    },
}

/// Derives an open proposal again from the ledger.
///
/// # Errors
/// The ledger's; an epoch of it that has no tree.
pub async fn judge(open: &Open, ledger: &Ledger, settles: &Settles, asset: &Asset) -> Result<Verdict, SettlementError> {
    let last = ledger.last_epoch().await?;
    if open.epoch > last {
        return Ok(Verdict::Unknown { last });
    }
    let bundle = bundle_of(ledger, open.epoch, settles, asset).await?;
    let own = bundle.manifest();
    let fields = [
        ("payout_root", open.root.to_string(), own.payout_root.to_string()),
        ("total", open.total.to_string(), own.total.to_string()),
        ("receipts_root", open.receipts_root.to_string(), own.receipts_root.to_string()),
        ("manifest_hash", open.manifest_hash.to_string(), own.hash().to_string()),
    ];
    Ok(match fields.into_iter().find(|(_, said, computed)| said != computed) {
        Some((field, said, computed)) => Verdict::Wrong { field, said, computed },
        None => Verdict::Right,
    })
}
