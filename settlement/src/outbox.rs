//! What an account has to send and what it has signed, kept so that a process may end anywhere.
//!
//! Three rows tell one story: an **intent** (what is to happen once), the **nonce** it was given, the **transactions** signed
//! for that nonce, each replacing the one before. Every change of a nonce is made in one transaction with a look at the
//! **lease**: who was overtaken by another process changes nothing any more.
//!
//! ```text
//! intent  queued ──signed──> sent ──final──> final (succeeded or reverted)
//!            ^ │                │ the nonce went to another transaction of the key
//!            │ └─> elsewhere    ├─> queued, where a view can tell whether it happened
//!         retry └> refused <────┘   refused, where none can
//!
//! nonce   open <──> mined ──> final          open ──> lost
//! ```

use std::sync::Arc;

use alloy::primitives::{Address, B256, Bytes, U256};
use openlora_database::{Database, DatabaseError, Schema, Version, kill};
use serde::{Deserialize, Serialize};
use sqlx::{Any, AnyConnection, Row as _, any::AnyRow, query};

use crate::{SettlementError, chain::Receipt};

/// The tables of this room.
pub const SCHEMA: Schema = &[Version {
    number: 2001,
    name: "sender",
    sqlite: include_str!("../migrations/sqlite/2001_sender.sql"),
    postgres: include_str!("../migrations/postgres/2001_sender.sql"),
}];

const READ: &str = "read what is to be sent";
const WRITE: &str = "write what is to be sent";

/// Milliseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixMs(pub i64);

/// An intent's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IntentId(pub(crate) i64);

/// What is to happen on the chain, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Names it for ever, such as `propose 31337 0x… 7`.
    pub key: String,
    /// What is done.
    pub content: Content,
}

/// The call of an intent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The contract or account called; none to create a contract.
    pub to: Option<Address>,
    /// Selector and arguments, or the new contract's code.
    pub data: Bytes,
    /// Wei sent along.
    pub value: U256,
    /// Gas that it may use at most.
    pub gas_max: u64,
    /// How to see whether it has happened already, whoever did it. Without it, an intent whose nonce went to a transaction
    /// that is not in the outbox is refused instead of sent again.
    pub done: Option<Done>,
}

/// A view of a contract that tells whether an intent's effect is there: the first word it returns, as a number, is at least
/// `at_least`. So for an epoch's number, a claimed total, a role held (1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The contract.
    pub to: Address,
    /// Selector and arguments.
    pub data: Bytes,
    /// The first word that means done.
    pub at_least: U256,
}

/// Where an intent is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Not signed yet.
    Queued {
        /// What for, where it has to wait.
        waiting: Option<String>,
    },
    /// Signed, and handed to the node or about to be.
    Broadcast {
        /// Its nonce.
        nonce: u64,
        /// Every transaction signed for it; one of them at most gets into a block.
        hashes: Vec<B256>,
        /// What for, where it has to wait.
        waiting: Option<String>,
    },
    /// In a block that may still be taken back.
    Mined {
        /// Its nonce: with the account, where a contract is created.
        nonce: u64,
        /// The transaction.
        hash: B256,
        /// The block's number.
        block: u64,
        /// Whether it did not revert.
        succeeded: bool,
    },
    /// In a block for ever.
    Finalized {
        /// Its nonce: with the account, where a contract was created.
        nonce: u64,
        /// The transaction.
        hash: B256,
        /// The block's number.
        block: u64,
        /// Why it reverted, where it did.
        reverted: Option<String>,
    },
    /// Its effect is there for ever, by a transaction that is not in the outbox.
    DoneElsewhere,
    /// It was not sent, or its nonce was taken from it; [`retry`](crate::sender::Sender::retry) queues it again.
    Refused {
        /// Why.
        reason: String,
    },
}

impl Status {
    /// Whether nothing more happens by itself.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finalized { .. } | Self::DoneElsewhere | Self::Refused { .. })
    }
}

/// Bytes as the node gets them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signed {
    pub(crate) hash: B256,
    pub(crate) raw: Vec<u8>,
    pub(crate) signed: UnixMs,
}

