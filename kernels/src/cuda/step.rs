//! What kernels know of a step: rows, sequences, block tables, adapters of runs of rows, at addresses that stay for all steps of as few
//! rows as passes are recorded for, and for all larger ones.
//!
//! A recorded graph has the addresses and the largest sizes in it; how many rows, sequences and segments there really are is
//! in [`Counts`], which kernels read. So one graph serves every step of its size, whatever adapters are in it.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::{Address, Device, Memory};
use crate::{DrawnToken, KernelError, StepRows};

/// `Counts` in `include/step.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counts {
    /// Rows of the step.
    pub rows: u32,
    /// Its sequences.
    pub sequences: u32,
    /// Runs of rows that share an adapter or have none; 0 when no row has one.
    pub segments: u32,
    /// 0
    pub unused: u32,
}

/// `Sequence` in `include/step.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Sequence {
    /// First row.
    pub row: u32,
    /// Rows.
    pub rows: u32,
    /// First entry in the block tables.
    pub table: u32,
    /// Entries there.
    pub blocks: u32,
}

/// `Segment` in `include/step.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Segment {
    /// First row.
    pub row: u32,
    /// Rows.
    pub rows: u32,
    /// The adapter's sites on the device; 0 for the base model alone.
    pub adapter: Address,
}

/// `Step` in `include/step.cuh`: passed to kernels by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Step {
    /// One [`Counts`].
    pub counts: Address,
    /// `[rows]` u32
    pub tokens: Address,
    /// `[rows]` u32
    pub positions: Address,
    /// `[rows]` u32: the number of each row's sequence.
    pub row_sequence: Address,
    /// `[sequences]` of [`Sequence`]
    pub sequences: Address,
    /// u32: page numbers.
    pub block_tables: Address,
    /// `[segments]` of [`Segment`]
    pub segments: Address,
}

/// Room for the largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows, and so sequences and segments.
    pub rows: usize,
    /// Entries of all block tables.
    pub table_entries: usize,
}

/// The memory of one step.
#[derive(Debug)]
pub struct StepMemory<D: Device> {
    limits: StepLimits,
    memory: Memory<D>,
    /// What was written last, as it lies on the device.
    host: Vec<u8>,
    sequences: Vec<Sequence>,
    row_sequence: Vec<u32>,
    /// Where the drawn tokens of what was written last are, and how many.
    drawn: (Address, usize),
    view: Step,
}

/// Rows of recorded passes.
pub const BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

const ALIGNED: usize = 256;
/// Steps of up to so many rows, for which passes are recorded, lie close together whatever the largest step is: what is copied is as
/// much as they need.
const FEW_ROWS: usize = BUCKETS[BUCKETS.len() - 1];

impl<D: Device> StepMemory<D> {
    /// Room for steps within `limits`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(device: &Arc<D>, limits: StepLimits) -> Result<Self, KernelError> {
        let rows = limits.rows;
        // Behind the block tables that a step has come its drawn tokens.
        let total = layout(Address(0), rows).block_tables.0 as usize
            + limits.table_entries * 4
            + rows * size_of::<DrawnToken>();
        let memory = Memory::new(device, total)?;
        let view = layout(memory.address(), rows);
        Ok(Self {
            limits,
            memory,
            host: vec![0; total],
            sequences: Vec::with_capacity(rows),
            row_sequence: Vec::with_capacity(rows),
            drawn: (view.block_tables, 0),
            view,
        })
    }

    /// Lays the memory out for steps of up to `rows` rows as [`StepMemory::write`] does for one of so many; what was written elsewhere
    /// is lost.
    pub fn lay_out(&mut self, rows: usize) {
        let rows = if rows <= FEW_ROWS { FEW_ROWS.min(self.limits.rows) } else { self.limits.rows };
        self.view = layout(self.memory.address(), rows);
    }

    /// What it has room for.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// Where kernels find what was written last.
    #[must_use]
    pub fn view(&self) -> Step {
        self.view
    }

    /// The drawn tokens of the step written last, `Drawn` in `include/step.cuh`, and how many there are.
    #[must_use]
    pub fn drawn(&self) -> (Address, usize) {
        self.drawn
    }

    /// Copies a step to the device, in one copy. The tokens of its drawn rows are what the host says of them, until
    /// [`rows::take_drawn`](super::rows::take_drawn) has run.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When it is larger than the limits, or its drawn rows are not rows of it in ascending order.
    pub fn write(&mut self, step: &StepRows<'_>, segments: &[Segment]) -> Result<(), KernelError> {
        let (rows, limits) = (step.tokens.len(), self.limits);
        assert!(rows <= limits.rows && segments.len() <= limits.rows, "{rows} rows, {} segments", segments.len());
        assert!(step.block_tables.len() <= limits.table_entries, "{} table entries", step.block_tables.len());
        let ascending = step.drawn.is_sorted_by(|a, b| a.row < b.row);
        assert!(ascending && step.drawn.last().is_none_or(|last| (last.row as usize) < rows), "drawn rows of {rows}");
        self.lay_out(rows);
        self.sequences.clear();
        self.row_sequence.clear();
        for (number, s) in (0..).zip(step.sequences) {
            let [row, rows, table, blocks] = [s.row, s.rows, s.table, s.blocks].map(|value| value as u32);
            self.sequences.push(Sequence { row, rows, table, blocks });
            self.row_sequence.extend(std::iter::repeat_n(number, s.rows));
        }
        // A table's entries have 4 bytes, as much as is aligned here.
        self.drawn = (self.view.block_tables.plus(size_of_val(step.block_tables)), step.drawn.len());
        let Self { host, view, memory, drawn, .. } = self;
        let counts = [step.tokens.len(), self.sequences.len(), segments.len()].map(|count| count as u32);
        let counts = Counts { rows: counts[0], sequences: counts[1], segments: counts[2], unused: 0 };
        let mut put = |at: Address, bytes: &[u8]| {
            let offset = (at.0 - memory.address().0) as usize;
            host[offset..offset + bytes.len()].copy_from_slice(bytes);
            offset + bytes.len()
        };
        put(view.counts, bytemuck::bytes_of(&counts));
        put(view.tokens, bytemuck::cast_slice(step.tokens));
        put(view.positions, bytemuck::cast_slice(step.positions));
        put(view.row_sequence, bytemuck::cast_slice(&self.row_sequence));
        put(view.sequences, bytemuck::cast_slice(&self.sequences));
        put(view.segments, bytemuck::cast_slice(segments));
        put(view.block_tables, bytemuck::cast_slice(step.block_tables));
        let end = put(drawn.0, bytemuck::cast_slice(step.drawn));
        memory.write(0, &host[..end])
    }
}

/// A step's lists, with room for `rows` rows. The block tables come last: there is room for far more of them than most steps have, and no
/// more is copied than there are.
fn layout(start: Address, rows: usize) -> Step {
    let mut at = start;
    let mut list = |bytes: usize| {
        let list = at;
        at = at.plus(bytes.next_multiple_of(ALIGNED));
        list
    };
    Step {
        counts: list(size_of::<Counts>()),
        tokens: list(rows * 4),
        positions: list(rows * 4),
        row_sequence: list(rows * 4),
        sequences: list(rows * size_of::<Sequence>()),
        segments: list(rows * size_of::<Segment>()),
        block_tables: list(0),
    }
}
