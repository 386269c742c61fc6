//! A sequence's token state, and the slots that live sequences are kept in.

use std::cmp::Reverse;

use openlora_types::{Priority, SequenceId, TenantId, Time, Token};

use crate::SchedulerConfig;
use crate::page_pool::PagePool;
use crate::prefix_cache::{BlockKey, FixedMap};
use crate::queue::Ticket;
use crate::rate::Rate;
use crate::residency::AdapterNeed;

/// Stands for a token that a plan without results draws.
pub(crate) const UNKNOWN: Token = 0;

/// One sequence as it is submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// Never used before in this scheduler.
    pub id: SequenceId,
    /// Whom it is accounted to; prefixes are shared only inside one tenant.
    pub tenant: TenantId,
    /// Its tenant's rate from now on; `None` is none. What was computed under an earlier rate stays charged while there is one.
    pub rate: Option<Rate>,
    /// Its adapter; `None` is the base model.
    pub adapter: Option<AdapterNeed>,
    /// Prefixes are shared only under the same salt.
    pub cache_salt: String,
    /// Which class it waits in.
    pub priority: Priority,
    /// The first [`Scheduler::schedule`](crate::Scheduler::schedule) at or after this time ends it.
    pub deadline: Option<Time>,
    /// At least one token.
    pub prompt: Vec<Token>,
    /// Tokens to generate at most, at least 1.
    pub max_tokens: u32,
    /// Whether its prompt may start from cached blocks; false where every prompt row must be computed (prompt
    /// log-probabilities). Its own blocks are cached for others either way.
    pub use_prefix_cache: bool,
}

/// What a sequence is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the queue; holds no block.
    Waiting,
    /// Holds blocks and gets at least one row in every fourth step, and in every step where all can have one.
    Running,
    /// All its rows are planned and only its last token is to come: holds nothing any more.
    Ending,
}

/// A live sequence.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) deadline: Option<Time>,
    pub(crate) use_prefix_cache: bool,
    /// Its place in the queue, now or when it waits again.
    pub(crate) ticket: Ticket,
    pub(crate) phase: Phase,
    /// Number of its first admission; kept over preemptions, so that it never loses its rank to a newcomer.
    pub(crate) admission: Option<u64>,
    /// Steps in which it was passed over because another sequence was computing its next block.
    pub(crate) deferrals: usize,
    /// Prompt, then what was generated; [`UNKNOWN`] for tokens that plans without results draw.
    pub(crate) tokens: Vec<Token>,
    /// How many of them, the last ones, are not known yet.
    pub(crate) unknown: usize,
    pub(crate) prompt_len: usize,
    pub(crate) max_tokens: usize,
    /// Leading tokens whose keys and values are in `blocks` once all plans made so far have run.
    pub(crate) computed: usize,
    /// Steps in a row in which it ran and got no row.
    pub(crate) left_out: u8,
    /// In a step that keeps rows: whether its tenant runs less than its share, and whether it must have a row.
    pub(crate) below_share: bool,
    pub(crate) owed: bool,
    /// Enough for `computed` tokens and not one more.
    pub(crate) blocks: Vec<u32>,
    /// Leading blocks that were offered to the prefix cache or came from it.
    pub(crate) published: usize,
    /// Parent of the first block's key.
    root: BlockKey,
    /// Keys of all full blocks of `tokens`; empty where there is no prefix cache.
    pub(crate) keys: Vec<BlockKey>,
}

impl Sequence {
    pub(crate) fn new(new: NewSequence, ticket: Ticket) -> Self {
        Self {
            id: new.id,
            deadline: new.deadline,
            use_prefix_cache: new.use_prefix_cache,
            ticket,
            phase: Phase::Waiting,
            admission: None,
            deferrals: 0,
            root: BlockKey::root(new.adapter.as_ref().map(|need| &need.generation), &new.tenant, &new.cache_salt),
            prompt_len: new.prompt.len(),
            tokens: new.prompt,
            unknown: 0,
            max_tokens: new.max_tokens as usize,
            computed: 0,
            left_out: 0,
            below_share: false,
            owed: false,
            blocks: Vec::new(),
            published: 0,
            keys: Vec::new(),
        }
    }