/// A nonce that is not final.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) nonce: u64,
    pub(crate) intent: Option<IntentId>,
    /// The transaction and the block it was last seen in.
    pub(crate) mined: Option<(B256, B256)>,
    /// Oldest first; never empty.
    pub(crate) transactions: Vec<Signed>,
}

impl Slot {
    pub(crate) fn newest(&self) -> &Signed {
        self.transactions.last().expect("a nonce is given away with a transaction")
    }
}

/// The right to change nonces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    holder: String,
    fence: i64,
}

/// The rows of one account on one chain.
pub(crate) struct Outbox {
    database: Arc<Database>,
    chain: i64,
    account: String,
}

fn failed(action: &'static str) -> impl FnOnce(sqlx::Error) -> SettlementError {
    move |error| DatabaseError::new(action)(error).into()
}

/// A column that this file wrote.
fn column<'r, T: sqlx::Decode<'r, Any> + sqlx::Type<Any>>(row: &'r AnyRow, name: &str) -> Result<T, SettlementError> {
    row.try_get(name).map_err(failed(READ))
}

fn parsed<T: std::str::FromStr>(text: &str) -> Result<T, SettlementError>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|error| failed(READ)(sqlx::Error::Decode(Box::new(error))))
}

impl Outbox {
    pub(crate) fn new(database: Arc<Database>, chain: u64, account: Address) -> Self {
        // EIP-2294 bounds chain ids far below 2^63.
        Self { database, chain: chain as i64, account: account.to_string() }
    }

    /// Takes the lease or keeps it; nothing where another process has it.
    pub(crate) async fn lease(
        &self,
        holder: &str,
        now: UnixMs,
        until: UnixMs,
    ) -> Result<Option<Lease>, SettlementError> {
        let work = async |db: &mut AnyConnection| {
            let sql = "INSERT INTO sender_lease (chain, account, holder, fence, expires_ms) VALUES ($1, $2, '', 0, 0) \
                       ON CONFLICT (chain, account) DO NOTHING";
            query(sql).bind(self.chain).bind(&self.account).execute(&mut *db).await.map_err(failed(WRITE))?;
            let (found, fence, expires) = self.found(db).await?;
            let fence = match found == holder {
                true => fence,
                false if expires > now.0 => return Ok(None),
                false => fence + 1,
            };
            let sql =
                "UPDATE sender_lease SET holder = $3, fence = $4, expires_ms = $5 WHERE chain = $1 AND account = $2";
            let statement = query(sql).bind(self.chain).bind(&self.account).bind(holder).bind(fence).bind(until.0);
            statement.execute(&mut *db).await.map_err(failed(WRITE))?;
            Ok(Some(Lease { holder: holder.to_owned(), fence }))
        };
        self.database.change("take the lease of a key", work).await
    }

    /// Lets another process have the lease now.
    pub(crate) async fn release(&self, holder: &str) -> Result<(), SettlementError> {
        let work = async |db: &mut AnyConnection| {
            let sql = "UPDATE sender_lease SET expires_ms = 0 WHERE chain = $1 AND account = $2 AND holder = $3";
            let statement = query(sql).bind(self.chain).bind(&self.account).bind(holder);
            statement.execute(&mut *db).await.map(drop).map_err(failed(WRITE))
        };
        self.database.change("give back the lease of a key", work).await
    }

    async fn found(&self, db: &mut AnyConnection) -> Result<(String, i64, i64), SettlementError> {
        let sql = "SELECT holder, fence, expires_ms FROM sender_lease WHERE chain = $1 AND account = $2";
        let row = query(sql).bind(self.chain).bind(&self.account).fetch_one(db).await.map_err(failed(READ))?;
        Ok((column(&row, "holder")?, column(&row, "fence")?, column(&row, "expires_ms")?))
    }

    /// Runs `work` in one transaction with the look at the lease. The fence alone decides, so no clock does: a lease that
    /// ran out and that nobody took is as good as new.
    async fn fenced<T>(
        &self,
        lease: &Lease,
        work: impl AsyncFn(&mut AnyConnection) -> Result<T, SettlementError>,
    ) -> Result<T, SettlementError> {
        let work = async |db: &mut AnyConnection| {
            let (holder, fence, _) = self.found(db).await?;
            if (&holder, fence) != (&lease.holder, lease.fence) {
                return Err(SettlementError::LeaseLost { account: self.account.clone() });
            }
            work(db).await
        };
        self.database.change(WRITE, work).await
    }

