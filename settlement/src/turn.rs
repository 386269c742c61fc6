//! One step of everything that a sender has under way.
//!
//! The order of writes is what makes a crash harmless: a nonce is given away together with the bytes that use it, and only
//! then do those bytes leave the process. Whoever reads the outbox later finds every transaction that may be on its way.

use std::sync::atomic::Ordering;

use alloy::{
    consensus::TxEip1559,
    primitives::{Bytes, TxKind, U256},
};
use openlora_database::kill;

use crate::{
    SettlementError,
    chain::{At, Call, Receipt},
    outbox::{Lease, Signed, Slot, UnixMs},
    preflight::{self, Verdict},
    rpc::RpcError,
    sender::{Sender, Turn},
    transaction,
};

/// Gas of a transfer on most chains, where a node does not say.
const TRANSFER_GAS: u64 = 21_000;

/// The chain at the beginning of a turn.
struct View {
    /// Nonces used in blocks.
    latest: u64,
    /// The first nonce that neither a block nor the node's pool has.
    pending: u64,
    /// Height that no reorganisation reaches.
    finalized: Option<u64>,
    now: UnixMs,
}

/// What a node made of a transaction.
enum Heard {
    /// It has it.
    Taken,
    /// It has another with the same nonce that offers about as much, or wants more for any.
    Underpriced(String),
    /// The nonce is used: receipts tell by what.
    Used,
    /// Perhaps it has it.
    Unclear(String),
}

impl Heard {
    /// Nodes agree on no codes, so their words must do.
    fn from(answer: Result<(), RpcError>) -> Self {
        let text = match answer {
            Ok(()) => return Self::Taken,
            Err(error @ (RpcError::Unknown { .. } | RpcError::TooLong { .. })) => {
                return Self::Unclear(error.to_string());
            }
            Err(RpcError::Refused { message, .. }) => message,
        };
        let lower = text.to_ascii_lowercase();
        let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
        if says(&["already known", "already imported", "known transaction", "already exists", "already in mempool"]) {
            Self::Taken
        } else if says(&["nonce too low", "nonce is too low", "old nonce"]) {
            Self::Used
        } else if says(&["underpriced", "less than block base fee", "fee too low", "gas price too low"]) {
            Self::Underpriced(text)
        } else {
            Self::Unclear(text)
        }
    }
}

impl Sender {
    pub(crate) async fn step(&self, now: UnixMs) -> Result<Turn, SettlementError> {
        self.chain.check_id().await?;
        let lease = i64::try_from(self.config.lease.as_millis()).unwrap_or(i64::MAX);
        let until = UnixMs(now.0.saturating_add(lease));
        let Some(lease) = self.outbox.lease(&self.holder, now, until).await? else {
            return Ok(Turn::default());
        };
        let mut turn = Turn { leads: true, ..Turn::default() };
        let again = self.fresh.load(Ordering::Relaxed);
        if again {
            self.check_genesis(&lease).await?;
        }
        let view = self.look(now).await?;
        let mut next = self.outbox.next_nonce(&lease, view.pending.max(view.latest)).await?;
        for slot in self.outbox.slots().await? {
            self.follow(&lease, &view, &slot, again, &mut turn).await?;
        }
        self.fill_gap(&lease, &view, next, &mut turn).await?;
        self.send_queued(&lease, &view, &mut next, &mut turn).await?;
        self.fresh.store(false, Ordering::Relaxed);
        Ok(turn)
    }

    /// What is signed for one chain is valid on every other with the same id.
    async fn check_genesis(&self, lease: &Lease) -> Result<(), SettlementError> {
        let Some(first) = self.chain.block(At::Block(0)).await? else { return Ok(()) };
        let expected = self.outbox.genesis(lease, first.hash).await?;
        match expected == first.hash {
            true => Ok(()),
            false => Err(SettlementError::OtherChain { id: self.chain.id(), expected, found: first.hash }),
        }
    }

