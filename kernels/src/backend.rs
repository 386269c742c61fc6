use bytemuck::{Pod, Zeroable};
use openlora_types::{AdapterSizes, AdapterWeights, SamplingParams, Token, TokenLogprob};

use crate::{BlockFormat, KernelError, LinearSpec, TensorSource};

/// A device. Operations are coarse so that each backend can fuse what it likes, and all of them enqueue in order: results
/// are visible once [`Backend::sample`] or [`Backend::collect_sample`] returns.
///
/// Tensors are row-major `[rows, width]` activations allocated once for the largest step; an operation sets the number
/// of rows it wrote. Every operation keeps the crate's invariant that a row does not depend on its neighbours.
pub trait Backend: Send + Sync + 'static {
    /// A loaded (fused) weight matrix.
    type Linear: Send + Sync;
    /// A loaded embedding table.
    type Embedding: Send + Sync;
    /// A loaded vector, such as a norm's weight.
    type Vector: Send + Sync;
    /// A loaded table of rotary angles.
    type Rope: Send + Sync;
    /// One adapter generation, resident.
    type Adapter: Send + Sync;
    /// The pool of pages: KV blocks of all layers, and adapters.
    type Pages: Send;
    /// Pages that belong to one adapter. Dropping it, on any thread, gives them back to their pool.
    type PageSet: Send;
    /// Activations.
    type Tensor: Send;

    /// A short name for logs and `doctor`, such as `cpu avx512-vnni, 2 threads`.
    fn describe(&self) -> String;

    /// Whether operations return before they are done, so that the caller has time for other work until it collects results.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Bytes of device memory that nobody has taken; `None` where the device's memory is the host's.
    ///
    /// # Errors
    /// A device failure.
    fn memory_free(&self) -> Result<Option<usize>, KernelError> {
        Ok(None)
    }

    /// Repacks a linear for this device.
    ///
    /// # Errors
    /// A tensor whose bytes do not fit its shape, or memory.
    fn load_linear(&self, spec: &LinearSpec<'_>) -> Result<Self::Linear, KernelError>;

    /// Prepares an embedding table, `[vocab, hidden]`. `owner` keeps the mapped bytes alive.
    ///
    /// # Errors
    /// A tensor whose bytes do not fit its shape, or memory.
    fn load_embedding(
        &self,
        source: &TensorSource<'_>,
        owner: std::sync::Arc<dyn AsRef<[u8]> + Send + Sync>,
        offset: usize,
    ) -> Result<Self::Embedding, KernelError>;

    /// Copies a vector to the device.
    ///
    /// # Errors
    /// Memory.
    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError>;

    /// Copies a table of angles to the device.
    ///
    /// # Errors
    /// Memory.
    fn load_rope(&self, table: &RopeTable) -> Result<Self::Rope, KernelError>;

    /// Makes an adapter resident: writes its factors into `pages`, which are the adapter's from then on. Runs on any thread,
    /// beside operations on the pool. `output_scales[i]` is, for a DoRA site `weights.sites[i]`, the `[outputs]` factor
    /// `m / ||W + scale * B A||`; `None` elsewhere. `layers` is the base model's number of layers.
    ///
    /// # Errors
    /// Fewer pages than [`Backend::adapter_pages`], numbers out of the device format's range, or memory.
    fn load_adapter(
        &self,
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        pages: Self::PageSet,
    ) -> Result<Self::Adapter, KernelError>;

    /// How many pages of `page_bytes` [`Backend::load_adapter`] needs for an adapter of these sizes.
    fn adapter_pages(&self, sizes: &AdapterSizes, page_bytes: usize) -> usize;

    /// Bytes an adapter uses on the device, without the unused ends of its pages.
    fn adapter_bytes(&self, adapter: &Self::Adapter) -> usize;

    /// Allocates a pool of `pages` pages, numbered from 0, all of them free. A page holds the keys and values of
    /// `spec.block_size` tokens in all `layers` layers, or a piece of one adapter. A page that no adapter owns is KV to whoever
    /// names it in a block table.
    ///
    /// # Errors
    /// Memory.
    fn new_pages(&self, spec: &AttentionSpec, layers: usize, pages: usize) -> Result<Self::Pages, KernelError>;

    /// Bytes of one page.
    fn page_bytes(&self, spec: &AttentionSpec, layers: usize) -> usize;

    /// Makes pages an adapter's until the set is dropped. What they held is lost.
    ///
    /// # Errors
    /// A page that does not exist or is an adapter's already, named; then none is taken.
    fn take_pages(&self, pool: &mut Self::Pages, pages: &[u32]) -> Result<Self::PageSet, KernelError>;

    /// Allocates activations.
    ///
    /// # Errors
    /// Memory.
    fn new_tensor(&self, numbers: Numbers, rows_max: usize, width: usize) -> Result<Self::Tensor, KernelError>;

    /// The rows of a tensor, copied to the host as f32: for tests and logits inspection, not for the step.
    fn read_tensor(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// Says how many rows a tensor has: where [`Backend::forward`] repeated an earlier pass instead of calling `run`, the operations
    /// that say so were not called.
    fn set_rows(&self, tensor: &mut Self::Tensor, rows: usize);

    /// Runs one forward pass: `run` calls the operations, on tensors that `scope` identifies. A backend may write down what it is
    /// given here once for all of them, and where every sequence has one row it may record what `run` enqueues and enqueue that
    /// again for other steps like it instead of calling `run`.
    ///
    /// # Errors
    /// A device failure, or what `run` returns.
    fn forward(
        &self,
        scope: &ForwardScope<'_, Self>,
        pages: &mut Self::Pages,
        run: &mut dyn FnMut(&mut Self::Pages) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let _ = scope;
        run(pages)
    }

    /// Of how many rows the passes are that [`Backend::forward`] replays for steps of up to `rows` sequences with one row each:
    /// ascending, none where it records nothing.
    fn recorded_rows(&self, rows: usize) -> Vec<usize> {
        let _ = rows;
        Vec::new()
    }

    /// Records a pass of one of [`Backend::recorded_rows`] as [`Backend::forward`] would, without running it: what `scope` says of
    /// tokens, positions, block tables and adapters means nothing but for whether there are runs in `lora`. A pass must have run over
    /// the same tensors before, as large as any to come, with `lora` given.
    ///
    /// # Errors
    /// A device failure, or what `run` returns.
    fn record(
        &self,
        scope: &ForwardScope<'_, Self>,
        pages: &mut Self::Pages,
        run: &mut dyn FnMut(&mut Self::Pages) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let _ = (scope, pages, run);
        Ok(())
    }

    /// `out[i] = table[tokens[i]] (+ scale * B A[:, tokens[i]])`, `out: [tokens, hidden]`.
    ///
    /// # Errors
    /// A device failure.
    fn embed(
        &self,
        table: &Self::Embedding,
        tokens: &[Token],
        lora: &LoraRows<'_, Self::Adapter>,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError>;

    /// `residual += delta` where given, then `out = residual / sqrt(mean(residual^2) + eps) * weight` (RMSNorm, Zhang and
    /// Sennrich 2019, equation 4). All `[rows, hidden]`.
    ///
    /// # Errors
    /// A device failure.
    fn add_rms_norm(
        &self,
        residual: &mut Self::Tensor,
        delta: Option<&Self::Tensor>,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError>;

    /// `out = x W^T + bias`, and per site and segment of `lora` what [`openlora_types::SiteWeights`] defines. `x: [rows,
    /// inputs]`, `out: [rows, outputs]`.
    ///
    /// # Errors
    /// A device failure.
    fn linear(
        &self,
        linear: &Self::Linear,
        lora: &LoraRows<'_, Self::Adapter>,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError>;

    /// On `qkv: [rows, (heads + 2 kv_heads) head_dim]`: RMSNorm of each q and k head where `qk_norm` is given (Qwen3), rotary
    /// embedding of q and k (half-split pairs, as in Hugging Face), then k and v into the cache.
    ///
    /// # Errors
    /// A block table that names a page of an adapter or none of the pool, or a device failure.
    fn rope_and_store(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &mut Self::Tensor,
        pages: &mut Self::Pages,
    ) -> Result<(), KernelError>;

    /// Causal attention of each row over its sequence's cache, `layer`'s window applied. `out: [rows, heads head_dim]`.
    ///
    /// # Errors
    /// A block table that names a page of an adapter or none of the pool, or a device failure.
    fn attention(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &Self::Tensor,
        pages: &Self::Pages,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError>;

    /// `out = silu(gate) * up` of `gate_up: [rows, 2 intermediate]` (SwiGLU, Shazeer 2020).
    ///
    /// # Errors
    /// A device failure.
    fn swiglu(&self, gate_up: &Self::Tensor, out: &mut Self::Tensor) -> Result<(), KernelError>;

    /// `out[i] = x[rows[i]]`.
    ///
    /// # Errors
    /// A device failure.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor) -> Result<(), KernelError>;

    /// One result per row of `logits: [rows, vocab]`, which it may overwrite. `out` is cleared and filled; its buffers are
    /// reused.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When another sampling is enqueued and not collected.
    fn sample(
        &self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError>;

    /// The first half of [`Backend::sample`]: enqueues it where operations are [asynchronous](Backend::is_asynchronous), else does all
    /// of it, into `out`. Each is collected by [`Backend::collect_sample`]. Two may be enqueued and not collected where operations are
    /// asynchronous, so that a step can be enqueued behind one that is not done yet ([`StepRows::drawn`]); elsewhere one. With no rows
    /// nothing is computed, and collecting it waits for what was enqueued before.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When two have been enqueued and not collected.
    fn enqueue_sample(
        &self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        self.sample(logits, rows, out)
    }

    /// The second half of [`Backend::sample`]: waits for the oldest sampling that has not been collected, not for what was enqueued
    /// after it, and fills `out`. Where operations are not asynchronous, `out` is the one that [`Backend::enqueue_sample`] had.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When there is none.
    fn collect_sample(&self, out: &mut Vec<SampledRow>) -> Result<(), KernelError> {
        let _ = out;
        Ok(())
    }
}

/// How the numbers of a tensor are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// As the backend multiplies: 16 bits on a GPU, f32 on the CPU.
    Activation,
    /// f32 on every backend: the residual stream, to which every layer adds, and logits.
    F32,
}

/// One forward pass over a model's layers.
pub struct ForwardScope<'a, B: Backend + ?Sized> {
    /// The same for passes over the same tensors, different for all others.
    pub tensors: u64,
    /// The rows.
    pub rows: &'a StepRows<'a>,
    /// Their adapters.
    pub lora: &'a LoraRows<'a, B::Adapter>,
    /// Rows that the tensors have room for.
    pub rows_max: usize,
    /// Whether the hidden rows after the final norm are wanted of all rows.
    pub all_wanted: bool,
}

/// Attention's sizes, the same for all layers of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head, even.
    pub head_dim: usize,
    /// Tokens of one KV block.
    pub block_size: usize,
    /// Multiplies q · k, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// Epsilon of the q/k norms.
    pub norm_eps: f32,
}

/// What differs between layers.
pub struct LayerAttention<'a, B: Backend + ?Sized> {
    /// Layer, from 0.
    pub layer: usize,
    /// Tokens a row sees, itself included; `None` sees all before it.
    pub window: Option<usize>,
    /// Rotary frequencies.
    pub rope: &'a B::Rope,
    /// Weights of the q and k head norms, `[head_dim]` each.
    pub qk_norm: Option<(&'a B::Vector, &'a B::Vector)>,
}

impl<B: Backend + ?Sized> Clone for LayerAttention<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend + ?Sized> Copy for LayerAttention<'_, B> {}

/// cos and sin of every position, scaling (llama3, yarn) included.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Rotated elements of a head, at most `head_dim`, even; the rest pass through.
    pub rotary_dim: usize,
    /// `[positions, rotary_dim / 2]`.
    pub cos: Vec<f32>,
    /// `[positions, rotary_dim / 2]`.
    pub sin: Vec<f32>,
}

/// The rows of one step. Rows of a sequence are neighbours, in order of position; sequences of one adapter are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// Token of each row.
    pub tokens: &'a [Token],
    /// The rows whose token is not known to the host yet, in ascending order: none but where operations are
    /// [asynchronous](Backend::is_asynchronous), and only in a pass of [`Backend::forward`].
    pub drawn: &'a [DrawnToken],
    /// Position of each row in its sequence, from 0.
    pub positions: &'a [u32],
    /// The sequences, covering all rows in order.
    pub sequences: &'a [SequenceRows],
    /// All block tables, one after the other: page numbers.
    pub block_tables: &'a [u32],
}

