//! The CPU backend.
//!
//! [`Cpu`] joins the operations; each is a module of its own that takes the thread [`pool`] and the instruction set
//! ([`isa`]) first. Weights are repacked at load ([`pack`]) into panels that the kernels of [`linear`] read from end to end.
//! docs/cpu.md explains the layout and what bounds each shape.

mod ahead;
pub mod attention;
pub mod ceilings;
pub mod embed;
pub mod isa;
pub mod kv;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod pack;
pub mod pages;
pub mod pool;
pub mod rope;
pub mod sample;
pub mod swiglu;
pub mod tensor;
pub mod vector_math;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openlora_types::{AdapterSizes, AdapterWeights, Token};

use crate::{
    AttentionSpec, Backend, KernelError, LayerAttention, LinearSpec, LoraRows, Numbers, Precision, RopeTable,
    SampleRow, SampledRow, StepRows, TensorSource,
};
use attention::{Attend, AttentionScratch};
use embed::CpuEmbedding;
pub use isa::Isa;
use linear::CpuLinear;
use linear::activations::Activations;
use lora::{Adapt, CpuAdapter, LoraScratch};
use pages::{CpuPageSet, CpuPages};
pub use pool::Pool;
use sample::SampleScratch;
pub use tensor::CpuTensor;

/// The linears of a layer that are fused at most: q, k and v.
const FUSED_SITES_MAX: usize = 3;

/// The processor as a [`Backend`].
///
/// Operations run one at a time: the caller's thread and the pool's threads share each of them. A panic on any thread makes
/// this and all later operations fail with [`KernelError::ThreadPanicked`].
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    isa: Isa,
    precision: Precision,
    scratch: Mutex<Scratch>,
}

/// Buffers that operations reuse, so that no step allocates: they grow while things are loaded.
#[derive(Debug)]
struct Scratch {
    /// Rows of the largest tensor so far.
    rows_max: usize,
    /// Inputs of the widest linear so far.
    inputs_max: usize,
    activations: Activations,
    lora: LoraScratch,
    attention: AttentionScratch,
    sample: SampleScratch,
}

impl Cpu {
    /// A backend of `threads` threads, the caller's included. `isa` is [`Isa::detect`] except in tests.
    ///
    /// # Errors
    /// [`KernelError::Threads`] when the threads cannot be started.
    pub fn new(threads: usize, precision: Precision, isa: Isa) -> Result<Self, KernelError> {
        let scratch = Scratch {
            rows_max: 0,
            inputs_max: 0,
            activations: Activations::new()?,
            lora: LoraScratch::default(),
            attention: AttentionScratch::default(),
            sample: SampleScratch::default(),
        };
        Ok(Self { pool: Pool::new(threads)?, isa, precision, scratch: Mutex::new(scratch) })
    }

    /// Not contended in a step: operations come from one thread, and loading beside them holds it for moments only.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scratch {
    fn grow(&mut self, threads: usize, rows: usize, inputs: usize) -> Result<(), KernelError> {
        self.rows_max = self.rows_max.max(rows);
        self.inputs_max = self.inputs_max.max(inputs);
        self.activations.reserve(threads, self.rows_max, self.inputs_max)
    }
}

/// Whether the pages of all adapters of an operation are still theirs.
fn check_adapters(lora: &LoraRows<'_, CpuAdapter>) -> Result<(), KernelError> {
    lora.segments.iter().filter_map(|segment| segment.adapter).try_for_each(CpuAdapter::check)
}

/// Nothing is enqueued here, so every token is known.
fn check_tokens(step: &StepRows<'_>) {
    assert!(step.drawn.is_empty(), "{} drawn tokens, where each sampling is done when it returns", step.drawn.len());
}

impl Backend for Cpu {
    type Linear = CpuLinear;
    type Embedding = CpuEmbedding;
    type Vector = Vec<f32>;
    type Rope = RopeTable;
    type Adapter = CpuAdapter;
    type Pages = CpuPages;
    type PageSet = CpuPageSet;
    type Tensor = CpuTensor;

    fn describe(&self) -> String {
        let (threads, precision) = (self.pool.threads(), self.precision);
        let plural = if threads == 1 { "" } else { "s" };
        let precision = match precision {
            Precision::Quantised => "quantised",
            Precision::F32 => "f32",
        };
        format!("cpu {}, {threads} thread{plural}, {precision}", self.isa.name())
    }

    fn load_linear(&self, spec: &LinearSpec<'_>) -> Result<CpuLinear, KernelError> {
        let linear = CpuLinear::load(&self.pool, spec, self.precision)?;
        // In precision f32 nothing is quantised.
        let quantised_inputs = if self.precision == Precision::F32 { 0 } else { linear.panels.inputs };
        self.scratch().grow(self.pool.threads(), 0, quantised_inputs)?;
        Ok(linear)
    }

    fn load_embedding(
        &self,
        source: &TensorSource<'_>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        offset: usize,
    ) -> Result<CpuEmbedding, KernelError> {
        CpuEmbedding::new(source, owner, offset)
    }

