//! [`Backend`] on a [`Device`].
//!
//! A step's rows, block tables and adapters are written to the device once ([`StepMemory`]), before its first operation; kernels
//! find them there. Where every sequence has one row and all of them are wanted, the operations of a forward pass are recorded as a
//! graph the first time, for the next of [`BUCKETS`] rows, and replayed for every later step of so many rows or fewer, with whatever
//! adapters, ranks and lengths, since none of those is in the launches.
//!
//! The first pass of all is not recorded, because it makes the room that the others need. An engine that starts lets one as large as
//! any run, then has all passes recorded that it can come to need ([`Backend::record`]): no request waits for a recording.
//!
//! A step may be enqueued before the tokens of the one before it are known to the host ([`StepRows::drawn`]): a launch of its own takes
//! them from the sampling's results, before the pass, so that no recorded pass has it.
//!
//! Operations may also be called by themselves, as tests do: then each writes what it was given, if that is not what was written last.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openlora_types::{AdapterSizes, AdapterWeights, Module, Site, Token};

use super::attention::{self, Attention, AttentionBounds, AttentionPartials, AttentionPlan, KvLayer};
use super::device::{Device, Element, Gemm, Memory, Stream};
use super::lora::{CudaAdapter, LoraLimits, LoraLinear, LoraPlan};
use super::pages::{CudaPageSet, CudaPages, page_bytes};
use super::rope::{self, Rope, RopeMemory};
use super::rows::{self, DeviceList, NormWeight, Rows};
use super::sample::{SampleLimits, Sampled, Sampler};
use super::step::{Segment, Step, StepLimits, StepMemory};
use super::tensor::CudaTensor;
use super::weights::{CudaEmbedding, CudaLinear};
use crate::{
    AttentionSpec, Backend, ForwardScope, KernelError, LayerAttention, LinearSpec, LoraRows, Numbers, RopeTable,
    SampleRow, SampledRow, SequenceRows, SiteSpan, StepRows, TensorSource,
};

/// Rows of recorded passes.
pub const BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Largest rank of an adapter.
pub const RANK_MAX: usize = 256;
/// Alternatives of a row that there is room for from the start.
const TOP: usize = 20;
/// Samplings that may be enqueued and not collected.
const SAMPLED: usize = 2;
/// Runs of rows with an adapter each that there is room for from the start: as many as a recorded pass has rows.
const SEGMENTS: usize = BUCKETS[BUCKETS.len() - 1];
/// Entries of all block tables that there is room for from the start.
const TABLE_ENTRIES: usize = 1024;

/// A GPU, or the host in its place.
pub struct Cuda<D: Device> {
    device: Arc<D>,
    element: Element,
    state: Mutex<State<D>>,
}

impl<D: Device> fmt::Debug for Cuda<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("device", &self.device).field("element", &self.element).finish_non_exhaustive()
    }
}

/// What operations share from call to call.
struct State<D: Device> {
    /// Rows of the largest tensor so far.
    rows_max: usize,
    /// Of a pass.
    step: Option<StepMemory<D>>,
    /// What `step` was written with.
    written: Written,
    /// Of the rows that have adapters at an operation, where they are not the pass's.
    others: Option<StepMemory<D>>,
    /// The runs of rows that the plan was made for last, and the numbers of their adapters, 0 for none. Not their addresses: an adapter
    /// may come to lie where another one was.
    planned: Vec<(u32, u32, u64)>,
    /// Every linear that adapters may target.
    linears: Vec<LoraLinear>,
    /// The model's layers, once they are known.
    layers: usize,
    lora: Option<LoraPlan<D>>,
    /// Segments that it has room for.
    segments_max: usize,
    /// For the layers of each window, and whether made for the step.
    attention: Vec<(Option<usize>, AttentionPlan<D>, bool)>,
    partials: Option<AttentionPartials<D>>,
    picked: Option<DeviceList<D, u32>>,
    sampler: Option<(Sampler<D>, SampleLimits)>,
    /// Enqueued and not collected, the older first.
    sampled: VecDeque<Sampled<D>>,
    /// A count that leaves no row of a launch out.
    all: Memory<D>,
    graphs: HashMap<GraphKey, D::Graph>,
    pass: Pass,
}

/// Which pass an operation is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// None: it stands by itself.
    None,
    /// One of the rows that have been written.
    Eager,
    /// One that is being recorded, for at most so many rows, with adapters or without.
    Recorded { rows: usize, adapters: bool },
}

