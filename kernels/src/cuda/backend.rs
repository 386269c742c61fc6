//! [`Backend`] on a [`Device`].
//!
//! A step's rows, block tables and adapters are written to the device once ([`StepMemory`](super::step::StepMemory)), before its first operation; kernels
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

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openlora_types::{AdapterSizes, AdapterWeights, Module, Site, Token};

use super::attention::{self, Attention, AttentionBounds, AttentionPartials, AttentionPlan, KvLayer};
use super::device::{Device, Element, Gemm, Memory, Stream};
use super::lora::{CudaAdapter, LoraLinear, RANK_MAX};
use super::pages::{CudaPageSet, CudaPages, page_bytes};
use super::rope::{self, Rope, RopeMemory};
use super::rows::{self, NormWeight};
use super::sample::SampleLimits;
use super::state::{GraphKey, Pass, SAMPLED, State, Written, runs};
use super::step::{BUCKETS, StepLimits};
use super::tensor::CudaTensor;
use super::weights::{CudaEmbedding, CudaLinear};
use crate::{
    AttentionSpec, Backend, ForwardScope, KernelError, LayerAttention, LinearSpec, LoraRows, Numbers, RopeTable,
    SampleRow, SampledRow, SiteSpan, StepRows, TensorSource,
};

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
        let state = State::new(&device)?;
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