    fn load_vector(&self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn load_rope(&self, table: &RopeTable) -> Result<RopeTable, KernelError> {
        Ok(table.clone())
    }

    fn load_adapter(
        &self,
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        pages: CpuPageSet,
    ) -> Result<CpuAdapter, KernelError> {
        let adapter = CpuAdapter::load(weights, output_scales, layers, self.precision, pages)?;
        let mut scratch = self.scratch();
        let rows = scratch.rows_max;
        scratch.lora.reserve(rows, weights.rank_max() * FUSED_SITES_MAX);
        Ok(adapter)
    }

    fn adapter_bytes(&self, adapter: &CpuAdapter) -> usize {
        adapter.byte_len()
    }

    fn adapter_pages(&self, sizes: &AdapterSizes, page_bytes: usize) -> usize {
        CpuAdapter::pages(sizes, page_bytes, self.precision)
    }

    fn new_pages(&self, spec: &AttentionSpec, layers: usize, pages: usize) -> Result<CpuPages, KernelError> {
        let pool = CpuPages::new(spec, layers, pages, self.precision)?;
        self.scratch().attention.reserve(self.pool.threads(), &pool.layout, pages);
        Ok(pool)
    }

    fn page_bytes(&self, spec: &AttentionSpec, layers: usize) -> usize {
        kv::page_bytes(spec, layers, self.precision)
    }

    fn take_pages(&self, pool: &mut CpuPages, pages: &[u32]) -> Result<CpuPageSet, KernelError> {
        pool.take(pages)
    }

    fn new_tensor(&self, _numbers: Numbers, rows_max: usize, width: usize) -> Result<CpuTensor, KernelError> {
        self.scratch().grow(self.pool.threads(), rows_max, 0)?;
        CpuTensor::new(rows_max, width)
    }

    fn read_tensor(&self, tensor: &CpuTensor) -> Vec<f32> {
        tensor.values().to_vec()
    }

    fn embed(
        &self,
        table: &CpuEmbedding,
        tokens: &[Token],
        lora: &LoraRows<'_, CpuAdapter>,
        out: &mut CpuTensor,
    ) -> Result<(), KernelError> {
        check_adapters(lora)?;
        embed::embed(&self.pool, self.isa, table, tokens, *lora, out, &mut self.scratch().lora);
        self.pool.check()
    }

    fn add_rms_norm(
        &self,
        residual: &mut CpuTensor,
        delta: Option<&CpuTensor>,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<(), KernelError> {
        norm::add_rms_norm(&self.pool, self.isa, residual, delta, weight, eps, out);
        self.pool.check()
    }

    fn linear(
        &self,
        linear: &CpuLinear,
        lora: &LoraRows<'_, CpuAdapter>,
        x: &CpuTensor,
        out: &mut CpuTensor,
    ) -> Result<(), KernelError> {
        let scratch = &mut *self.scratch();
        // DoRA scales W x + s B A x before the bias is added, so with it among the adapters the bias comes last.
        let bias = linear.bias.as_deref();
        let bias_last = bias.filter(|_| lora::rescales(&linear.sites, *lora));
        let adapt = Adapt { sites: &linear.sites, lora: *lora, bias: bias_last };
        let (pool, isa, activations) = (&self.pool, self.isa, &mut scratch.activations);
        lora::planned(pool, isa, adapt, x, &mut scratch.lora, |planned| {
            linear::multiply(pool, isa, linear, x, out, activations, &planned)?;
            if let Some(bias) = bias
                && bias_last.is_none()
            {
                linear::add_bias(pool, bias, out);
            }
            if let Some(planned) = planned {
                planned.expand(out);
            }
            pool.check()
        })
    }

    fn rope_and_store(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &mut CpuTensor,
        pages: &mut CpuPages,
    ) -> Result<(), KernelError> {
        check_tokens(step);
        pages.check(step.block_tables)?;
        rope::rope_and_store(&self.pool, self.isa, spec, step, layer, qkv, pages);
        self.pool.check()
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &CpuTensor,
        pages: &CpuPages,
        out: &mut CpuTensor,
    ) -> Result<(), KernelError> {
        check_tokens(step);
        pages.check(step.block_tables)?;
        let attend = Attend { spec, step, layer };
        attention::attention(&self.pool, self.isa, attend, qkv, pages, out, &mut self.scratch().attention);
        self.pool.check()
    }

    fn swiglu(&self, gate_up: &CpuTensor, out: &mut CpuTensor) -> Result<(), KernelError> {
        swiglu::swiglu(&self.pool, self.isa, gate_up, out);
        self.pool.check()
    }

    fn gather_rows(&self, x: &CpuTensor, rows: &[u32], out: &mut CpuTensor) -> Result<(), KernelError> {
        assert_eq!(x.width(), out.width(), "width of gathered rows");
        out.set_rows(rows.len());
        for (i, row) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(*row as usize));
        }
        Ok(())
    }

    fn set_rows(&self, tensor: &mut CpuTensor, rows: usize) {
        tensor.set_rows(rows);
    }

    fn sample(
        &self,
        logits: &mut CpuTensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        sample::sample(&self.pool, self.isa, logits, rows, out, &mut self.scratch().sample);
        self.pool.check()
    }
}
