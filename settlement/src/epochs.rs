//! Epochs on their way from the ledger to the contract.
//!
//! ```text
//! ledger        chain                                          who
//! sealed   ->   proposed   ->   finalized   ->   claimed       proposer; anyone after the window; each account or anyone for it
//!                   \-> disputed -> rejected (free again) or proposed (dismissed)
//! ```
//!
//! What is to be done next is read from the contract each time, whose epoch number makes everything here harmless to repeat: it
//! takes `last finalized + 1` only, one at a time.

use alloy::primitives::{Address, B256, Bytes, U256, keccak256};
use alloy::sol_types::SolCall;
use openlora_ledger::{Asset, Ledger};

use crate::bundle::{Bundle, Epoch, RECEIPTS_MAX, Receipt};
use crate::chain::{At, Chain};
use crate::contracts::{Code, OpenToken, RewardSettlement};
use crate::error::SettlementError;
use crate::outbox::{Content, Done, Intent, IntentId, Status};
use crate::sender::Sender;
use crate::tree::{ACCOUNTS_MAX, Payout, Settles};

/// Gas of a proposal, a finalization, a challenge: what docs/contracts.md measured, with room.
const GAS_MAX: u64 = 250_000;
/// Gas of a claim in a batch at most.
const CLAIM_GAS_MAX: u64 = 120_000;
/// Claims of one transaction: what fits into the data that nodes take.
pub const CLAIMS_MAX: usize = 100;

/// Reads a sealed epoch out of the ledger and computes its roots. The same whenever it is asked.
///
/// # Errors
/// The ledger's; what [`Bundle::new`] refuses.
pub async fn bundle_of(
    ledger: &Ledger,
    number: u64,
    settles: &Settles,
    asset: &Asset,
) -> Result<Bundle, SettlementError> {
    let epoch = ledger.epoch(number).await?;
    let mut payouts = Vec::new();
    let mut fold = ledger.fold(number).await?;
    loop {
        let leaves = fold.next().await?;
        if leaves.is_empty() {
            break;
        }
        let own = leaves.into_iter().filter(|leaf| leaf.asset == *asset);
        payouts.extend(own.map(|leaf| Payout { account: leaf.address.0.into(), cumulative: leaf.cumulative }));
        if payouts.len() > ACCOUNTS_MAX {
            return Err(SettlementError::Accounts { given: payouts.len(), max: ACCOUNTS_MAX });
        }
    }
    let mut receipts = Vec::new();
    let mut pages = ledger.receipts(number).await?;
    loop {
        let page = pages.next().await?;
        if page.is_empty() || receipts.len() > RECEIPTS_MAX {
            break;
        }
        receipts.extend(page.into_iter().map(|evidence| Receipt { id: evidence.receipt, hash: evidence.hash.into() }));
    }
    // The row that sealed it is the last of its rows.
    let rows = (epoch.first, epoch.row);
    let sealed_unix_s = epoch.sealed_at_ms / 1_000;
    Bundle::new(settles, Epoch { number, rows, ledger_head: epoch.head.into(), sealed_unix_s, payouts, receipts })
}

/// Where an epoch's root is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not there; the contract takes this number next.
    Due,
    /// Not there, and others come before it.
    Behind {
        /// The number that the contract takes next.
        next: u64,
    },
    /// Proposed; it can be finalized from this second on.
    Proposed {
        /// Seconds since 1970.
        finalizable_at: u64,
    },
    /// Challenged; the arbiter has until this second.
    Disputed {
        /// Who challenged it.
        challenger: Address,
        /// Seconds since 1970.
        resolvable_until: u64,
    },
    /// Accounts can claim from it.
    Finalized,
    /// Another root was proposed or finalized for this number.
    Other {
        /// That root.
        root: B256,
        /// Whether it is final.
        finalized: bool,
    },
}

/// What the contract says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Last finalized epoch; 0 before the first.
    pub epoch: u64,
    /// Sum of what its root promises, in the token's smallest unit.
    pub finalized: U256,
    /// Of that, paid out.
    pub claimed: U256,
    /// Tokens it holds.
    pub balance: U256,
    /// Wei that a proposal or challenge costs, given back when it was right.
    pub bond: U256,
    /// Seconds from a proposal to its finalization.
    pub challenge_window: u64,
    /// What is proposed now.
    pub open: Option<Open>,
}

/// A proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its number.
    pub epoch: u64,
    /// Its payout root.
    pub root: B256,
    /// Its receipts root.
    pub receipts_root: B256,
    /// Its manifest's hash.
    pub manifest_hash: B256,
    /// Sum of its leaves.
    pub total: U256,
    /// Who proposed it.
    pub proposer: Address,
    /// Seconds since 1970.
    pub finalizable_at: u64,
    /// Who challenged it, and until when the arbiter may rule.
    pub challenge: Option<(Address, u64)>,
    /// Wei that a challenge costs.
    pub bond: U256,
}