    /// Keeps an intent, or finds the same one.
    pub(crate) async fn submit(&self, intent: &Intent, queue_max: usize) -> Result<IntentId, SettlementError> {
        let content = serde_json::to_string(&intent.content).expect("numbers and bytes are JSON");
        let work = async |db: &mut AnyConnection| {
            if let Some((id, known)) = self.known(db, &intent.key).await? {
                let taken = || SettlementError::KeyTaken { key: intent.key.clone() };
                return if known == content { Ok(id) } else { Err(taken()) };
            }
            let sql = "SELECT COUNT(*) AS open FROM sender_intent WHERE chain = $1 AND account = $2 \
                       AND state IN ('queued', 'sent')";
            let row =
                query(sql).bind(self.chain).bind(&self.account).fetch_one(&mut *db).await.map_err(failed(READ))?;
            if column::<i64>(&row, "open")? >= queue_max as i64 {
                return Err(SettlementError::OutboxFull { max: queue_max });
            }
            let sql = "INSERT INTO sender_intent (id, chain, account, intent_key, content, state) \
                       SELECT COALESCE(MAX(id), 0) + 1, $1, $2, $3, $4, 'queued' FROM sender_intent RETURNING id";
            let statement = query(sql).bind(self.chain).bind(&self.account).bind(&intent.key).bind(&content);
            let row = statement.fetch_one(&mut *db).await.map_err(failed(WRITE))?;
            column(&row, "id").map(IntentId)
        };
        kill::point("before an intent is kept");
        let id = self.database.change(WRITE, work).await?;
        kill::point("after an intent was kept");
        Ok(id)
    }

    /// Finds an intent by its key.
    pub(crate) async fn find(&self, key: &str) -> Result<Option<IntentId>, SettlementError> {
        let mut db = self.database.reader().acquire().await.map_err(failed(READ))?;
        Ok(self.known(&mut db, key).await?.map(|(id, _)| id))
    }

    async fn known(&self, db: &mut AnyConnection, key: &str) -> Result<Option<(IntentId, String)>, SettlementError> {
        let sql = "SELECT id, content FROM sender_intent WHERE chain = $1 AND account = $2 AND intent_key = $3";
        let found = query(sql).bind(self.chain).bind(&self.account).bind(key).fetch_optional(db).await;
        let row = found.map_err(failed(READ))?;
        row.map(|row| Ok((IntentId(column(&row, "id")?), column(&row, "content")?))).transpose()
    }

    /// Queues an intent again that was refused or reverted.
    pub(crate) async fn retry(&self, id: IntentId) -> Result<(), SettlementError> {
        let work = async |db: &mut AnyConnection| {
            let sql = "UPDATE sender_intent SET state = 'queued', note = NULL WHERE id = $1 AND chain = $2 AND account = $3 \
                       AND (state = 'refused' OR state = 'final' AND note IS NOT NULL)";
            let done = query(sql).bind(id.0).bind(self.chain).bind(&self.account).execute(&mut *db).await;
            match done.map_err(failed(WRITE))?.rows_affected() {
                1 => Ok(()),
                _ => Err(SettlementError::NotFailed { id: id.0 }),
            }
        };
        self.database.change(WRITE, work).await
    }

    /// The oldest intents that have no nonce.
    pub(crate) async fn queued(&self, max: usize) -> Result<Vec<(IntentId, Content)>, SettlementError> {
        let sql = "SELECT id, content FROM sender_intent WHERE chain = $1 AND account = $2 AND state = 'queued' \
                   ORDER BY id LIMIT $3";
        let statement = query(sql).bind(self.chain).bind(&self.account).bind(max as i64);
        let rows = statement.fetch_all(self.database.reader()).await.map_err(failed(READ))?;
        let read = |row: &AnyRow| Ok((IntentId(column(row, "id")?), content(row)?));
        rows.iter().map(read).collect()
    }

    /// An intent's call.
    pub(crate) async fn content(&self, id: IntentId) -> Result<Content, SettlementError> {
        let sql = "SELECT content FROM sender_intent WHERE id = $1";
        content(&query(sql).bind(id.0).fetch_one(self.database.reader()).await.map_err(failed(READ))?)
    }

