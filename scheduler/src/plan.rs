//! The one hand-off between scheduler and engine: a [`StepPlan`] out, [`SequenceResult`]s back.

use std::ops::Range;

use openlora_types::{Generation, SequenceId, Token};

/// What one step computes, and what moves in and out of the pool before it. The engine drops what is `evicted`, hands the
/// `loads` to whoever loads, runs the `sequences` and calls [`Scheduler::update`](crate::Scheduler::update) with what they drew,
/// before it asks for the next plan or, where a device works by itself, one plan later. Reusable:
/// [`Scheduler::schedule_into`](crate::Scheduler::schedule_into) keeps the buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Sequences with rows in this step, ordered by generation, the base model (`None`) first: an adapter's rows are
    /// neighbours. Within a generation the best-ranked come first.
    pub sequences: Vec<ScheduledSequence>,
    /// The block tables of all sequences, one after the other; see [`ScheduledSequence::table`].
    pub block_tables: Vec<u32>,
    /// Adapters whose pages were taken back, to be dropped before anything else of this plan is done: blocks and loads of the
    /// same plan may be in those pages.
    pub evicted: Vec<Generation>,
    /// Adapters to load, each to be answered by [`Scheduler::adapter_loaded`](crate::Scheduler::adapter_loaded) or
    /// [`Scheduler::adapter_failed`](crate::Scheduler::adapter_failed). There may be some in a plan without sequences.
    pub loads: Vec<AdapterLoad>,
    /// The pages of all loads, one after the other; see [`AdapterLoad::pages`].
    pub load_pages: Vec<u32>,
    /// Sequences put back to waiting for want of pages. They keep their tokens and are recomputed later.
    pub preempted: Vec<SequenceId>,
    /// Sequences whose deadline has passed: ended, their blocks freed, forgotten.
    pub expired: Vec<SequenceId>,
    /// Sum of `rows` over `sequences`; at most `max_num_batched_tokens`.
    pub total_rows: usize,
}

impl StepPlan {
    /// The block table of one of this plan's sequences: block `i` holds the positions `i * block_size ..`.
    #[must_use]
    pub fn table(&self, sequence: &ScheduledSequence) -> &[u32] {
        &self.block_tables[sequence.table..sequence.table + sequence.blocks]
    }

    /// The pages of one of this plan's loads.
    #[must_use]
    pub fn pages(&self, load: &AdapterLoad) -> &[u32] {
        &self.load_pages[load.pages.clone()]
    }

    pub(crate) fn clear(&mut self) {
        self.sequences.clear();
        self.block_tables.clear();
        self.evicted.clear();
        self.loads.clear();
        self.load_pages.clear();
        self.preempted.clear();
        self.expired.clear();
        self.total_rows = 0;
    }
}

/// An adapter to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterLoad {
    /// Which.
    pub generation: Generation,
    /// Where its pages stand in [`StepPlan::load_pages`]: as many as its [`AdapterNeed`](crate::AdapterNeed) names.
    pub pages: Range<usize>,
}

/// The rows of one sequence in a step: its tokens `start..start + rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// Whose.
    pub id: SequenceId,
    /// Its adapter; `None` is the base model.
    pub generation: Option<Generation>,
    /// Tokens whose keys and values are in the blocks already; the position of the first row.
    pub start: usize,
    /// Rows to compute, at least 1.
    pub rows: usize,
    /// Where its block table starts in [`StepPlan::block_tables`].
    pub table: usize,
    /// Blocks in its table: enough for `start + rows` tokens.
    pub blocks: usize,
    /// Whether the last row is the sequence's last token, so that a token is sampled from it.
    pub samples: bool,
    /// Whether the last row's token is not known to the scheduler: the plan before this one draws it, whose results are to come.
    pub drawn: bool,
    /// Tokens found in the prefix cache, in the step in which the sequence is admitted or readmitted; 0 in all others.
    pub cached_tokens: usize,
}

/// What became of a scheduled sequence that samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceResult {
    /// Whose.
    pub id: SequenceId,
    /// The sampled token.
    pub token: Token,
    /// Whether the sequence ends here.
    pub finished: bool,
}
