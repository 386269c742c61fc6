//! The forward pass: one page for every family, because they differ in data (biases, norms, windows, angles) and not in
//! the sequence of operations.

use std::sync::atomic::{AtomicU64, Ordering};

use openlora_kernels::{Backend, ForwardScope, KernelError, LayerAttention, LoraRows, Numbers, StepRows};

use crate::error::ModelError;
use crate::weights::{Layer, Model};

/// The next [`Activations::id`].
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// The buffers of one forward pass, allocated once for the largest step.
pub struct Activations<B: Backend> {
    /// Unlike any other's.
    id: u64,
    /// The residual stream, `[rows, hidden]`.
    residual: B::Tensor,
    /// Output of the last norm, `[rows, hidden]`.
    normed: B::Tensor,
    /// `[rows, (heads + 2 kv_heads) head_dim]`
    qkv: B::Tensor,
    /// `[rows, heads head_dim]`
    attended: B::Tensor,
    /// What the next norm adds to the residual, `[rows, hidden]`.
    delta: B::Tensor,
    /// `[rows, 2 intermediate]`
    gate_up: B::Tensor,
    /// `[rows, intermediate]`
    activated: B::Tensor,
    /// The residual stream and the attention's output of the wanted rows, once the others are left behind.
    wanted_residual: B::Tensor,
    wanted_attended: B::Tensor,
    /// Rows that get logits, `[logit rows, hidden]`.
    gathered: B::Tensor,
    /// `[logit rows, vocab]`
    logits: B::Tensor,
    /// Wanted rows of the last forward.
    rows: usize,
    /// Rows and logit rows there is room for.
    rows_max: usize,
    logit_rows_max: usize,
}

impl<B: Backend> Activations<B> {
    /// The wanted hidden rows after the final norm, `[wanted rows, hidden]` of the last forward.
    pub fn hidden(&self) -> &B::Tensor {
        &self.normed
    }

    /// Rows there is room for.
    pub(crate) fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Rows of logits there is room for.
    pub(crate) fn logit_rows_max(&self) -> usize {
        self.logit_rows_max
    }

    /// A pass over these buffers, of which not all rows are wanted.
    pub(crate) fn scope<'a>(&self, rows: &'a StepRows<'a>, lora: &'a LoraRows<'a, B::Adapter>) -> ForwardScope<'a, B> {
        ForwardScope { tensors: self.id, rows, lora, rows_max: self.rows_max, all_wanted: false }
    }
}

impl<B: Backend> Model<B> {
    /// Allocates the buffers of the largest forward pass the model was loaded for.
    ///
    /// # Errors
    /// Memory.
    pub fn new_activations(&self) -> Result<Activations<B>, ModelError> {
        self.activations(self.options.max_rows, self.options.max_logit_rows)
    }

    /// Allocates the buffers of a forward pass of at most `rows`, whose logits are computed for `logit_rows` at once.
    ///
    /// # Errors
    /// Memory.
    pub fn activations(&self, rows: usize, logit_rows: usize) -> Result<Activations<B>, ModelError> {
        let shape = self.shape();
        let q = shape.heads * shape.head_dim;
        let kv = shape.kv_heads * shape.head_dim;
        let tensor = |rows, width| self.backend.new_tensor(Numbers::Activation, rows, width);
        let exact = |rows, width| self.backend.new_tensor(Numbers::F32, rows, width);
        Ok(Activations {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            residual: exact(rows, shape.hidden)?,
            normed: tensor(rows, shape.hidden)?,
            qkv: tensor(rows, q + 2 * kv)?,
            attended: tensor(rows, q)?,
            delta: tensor(rows, shape.hidden)?,
            gate_up: tensor(rows, 2 * shape.intermediate)?,
            activated: tensor(rows, shape.intermediate)?,
            wanted_residual: exact(rows, shape.hidden)?,
            wanted_attended: tensor(rows, q)?,
            gathered: tensor(logit_rows, shape.hidden)?,
            logits: exact(logit_rows, shape.vocab)?,
            rows: 0,
            rows_max: rows,
            logit_rows_max: logit_rows,
        })
    }