    async fn look(&self, now: UnixMs) -> Result<View, SettlementError> {
        let account = self.account();
        // In this order: another process may be ahead.
        let ours = self.outbox.final_nonce().await?;
        let latest = self.chain.nonce(account, At::Latest).await?;
        if let Some(nonce) = ours.filter(|&nonce| nonce >= latest) {
            return Err(SettlementError::RolledBack { account, nonce, latest });
        }
        let finalized = match self.chain.block(At::Finalized).await {
            // A young chain has no such block.
            Err(RpcError::Refused { .. }) => None,
            block => block?.map(|block| block.number()),
        };
        Ok(View { latest, pending: self.chain.nonce(account, At::Pending).await?, finalized, now })
    }

    /// Looks where a nonce's transactions are, and does what brings one of them into a final block.
    async fn follow(
        &self,
        lease: &Lease,
        view: &View,
        slot: &Slot,
        again: bool,
        turn: &mut Turn,
    ) -> Result<(), SettlementError> {
        if let Some(receipt) = self.receipt(slot).await? {
            return self.seen(lease, view, slot, &receipt, turn).await;
        }
        if let Some((hash, block)) = slot.mined {
            tracing::warn!(nonce = slot.nonce, %hash, %block, "a block was taken back");
            self.outbox.taken_back(lease, slot).await?;
            turn.taken_back += 1;
        }
        if slot.nonce < view.latest {
            return self.used(lease, view, slot, turn).await;
        }
        let newest = slot.newest();
        let heard = match !again && self.chain.knows(newest.hash).await? {
            true => Heard::Taken,
            false => self.broadcast(slot.nonce, newest, turn).await,
        };
        let stuck_after = i64::try_from(self.config.stuck_after.as_millis()).unwrap_or(i64::MAX);
        let stuck = slot.nonce == view.latest && view.now.0.saturating_sub(newest.signed.0) >= stuck_after;
        match heard {
            Heard::Underpriced(_) => self.replace(lease, view, slot, turn).await,
            Heard::Taken if stuck => self.replace(lease, view, slot, turn).await,
            Heard::Unclear(why) => self.wait(lease, slot, &why, turn).await,
            Heard::Taken | Heard::Used => self.outbox.mark(lease, slot.intent, "sent", None).await,
        }
    }

    async fn receipt(&self, slot: &Slot) -> Result<Option<Receipt>, SettlementError> {
        for signed in slot.transactions.iter().rev() {
            if let Some(receipt) = self.chain.receipt(signed.hash).await? {
                return Ok(Some(receipt));
            }
        }
        Ok(None)
    }

    /// A transaction of the nonce is in a block.
    async fn seen(
        &self,
        lease: &Lease,
        view: &View,
        slot: &Slot,
        receipt: &Receipt,
        turn: &mut Turn,
    ) -> Result<(), SettlementError> {
        let (nonce, hash, block) = (slot.nonce, receipt.transaction_hash, receipt.block());
        if view.finalized.is_some_and(|finalized| block <= finalized) {
            let reverted = if receipt.succeeded() { None } else { Some(self.why(slot, receipt).await?) };
            self.outbox.finalized(lease, slot, receipt, reverted.as_deref()).await?;
            tracing::info!(nonce, %hash, block, ?reverted, "final");
            turn.finalized += 1;
        } else if slot.mined != Some((hash, receipt.block_hash)) {
            self.outbox.mined(lease, slot, receipt).await?;
            tracing::info!(nonce, %hash, block, succeeded = receipt.succeeded(), "in a block");
            turn.mined += 1;
        }
        Ok(())
    }

