//! What an epoch publishes: one JSON file from which anyone recomputes the roots that the chain was told.
//!
//! ```json
//! {"manifest": {"accounts": 2, "chain_id": 10, "epoch": 7, …, "total": "300"},
//!  "manifest_hash": "0x…",
//!  "payouts": [["0x1111…", "100"], ["0x2222…", "200"]],
//!  "receipts": [["receipt id", "0x…"]]}
//! ```
//!
//! The manifest's hash is keccak256 of its canonical JSON (RFC 8785: keys sorted, no white space); its payout root is that of
//! [`tree`](crate::tree) over `payouts`, its receipts root the same kind of tree over `receipts` in their order, a leaf being
//! `keccak256(keccak256(abi.encode(RECEIPT_DOMAIN, keccak256(id), hash)))`, and 0 where there are none.

use alloy::primitives::{Address, B256, b256, keccak256};
use alloy::sol_types::SolValue;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::error::SettlementError;
use crate::tree::{ACCOUNTS_MAX, Levels, Payout, PayoutTree, Settles};

/// First word of a receipt's leaf: keccak256("OpenLoRA.Epoch.Receipt.v1").
pub const RECEIPT_DOMAIN: B256 = b256!("407219d085246ea6a6cd68403d6de245cb19a62c25ba75c988f47820dd063e26");
/// What `format` says.
pub const FORMAT: &str = "openlora-epoch-v1";
/// Receipts of an epoch at most.
pub const RECEIPTS_MAX: usize = 1 << 24;
/// Bytes of a receipt's id at most.
pub const RECEIPT_ID_BYTES_MAX: usize = 256;

/// What an epoch is made of, before there are roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// 1 for the first; the contract's number too.
    pub number: u64,
    /// Where in the ledger it begins and ends, inclusive.
    pub rows: (u64, u64),
    /// The ledger's chain at its last row (BLAKE3).
    pub ledger_head: B256,
    /// Seconds since 1970.
    pub sealed_unix_s: u64,
    /// Cumulative amounts, accounts ascending.
    pub payouts: Vec<Payout>,
    /// What the epoch's usage left, in the ledger's order.
    pub receipts: Vec<Receipt>,
}

/// The receipt of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// As it was given to the caller.
    pub id: String,
    /// Of its content.
    pub hash: B256,
}

impl Receipt {
    fn leaf(&self) -> B256 {
        keccak256(keccak256((RECEIPT_DOMAIN, keccak256(&self.id), self.hash).abi_encode()))
    }
}

/// All of a bundle but its lists. Fields in the order of their names, which is the canonical one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// How many are paid.
    pub accounts: u64,
    /// Where.
    pub chain_id: u64,
    /// Which.
    pub epoch: u64,
    /// First row of the ledger in it.
    pub first_row: u64,
    /// [`FORMAT`].
    pub format: String,
    /// Last row of the ledger in it.
    pub last_row: u64,
    /// The ledger's chain at that row.
    pub ledger_head: B256,
    /// Root over the payouts.
    pub payout_root: B256,
    /// How many receipts.
    pub receipts: u64,
    /// Root over them.
    pub receipts_root: B256,
    /// Seconds since 1970.
    pub sealed_unix_s: u64,
    /// The contract that pays.
    pub settlement: Address,
    /// What it pays out.
    pub token: Address,
    /// Sum of all payouts.
    #[serde(with = "amount")]
    pub total: u128,
}

impl Manifest {
    /// keccak256 of the canonical JSON.
    #[must_use]
    pub fn hash(&self) -> B256 {
        keccak256(serde_json::to_vec(self).expect("numbers and text"))
    }

    /// Which contract pays which token where.
    #[must_use]
    pub fn settles(&self) -> Settles {
        Settles { chain_id: self.chain_id, settlement: self.settlement, token: self.token }
    }
}

/// An amount as its decimal digits: JSON's numbers lose some.
mod amount {
    use super::*;

    pub(super) fn serialize<S: Serializer>(amount: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(amount)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }

    /// One spelling for each amount, so that a file is the only one for its epoch.
    pub(super) fn parse(text: &str) -> Result<u128, String> {
        let amount = text.parse::<u128>().ok().filter(|amount| amount.to_string() == text);
        amount.ok_or_else(|| format!("{text:?} is no amount: decimal digits below 2^128 are expected"))
    }
}

/// An epoch with its roots.
#[derive(Clone, Debug)]
pub struct Bundle {
    manifest: Manifest,
    tree: PayoutTree,
    receipts: Vec<Receipt>,
}