    /// Where an intent is.
    pub(crate) async fn status(&self, id: IntentId) -> Result<Status, SettlementError> {
        let mut db = self.database.snapshot().await?;
        let sql = "SELECT i.state, i.nonce, i.note, n.state AS place, n.hash, n.block, n.succeeded FROM sender_intent i \
                   LEFT JOIN sender_nonce n ON n.chain = i.chain AND n.account = i.account AND n.nonce = i.nonce \
                   WHERE i.id = $1 AND i.chain = $2 AND i.account = $3";
        let found = query(sql).bind(id.0).bind(self.chain).bind(&self.account).fetch_optional(&mut *db).await;
        let row = found.map_err(failed(READ))?.ok_or(SettlementError::UnknownIntent { id: id.0 })?;
        let note: Option<String> = column(&row, "note")?;
        let nonce = column::<Option<i64>>(&row, "nonce")?.unwrap_or_default() as u64;
        let mined = || -> Result<(B256, u64), SettlementError> {
            Ok((parsed(&column::<String>(&row, "hash")?)?, column::<i64>(&row, "block")? as u64))
        };
        match (&*column::<String>(&row, "state")?, column::<Option<String>>(&row, "place")?.as_deref()) {
            ("queued", _) => Ok(Status::Queued { waiting: note }),
            ("sent", Some("mined")) => {
                let succeeded = column::<i64>(&row, "succeeded")? == 1;
                mined().map(|(hash, block)| Status::Mined { nonce, hash, block, succeeded })
            }
            ("sent", _) => {
                let hashes = self.transactions(&mut db, nonce).await?.into_iter().map(|signed| signed.hash).collect();
                Ok(Status::Broadcast { nonce, hashes, waiting: note })
            }
            ("final", _) => mined().map(|(hash, block)| Status::Finalized { nonce, hash, block, reverted: note }),
            ("elsewhere", _) => Ok(Status::DoneElsewhere),
            _ => Ok(Status::Refused { reason: note.unwrap_or_default() }),
        }
    }

    /// Nonces that are not final, in order.
    pub(crate) async fn slots(&self) -> Result<Vec<Slot>, SettlementError> {
        let mut db = self.database.snapshot().await?;
        let sql = "SELECT nonce, intent, hash, block_hash FROM sender_nonce WHERE chain = $1 AND account = $2 \
                   AND state IN ('open', 'mined') ORDER BY nonce";
        let rows = query(sql).bind(self.chain).bind(&self.account).fetch_all(&mut *db).await.map_err(failed(READ))?;
        let mut slots = Vec::with_capacity(rows.len());
        for row in &rows {
            let nonce = column::<i64>(row, "nonce")? as u64;
            let hashes = (column::<Option<String>>(row, "hash")?, column::<Option<String>>(row, "block_hash")?);
            slots.push(Slot {
                nonce,
                intent: column::<Option<i64>>(row, "intent")?.map(IntentId),
                mined: match hashes {
                    (Some(hash), Some(block)) => Some((parsed(&hash)?, parsed(&block)?)),
                    _ => None,
                },
                transactions: self.transactions(&mut db, nonce).await?,
            });
        }
        Ok(slots)
    }

    async fn transactions(&self, db: &mut AnyConnection, nonce: u64) -> Result<Vec<Signed>, SettlementError> {
        let sql = "SELECT hash, raw, signed_ms FROM sender_transaction WHERE chain = $1 AND account = $2 AND nonce = $3 \
                   ORDER BY replacement";
        let rows = query(sql).bind(self.chain).bind(&self.account).bind(nonce as i64).fetch_all(db).await;
        let read = |row: &AnyRow| {
            let signed = UnixMs(column(row, "signed_ms")?);
            Ok(Signed { hash: parsed(&column::<String>(row, "hash")?)?, raw: column(row, "raw")?, signed })
        };
        rows.map_err(failed(READ))?.iter().map(read).collect()
    }