/// A `RewardSettlement` on a chain.
#[derive(Clone, Debug)]
pub struct Contract {
    chain: Chain,
    settles: Settles,
}

impl Contract {
    /// The contract at `address`, once its code has been compared with ours.
    ///
    /// # Errors
    /// [`SettlementError::NoCode`], [`SettlementError::NotOurs`]; the node's.
    pub async fn open(chain: Chain, address: Address) -> Result<Self, SettlementError> {
        let code = chain.code(address).await?;
        if code.is_empty() {
            return Err(SettlementError::NoCode { address, chain: chain.id() });
        }
        if !Code::SETTLEMENT.is(&code) {
            return Err(SettlementError::NotOurs { address, name: Code::SETTLEMENT.name });
        }
        let settles = Settles { chain_id: chain.id(), settlement: address, token: Address::ZERO };
        let mut contract = Self { chain, settles };
        contract.settles.token = contract.ask(&RewardSettlement::TOKENCall {}, At::Latest).await?;
        Ok(contract)
    }

    /// Which contract pays which token where.
    #[must_use]
    pub fn settles(&self) -> &Settles {
        &self.settles
    }

    /// The node.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    async fn ask<C: SolCall>(&self, call: &C, at: At) -> Result<C::Return, SettlementError> {
        self.ask_at(self.settles.settlement, call, at).await
    }

    async fn ask_at<C: SolCall>(&self, to: Address, call: &C, at: At) -> Result<C::Return, SettlementError> {
        let unclear = |reason: String| SettlementError::View { to, call: C::SIGNATURE, reason };
        let answer = self.chain.view(to, call.abi_encode().into(), at).await?;
        let answer = answer.map_err(|reverted| unclear(reverted.to_string()))?;
        C::abi_decode_returns(&answer).map_err(|error| unclear(error.to_string()))
    }

    /// What the contract says of itself.
    ///
    /// # Errors
    /// The node's.
    pub async fn state(&self, at: At) -> Result<State, SettlementError> {
        let totals = self.ask(&RewardSettlement::totalsCall {}, at).await?;
        let terms = self.ask(&RewardSettlement::termsCall {}, at).await?;
        let open = self.ask(&RewardSettlement::proposalCall {}, at).await?;
        let balance = OpenToken::balanceOfCall { account: self.settles.settlement };
        let status = open.status;
        Ok(State {
            epoch: totals.epoch.into(),
            finalized: U256::from(totals.finalized),
            claimed: U256::from(totals.claimed),
            balance: self.ask_at(self.settles.token, &balance, at).await?,
            bond: U256::from(terms.bond),
            challenge_window: terms.challengeWindow.into(),
            open: (status != 0).then(|| Open {
                epoch: open.epoch.into(),
                root: open.payoutRoot,
                receipts_root: open.receiptsRoot,
                manifest_hash: open.manifestHash,
                total: U256::from(open.totalCumulative),
                proposer: open.proposer,
                finalizable_at: open.finalizableAt.to(),
                challenge: (status == 2).then(|| (open.challenger, open.resolvableUntil.to())),
                bond: U256::from(open.bond),
            }),
        })
    }

    /// The root that an epoch was finalized with; zero where it was not.
    ///
    /// # Errors
    /// The node's.
    pub async fn finalized_root(&self, epoch: u64, at: At) -> Result<B256, SettlementError> {
        self.ask(&RewardSettlement::finalizedRootCall { epoch }, at).await
    }

    /// What an account has been paid so far.
    ///
    /// # Errors
    /// The node's.
    pub async fn claimed(&self, account: Address, at: At) -> Result<U256, SettlementError> {
        self.ask(&RewardSettlement::claimedCall { account }, at).await
    }

    /// Whether an account may propose epochs.
    ///
    /// # Errors
    /// The node's.
    pub async fn may_propose(&self, account: Address, at: At) -> Result<bool, SettlementError> {
        self.ask(&RewardSettlement::hasRoleCall { role: keccak256("PROPOSER_ROLE"), account }, at).await
    }

    /// Tokens of an account.
    ///
    /// # Errors
    /// The node's.
    pub async fn balance(&self, account: Address, at: At) -> Result<U256, SettlementError> {
        self.ask_at(self.settles.token, &OpenToken::balanceOfCall { account }, at).await
    }

    /// Where an epoch's root is.
    ///
    /// # Errors
    /// The node's.
    pub async fn standing(&self, epoch: u64, root: B256, at: At) -> Result<Standing, SettlementError> {
        self.standing_in(&self.state(at).await?, epoch, root, at).await
    }

    /// As [`Contract::standing`], where the contract's `state` at that block is known.
    ///
    /// # Errors
    /// The node's.
    pub async fn standing_in(
        &self,
        state: &State,
        epoch: u64,
        root: B256,
        at: At,
    ) -> Result<Standing, SettlementError> {
        if epoch <= state.epoch {
            let found = self.finalized_root(epoch, at).await?;
            let same = found == root;
            return Ok(if same { Standing::Finalized } else { Standing::Other { root: found, finalized: true } });
        }
        Ok(match state.open {
            Some(open) if open.epoch == epoch && open.root != root => {
                Standing::Other { root: open.root, finalized: false }
            }
            Some(Open { epoch: of, challenge: Some((challenger, resolvable_until)), .. }) if of == epoch => {
                Standing::Disputed { challenger, resolvable_until }
            }
            Some(open) if open.epoch == epoch => Standing::Proposed { finalizable_at: open.finalizable_at },
            None if epoch == state.epoch + 1 => Standing::Due,
            _ => Standing::Behind { next: state.epoch + 1 },
        })
    }

    /// What is to be sent for a proposal; nothing where it is proposed or finalized already.
    ///
    /// # Errors
    /// Before anything is sent: another contract's bundle, an epoch that is not next, another root for its number, and tokens
    /// that are missing.
    pub async fn propose(&self, bundle: &Bundle) -> Result<Option<Intent>, SettlementError> {
        let manifest = bundle.manifest();
        if manifest.settles() != self.settles {
            return Err(SettlementError::OtherContract { epoch: manifest.epoch, ours: self.settles.settlement });
        }
        let (epoch, root) = (manifest.epoch, manifest.payout_root);
        let state = self.state(At::Latest).await?;
        match self.standing_in(&state, epoch, root, At::Latest).await? {
            Standing::Proposed { .. } | Standing::Disputed { .. } | Standing::Finalized => return Ok(None),
            Standing::Behind { next } => return Err(SettlementError::NotDue { epoch, next }),
            Standing::Other { root: other, .. } => return Err(SettlementError::OtherRoot { epoch, root, other }),
            Standing::Due => {}
        }
        let needed = U256::from(manifest.total).saturating_sub(state.claimed);
        if state.balance < needed {
            let missing = needed - state.balance;
            let (token, to) = (self.settles.token, self.settles.settlement);
            return Err(SettlementError::Unfunded { epoch, missing, token, to });
        }
        let call = RewardSettlement::proposeCall {
            epoch,
            payoutRoot: root,
            receiptsRoot: manifest.receipts_root,
            totalCumulative: U256::from(manifest.total),
            manifestHash: manifest.hash(),
        };
        Ok(Some(self.intent(&format!("propose {epoch} {root}"), &call, state.bond, GAS_MAX, None)))
    }

    /// What is to be sent so that the contract gets tokens of the sender's; `key` names it among others.
    #[must_use]
    pub fn fund(&self, amount: u128, key: &str) -> Intent {
        let call = OpenToken::transferCall { to: self.settles.settlement, value: U256::from(amount) };
        let mut intent = self.intent(&format!("fund {key}"), &call, U256::ZERO, GAS_MAX, None);
        intent.content.to = Some(self.settles.token);
        intent
    }

    /// What is to be sent to finalize an epoch; nothing where it is final already.
    ///
    /// # Errors
    /// Before anything is sent: not proposed, disputed, another root, or its window is open at `now_unix_s`.
    pub async fn finalize(&self, bundle: &Bundle, now_unix_s: u64) -> Result<Option<Intent>, SettlementError> {
        let (epoch, root) = (bundle.manifest().epoch, bundle.manifest().payout_root);
        match self.standing(epoch, root, At::Latest).await? {
            Standing::Finalized => return Ok(None),
            Standing::Due => return Err(SettlementError::NotProposed { epoch }),
            Standing::Behind { next } => return Err(SettlementError::NotDue { epoch, next }),
            Standing::Other { root: other, .. } => return Err(SettlementError::OtherRoot { epoch, root, other }),
            Standing::Disputed { challenger, resolvable_until } => {
                return Err(SettlementError::InDispute { epoch, challenger, resolvable_until });
            }
            Standing::Proposed { finalizable_at } if finalizable_at > now_unix_s => {
                return Err(SettlementError::WindowOpen { epoch, seconds: finalizable_at - now_unix_s });
            }
            Standing::Proposed { .. } => {}
        }
        let call = RewardSettlement::finalizeCall { epoch, payoutRoot: root };
        let done = RewardSettlement::finalizedRootCall { epoch };
        let done = self.done(&done, U256::from(1));
        Ok(Some(self.intent(&format!("finalize {epoch} {root}"), &call, U256::ZERO, GAS_MAX, Some(done))))
    }

    /// What is to be sent to dispute what is proposed now.
    #[must_use]
    pub fn challenge(&self, open: &Open, evidence: B256) -> Intent {
        let call = RewardSettlement::challengeCall { epoch: open.epoch, payoutRoot: open.root, evidenceHash: evidence };
        self.intent(&format!("challenge {} {}", open.epoch, open.root), &call, open.bond, GAS_MAX, None)
    }

    /// What is to be sent so that these accounts are paid what they have earned up to the bundle's epoch; those that have been
    /// paid are left out, and who has nothing in it. At most [`CLAIMS_MAX`] at once.
    ///
    /// # Errors
    /// The epoch is not final, or two others are since; the node's.
    pub async fn claim(&self, bundle: &Bundle, accounts: &[Address]) -> Result<Option<Intent>, SettlementError> {
        let (epoch, root) = (bundle.manifest().epoch, bundle.manifest().payout_root);
        let state = self.state(At::Latest).await?;
        match self.standing_in(&state, epoch, root, At::Latest).await? {
            // A batch would not revert: it would skip every entry, and cost all the same.
            Standing::Finalized if state.epoch > epoch + 1 => {
                return Err(SettlementError::Superseded { epoch, last: state.epoch });
            }
            Standing::Finalized => {}
            Standing::Other { root: other, .. } => return Err(SettlementError::OtherRoot { epoch, root, other }),
            _ => return Err(SettlementError::NotFinal { epoch }),
        }
        let mut claims = Vec::new();
        for &account in accounts.iter().take(CLAIMS_MAX) {
            let Some(proof) = bundle.tree().proof(account) else { continue };
            if self.claimed(account, At::Latest).await? >= U256::from(proof.cumulative) {
                continue;
            }
            claims.push(RewardSettlement::Claim {
                epoch,
                account,
                cumulative: U256::from(proof.cumulative),
                index: U256::from(proof.index),
                proof: proof.siblings,
            });
        }
        let Some(first) = claims.first() else { return Ok(None) };
        let gas = GAS_MAX + CLAIM_GAS_MAX * claims.len() as u64;
        if claims.len() > 1 {
            let count = claims.len();
            let call = RewardSettlement::claimBatchCall { entries: claims };
            // By all of what it claims: two batches may well begin and end alike.
            let key = format!("claim {epoch} {count} {}", keccak256(call.abi_encode()));
            return Ok(Some(self.intent(&key, &call, U256::ZERO, gas, None)));
        }
        let done = self.done(&RewardSettlement::claimedCall { account: first.account }, first.cumulative);
        let key = format!("claim {epoch} {}", first.account);
        let call = RewardSettlement::claimCall { entry: first.clone() };
        Ok(Some(self.intent(&key, &call, U256::ZERO, gas, Some(done))))
    }

    /// Hands an intent to the sender. One whose effect is gone by now, as when a root was rejected after it had been proposed, is
    /// done again.
    ///
    /// # Errors
    /// The sender's.
    pub async fn submit(&self, sender: &Sender, intent: Intent) -> Result<IntentId, SettlementError> {
        for number in 1.. {
            let key = if number == 1 { intent.key.clone() } else { format!("{} again {number}", intent.key) };
            let Some(id) = sender.find(&key).await? else {
                return sender.submit(&Intent { key, ..intent }).await;
            };
            match sender.status(id).await? {
                Status::Finalized { reverted: None, .. } | Status::DoneElsewhere => {}
                Status::Finalized { .. } | Status::Refused { .. } => {
                    sender.retry(id).await?;
                    return Ok(id);
                }
                _ => return Ok(id),
            }
        }
        unreachable!("there are fewer intents than numbers")
    }

    fn done<C: SolCall>(&self, view: &C, at_least: U256) -> Done {
        Done { to: self.settles.settlement, data: view.abi_encode().into(), at_least }
    }

    fn intent<C: SolCall>(&self, what: &str, call: &C, value: U256, gas_max: u64, done: Option<Done>) -> Intent {
        let Settles { chain_id, settlement, .. } = self.settles;
        let data: Bytes = call.abi_encode().into();
        Intent {
            key: format!("{chain_id} {settlement} {what}"),
            content: Content { to: Some(settlement), data, value, gas_max, done },
        }
    }
}
