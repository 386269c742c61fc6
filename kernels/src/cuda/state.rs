//! What the backend's operations share from call to call: the step that is written, the plans made for it, and the memory of both.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use openlora_types::Token;

use super::attention::{AttentionPartials, AttentionPlan};
use super::device::{Device, Element, Memory, Stream};
use super::lora::{CudaAdapter, LoraLimits, LoraLinear, LoraPlan, RANK_MAX};
use super::rows::{self, DeviceList, Rows};
use super::sample::{SampleLimits, Sampled, Sampler};
use super::step::{BUCKETS, Segment, Step, StepLimits, StepMemory};
use crate::{KernelError, LoraRows, SequenceRows, StepRows};

/// Samplings that may be enqueued and not collected.
pub(super) const SAMPLED: usize = 2;
/// Alternatives of a row that there is room for from the start.
const TOP: usize = 20;
/// Runs of rows with an adapter each that there is room for from the start: as many as a recorded pass has rows.
const SEGMENTS: usize = BUCKETS[BUCKETS.len() - 1];
/// Entries of all block tables that there is room for from the start.
const TABLE_ENTRIES: usize = 1024;

/// What operations share from call to call.
pub(super) struct State<D: Device> {
    /// Rows of the largest tensor so far.
    pub(super) rows_max: usize,
    /// Of a pass.
    pub(super) step: Option<StepMemory<D>>,
    /// What `step` was written with.
    pub(super) written: Written,
    /// Of the rows that have adapters at an operation, where they are not the pass's.
    pub(super) others: Option<StepMemory<D>>,
    /// The runs of rows that the plan was made for last, and the numbers of their adapters, 0 for none. Not their addresses: an adapter
    /// may come to lie where another one was.
    pub(super) planned: Vec<(u32, u32, u64)>,
    /// Every linear that adapters may target.
    pub(super) linears: Vec<LoraLinear>,
    /// The model's layers, once they are known.
    pub(super) layers: usize,
    pub(super) lora: Option<LoraPlan<D>>,
    /// Segments that it has room for.
    pub(super) segments_max: usize,
    /// For the layers of each window, and whether made for the step.
    pub(super) attention: Vec<(Option<usize>, AttentionPlan<D>, bool)>,
    pub(super) partials: Option<AttentionPartials<D>>,
    pub(super) picked: Option<DeviceList<D, u32>>,
    pub(super) sampler: Option<(Sampler<D>, SampleLimits)>,
    /// Enqueued and not collected, the older first.
    pub(super) sampled: VecDeque<Sampled<D>>,
    /// A count that leaves no row of a launch out.
    pub(super) all: Memory<D>,
    pub(super) graphs: HashMap<GraphKey, D::Graph>,
    pub(super) pass: Pass,
}

/// Which pass an operation is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// None: it stands by itself.
    None,
    /// One of the rows that have been written.
    Eager,
    /// One that is being recorded, for at most so many rows, with adapters or without.
    Recorded { rows: usize, adapters: bool },
}

/// What makes a recorded pass fit another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub(super) tensors: u64,
    pub(super) pages: u64,
    pub(super) rows: usize,
    pub(super) adapters: bool,
}

/// Rows, sequences and block tables as they were written to the device.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) tokens: Vec<Token>,
    pub(super) positions: Vec<u32>,
    pub(super) sequences: Vec<SequenceRows>,
    pub(super) block_tables: Vec<u32>,
    /// Some of the tokens have been replaced on the device.
    pub(super) drawn: bool,
}

impl Written {
    pub(super) fn is(&self, step: &StepRows<'_>) -> bool {
        !self.drawn
            && (self.tokens == step.tokens && self.positions == step.positions)
            && (self.sequences == step.sequences && self.block_tables == step.block_tables)
    }