impl Bundle {
    /// Computes the roots of an epoch.
    ///
    /// # Errors
    /// What [`PayoutTree::new`] refuses; too many receipts.
    pub fn new(settles: &Settles, epoch: Epoch) -> Result<Self, SettlementError> {
        let Epoch { number, rows, ledger_head, sealed_unix_s, payouts, receipts } = epoch;
        let long = receipts.iter().any(|receipt| receipt.id.len() > RECEIPT_ID_BYTES_MAX);
        if receipts.len() > RECEIPTS_MAX || long {
            let (given, max) = (receipts.len(), RECEIPTS_MAX);
            return Err(SettlementError::Receipts { given, max, bytes_max: RECEIPT_ID_BYTES_MAX });
        }
        let tree = PayoutTree::new(settles, payouts)?;
        let leaves: Vec<B256> = receipts.iter().map(Receipt::leaf).collect();
        let manifest = Manifest {
            accounts: tree.payouts().len() as u64,
            chain_id: settles.chain_id,
            epoch: number,
            first_row: rows.0,
            format: FORMAT.to_owned(),
            last_row: rows.1,
            ledger_head,
            payout_root: tree.root(),
            receipts: receipts.len() as u64,
            receipts_root: if leaves.is_empty() { B256::ZERO } else { Levels::over(leaves).root() },
            sealed_unix_s,
            settlement: settles.settlement,
            token: settles.token,
            total: tree.total(),
        };
        Ok(Self { manifest, tree, receipts })
    }

    /// Everything but the lists.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Who is paid what, with proofs.
    #[must_use]
    pub fn tree(&self) -> &PayoutTree {
        &self.tree
    }

    /// In the ledger's order.
    #[must_use]
    pub fn receipts(&self) -> &[Receipt] {
        &self.receipts
    }

    /// The file's content.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let file = File {
            manifest: self.manifest.clone(),
            manifest_hash: self.manifest.hash(),
            payouts: self.tree.payouts().iter().map(|payout| Row(payout.account, payout.cumulative)).collect(),
            receipts: self.receipts.iter().map(|receipt| (receipt.id.clone(), receipt.hash)).collect(),
        };
        let mut json = serde_json::to_vec(&file).expect("numbers and text");
        json.push(b'\n');
        json
    }

    /// Reads a file and recomputes everything in it.
    ///
    /// # Errors
    /// [`SettlementError::BundleFormat`] for a file that is none, [`SettlementError::BundleMismatch`] naming the first field
    /// that its own lists contradict.
    pub fn from_json(json: &[u8]) -> Result<Self, SettlementError> {
        let file: File = serde_json::from_slice(json)
            .map_err(|error| SettlementError::BundleFormat { reason: error.to_string() })?;
        let said = file.manifest;
        if said.format != FORMAT {
            let reason = format!("its format is {:?}; this program reads {FORMAT:?}", said.format);
            return Err(SettlementError::BundleFormat { reason });
        }
        if file.payouts.len() > ACCOUNTS_MAX {
            return Err(SettlementError::Accounts { given: file.payouts.len(), max: ACCOUNTS_MAX });
        }
        let epoch = Epoch {
            number: said.epoch,
            rows: (said.first_row, said.last_row),
            ledger_head: said.ledger_head,
            sealed_unix_s: said.sealed_unix_s,
            payouts: file.payouts.into_iter().map(|Row(account, cumulative)| Payout { account, cumulative }).collect(),
            receipts: file.receipts.into_iter().map(|(id, hash)| Receipt { id, hash }).collect(),
        };
        let found = Self::new(&said.settles(), epoch)?;
        let is = &found.manifest;
        let fields = [
            ("accounts", said.accounts.to_string(), is.accounts.to_string()),
            ("receipts", said.receipts.to_string(), is.receipts.to_string()),
            ("total", said.total.to_string(), is.total.to_string()),
            ("payout_root", said.payout_root.to_string(), is.payout_root.to_string()),
            ("receipts_root", said.receipts_root.to_string(), is.receipts_root.to_string()),
            ("manifest_hash", file.manifest_hash.to_string(), is.hash().to_string()),
        ];
        match fields.into_iter().find(|(_, said, is)| said != is) {
            Some((field, said, computed)) => Err(SettlementError::BundleMismatch { field, said, computed }),
            None => Ok(found),
        }
    }

    /// Fails unless this epoch goes on where `previous` ended: the next number and row, of the same contract, nobody having
    /// earned less.
    ///
    /// # Errors
    /// [`SettlementError::NotNext`] with what does not fit.
    pub fn follows(&self, previous: &Self) -> Result<(), SettlementError> {
        let (this, before) = (&self.manifest, &previous.manifest);
        let epoch = this.epoch;
        let not_next = |reason: String| Err(SettlementError::NotNext { epoch, previous: before.epoch, reason });
        if before.epoch.checked_add(1) != Some(epoch) {
            return not_next("its number is not the next".to_owned());
        }
        if this.settles() != before.settles() {
            return not_next("it is of another chain, contract or token".to_owned());
        }
        if before.last_row.checked_add(1) != Some(this.first_row) || this.last_row < this.first_row {
            let rows = (this.first_row, this.last_row, before.last_row);
            return not_next(format!(
                "it has rows {} to {} of the ledger, the one before ended at {}",
                rows.0, rows.1, rows.2
            ));
        }
        for payout in previous.tree.payouts() {
            let now = self.tree.cumulative(payout.account);
            if now < payout.cumulative {
                let Payout { account, cumulative } = payout;
                return not_next(format!("{account} had earned {cumulative} and now has {now}"));
            }
        }
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    manifest: Manifest,
    manifest_hash: B256,
    payouts: Vec<Row>,
    receipts: Vec<(String, B256)>,
}

#[derive(Serialize, Deserialize)]
struct Row(Address, #[serde(with = "amount")] u128);
