//! Gets transactions onto a chain, each exactly once, whatever fails in between.
//!
//! [`Sender::submit`] keeps what is to happen; [`Sender::turn`] brings everything one step further and may be called at any
//! time, by any number of processes: the one with the lease works, the others stand by. docs/sending.md tells the rules.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use alloy::primitives::{Address, B256, U256};
use openlora_database::Database;
use openlora_types::{Classify as _, InvalidField};
use tokio::sync::Mutex;

use crate::{
    SettlementError,
    chain::Chain,
    keys::Signer,
    outbox::{Intent, IntentId, Outbox, Status, UnixMs},
    preflight::{self, Verdict},
};

/// Bytes of an intent's key.
const KEY_BYTES_MAX: usize = 200;

/// Bounds of sending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SenderConfig {
    /// Wei per gas that are offered at most, tip included.
    pub max_fee_per_gas: u128,
    /// Wei that one transaction may cost at most, with the fee for its bytes and without the value it carries.
    pub cost_max: U256,
    /// How long a transaction may stay out of a block before it is replaced by one that offers more.
    pub stuck_after: Duration,
    /// How long a process that says nothing keeps the lease.
    pub lease: Duration,
    /// Nonces that are not final at once.
    pub in_flight_max: usize,
    /// Intents that are not final at once.
    pub queue_max: usize,
    /// Transactions signed for one nonce.
    pub transactions_max: usize,
    /// Bytes of an intent's data; nodes take 128 KiB for a whole transaction.
    pub data_bytes_max: usize,
    /// Pause between turns while something is waited for.
    pub poll: Duration,
    /// The keccak of the code that must be at these addresses.
    pub code: BTreeMap<Address, B256>,
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self {
            max_fee_per_gas: 100_000_000_000,
            cost_max: U256::from(50_000_000_000_000_000_u64),
            stuck_after: Duration::from_secs(60),
            lease: Duration::from_secs(30),
            in_flight_max: 16,
            queue_max: 10_000,
            transactions_max: 64,
            data_bytes_max: 120 << 10,
            poll: Duration::from_secs(2),
            code: BTreeMap::new(),
        }
    }
}

/// What one turn did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Whether this process has the lease; without it nothing else is done.
    pub leads: bool,
    /// Intents given a nonce.
    pub signed: usize,
    /// Nonces given to nothing, so that those behind them are not held up.
    pub gaps_filled: usize,
    /// Transactions handed to the node, the signed ones and replacements included.
    pub broadcast: usize,
    /// Transactions that took the place of one that was stuck.
    pub replaced: usize,
    /// Nonces newly seen in a block.
    pub mined: usize,
    /// Nonces whose block was taken back.
    pub taken_back: usize,
    /// Nonces that became final.
    pub finalized: usize,
    /// Nonces that went to a transaction that is not in the outbox.
    pub lost: usize,
    /// What something waits for, the last of them.
    pub waiting: Option<String>,
}