    pub(super) fn set(&mut self, step: &StepRows<'_>) {
        fn copy<T: Copy>(to: &mut Vec<T>, from: &[T]) {
            to.clear();
            to.extend_from_slice(from);
        }
        copy(&mut self.tokens, step.tokens);
        copy(&mut self.positions, step.positions);
        copy(&mut self.sequences, step.sequences);
        copy(&mut self.block_tables, step.block_tables);
        self.drawn = !step.drawn.is_empty();
    }
}

impl<D: Device> State<D> {
    /// Of a backend that has done nothing.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub(super) fn new(device: &Arc<D>) -> Result<Self, KernelError> {
        Ok(Self {
            rows_max: 0,
            step: None,
            written: Written::default(),
            others: None,
            planned: Vec::new(),
            linears: Vec::new(),
            layers: 0,
            lora: None,
            segments_max: SEGMENTS,
            attention: Vec::new(),
            partials: None,
            picked: None,
            sampler: None,
            sampled: VecDeque::with_capacity(SAMPLED),
            all: Memory::holding(device, &[u32::MAX; 4])?,
            graphs: HashMap::new(),
            pass: Pass::None,
        })
    }

    /// The rows of a launch over `rows` rows of a tensor.
    pub(super) fn rows(&self, rows: usize) -> Rows {
        match (self.pass, &self.step) {
            (Pass::Recorded { .. }, Some(step)) => Rows::of_step(&step.view(), rows),
            _ => Rows { count: self.all.address(), max: rows },
        }
    }

    /// Memory for steps of so many rows and table entries. What was recorded with smaller memory is forgotten.
    pub(super) fn make_room(&mut self, device: &Arc<D>, rows: usize, table_entries: usize) -> Result<(), KernelError> {
        let has = self.step.as_ref().map(StepMemory::limits);
        if has.is_some_and(|has| has.rows >= rows.max(self.rows_max) && has.table_entries >= table_entries) {
            return Ok(());
        }
        let limits = StepLimits {
            rows: rows.max(self.rows_max),
            table_entries: table_entries.max(TABLE_ENTRIES).next_power_of_two(),
        };
        self.graphs.clear();
        self.attention.clear();
        (self.lora, self.partials, self.picked) = (None, None, None);
        self.planned.clear();
        self.written = Written::default();
        self.step = Some(StepMemory::new(device, limits)?);
        self.others = Some(StepMemory::new(device, StepLimits { table_entries: 1, ..limits })?);
        self.picked = Some(DeviceList::new(device, limits.rows)?);
        Ok(())
    }

    /// The next attention of each window plans anew.
    pub(super) fn forget_plans(&mut self) {
        self.attention.iter_mut().for_each(|(_, _, made)| *made = false);
    }

    pub(super) fn limits(&self) -> StepLimits {
        self.step.as_ref().expect("made by make_room").limits()
    }

    pub(super) fn view(&self) -> Step {
        self.step.as_ref().expect("made by make_room").view()
    }

    /// Writes a step, if it is not there already.
    pub(super) fn write(
        &mut self,
        device: &Arc<D>,
        step: &StepRows<'_>,
        segments: &[Segment],
    ) -> Result<(), KernelError> {
        self.make_room(device, step.tokens.len(), step.block_tables.len())?;
        self.forget_plans();
        let memory = self.step.as_mut().expect("just made");
        memory.write(step, segments)?;
        self.written.set(step);
        if step.drawn.is_empty() {
            return Ok(());
        }
        let (sampler, _) = self.sampler.as_ref().expect("a sampling was enqueued, whose tokens are taken");
        let (results, rows) = sampler.drawn();
        let wrong = step.drawn.iter().find(|drawn| drawn.sample as usize >= rows);
        assert!(wrong.is_none(), "{wrong:?} of a sampling of {rows} rows");
        // SAFETY: the sampling has those rows, just checked.
        unsafe { rows::take_drawn(&**device, Stream::Compute, memory, results) }
    }

    /// For an operation outside of a pass: writes its rows, if they are not there already. Drawn tokens are for passes: of the operations
    /// that are given them, none reads tokens.
    pub(super) fn write_alone(&mut self, device: &Arc<D>, step: &StepRows<'_>) -> Result<(), KernelError> {
        if self.pass != Pass::None || (self.step.is_some() && self.written.is(step)) {
            return Ok(());
        }
        self.write(device, &StepRows { drawn: &[], ..*step }, &[])
    }

    /// The plan, with room for so many segments. What was recorded with a smaller one is forgotten.
    pub(super) fn lora_plan_for(
        &mut self,
        segments: usize,
        device: &Arc<D>,
        element: Element,
    ) -> Result<&LoraPlan<D>, KernelError> {
        if segments > self.segments_max {
            self.segments_max = segments.next_power_of_two();
            self.lora = None;
            self.graphs.clear();
        }
        self.lora_plan(device, element)
    }

    pub(super) fn lora_plan(&mut self, device: &Arc<D>, element: Element) -> Result<&LoraPlan<D>, KernelError> {
        if self.lora.is_none() {
            let limits = LoraLimits { rows: self.limits().rows, segments: self.segments_max, rank: RANK_MAX };
            self.planned.clear();
            let mut linears = self.linears.clone();
            for span in linears.iter_mut().flat_map(|linear| &mut linear.sites) {
                span.index = span.site.index(self.layers);
            }
            self.lora = Some(LoraPlan::new(device, element, &linears, limits)?);
        }
        Ok(self.lora.as_ref().expect("just made"))
    }

    /// Makes the plan of the adapters of an operation's rows, if it is not made already. False when there are none.
    pub(super) fn plan_alone(
        &mut self,
        device: &Arc<D>,
        element: Element,
        lora: &LoraRows<'_, CudaAdapter<D>>,
        rows: usize,
    ) -> Result<bool, KernelError> {
        if let Pass::Recorded { adapters, .. } = self.pass {
            return Ok(adapters);
        }
        // As for the pass: rows that are all of the base model have no plan.
        if lora.segments.iter().all(|segment| segment.adapter.is_none()) {
            return Ok(false);
        }
        self.make_room(device, rows, 0)?;
        let segments = self.lora_plan_for(lora.segments.len(), device, element)?.segments(lora)?;
        if segments.is_empty() {
            return Ok(false);
        }
        let runs = runs(&segments, lora);
        if runs != self.planned {
            let tokens = vec![0; rows];
            let step = StepRows { tokens: &tokens, drawn: &[], positions: &tokens, sequences: &[], block_tables: &[] };
            let others = self.others.as_mut().expect("made with the step");
            others.write(&step, &segments)?;
            let view = others.view();
            self.lora.as_ref().expect("made above").plan(view)?;
            self.planned = runs;
        }
        Ok(true)
    }

    pub(super) fn sampler(&mut self, device: &Arc<D>, limits: SampleLimits) -> Result<&mut Sampler<D>, KernelError> {
        let has = self.sampler.as_ref().map(|(_, has)| *has);
        let fits = |has: SampleLimits| has.vocab == limits.vocab && has.rows >= limits.rows && has.top >= limits.top;
        if !has.is_some_and(fits) {
            let room = has.filter(|has| has.vocab == limits.vocab);
            let limits = SampleLimits {
                rows: limits.rows.max(room.map_or(0, |room| room.rows)),
                top: limits.top.max(TOP).max(room.map_or(0, |room| room.top)),
                ..limits
            };
            self.sampler = Some((Sampler::new(device, limits)?, limits));
        }
        Ok(&mut self.sampler.as_mut().expect("just made").0)
    }
}

/// What a plan for `segments`, which are those of `lora`, is known by.
pub(super) fn runs<D: Device>(segments: &[Segment], lora: &LoraRows<'_, CudaAdapter<D>>) -> Vec<(u32, u32, u64)> {
    let number = |adapter: Option<&CudaAdapter<D>>| adapter.map_or(0, CudaAdapter::number);
    segments.iter().zip(lora.segments).map(|(segment, of)| (segment.row, segment.rows, number(of.adapter))).collect()
}