    /// The highest nonce that is final, if any.
    pub(crate) async fn final_nonce(&self) -> Result<Option<u64>, SettlementError> {
        let sql = "SELECT MAX(nonce) AS nonce FROM sender_nonce WHERE chain = $1 AND account = $2 AND state = 'final'";
        let found = query(sql).bind(self.chain).bind(&self.account).fetch_one(self.database.reader()).await;
        let row = found.map_err(failed(READ))?;
        Ok(column::<Option<i64>>(&row, "nonce")?.map(|nonce| nonce as u64))
    }

    /// The chain's first block, as it was when this was asked first.
    pub(crate) async fn genesis(&self, lease: &Lease, found: B256) -> Result<B256, SettlementError> {
        self.fenced(lease, async |db| {
            let sql = "UPDATE sender_lease SET genesis = COALESCE(genesis, $3) WHERE chain = $1 AND account = $2 RETURNING genesis";
            let statement = query(sql).bind(self.chain).bind(&self.account).bind(found.to_string());
            parsed(&column::<String>(&statement.fetch_one(db).await.map_err(failed(WRITE))?, "genesis")?)
        })
        .await
    }

    /// The lowest nonce never given away: as kept, unless the chain is further (the key was used elsewhere).
    pub(crate) async fn next_nonce(&self, lease: &Lease, of_chain: u64) -> Result<u64, SettlementError> {
        self.fenced(lease, async |db| {
            let sql = "SELECT next_nonce FROM sender_lease WHERE chain = $1 AND account = $2";
            let found = query(sql).bind(self.chain).bind(&self.account).fetch_one(&mut *db).await;
            let kept = column::<Option<i64>>(&found.map_err(failed(READ))?, "next_nonce")?;
            let next = kept.map_or(of_chain, |kept| of_chain.max(kept as u64));
            if kept != Some(next as i64) {
                self.set_next_nonce(db, next).await?;
            }
            Ok(next)
        })
        .await
    }

    async fn set_next_nonce(&self, db: &mut AnyConnection, next: u64) -> Result<(), SettlementError> {
        let sql = "UPDATE sender_lease SET next_nonce = $3 WHERE chain = $1 AND account = $2";
        let statement = query(sql).bind(self.chain).bind(&self.account).bind(next as i64);
        statement.execute(db).await.map(drop).map_err(failed(WRITE))
    }

    /// Gives away a nonce, with the transaction that uses it.
    pub(crate) async fn give(
        &self,
        lease: &Lease,
        nonce: u64,
        intent: Option<IntentId>,
        signed: &Signed,
    ) -> Result<(), SettlementError> {
        kill::point("before a nonce is given away");
        self.fenced(lease, async |db| {
            let sql = "INSERT INTO sender_nonce (chain, account, nonce, intent, state) VALUES ($1, $2, $3, $4, 'open')";
            let statement = query(sql).bind(self.chain).bind(&self.account).bind(nonce as i64);
            let statement = statement.bind(intent.map(|intent| intent.0));
            statement.execute(&mut *db).await.map_err(failed(WRITE))?;
            self.insert(db, nonce, 0, signed).await?;
            let Some(intent) = intent else { return Ok(()) };
            self.set_next_nonce(db, nonce + 1).await?;
            let sql =
                "UPDATE sender_intent SET state = 'sent', nonce = $2, note = NULL WHERE id = $1 AND state = 'queued'";
            let done = query(sql).bind(intent.0).bind(nonce as i64).execute(&mut *db).await.map_err(failed(WRITE))?;
            match done.rows_affected() {
                1 => Ok(()),
                _ => Err(SettlementError::UnknownIntent { id: intent.0 }),
            }
        })
        .await?;
        kill::point("after a nonce was given away");
        Ok(())
    }

    /// Keeps a transaction that takes the place of the newest of its nonce.
    pub(crate) async fn replace(&self, lease: &Lease, slot: &Slot, signed: &Signed) -> Result<(), SettlementError> {
        kill::point("before a replacement");
        let number = slot.transactions.len();
        self.fenced(lease, async |db| self.insert(db, slot.nonce, number, signed).await).await?;
        kill::point("after a replacement");
        Ok(())
    }

    async fn insert(
        &self,
        db: &mut AnyConnection,
        nonce: u64,
        number: usize,
        signed: &Signed,
    ) -> Result<(), SettlementError> {
        let sql = "INSERT INTO sender_transaction (chain, account, nonce, replacement, hash, raw, signed_ms) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let statement = query(sql).bind(self.chain).bind(&self.account).bind(nonce as i64).bind(number as i64);
        let statement = statement.bind(signed.hash.to_string()).bind(&signed.raw[..]).bind(signed.signed.0);
        statement.execute(db).await.map(drop).map_err(failed(WRITE))
    }