/// A row whose token is not known to the host yet. `Drawn` in `include/step.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DrawnToken {
    /// Row of the step; its entry in `tokens` means nothing, 0 there.
    pub row: u32,
    /// Row of the sampling that was enqueued last, whose token it takes.
    pub sample: u32,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// First row.
    pub row: usize,
    /// Rows, at least 1.
    pub rows: usize,
    /// First entry in `block_tables`.
    pub table: usize,
    /// Entries there: enough blocks for the last row's position.
    pub blocks: usize,
}

/// Which adapter each row uses, as runs (Punica's segments).
pub struct LoraRows<'a, A> {
    /// Runs covering all rows in order. Empty when no row has an adapter.
    pub segments: &'a [LoraSegment<'a, A>],
}

/// A run of rows with the same adapter.
pub struct LoraSegment<'a, A> {
    /// First row.
    pub row: usize,
    /// Rows, at least 1.
    pub rows: usize,
    /// The adapter, or `None` for the base model alone.
    pub adapter: Option<&'a A>,
}

impl<A> Clone for LoraRows<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for LoraRows<'_, A> {}
impl<A> Clone for LoraSegment<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for LoraSegment<'_, A> {}

/// What to do with one row of logits.
#[derive(Clone, Copy, Debug)]
pub enum SampleRow<'a> {
    /// Draw the next token.
    Draw {
        /// The request's parameters.
        params: &'a SamplingParams,
        /// Which of the request's `n` samples this is: part of the random key.
        sample_index: u32,
        /// Prompt tokens.
        prompt: &'a [Token],
        /// Tokens generated so far; their number is the draw's position.
        generated: &'a [Token],
        /// Tokens that must not be drawn now (end-of-sequence and stop tokens before `min_tokens`).
        banned: &'a [Token],
        /// Alternatives to report.
        top: usize,
    },
    /// Report the log-probability of a given token.
    Score {
        /// The token.
        token: Token,
        /// Alternatives to report.
        top: usize,
    },
}

/// One row's result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledRow {
    /// The token drawn or scored.
    pub token: Token,
    /// Its log-probability under the raw logits (no penalty, temperature or truncation).
    pub logprob: f32,
    /// The most probable tokens under the raw logits, best first, ties by lower token.
    pub top: Vec<TokenLogprob>,
}

impl BlockFormat {
    /// Elements of one block.
    #[must_use]
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Name in files and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }
}