    /// Why a transaction reverted, as far as it can be had: run again after its block, then before it.
    async fn why(&self, slot: &Slot, receipt: &Receipt) -> Result<String, SettlementError> {
        let signed = slot.transactions.iter().find(|signed| signed.hash == receipt.transaction_hash);
        let sent = transaction::decode(signed.unwrap_or_else(|| slot.newest()))?;
        let call = Call { from: self.account(), to: sent.to, data: sent.input.clone(), value: sent.value };
        for block in [receipt.block(), receipt.block().saturating_sub(1)] {
            match self.chain.call(&call, At::Block(block)).await {
                Ok(Err(reverted)) => return Ok(reverted.0),
                // A node without that old state cannot tell.
                Ok(Ok(_)) | Err(RpcError::Refused { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let ran_out = receipt.gas_used() >= sent.gas_limit;
        Ok(if ran_out {
            format!("ran out of {} gas", sent.gas_limit)
        } else {
            "reverted, and the node cannot tell why".into()
        })
    }

    /// The nonce is used, and by none of its transactions as far as the node shows. That counts once it is final.
    async fn used(&self, lease: &Lease, view: &View, slot: &Slot, turn: &mut Turn) -> Result<(), SettlementError> {
        let finally = match view.finalized {
            Some(block) => match self.chain.nonce(self.account(), At::Block(block)).await {
                Err(error @ RpcError::Refused { .. }) => {
                    return self
                        .wait(lease, slot, &format!("{error}; a node that keeps old state is needed"), turn)
                        .await;
                }
                used => used? > slot.nonce,
            },
            None => false,
        };
        let note = format!("nonce {} was used by a transaction that this outbox does not know", slot.nonce);
        // Looked for again: it may have become final since the first look.
        if !finally || self.receipt(slot).await?.is_some() {
            return self.wait(lease, slot, &format!("{note}; waiting for that to be final"), turn).await;
        }
        let again = match slot.intent {
            Some(intent) => self.outbox.content(intent).await?.done.is_some(),
            None => false,
        };
        tracing::warn!(nonce = slot.nonce, again, "the nonce went to a transaction of the same key from elsewhere");
        let refused = format!("{note}, and no view tells whether it happened; check, then retry it");
        self.outbox.lost(lease, slot, again, if again { &note } else { &refused }).await?;
        turn.lost += 1;
        Ok(())
    }

    /// Puts a transaction that offers more in the place of a nonce's newest.
    async fn replace(&self, lease: &Lease, view: &View, slot: &Slot, turn: &mut Turn) -> Result<(), SettlementError> {
        if slot.transactions.len() >= self.config.transactions_max {
            let max = self.config.transactions_max;
            return self
                .wait(lease, slot, &format!("{max} transactions were signed for it (transactions_max)"), turn)
                .await;
        }
        let mut replacement = transaction::decode(slot.newest())?;
        let offered =
            transaction::fees(&replacement).replaced(&self.chain.market().await?, self.config.max_fee_per_gas);
        let fees = match offered {
            Ok(fees) => fees,
            Err(above) => return self.wait(lease, slot, &above.to_string(), turn).await,
        };
        let data_fee = self.chain.data_fee_max(&transaction::unsigned(&replacement)).await?;
        if let Some(why) = preflight::too_dear(&self.config, fees, replacement.gas_limit, data_fee) {
            return self.wait(lease, slot, &why, turn).await;
        }
        (replacement.max_fee_per_gas, replacement.max_priority_fee_per_gas) = (fees.max_fee, fees.tip);
        let signed = transaction::sign(&self.signer, replacement, view.now).await?;
        self.outbox.replace(lease, slot, &signed).await?;
        tracing::info!(nonce = slot.nonce, hash = %signed.hash, replaces = %slot.newest().hash, max_fee = fees.max_fee, "replaced");
        turn.replaced += 1;
        match self.broadcast(slot.nonce, &signed, turn).await {
            Heard::Underpriced(why) | Heard::Unclear(why) => self.wait(lease, slot, &why, turn).await,
            Heard::Taken | Heard::Used => self.outbox.mark(lease, slot.intent, "sent", None).await,
        }
    }

    /// Keeps and tells what a nonce waits for.
    async fn wait(&self, lease: &Lease, slot: &Slot, why: &str, turn: &mut Turn) -> Result<(), SettlementError> {
        tracing::warn!(nonce = slot.nonce, why, "waiting");
        turn.waiting = Some(why.to_owned());
        self.outbox.mark(lease, slot.intent, "sent", Some(why)).await
    }

    async fn broadcast(&self, nonce: u64, signed: &Signed, turn: &mut Turn) -> Heard {
        kill::point("before a broadcast");
        let heard = Heard::from(self.chain.broadcast(&signed.raw).await);
        kill::point("after a broadcast");
        tracing::info!(nonce, hash = %signed.hash, taken = matches!(heard, Heard::Taken), "broadcast");
        turn.broadcast += 1;
        heard
    }

    /// Gives the first nonce that nobody uses, where later ones are given away, to a transfer of nothing to oneself: a
    /// transaction of the key from elsewhere was counted on and never came.
    async fn fill_gap(&self, lease: &Lease, view: &View, next: u64, turn: &mut Turn) -> Result<(), SettlementError> {
        let nonce = view.pending.max(view.latest);
        if nonce >= next || self.outbox.slots().await?.iter().any(|slot| slot.nonce == nonce) {
            return Ok(());
        }
        let account = self.account();
        let call = Call { from: account, to: TxKind::Call(account), data: Bytes::new(), value: U256::ZERO };
        let gas = self.chain.estimate_gas(&call).await?.unwrap_or(TRANSFER_GAS);
        let fees = match self.chain.market().await?.offer(self.config.max_fee_per_gas) {
            Ok(fees) => fees,
            Err(above) => {
                turn.waiting = Some(above.to_string());
                return Ok(());
            }
        };
        let nothing = TxEip1559 {
            chain_id: self.chain.id(),
            nonce,
            gas_limit: gas,
            max_fee_per_gas: fees.max_fee,
            max_priority_fee_per_gas: fees.tip,
            to: call.to,
            ..TxEip1559::default()
        };
        let signed = transaction::sign(&self.signer, nothing, view.now).await?;
        self.outbox.give(lease, nonce, None, &signed).await?;
        tracing::warn!(nonce, hash = %signed.hash, "nobody used this nonce; a transfer of nothing does");
        turn.gaps_filled += 1;
        self.broadcast(nonce, &signed, turn).await;
        Ok(())
    }

    /// Signs, keeps and broadcasts what has no nonce.
    async fn send_queued(
        &self,
        lease: &Lease,
        view: &View,
        next: &mut u64,
        turn: &mut Turn,
    ) -> Result<(), SettlementError> {
        let slots = self.outbox.slots().await?;
        let mut owed = U256::ZERO;
        for slot in &slots {
            owed = owed.saturating_add(transaction::takes_max(&transaction::decode(slot.newest())?));
        }
        for (id, content) in self.outbox.queued(self.config.in_flight_max.saturating_sub(slots.len())).await? {
            let mut ready = match preflight::judge(&self.chain, &self.config, self.account(), &content, owed).await? {
                Verdict::Ready(transaction) => transaction,
                Verdict::Done { finally: true } => {
                    self.outbox.mark(lease, Some(id), "elsewhere", None).await?;
                    continue;
                }
                Verdict::Done { finally: false } => {
                    let why = "it has happened by another transaction; waiting for that to be final";
                    turn.waiting = Some(why.to_owned());
                    self.outbox.mark(lease, Some(id), "queued", Some(why)).await?;
                    continue;
                }
                Verdict::Refuse(error @ SettlementError::Balance { .. }) => {
                    return self.queue_waits(lease, id, error.to_string(), turn).await;
                }
                Verdict::Wait(why) => return self.queue_waits(lease, id, why, turn).await,
                Verdict::Refuse(error) => {
                    tracing::warn!(intent = id.0, %error, "refused");
                    self.outbox.mark(lease, Some(id), "refused", Some(&error.to_string())).await?;
                    continue;
                }
            };
            ready.nonce = *next;
            owed = owed.saturating_add(transaction::takes_max(&ready));
            let signed = transaction::sign(&self.signer, ready, view.now).await?;
            self.outbox.give(lease, *next, Some(id), &signed).await?;
            tracing::info!(intent = id.0, nonce = *next, hash = %signed.hash, "signed");
            turn.signed += 1;
            if let Heard::Underpriced(why) | Heard::Unclear(why) = self.broadcast(*next, &signed, turn).await {
                turn.waiting = Some(why.clone());
                self.outbox.mark(lease, Some(id), "sent", Some(&why)).await?;
            }
            *next += 1;
        }
        Ok(())
    }

    /// The first of the queue waits, and so do those behind it: for gas and money, they would too.
    async fn queue_waits(
        &self,
        lease: &Lease,
        id: crate::outbox::IntentId,
        why: String,
        turn: &mut Turn,
    ) -> Result<(), SettlementError> {
        tracing::warn!(intent = id.0, why, "waiting");
        self.outbox.mark(lease, Some(id), "queued", Some(&why)).await?;
        turn.waiting = Some(why);
        Ok(())
    }
}