    /// A transaction was seen in a block.
    pub(crate) async fn mined(&self, lease: &Lease, slot: &Slot, receipt: &Receipt) -> Result<(), SettlementError> {
        kill::point("before a receipt is kept");
        self.fenced(lease, async |db| {
            self.place(db, slot.nonce, "mined", Some(receipt)).await?;
            self.annotate(db, slot.intent, "sent", None).await
        })
        .await?;
        kill::point("after a receipt was kept");
        Ok(())
    }

    /// The block was taken back.
    pub(crate) async fn taken_back(&self, lease: &Lease, slot: &Slot) -> Result<(), SettlementError> {
        self.fenced(lease, async |db| self.place(db, slot.nonce, "open", None).await).await
    }

    /// The block is final. `reverted` says why nothing came of it.
    pub(crate) async fn finalized(
        &self,
        lease: &Lease,
        slot: &Slot,
        receipt: &Receipt,
        reverted: Option<&str>,
    ) -> Result<(), SettlementError> {
        kill::point("before a nonce is final");
        self.fenced(lease, async |db| {
            self.place(db, slot.nonce, "final", Some(receipt)).await?;
            self.annotate(db, slot.intent, "final", reverted).await
        })
        .await?;
        kill::point("after a nonce is final");
        Ok(())
    }

    /// The nonce went to a transaction that is not here; the intent goes back to the queue, or is refused.
    pub(crate) async fn lost(
        &self,
        lease: &Lease,
        slot: &Slot,
        again: bool,
        note: &str,
    ) -> Result<(), SettlementError> {
        self.fenced(lease, async |db| {
            self.place(db, slot.nonce, "lost", None).await?;
            self.annotate(db, slot.intent, if again { "queued" } else { "refused" }, Some(note)).await
        })
        .await
    }

    /// Changes an intent's state: what it waits for, that it was refused, that another did it.
    pub(crate) async fn mark(
        &self,
        lease: &Lease,
        intent: Option<IntentId>,
        state: &str,
        note: Option<&str>,
    ) -> Result<(), SettlementError> {
        self.fenced(lease, async |db| self.annotate(db, intent, state, note).await).await
    }

    async fn annotate(
        &self,
        db: &mut AnyConnection,
        intent: Option<IntentId>,
        state: &str,
        note: Option<&str>,
    ) -> Result<(), SettlementError> {
        let Some(intent) = intent else { return Ok(()) };
        // Nothing is written where nothing changes.
        let sql = "UPDATE sender_intent SET state = $2, note = $3 WHERE id = $1 \
                   AND (state <> $2 OR COALESCE(note, '') <> COALESCE($3, ''))";
        query(sql).bind(intent.0).bind(state).bind(note).execute(db).await.map(drop).map_err(failed(WRITE))
    }

    async fn place(
        &self,
        db: &mut AnyConnection,
        nonce: u64,
        state: &str,
        receipt: Option<&Receipt>,
    ) -> Result<(), SettlementError> {
        let sql = "UPDATE sender_nonce SET state = $4, hash = $5, block = $6, block_hash = $7, succeeded = $8 \
                   WHERE chain = $1 AND account = $2 AND nonce = $3";
        let statement = query(sql).bind(self.chain).bind(&self.account).bind(nonce as i64).bind(state);
        let statement = statement.bind(receipt.map(|receipt| receipt.transaction_hash.to_string()));
        let statement = statement.bind(receipt.map(|receipt| receipt.block() as i64));
        let statement = statement.bind(receipt.map(|receipt| receipt.block_hash.to_string()));
        let statement = statement.bind(receipt.map(|receipt| i64::from(receipt.succeeded())));
        statement.execute(db).await.map(drop).map_err(failed(WRITE))
    }
}

fn content(row: &AnyRow) -> Result<Content, SettlementError> {
    let text: String = column(row, "content")?;
    serde_json::from_str(&text).map_err(|error| failed(READ)(sqlx::Error::Decode(Box::new(error))))
}