/// Sends for one account on one chain.
pub struct Sender {
    pub(crate) chain: Chain,
    pub(crate) signer: Signer,
    pub(crate) outbox: Outbox,
    pub(crate) config: SenderConfig,
    /// Names this sender in the lease.
    pub(crate) holder: String,
    /// Whether the next turn with the lease hands everything to the node again.
    pub(crate) fresh: AtomicBool,
    /// Turns of this sender come one after another: they share a lease, which cannot tell them apart.
    turning: Mutex<()>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("account", &self.account()).field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl Sender {
    /// A sender with the tables of [`SCHEMA`](crate::outbox::SCHEMA) in `database`. What an earlier process left is taken up
    /// by the first turn.
    #[must_use]
    pub fn new(chain: Chain, signer: Signer, database: Arc<Database>, config: SenderConfig) -> Self {
        let outbox = Outbox::new(database, chain.id(), signer.address());
        let holder = format!("{}-{:016x}", std::process::id(), rand::random::<u64>());
        Self { chain, signer, outbox, config, holder, fresh: AtomicBool::new(true), turning: Mutex::default() }
    }

    /// Who pays.
    #[must_use]
    pub fn account(&self) -> Address {
        self.signer.address()
    }

    /// The chain that is sent to.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Keeps what is to happen, or finds what is known of the same key. A later turn sends it.
    ///
    /// # Errors
    /// Nothing is kept where the node is another chain's, the contract is missing or another one, the call would revert or
    /// use too much gas, or the account has too little; where the key stands for another call; where the outbox is full.
    pub async fn submit(&self, intent: &Intent) -> Result<IntentId, SettlementError> {
        if intent.key.is_empty() || intent.key.len() > KEY_BYTES_MAX {
            return Err(InvalidField::new("key", format!("must have 1 to {KEY_BYTES_MAX} bytes")).into());
        }
        if intent.content.data.len() > self.config.data_bytes_max {
            let why = format!("has {} bytes; the most is {}", intent.content.data.len(), self.config.data_bytes_max);
            return Err(InvalidField::new("data", why).into());
        }
        if self.outbox.find(&intent.key).await?.is_none() {
            self.chain.check_id().await?;
            let verdict =
                preflight::judge(&self.chain, &self.config, self.account(), &intent.content, U256::ZERO).await?;
            if let Verdict::Refuse(refused) = verdict {
                return Err(refused);
            }
        }
        self.outbox.submit(intent, self.config.queue_max).await
    }

    /// What is known of a key.
    ///
    /// # Errors
    /// [`SettlementError::Database`].
    pub async fn find(&self, key: &str) -> Result<Option<IntentId>, SettlementError> {
        self.outbox.find(key).await
    }

    /// Where an intent is.
    ///
    /// # Errors
    /// [`SettlementError::UnknownIntent`]; [`SettlementError::Database`].
    pub async fn status(&self, id: IntentId) -> Result<Status, SettlementError> {
        self.outbox.status(id).await
    }

    /// Queues an intent again that was refused or reverted.
    ///
    /// # Errors
    /// [`SettlementError::NotFailed`] where it was neither; [`SettlementError::Database`].
    pub async fn retry(&self, id: IntentId) -> Result<(), SettlementError> {
        self.outbox.retry(id).await
    }

    /// One step of everything that is not final, by the system's clock.
    ///
    /// # Errors
    /// As [`Self::turn_at`].
    pub async fn turn(&self) -> Result<Turn, SettlementError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.turn_at(UnixMs(i64::try_from(now.as_millis()).unwrap_or(i64::MAX))).await
    }

    /// One step of everything that is not final: what has no nonce is signed, kept and broadcast; receipts are looked for;
    /// what is stuck is replaced and what was dropped is broadcast again. May be given up halfway and called again. `now`
    /// decides who has the lease and what is stuck.
    ///
    /// # Errors
    /// [`SettlementError`] where the node or the database fails; what was done until then is kept.
    pub async fn turn_at(&self, now: UnixMs) -> Result<Turn, SettlementError> {
        let _turn = self.turning.lock().await;
        match self.step(now).await {
            Err(SettlementError::LeaseLost { account }) => {
                tracing::warn!(account, "another process took the lease; standing by");
                Ok(Turn::default())
            }
            done => done,
        }
    }

    /// Takes turns until nothing more happens to an intent by itself; `progress` hears of every change. Waits for ever if
    /// need be: drop it to stop.
    ///
    /// # Errors
    /// [`SettlementError`] that trying again does not help against.
    pub async fn wait_finalized(
        &self,
        id: IntentId,
        mut progress: impl FnMut(&Status),
    ) -> Result<Status, SettlementError> {
        self.wait_until(id, |status| {
            progress(status);
            false
        })
        .await
    }

    /// As [`Sender::wait_finalized`], or until `enough` says so of a change.
    ///
    /// # Errors
    /// As [`Sender::wait_finalized`].
    pub async fn wait_until(
        &self,
        id: IntentId,
        mut enough: impl FnMut(&Status) -> bool,
    ) -> Result<Status, SettlementError> {
        let mut last = None;
        loop {
            match self.turn().await {
                Err(error) if error.is_retryable() => tracing::warn!(%error, "trying again"),
                done => drop(done?),
            }
            let status = self.status(id).await?;
            let changed = last.as_ref() != Some(&status);
            if (changed && enough(&status)) || status.is_terminal() {
                return Ok(status);
            }
            last = Some(status);
            tokio::time::sleep(self.config.poll).await;
        }
    }

    /// Lets another process lead at once. Only for a sender that takes no more turns.
    ///
    /// # Errors
    /// [`SettlementError::Database`].
    pub async fn close(&self) -> Result<(), SettlementError> {
        self.outbox.release(&self.holder).await
    }
}
