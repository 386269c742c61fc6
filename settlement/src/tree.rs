//! The payout tree of an epoch: who has earned how much so far, as a root that the contract pays from.
//!
//! ```text
//! leaf  = keccak256(keccak256(abi.encode(domain, chain id, settlement, account, token, cumulative)))
//! node  = keccak256(left || right)          pairs keep their places: a proof is for one index
//! level 0: leaves in the order of accounts, zero words up to the next power of two
//! ```
//!
//! The same as `contracts/src/libraries/IndexedMerkle.sol`; docs/contracts.md has the format, and
//! `contracts/test/vectors/merkle.json` trees of a third implementation that both are tested against.

pub use alloy::primitives::Address;
use alloy::primitives::{B256, U256, b256, keccak256};
use alloy::sol_types::SolValue;

use crate::error::SettlementError;

/// First word of every leaf's preimage: keccak256("OpenLoRA.RewardSettlement.Leaf.v1").
pub const LEAF_DOMAIN: B256 = b256!("3e43c26a0e4c44b00581383c695e2e3479b94a9d9d4cda2a5b5c130b41e62fb4");
/// The most accounts of a tree; the contract takes proofs for 256 times as many.
pub const ACCOUNTS_MAX: usize = 1 << 24;
/// Levels above the leaves for which the contract takes proofs.
pub const DEPTH_MAX: usize = 32;
/// The largest sum of all leaves that the contract keeps: 2^112 - 1.
pub const TOTAL_MAX: u128 = (1 << 112) - 1;

/// Which contract pays which token where: part of every leaf, so that no proof counts elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settles {
    /// EIP-155 id.
    pub chain_id: u64,
    /// The `RewardSettlement` contract.
    pub settlement: Address,
    /// What it pays out.
    pub token: Address,
}

impl Settles {
    /// The leaf of an account's cumulative amount, in the token's smallest unit.
    #[must_use]
    pub fn leaf(&self, account: Address, cumulative: u128) -> B256 {
        let content =
            (LEAF_DOMAIN, U256::from(self.chain_id), self.settlement, account, self.token, U256::from(cumulative));
        keccak256(keccak256(content.abi_encode()))
    }
}

/// What an account has earned in all epochs so far, in the token's smallest unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Payout {
    /// Who is paid.
    pub account: Address,
    /// Of all epochs up to this one.
    pub cumulative: u128,
}

/// What an account shows the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The leaf's place.
    pub index: usize,
    /// What the leaf says.
    pub cumulative: u128,
    /// From the bottom up; as many as the tree is deep.
    pub siblings: Vec<B256>,
}

/// A tree with all its nodes, 64 bytes for an account, so that a proof is a lookup.
#[derive(Clone, Debug)]
pub struct PayoutTree {
    payouts: Vec<Payout>,
    levels: Levels,
    total: u128,
}

impl PayoutTree {
    /// Builds the tree of `payouts`.
    ///
    /// # Errors
    /// None or too many of them, accounts that are not strictly ascending (so that each has one leaf), or a
    /// sum above [`TOTAL_MAX`].
    pub fn new(settles: &Settles, payouts: Vec<Payout>) -> Result<Self, SettlementError> {
        if payouts.is_empty() || payouts.len() > ACCOUNTS_MAX {
            return Err(SettlementError::Accounts { given: payouts.len(), max: ACCOUNTS_MAX });
        }
        if let Some(pair) = payouts.windows(2).find(|pair| pair[0].account >= pair[1].account) {
            return Err(SettlementError::AccountOrder { account: pair[1].account, after: pair[0].account });
        }
        let mut total = 0_u128;
        for Payout { account, cumulative } in &payouts {
            total = total
                .checked_add(*cumulative)
                .filter(|total| *total <= TOTAL_MAX)
                .ok_or(SettlementError::TotalTooLarge { account: *account, max: TOTAL_MAX })?;
        }
        let leaves = payouts.iter().map(|payout| settles.leaf(payout.account, payout.cumulative)).collect();
        Ok(Self { levels: Levels::over(leaves), payouts, total })
    }

    /// What the contract is told.
    #[must_use]
    pub fn root(&self) -> B256 {
        self.levels.root()
    }

    /// The sum of all leaves.
    #[must_use]
    pub fn total(&self) -> u128 {
        self.total
    }

    /// The accounts, ascending.
    #[must_use]
    pub fn payouts(&self) -> &[Payout] {
        &self.payouts
    }

    /// What an account has earned.
    #[must_use]
    pub fn cumulative(&self, account: Address) -> u128 {
        self.place(account).map_or(0, |index| self.payouts[index].cumulative)
    }

    fn place(&self, account: Address) -> Option<usize> {
        self.payouts.binary_search_by_key(&account, |payout| payout.account).ok()
    }

    /// An account's proof; none where it has earned nothing.
    #[must_use]
    pub fn proof(&self, account: Address) -> Option<Proof> {
        let index = self.place(account)?;
        Some(Proof { index, cumulative: self.payouts[index].cumulative, siblings: self.levels.siblings(index) })
    }
}

/// The nodes of a tree from the leaves up, without those over padding alone: what is to the right of a level's end is
/// that level's entry of `padding`.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    levels: Vec<Vec<B256>>,
    padding: Vec<B256>,
}

impl Levels {
    /// Over at least one leaf.
    pub(crate) fn over(leaves: Vec<B256>) -> Self {
        let (mut levels, mut padding) = (vec![leaves], vec![B256::ZERO]);
        while let below = &levels[levels.len() - 1]
            && below.len() > 1
        {
            let empty = padding[padding.len() - 1];
            let parent = |pair: &[B256]| node(pair[0], *pair.get(1).unwrap_or(&empty));
            let level = below.chunks(2).map(parent).collect();
            levels.push(level);
            padding.push(node(empty, empty));
        }
        Self { levels, padding }
    }

    pub(crate) fn root(&self) -> B256 {
        self.levels[self.levels.len() - 1][0]
    }

    fn siblings(&self, index: usize) -> Vec<B256> {
        let below_root = self.levels.iter().zip(&self.padding).take(self.levels.len() - 1).enumerate();
        below_root.map(|(up, (level, padding))| *level.get((index >> up) ^ 1).unwrap_or(padding)).collect()
    }
}

fn node(left: B256, right: B256) -> B256 {
    let mut both = [0; 64];
    both[..32].copy_from_slice(left.as_slice());
    both[32..].copy_from_slice(right.as_slice());
    keccak256(both)
}

/// The root that a leaf and its proof lead to, as the contract computes it; none where it refuses: more than [`DEPTH_MAX`] siblings,
/// or a place outside a tree of that depth.
#[must_use]
pub fn root_of(leaf: B256, proof: &Proof) -> Option<B256> {
    let depth = proof.siblings.len();
    if depth > DEPTH_MAX || proof.index as u64 >> depth != 0 {
        return None;
    }
    let above = |below, (up, sibling): (usize, &B256)| match proof.index >> up & 1 {
        0 => node(below, *sibling),
        _ => node(*sibling, below),
    };
    Some(proof.siblings.iter().enumerate().fold(leaf, above))
}