    /// Tokens when it ends by length.
    pub(crate) fn tokens_max(&self) -> usize {
        self.prompt_len + self.max_tokens
    }

    /// Tokens that are known.
    pub(crate) fn known(&self) -> usize {
        self.tokens.len() - self.unknown
    }

    /// Brings `keys` up to the known tokens.
    pub(crate) fn extend_keys(&mut self, block_size: usize) {
        for block in self.tokens[..self.known()].chunks_exact(block_size).skip(self.keys.len()) {
            let key = self.keys.last().unwrap_or(&self.root).child(block);
            self.keys.push(key);
        }
    }

    /// Leading blocks that a cache hit may cover: full ones, and never the last token, whose row must be computed to
    /// sample from it.
    pub(crate) fn reusable_blocks(&self, block_size: usize) -> usize {
        if self.use_prefix_cache { self.keys.len().min((self.tokens.len() - 1) / block_size) } else { 0 }
    }

    /// Offers the blocks that became full and computed to the prefix cache.
    pub(crate) fn publish(&mut self, pool: &mut PagePool, block_size: usize) {
        let full = self.keys.len().min(self.computed / block_size);
        for block in self.published..full {
            pool.publish(self.blocks[block], self.keys[block]);
        }
        self.published = self.published.max(full);
    }

    /// Takes all room it will ever need, once, so that its later steps do not allocate.
    pub(crate) fn reserve(&mut self, config: &SchedulerConfig) {
        let (tokens, blocks) = (self.tokens_max(), config.blocks_for(self.tokens_max()));
        self.tokens.reserve_exact(tokens - self.tokens.len());
        self.blocks.reserve_exact(blocks - self.blocks.len());
        if config.prefix_cache {
            self.keys.reserve_exact(tokens / config.block_size - self.keys.len());
        }
    }
}

/// Live sequences by slot. Slots are small integers that queues and lists carry in place of ids; a slot is reused when its
/// sequence has ended and no list names it any more.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    entries: Vec<Option<Sequence>>,
    vacant: Vec<u32>,
    by_id: FixedMap<SequenceId, u32>,
}

impl Slots {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn find(&self, id: SequenceId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn insert(&mut self, sequence: impl FnOnce(u32) -> Sequence) -> u32 {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            u32::try_from(self.entries.len() - 1).expect("live sequences are bounded by validated u32 limits")
        });
        let sequence = sequence(slot);
        self.by_id.insert(sequence.id, slot);
        self.entries[slot as usize] = Some(sequence);
        slot
    }

    pub(crate) fn remove(&mut self, slot: u32) -> Sequence {
        let sequence = self.entries[slot as usize].take().expect("the slot of a live sequence is filled");
        self.by_id.remove(&sequence.id);
        self.vacant.push(slot);
        sequence
    }

    /// Whether the slot's sequence is live; lists that are cleaned later ask this.
    pub(crate) fn is_live(&self, slot: u32) -> bool {
        self.entries[slot as usize].is_some()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Sequence)> {
        self.entries.iter().enumerate().filter_map(|(slot, entry)| entry.as_ref().map(|entry| (slot as u32, entry)))
    }
}

impl std::ops::Index<u32> for Slots {
    type Output = Sequence;

    fn index(&self, slot: u32) -> &Sequence {
        self.entries[slot as usize].as_ref().expect("the slot of a live sequence is filled")
    }
}

impl std::ops::IndexMut<u32> for Slots {
    fn index_mut(&mut self, slot: u32) -> &mut Sequence {
        self.entries[slot as usize].as_mut().expect("the slot of a live sequence is filled")
    }
}

/// How running sequences compete for rows and blocks; the smallest rank is the best and is never preempted. Priority first,
/// an aged sequence counting as of the highest; then first admission: the victim of preemption is the most recently admitted
/// of the lowest priority. Every sequence ages and none is admitted before it again, so every one becomes the best in time.
pub(crate) fn rank(sequence: &Sequence, now: Time, starvation_micros: u64) -> (Reverse<Priority>, u64) {
    let aged = sequence.ticket.is_aged(now, starvation_micros);
    let priority = if aged { Priority::High } else { sequence.ticket.priority };
    (Reverse(priority), sequence.admission.expect("a running sequence was admitted"))
}
