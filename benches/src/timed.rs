//! A backend that times another's operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use openlora_kernels::{
    AttentionSpec, Backend, KernelError, LayerAttention, LinearSpec, LoraRows, Numbers, RopeTable, SampleRow,
    SampledRow, StepRows, TensorSource,
};
use openlora_types::{AdapterSizes, AdapterWeights, Module, Token};

/// What is timed apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Rows of the embedding table.
    Embed,
    /// Norms, with the residual's addition.
    Norm,
    /// The fused linear of q, k and v, adapters included.
    Qkv,
    /// Rotary embedding and storing keys and values.
    Rope,
    /// Attention.
    Attention,
    /// The linear after attention.
    O,
    /// The fused linear of gate and up.
    GateUp,
    /// SwiGLU.
    Swiglu,
    /// The linear that ends a layer.
    Down,
    /// The head.
    Head,
    /// Drawing tokens.
    Sample,
}

impl Operation {
    /// In the order of a step.
    pub const ALL: [Self; 11] = [
        Self::Embed,
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::O,
        Self::GateUp,
        Self::Swiglu,
        Self::Down,
        Self::Head,
        Self::Sample,
    ];
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Qkv => "q, k, v",
            Self::Rope => "rope, store",
            Self::Attention => "attention",
            Self::O => "o",
            Self::GateUp => "gate, up",
            Self::Swiglu => "swiglu",
            Self::Down => "down",
            Self::Head => "head",
            Self::Sample => "sample",
        }
    }
}

/// `B`, and how long its operations have taken since [`Timed::reset`].
#[derive(Debug)]
pub struct Timed<B> {
    backend: B,
    nanos: [AtomicU64; Operation::COUNT],
}

/// A linear, and which it is.
#[derive(Debug)]
pub struct TimedLinear<L> {
    linear: L,
    operation: Operation,
}

impl<B: Backend> Timed<B> {
    /// Times `backend`.
    pub fn new(backend: B) -> Self {
        Self { backend, nanos: Default::default() }
    }

    /// Starts again from nothing.
    pub fn reset(&self) {
        self.nanos.iter().for_each(|nanos| nanos.store(0, Ordering::Relaxed));
    }

    /// Of each operation, in the order of [`Operation::ALL`].
    #[must_use]
    pub fn milliseconds(&self) -> [f64; Operation::COUNT] {
        std::array::from_fn(|i| self.nanos[i].load(Ordering::Relaxed) as f64 / 1e6)
    }

    fn time<T>(&self, operation: Operation, call: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = call();
        self.nanos[operation as usize].fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Linear = TimedLinear<B::Linear>;
    type Embedding = B::Embedding;
    type Vector = B::Vector;
    type Rope = B::Rope;
    type Adapter = B::Adapter;
    type Pages = B::Pages;
    type PageSet = B::PageSet;
    type Tensor = B::Tensor;

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn load_linear(&self, spec: &LinearSpec<'_>) -> Result<Self::Linear, KernelError> {
        let operation = match spec.sites.first().map(|site| site.site.module) {
            Some(Module::Q) => Operation::Qkv,
            Some(Module::O) => Operation::O,
            Some(Module::Gate) => Operation::GateUp,
            Some(Module::Down) => Operation::Down,
            _ => Operation::Head,
        };
        Ok(TimedLinear { linear: self.backend.load_linear(spec)?, operation })
    }

    fn load_embedding(
        &self,
        source: &TensorSource<'_>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        offset: usize,
    ) -> Result<B::Embedding, KernelError> {
        self.backend.load_embedding(source, owner, offset)
    }

    fn load_vector(&self, values: &[f32]) -> Result<B::Vector, KernelError> {
        self.backend.load_vector(values)
    }

    fn load_rope(&self, table: &RopeTable) -> Result<B::Rope, KernelError> {
        self.backend.load_rope(table)
    }

    fn load_adapter(
        &self,
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        pages: B::PageSet,
    ) -> Result<B::Adapter, KernelError> {
        self.backend.load_adapter(weights, output_scales, layers, pages)
    }

    fn adapter_pages(&self, sizes: &AdapterSizes, page_bytes: usize) -> usize {
        self.backend.adapter_pages(sizes, page_bytes)
    }

    fn adapter_bytes(&self, adapter: &B::Adapter) -> usize {
        self.backend.adapter_bytes(adapter)
    }

    fn new_pages(&self, spec: &AttentionSpec, layers: usize, pages: usize) -> Result<B::Pages, KernelError> {
        self.backend.new_pages(spec, layers, pages)
    }

    fn page_bytes(&self, spec: &AttentionSpec, layers: usize) -> usize {
        self.backend.page_bytes(spec, layers)
    }

    fn take_pages(&self, pool: &mut B::Pages, pages: &[u32]) -> Result<B::PageSet, KernelError> {
        self.backend.take_pages(pool, pages)
    }

    fn new_tensor(&self, numbers: Numbers, rows_max: usize, width: usize) -> Result<B::Tensor, KernelError> {
        self.backend.new_tensor(numbers, rows_max, width)
    }

    fn read_tensor(&self, tensor: &B::Tensor) -> Vec<f32> {
        self.backend.read_tensor(tensor)
    }

    fn set_rows(&self, tensor: &mut B::Tensor, rows: usize) {
        self.backend.set_rows(tensor, rows);
    }

    fn embed(
        &self,
        table: &B::Embedding,
        tokens: &[Token],
        lora: &LoraRows<'_, B::Adapter>,
        out: &mut B::Tensor,
    ) -> Result<(), KernelError> {
        self.time(Operation::Embed, || self.backend.embed(table, tokens, lora, out))
    }

    fn add_rms_norm(
        &self,
        residual: &mut B::Tensor,
        delta: Option<&B::Tensor>,
        weight: &B::Vector,
        eps: f32,
        out: &mut B::Tensor,
    ) -> Result<(), KernelError> {
        self.time(Operation::Norm, || self.backend.add_rms_norm(residual, delta, weight, eps, out))
    }

    fn linear(
        &self,
        linear: &Self::Linear,
        lora: &LoraRows<'_, B::Adapter>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), KernelError> {
        self.time(linear.operation, || self.backend.linear(&linear.linear, lora, x, out))
    }

    fn rope_and_store(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &mut B::Tensor,
        pages: &mut B::Pages,
    ) -> Result<(), KernelError> {
        self.time(Operation::Rope, || self.backend.rope_and_store(spec, step, inner(layer), qkv, pages))
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &B::Tensor,
        pages: &B::Pages,
        out: &mut B::Tensor,
    ) -> Result<(), KernelError> {
        self.time(Operation::Attention, || self.backend.attention(spec, step, inner(layer), qkv, pages, out))
    }

    fn swiglu(&self, gate_up: &B::Tensor, out: &mut B::Tensor) -> Result<(), KernelError> {
        self.time(Operation::Swiglu, || self.backend.swiglu(gate_up, out))
    }

    fn gather_rows(&self, x: &B::Tensor, rows: &[u32], out: &mut B::Tensor) -> Result<(), KernelError> {
        self.backend.gather_rows(x, rows, out)
    }

    fn sample(
        &self,
        logits: &mut B::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        self.time(Operation::Sample, || self.backend.sample(logits, rows, out))
    }
}

fn inner<'a, B: Backend>(layer: LayerAttention<'a, Timed<B>>) -> LayerAttention<'a, B> {
    let LayerAttention { layer, window, rope, qk_norm } = layer;
    LayerAttention { layer, window, rope, qk_norm }
}
