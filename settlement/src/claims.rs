//! What the contract has paid, noted in the ledger, whoever claimed it: so an account's `payout/0x…` is what it has not claimed yet.
//!
//! Read are the contract's `Claimed` events in final blocks, which no reorganisation takes back. Nothing is kept beside the
//! ledger. A claim's key there is its transaction and its place, so noting it twice is noting it once; claims are noted in the
//! chain's order, so the newest one in the ledger tells where to go on.

use alloy::primitives::{Address, B256, U256};
use alloy::sol_types::SolEvent as _;
use openlora_ledger::{Account, Asset, Ledger, LedgerError, Order};

use crate::chain::{At, Log};
use crate::contracts::RewardSettlement::Claimed;
use crate::epochs::Contract;
use crate::error::SettlementError;
use crate::rpc::RpcError;

/// Blocks that a node is asked for at once; fewer where it refuses or answers at too great length.
const BLOCKS_MAX: u64 = 10_000;
/// Rows of the ledger among which its newest claim is looked for, a page at a time; beyond, all events are read again.
const LOOK_BACK_PAGES_MAX: usize = 1_000;
const PAGE_ROWS: usize = 100;

/// A claim that was noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose.
    pub account: Address,
    /// What it was paid, in the token's smallest unit.
    pub amount: u128,
    /// Whose leaf it showed.
    pub epoch: u64,
    /// Where it is on the chain.
    pub block: u64,
    /// The transaction.
    pub transaction: B256,
    /// Where it is in the ledger.
    pub row: u64,
}

/// Notes a contract's claims in a ledger.
pub struct Claims {
    contract: Contract,
    ledger: Ledger,
    asset: Asset,
    place: Option<Place>,
    /// Whether everything since the deployment has been asked for.
    whole: bool,
    blocks: u64,
}

/// How far the claims are noted.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The first block with claims that may not be noted.
    next: u64,
    /// The ledger's newest claim; 0 before the first.
    row: u64,
}

impl Claims {
    /// For the payouts of `contract`, which the ledger keeps in `asset`.
    #[must_use]
    pub fn new(contract: Contract, ledger: Ledger, asset: Asset) -> Self {
        Self { contract, ledger, asset, place: None, whole: false, blocks: BLOCKS_MAX }
    }

    /// Notes all claims that are final and of an epoch that the ledger has sealed, and tells of those that were not noted before.
    ///
    /// # Errors
    /// [`SettlementError::Unowed`] for a claim of more than the ledger owes; [`SettlementError::ClaimsMissing`] where the node
    /// leaves some out. Claims before those are noted. The node's and the ledger's.
    pub async fn note(&mut self, mut told: impl FnMut(&Claim)) -> Result<(), SettlementError> {
        match self.read_on(&mut told).await {
            // Some were left out before: by a node that was behind, or the ledger was restored from a backup.
            Err(SettlementError::ClaimsMissing { .. }) if !self.whole => {
                self.whole = true;
                self.place = None;
                self.read_on(&mut told).await
            }
            done => done,
        }
    }

    async fn read_on(&mut self, told: &mut impl FnMut(&Claim)) -> Result<(), SettlementError> {
        let chain = self.contract.chain().clone();
        let Some(last) = chain.block(At::Finalized).await?.map(|block| block.number()) else { return Ok(()) };
        let mut place = match self.place {
            Some(place) => place,
            None => self.find_place(last).await?,
        };
        let sealed = self.ledger.last_epoch().await?;
        while place.next <= last {
            let to = last.min(place.next.saturating_add(self.blocks - 1));
            let blocks = place.next..=to;
            let logs = match chain.logs(self.contract.settles().settlement, Claimed::SIGNATURE_HASH, blocks).await {
                Err(RpcError::Refused { .. } | RpcError::TooLong { .. }) if to > place.next => {
                    self.blocks = (to - place.next).div_ceil(2);
                    continue;
                }
                logs => logs?,
            };
            for log in &logs {
                let claimed = self.decode(log)?;
                if claimed.epoch > sealed {
                    // The ledger is a copy that is behind: noted once it has caught up.
                    return Ok(());
                }
                let claim = self.note_one(log, &claimed).await?;
                if claim.row > place.row {
                    place.row = claim.row;
                    told(&claim);
                }
                self.place = Some(place);
                self.check_noted(&claimed).await?;
            }
            place.next = to + 1;
            self.place = Some(place);
        }
        Ok(())
    }