    /// Computes the rows of a step, writing their keys and values into `pages`, and leaves the hidden rows after the final
    /// norm of those that are `wanted` (ascending) in `act`. `lora` covers the step's rows, `wanted_lora` the wanted ones:
    /// in the last layer the others end once their keys and values are stored. Allocates nothing.
    ///
    /// # Errors
    /// A step that does not fit `act` or what the model was loaded for, a wanted row it does not have, or a device failure.
    pub fn forward(
        &self,
        act: &mut Activations<B>,
        step: &StepRows<'_>,
        lora: &LoraRows<'_, B::Adapter>,
        (wanted, wanted_lora): (&[u32], &LoraRows<'_, B::Adapter>),
        pages: &mut B::Pages,
    ) -> Result<(), ModelError> {
        let rows = step.tokens.len();
        within("number of rows", rows, act.rows_max)?;
        self.check_step(step)?;
        check_wanted(wanted, rows)?;
        act.rows = wanted.len();
        let scope = ForwardScope { all_wanted: wanted.len() == rows, ..act.scope(step, lora) };
        self.backend
            .forward(&scope, pages, &mut |pages| self.run_layers(act, step, lora, (wanted, wanted_lora), pages))?;
        self.backend.set_rows(&mut act.normed, wanted.len());
        Ok(())
    }

    /// The operations of [`Model::forward`].
    pub(crate) fn run_layers(
        &self,
        act: &mut Activations<B>,
        step: &StepRows<'_>,
        lora: &LoraRows<'_, B::Adapter>,
        (wanted, wanted_lora): (&[u32], &LoraRows<'_, B::Adapter>),
        pages: &mut B::Pages,
    ) -> Result<(), KernelError> {
        let rows = step.tokens.len();
        let backend = &*self.backend;
        let eps = self.config().rms_eps;
        backend.embed(&self.embedding, step.tokens, lora, &mut act.residual)?;
        for (number, layer) in self.layers.iter().enumerate() {
            // The first norm adds nothing; every later one adds what the layer before it left in `delta`.
            let delta = (number > 0).then_some(&act.delta);
            backend.add_rms_norm(&mut act.residual, delta, &layer.attention_norm, eps, &mut act.normed)?;
            let mut lora = lora;
            let is_last = number + 1 == self.layers.len();
            self.attend(act, (number, layer), step, lora, pages, is_last && wanted.is_empty())?;
            if is_last && wanted.len() < rows {
                if wanted.is_empty() {
                    return Ok(());
                }
                backend.gather_rows(&act.residual, wanted, &mut act.wanted_residual)?;
                backend.gather_rows(&act.attended, wanted, &mut act.wanted_attended)?;
                std::mem::swap(&mut act.residual, &mut act.wanted_residual);
                std::mem::swap(&mut act.attended, &mut act.wanted_attended);
                lora = wanted_lora;
            }
            backend.linear(&layer.o, lora, &act.attended, &mut act.delta)?;
            backend.add_rms_norm(
                &mut act.residual,
                Some(&act.delta),
                &layer.feed_forward_norm,
                eps,
                &mut act.normed,
            )?;
            backend.linear(&layer.gate_up, lora, &act.normed, &mut act.gate_up)?;
            backend.swiglu(&act.gate_up, &mut act.activated)?;
            backend.linear(&layer.down, lora, &act.activated, &mut act.delta)?;
        }
        backend.add_rms_norm(&mut act.residual, Some(&act.delta), &self.final_norm, eps, &mut act.normed)?;
        Ok(())
    }

    /// Queries, keys and values of a layer, the latter two stored, and unless `only_store` attention over them.
    fn attend(
        &self,
        act: &mut Activations<B>,
        (number, layer): (usize, &Layer<B>),
        step: &StepRows<'_>,
        lora: &LoraRows<'_, B::Adapter>,
        pages: &mut B::Pages,
        only_store: bool,
    ) -> Result<(), KernelError> {
        let (backend, spec) = (&*self.backend, &self.attention);
        let attention = LayerAttention {
            layer: number,
            window: layer.window,
            rope: &self.rope,
            qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (q, k)),
        };
        backend.linear(&layer.qkv, lora, &act.normed, &mut act.qkv)?;
        backend.rope_and_store(spec, step, attention, &mut act.qkv, pages)?;
        if !only_store {
            backend.attention(spec, step, attention, &act.qkv, pages, &mut act.attended)?;
        }
        Ok(())
    }

    /// Logits of the given among the wanted rows of the last forward, `[rows, vocab]`, in that order. `lora` covers the gathered rows (an
    /// adapter may target the head). Sampling may overwrite them; the hidden rows stay, so that a step with more rows than
    /// `max_logit_rows` asks several times.
    ///
    /// # Errors
    /// More rows than `act` has room for, a row the last forward did not have, or a device failure.
    pub fn logits<'a>(
        &self,
        act: &'a mut Activations<B>,
        rows: &[u32],
        lora: &LoraRows<'_, B::Adapter>,
    ) -> Result<&'a mut B::Tensor, ModelError> {
        within("number of logit rows", rows.len(), act.logit_rows_max)?;
        if let Some(row) = rows.iter().find(|row| **row as usize >= act.rows) {
            return Err(ModelError::Step { what: "logit row + 1", value: *row as usize + 1, max: act.rows });
        }
        if rows.is_empty() {
            self.backend.set_rows(&mut act.logits, 0);
            return Ok(&mut act.logits);
        }
        self.backend.gather_rows(&act.normed, rows, &mut act.gathered)?;
        self.backend.linear(&self.head, lora, &act.gathered, &mut act.logits)?;
        Ok(&mut act.logits)
    }

    /// What kernels index with must be in range here, so that they need not check each element.
    fn check_step(&self, step: &StepRows<'_>) -> Result<(), ModelError> {
        let rows = step.tokens.len();
        if step.positions.len() != rows {
            return Err(ModelError::Step { what: "number of positions", value: step.positions.len(), max: rows });
        }
        if let Some(token) = step.tokens.iter().max() {
            within("largest token + 1", *token as usize + 1, self.shape().vocab)?;
        }
        if let Some(position) = step.positions.iter().max() {
            within("largest position + 1", *position as usize + 1, self.options.max_position)?;
        }
        let mut next = 0;
        for sequence in step.sequences {
            if sequence.row != next || sequence.rows == 0 {
                return Err(ModelError::Step { what: "sequence's first row", value: sequence.row, max: next });
            }
            next += sequence.rows;
            within("number of rows in sequences", next, rows)?;
            within("end of a block table", sequence.table + sequence.blocks, step.block_tables.len())?;
            let last = step.positions[next - 1] as usize;
            within("blocks needed", last / self.attention.block_size + 1, sequence.blocks)?;
        }
        if next != rows {
            return Err(ModelError::Step { what: "number of rows", value: rows, max: next });
        }
        Ok(())
    }
}

fn check_wanted(wanted: &[u32], rows: usize) -> Result<(), ModelError> {
    let last = wanted.last().map_or(0, |row| *row as usize + 1);
    within("last wanted row + 1", last, rows)?;
    if let Some(pair) = wanted.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(ModelError::Step {
            what: "wanted row before a greater one",
            value: pair[0] as usize,
            max: pair[1] as usize,
        });
    }
    Ok(())
}

fn within(what: &'static str, value: usize, max: usize) -> Result<(), ModelError> {
    if value > max {
        return Err(ModelError::Step { what, value, max });
    }
    Ok(())
}