/// What makes a recorded pass fit another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct GraphKey {
    tensors: u64,
    pages: u64,
    rows: usize,
    adapters: bool,
}

/// Rows, sequences and block tables as they were written to the device.
#[derive(Debug, Default, PartialEq, Eq)]
struct Written {
    tokens: Vec<Token>,
    positions: Vec<u32>,
    sequences: Vec<SequenceRows>,
    block_tables: Vec<u32>,
    /// Some of the tokens have been replaced on the device.
    drawn: bool,
}

impl Written {
    fn is(&self, step: &StepRows<'_>) -> bool {
        !self.drawn
            && (self.tokens == step.tokens && self.positions == step.positions)
            && (self.sequences == step.sequences && self.block_tables == step.block_tables)
    }

    fn set(&mut self, step: &StepRows<'_>) {
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

/// A linear and its place in the plan, where it has sites.
#[derive(Debug)]
pub struct PlannedLinear<D: Device> {
    linear: CudaLinear<D>,
    place: Option<usize>,
}

/// An embedding table and its place in the plan.
#[derive(Debug)]
pub struct PlannedEmbedding<D: Device> {
    embedding: CudaEmbedding<D>,
    place: usize,
}

impl<D: Device> Cuda<D> {
    /// A backend that multiplies numbers of `element`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn new(device: Arc<D>, element: Element) -> Result<Self, KernelError> {
        let state = State {
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
            all: Memory::holding(&device, &[u32::MAX; 4])?,
            graphs: HashMap::new(),
            pass: Pass::None,
        };
        Ok(Self { device, element, state: Mutex::new(state) })
    }

    /// The device.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// How many passes have been recorded.
    pub fn recorded(&self) -> usize {
        self.state().graphs.len()
    }

    /// Operations of a step come from one thread; loading beside it holds the lock for moments only.
    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_layers(&self, layers: usize) {
        let mut state = self.state();
        if state.layers != layers {
            state.layers = layers;
            state.lora = None;
            state.graphs.clear();
        }
    }

    /// Remembers a linear that adapters may target, or the embedding table; its place among them. What adapters do to two of the same
    /// sites and sizes is the same.
    fn plan_linear(&self, linear: LoraLinear) -> usize {
        let mut state = self.state();
        if let Some(place) = state.linears.iter().position(|planned| *planned == linear) {
            return place;
        }
        state.lora = None;
        state.graphs.clear();
        state.linears.push(linear);
        state.linears.len() - 1
    }
}

impl<D: Device> State<D> {
    /// The rows of a launch over `rows` rows of a tensor.
    fn rows(&self, rows: usize) -> Rows {
        match (self.pass, &self.step) {
            (Pass::Recorded { .. }, Some(step)) => Rows::of_step(&step.view(), rows),
            _ => Rows { count: self.all.address(), max: rows },
        }
    }