    async fn note_one(&self, log: &Log, claimed: &Claimed) -> Result<Claim, SettlementError> {
        let (account, transaction) = (claimed.account, log.transaction_hash);
        let Ok(amount) = u128::try_from(claimed.amount) else {
            return Err(self.unclear(format!("{} units in {transaction} are more than there are", claimed.amount)));
        };
        let payee = openlora_ledger::Address(account.into());
        let key = format!("{transaction}/{}", log.index());
        let row = match self.ledger.claimed(&key, payee, &self.asset, amount).await {
            Err(LedgerError::Unfunded { available: owed, .. }) => {
                return Err(SettlementError::Unowed { account, amount, owed, transaction });
            }
            row => row?,
        };
        Ok(Claim { account, amount, epoch: claimed.epoch, block: log.block(), transaction, row })
    }

    /// Fails unless what is noted of an account comes up to what it had been paid by this claim and those before it.
    async fn check_noted(&self, claimed: &Claimed) -> Result<(), SettlementError> {
        let (account, paid) = (claimed.account, claimed.cumulative);
        let payee = Account::Payout(openlora_ledger::Address(account.into()));
        let noted = self.ledger.balance(&payee, &self.asset).await?.debits;
        if U256::from(noted) < paid { Err(SettlementError::ClaimsMissing { account, noted, paid }) } else { Ok(()) }
    }

    fn decode(&self, log: &Log) -> Result<Claimed, SettlementError> {
        let claimed = Claimed::decode_raw_log(log.topics.iter().copied(), &log.data);
        claimed.map_err(|error| self.unclear(format!("{error} in {}", log.transaction_hash)))
    }

    fn unclear(&self, reason: String) -> SettlementError {
        SettlementError::View { to: self.contract.settles().settlement, call: Claimed::SIGNATURE, reason }
    }

    /// Where to go on: at the block of the ledger's newest claim, where this chain has it, or at the contract's first block.
    async fn find_place(&self, last: u64) -> Result<Place, SettlementError> {
        let newest = self.newest().await?;
        let row = newest.map_or(0, |(_, row)| row);
        if let Some((transaction, _)) = newest.filter(|_| !self.whole)
            && let Some(receipt) = self.contract.chain().receipt(transaction).await?
        {
            return Ok(Place { next: receipt.block(), row });
        }
        Ok(Place { next: self.first_block(last).await?, row })
    }

    /// The ledger's newest claim that was noted here: its transaction and its row.
    async fn newest(&self) -> Result<Option<(B256, u64)>, SettlementError> {
        let mut cursor = None;
        for _ in 0..LOOK_BACK_PAGES_MAX {
            let (entries, next) = self.ledger.entries(&Account::World, Order::Newest, cursor, PAGE_ROWS).await?;
            let ours = |what: &str| what.strip_prefix("claim/")?.split_once('/')?.0.parse().ok();
            let own = entries.iter().filter(|entry| entry.asset == self.asset);
            if let Some(found) = own.filter_map(|entry| Some((ours(&entry.what)?, entry.row))).next() {
                return Ok(Some(found));
            }
            match next {
                Some(_) => cursor = next,
                None => break,
            }
        }
        Ok(None)
    }

    /// The first block, up to `last`, after which the contract is there; the one after `last` where it is not there yet, 0 where the
    /// node has forgotten its old states.
    async fn first_block(&self, last: u64) -> Result<u64, SettlementError> {
        let (chain, contract) = (self.contract.chain(), self.contract.settles().settlement);
        let (mut from, mut to) = (0, last + 1);
        while from < to {
            let middle = from + (to - from) / 2;
            match chain.has_code(contract, At::Block(middle)).await {
                Ok(true) => to = middle,
                Ok(false) => from = middle + 1,
                Err(RpcError::Refused { .. }) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(from)
    }
}