    /// Memory for steps of so many rows and table entries. What was recorded with smaller memory is forgotten.
    fn make_room(&mut self, device: &Arc<D>, rows: usize, table_entries: usize) -> Result<(), KernelError> {
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
    fn forget_plans(&mut self) {
        self.attention.iter_mut().for_each(|(_, _, made)| *made = false);
    }

    fn limits(&self) -> StepLimits {
        self.step.as_ref().expect("made by make_room").limits()
    }

    fn view(&self) -> Step {
        self.step.as_ref().expect("made by make_room").view()
    }

    /// Writes a step, if it is not there already.
    fn write(&mut self, device: &Arc<D>, step: &StepRows<'_>, segments: &[Segment]) -> Result<(), KernelError> {
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
    fn write_alone(&mut self, device: &Arc<D>, step: &StepRows<'_>) -> Result<(), KernelError> {
        if self.pass != Pass::None || (self.step.is_some() && self.written.is(step)) {
            return Ok(());
        }
        self.write(device, &StepRows { drawn: &[], ..*step }, &[])
    }

    /// The plan, with room for so many segments. What was recorded with a smaller one is forgotten.
    fn lora_plan_for(
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

    fn lora_plan(&mut self, device: &Arc<D>, element: Element) -> Result<&LoraPlan<D>, KernelError> {
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
    fn plan_alone(
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

    fn sampler(&mut self, device: &Arc<D>, limits: SampleLimits) -> Result<&mut Sampler<D>, KernelError> {
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
fn runs<D: Device>(segments: &[Segment], lora: &LoraRows<'_, CudaAdapter<D>>) -> Vec<(u32, u32, u64)> {
    let number = |adapter: Option<&CudaAdapter<D>>| adapter.map_or(0, CudaAdapter::number);
    segments.iter().zip(lora.segments).map(|(segment, of)| (segment.row, segment.rows, number(of.adapter))).collect()
}

impl<D: Device> Backend for Cuda<D> {
    type Linear = PlannedLinear<D>;
    type Embedding = PlannedEmbedding<D>;
    type Vector = Memory<D>;
    type Rope = RopeMemory<D>;
    type Adapter = CudaAdapter<D>;
    type Pages = CudaPages<D>;
    type PageSet = CudaPageSet<D>;
    type Tensor = CudaTensor<D>;

    fn describe(&self) -> String {
        let properties = self.device.properties();
        let (major, minor) = properties.compute;
        format!("{} (compute {major}.{minor}), {}", properties.name, self.element.suffix())
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn memory_free(&self) -> Result<Option<usize>, KernelError> {
        self.device.memory_free().map(Some)
    }

    fn load_linear(&self, spec: &LinearSpec<'_>) -> Result<PlannedLinear<D>, KernelError> {
        let linear = CudaLinear::load(&self.device, self.element, spec)?;
        let place = (!linear.sites.is_empty()).then(|| {
            self.plan_linear(LoraLinear {
                sites: linear.sites.clone(),
                inputs: linear.inputs,
                outputs: linear.outputs,
                bias: linear.bias.is_some(),
                embedding: false,
            })
        });
        Ok(PlannedLinear { linear, place })
    }

    fn load_embedding(
        &self,
        source: &TensorSource<'_>,
        _owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        _offset: usize,
    ) -> Result<PlannedEmbedding<D>, KernelError> {
        let embedding = CudaEmbedding::load(&self.device, self.element, source)?;
        let (vocab, hidden) = (embedding.table.rows(), embedding.table.width());
        let site = Site { layer: 0, module: Module::Embed };
        let place = self.plan_linear(LoraLinear {
            // The index follows once the number of layers is known.
            sites: vec![SiteSpan { site, index: 0, outputs: 0..hidden }],
            inputs: vocab,
            outputs: hidden,
            bias: false,
            embedding: true,
        });
        Ok(PlannedEmbedding { embedding, place })
    }

    fn load_vector(&self, values: &[f32]) -> Result<Memory<D>, KernelError> {
        Memory::holding(&self.device, values)
    }

    fn load_rope(&self, table: &RopeTable) -> Result<RopeMemory<D>, KernelError> {
        RopeMemory::new(&self.device, table)
    }

    fn load_adapter(
        &self,
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        pages: CudaPageSet<D>,
    ) -> Result<CudaAdapter<D>, KernelError> {
        if let Some(site) = weights.sites.iter().find(|site| site.rank() > RANK_MAX) {
            let (site, rank) = (site.site, site.rank());
            return Err(KernelError::AdapterRank { site, rank, max: RANK_MAX });
        }
        self.set_layers(layers);
        CudaAdapter::load(weights, output_scales, layers, self.element, pages)
    }

    fn adapter_pages(&self, sizes: &AdapterSizes, page_bytes: usize) -> usize {
        CudaAdapter::<D>::pages_needed(sizes, page_bytes, self.element)
    }

    fn adapter_bytes(&self, adapter: &CudaAdapter<D>) -> usize {
        adapter.byte_len()
    }

    fn new_pages(&self, spec: &AttentionSpec, layers: usize, pages: usize) -> Result<CudaPages<D>, KernelError> {
        self.set_layers(layers);
        CudaPages::new(&self.device, pages, page_bytes(spec, layers, self.element))
    }

    fn page_bytes(&self, spec: &AttentionSpec, layers: usize) -> usize {
        page_bytes(spec, layers, self.element)
    }

    fn take_pages(&self, pool: &mut CudaPages<D>, pages: &[u32]) -> Result<CudaPageSet<D>, KernelError> {
        pool.take(pages)
    }

    fn new_tensor(&self, numbers: Numbers, rows_max: usize, width: usize) -> Result<CudaTensor<D>, KernelError> {
        let mut state = self.state();
        state.rows_max = state.rows_max.max(rows_max);
        let element = match numbers {
            Numbers::Activation => self.element,
            Numbers::F32 => Element::F32,
        };
        CudaTensor::new(&self.device, element, rows_max, width)
    }

    fn read_tensor(&self, tensor: &CudaTensor<D>) -> Vec<f32> {
        tensor.values().expect("a device that fails here fails the next operation as well")
    }

    fn set_rows(&self, tensor: &mut CudaTensor<D>, rows: usize) {
        tensor.set_rows(rows);
    }

    fn forward(
        &self,
        scope: &ForwardScope<'_, Self>,
        pages: &mut CudaPages<D>,
        run: &mut dyn FnMut(&mut CudaPages<D>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let rows = scope.rows.tokens.len();
        pages.check(scope.rows.block_tables)?;
        let decodes = scope.all_wanted && scope.rows.sequences.len() == rows;
        let bucket = bucket(rows).filter(|_| decodes).map(|bucket| bucket.min(scope.rows_max));
        let adapters;
        {
            let mut state = self.state();
            state.make_room(&self.device, rows, scope.rows.block_tables.len())?;
            let segments = match scope.lora.segments.is_empty() {
                true => Vec::new(),
                false => {
                    let plan = state.lora_plan_for(scope.lora.segments.len(), &self.device, self.element)?;
                    plan.segments(scope.lora)?
                }
            };
            adapters = !segments.is_empty();
            state.write(&self.device, scope.rows, &segments)?;
            state.planned = runs(&segments, scope.lora);
            state.pass = Pass::Eager;
        }
        // While a pass is recorded nothing can be allocated or written: one has to have run.
        let bucket = bucket.filter(|_| self.state().partials.is_some());
        let (tensors, address) = (scope.tensors, pages.address().0);
        let key = bucket.map(|rows| GraphKey { tensors, pages: address, rows, adapters });
        let done = match key {
            Some(key) => self.replay(key, pages, run),
            None => self.plan_adapters(adapters).and_then(|()| run(pages)),
        };
        self.state().pass = Pass::None;
        done
    }

    fn recorded_rows(&self, rows: usize) -> Vec<usize> {
        let last = bucket(rows).unwrap_or(BUCKETS[BUCKETS.len() - 1]);
        BUCKETS.into_iter().filter(|bucket| *bucket <= last).collect()
    }

    fn record(
        &self,
        scope: &ForwardScope<'_, Self>,
        pages: &mut CudaPages<D>,
        run: &mut dyn FnMut(&mut CudaPages<D>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let (rows, adapters) = (scope.rows.tokens.len(), !scope.lora.segments.is_empty());
        let key = GraphKey { tensors: scope.tensors, pages: pages.address().0, rows, adapters };
        let done = self.record_pass(key, pages, run);
        self.state().pass = Pass::None;
        done
    }

    fn embed(
        &self,
        table: &PlannedEmbedding<D>,
        tokens: &[Token],
        lora: &LoraRows<'_, CudaAdapter<D>>,
        out: &mut CudaTensor<D>,
    ) -> Result<(), KernelError> {
        let mut state = self.state();
        let rows = match state.pass {
            Pass::Recorded { rows, .. } => rows,
            _ => tokens.len(),
        };
        if state.pass == Pass::None {
            let positions = vec![0; tokens.len()];
            let step = StepRows { tokens, drawn: &[], positions: &positions, sequences: &[], block_tables: &[] };
            state.write_alone(&self.device, &step)?;
        }
        let view = state.view();
        // SAFETY: the step's memory lives as long as this backend, and has room for these rows.
        unsafe { rows::embed(&*self.device, Stream::Compute, &view, rows, &table.embedding.table, out)? };
        if state.plan_alone(&self.device, self.element, lora, rows)? {
            state.lora_plan(&self.device, self.element)?.embed(table.place, view, out, rows)?;
        }
        Ok(())
    }

    fn add_rms_norm(
        &self,
        residual: &mut CudaTensor<D>,
        delta: Option<&CudaTensor<D>>,
        weight: &Memory<D>,
        eps: f32,
        out: &mut CudaTensor<D>,
    ) -> Result<(), KernelError> {
        let rows = self.state().rows(residual.rows());
        let norm = NormWeight { weight, eps };
        // SAFETY: the count is in memory that lives as long as this backend.
        unsafe { rows::add_rms_norm(&*self.device, Stream::Compute, rows, residual, delta, &norm, out) }
    }

    fn linear(
        &self,
        linear: &PlannedLinear<D>,
        lora: &LoraRows<'_, CudaAdapter<D>>,
        x: &CudaTensor<D>,
        out: &mut CudaTensor<D>,
    ) -> Result<(), KernelError> {
        let mut state = self.state();
        let PlannedLinear { linear, place } = linear;
        let rows = x.rows();
        assert_eq!((x.width(), out.width()), (linear.inputs, linear.outputs), "[inputs, outputs] of a linear");
        assert_eq!(x.element(), self.element, "x");
        out.set_rows(rows);
        let gemm = Gemm {
            rows,
            inputs: linear.inputs,
            outputs: linear.outputs,
            element: self.element,
            out_element: out.element(),
            x: x.address(),
            w: linear.weights(),
            out: out.address(),
        };
        // SAFETY: x and out have these rows, and the weights were made with these sizes.
        unsafe { self.device.gemm(Stream::Compute, &gemm)? };
        let bias = linear.bias.as_ref();
        let adapters = match place {
            Some(_) => state.plan_alone(&self.device, self.element, lora, rows)?,
            None => false,
        };
        match place.filter(|_| adapters) {
            Some(place) => {
                let plan = state.lora_plan(&self.device, self.element)?;
                plan.shrink(place, x, rows)?;
                plan.expand(place, out, bias.map(Memory::address), rows)
            }
            None => match bias {
                // SAFETY: the count is in memory that lives as long as this backend.
                Some(bias) => unsafe { rows::add_bias(&*self.device, Stream::Compute, state.rows(rows), bias, out) },
                None => Ok(()),
            },
        }
    }

    fn rope_and_store(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &mut CudaTensor<D>,
        pages: &mut CudaPages<D>,
    ) -> Result<(), KernelError> {
        let mut state = self.state();
        if state.pass == Pass::None {
            pages.check(step.block_tables)?;
            state.write_alone(&self.device, step)?;
        }
        let kv = KvLayer { pages: pages.address(), page_bytes: pages.page_bytes(), layer: layer.layer };
        let rope = Rope {
            spec,
            step: state.view(),
            kv,
            table: layer.rope,
            qk_norm: layer.qk_norm.map(|(q, k)| (q.address(), k.address())),
            rows_max: qkv.rows(),
        };
        rope::rope_and_store(&*self.device, Stream::Compute, &rope, qkv)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &CudaTensor<D>,
        pages: &CudaPages<D>,
        out: &mut CudaTensor<D>,
    ) -> Result<(), KernelError> {
        let mut state = self.state();
        if state.pass == Pass::None {
            pages.check(step.block_tables)?;
            state.write_alone(&self.device, step)?;
        }
        let rows = qkv.rows();
        out.set_rows(rows);
        let StepLimits { rows: rows_max, table_entries } = state.limits();
        let room = AttentionBounds { rows: rows_max, rows_each: rows_max, table_entries };
        let bounds = match state.pass {
            Pass::Recorded { .. } => AttentionBounds { rows, rows_each: 1, table_entries },
            _ => {
                let rows_each = step.sequences.iter().map(|sequence| sequence.rows).max().unwrap_or(1);
                AttentionBounds { rows, rows_each, table_entries: step.block_tables.len() }
            }
        };
        let State { attention: plans, partials, step: memory, .. } = &mut *state;
        let view = memory.as_ref().expect("written").view();
        if partials.is_none() {
            *partials = Some(AttentionPartials::new(&self.device, spec, room)?);
        }
        let at = match plans.iter().position(|(window, ..)| *window == layer.window) {
            Some(at) => at,
            None => {
                let shared = self.device.properties().shared_bytes_max;
                let plan = AttentionPlan::new(&self.device, spec, room, layer.window, shared)?;
                plans.push((layer.window, plan, false));
                plans.len() - 1
            }
        };
        let (_, plan, made) = &mut plans[at];
        if !std::mem::replace(made, true) {
            plan.make(&self.device, Stream::Compute, view)?;
        }
        let kv = KvLayer { pages: pages.address(), page_bytes: pages.page_bytes(), layer: layer.layer };
        let partials = partials.as_ref().expect("just made");
        let attention = Attention { spec, step: view, kv, plan, partials, bounds };
        attention::attention(&*self.device, Stream::Compute, &attention, qkv, out)
    }

    fn swiglu(&self, gate_up: &CudaTensor<D>, out: &mut CudaTensor<D>) -> Result<(), KernelError> {
        let rows = self.state().rows(gate_up.rows());
        // SAFETY: the count is in memory that lives as long as this backend.
        unsafe { rows::swiglu(&*self.device, Stream::Compute, rows, gate_up, out) }
    }

    fn gather_rows(&self, x: &CudaTensor<D>, rows: &[u32], out: &mut CudaTensor<D>) -> Result<(), KernelError> {
        let mut state = self.state();
        state.make_room(&self.device, rows.len(), 0)?;
        let picked = state.picked.as_mut().expect("made with the step");
        picked.write(rows)?;
        rows::gather_rows(&*self.device, Stream::Compute, picked, rows.len(), x, out)
    }

    fn sample(
        &self,
        logits: &mut CudaTensor<D>,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        assert!(self.state().sampled.is_empty(), "another sampling is enqueued and not collected: collect it first");
        self.enqueue_sample(logits, rows, out)?;
        self.collect_sample(out)
    }

    fn enqueue_sample(
        &self,
        logits: &mut CudaTensor<D>,
        rows: &[SampleRow<'_>],
        _out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        assert_eq!(logits.rows(), rows.len(), "one entry for each row of logits");
        let top = |row: &SampleRow<'_>| match row {
            SampleRow::Draw { top, .. } | SampleRow::Score { top, .. } => *top,
        };
        let top = rows.iter().map(top).max().unwrap_or(0).min(logits.width());
        let mut state = self.state();
        let limits = SampleLimits { rows: logits.rows_max(), vocab: logits.width(), top };
        assert!(state.sampled.len() < SAMPLED, "{SAMPLED} samplings are enqueued and not collected: collect one first");
        let sampler = state.sampler(&self.device, limits)?;
        sampler.prepare(rows)?;
        sampler.launch(Stream::Compute, logits, rows.len())?;
        let sampled = sampler.fetch()?;
        state.sampled.push_back(sampled);
        Ok(())
    }

    fn collect_sample(&self, out: &mut Vec<SampledRow>) -> Result<(), KernelError> {
        let mut sampled = self.state().sampled.pop_front().expect("a sampling is enqueued and not collected");
        // Not under the lock: who loads adapters needs it, and waiting takes as long as a step.
        sampled.collect(&self.device, out)?;
        if let Some((sampler, _)) = &mut self.state().sampler {
            sampler.reuse(sampled);
        }
        Ok(())
    }
}

/// Rows of the pass that is recorded for so many; none beyond the largest.
fn bucket(rows: usize) -> Option<usize> {
    BUCKETS.into_iter().find(|bucket| *bucket >= rows)
}

impl<D: Device> Cuda<D> {
    /// The first launch of a pass with adapters.
    fn plan_adapters(&self, adapters: bool) -> Result<(), KernelError> {
        if !adapters {
            return Ok(());
        }
        let mut state = self.state();
        let view = state.view();
        state.lora_plan(&self.device, self.element)?.plan(view)
    }

    /// Records a pass, unless that has been done.
    fn record_pass(
        &self,
        key: GraphKey,
        pages: &mut CudaPages<D>,
        run: &mut dyn FnMut(&mut CudaPages<D>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        {
            let mut state = self.state();
            if state.graphs.contains_key(&key) {
                return Ok(());
            }
            let ready = state.partials.is_some() && (state.lora.is_some() || !key.adapters);
            assert!(ready, "while a pass is recorded nothing can be allocated: one has to have run");
            state.forget_plans();
            // What is written is written anew before a pass, and an operation alone is to do the same.
            state.step.as_mut().expect("one has run").lay_out(key.rows);
            state.written = Written::default();
            state.pass = Pass::Recorded { rows: key.rows, adapters: key.adapters };
        }
        let graph = self.device.capture(&mut || {
            self.plan_adapters(key.adapters)?;
            run(pages)
        })?;
        let mut state = self.state();
        // What was recorded has not been done.
        state.forget_plans();
        state.graphs.insert(key, graph);
        Ok(())
    }

    /// Replays a pass, recording it before where that has not been done.
    fn replay(
        &self,
        key: GraphKey,
        pages: &mut CudaPages<D>,
        run: &mut dyn FnMut(&mut CudaPages<D>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.record_pass(key, pages, run)?;
        let state = self.state();
        // SAFETY: it was recorded with the memory of this state and of the tensors and pages that the key names, all of which live:
        // what replaces memory forgets the graphs.
        unsafe { self.device.replay(&state.graphs[&key]) }
    }
}
