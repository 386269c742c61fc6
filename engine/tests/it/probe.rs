//! The CPU backend with a gate before each step, another before its results where it plays a device that works by itself, and faults on
//! demand.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use openlora_kernels::cpu::Cpu;
use openlora_kernels::{
    AttentionSpec, Backend, DrawnToken, ForwardScope, KernelError, LayerAttention, LinearSpec, LoraRows, Numbers,
    RopeTable, SampleRow, SampledRow, StepRows, TensorSource,
};
use openlora_types::{AdapterSizes, AdapterWeights, Token};

/// After this long something hangs that should not; nothing is expected to take a noticeable part of it.
pub(crate) const HANG: Duration = Duration::from_secs(60);

/// A [`Cpu`] that asks its [`Controls`] first.
pub(crate) struct Probe {
    pub(crate) cpu: Cpu,
    pub(crate) controls: Arc<Controls>,
    /// Whether it says that its operations return before they are done.
    pub(crate) asynchronous: bool,
    pub(crate) under_way: Mutex<UnderWay>,
}

/// What an asynchronous device knows and its host does not yet.
#[derive(Default)]
pub(crate) struct UnderWay {
    /// Samplings that were not collected.
    samplings: VecDeque<Vec<SampledRow>>,
    /// What the last one drew.
    tokens: Vec<Token>,
    /// Rows of the pass that runs whose tokens are among those.
    drawn: Vec<DrawnToken>,
}

/// Where a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// The first operation of a step.
    Embed,
    /// In the middle of it.
    Attention,
    /// The last.
    Sample,
    /// On a submitting thread.
    LoadAdapter,
}

/// How it strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Panic,
    OutOfMemory,
    DeviceLost,
}

/// What the tests hold, count and break.
#[derive(Default)]
pub(crate) struct Controls {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps that have come to the gate.
    begun: u64,
    /// Steps that may pass it; `None` lets all pass.
    allowed: Option<u64>,
    /// Results that were asked for, and that may be had; `None` gives all.
    collected: u64,
    results: Option<u64>,
    loads_begun: u64,
    loads_held: bool,
    fault: Option<(Operation, Fault)>,
    /// The most runs of rows with the same adapter, and the most sequences, that a step had.
    segments_max: usize,
    sequences_max: usize,
}

impl Controls {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until(&self, what: &str, reached: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, HANG, |state| !reached(state));
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "{what} did not come");
        state
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Holds the next step at its beginning, and all after it.
    pub(crate) fn close(&self) {
        self.change(|state| state.allowed = Some(state.begun));
    }

    /// Lets `steps` more steps pass a closed gate.
    pub(crate) fn allow(&self, steps: u64) {
        self.change(|state| *state.allowed.as_mut().expect("the gate is closed") += steps);
    }

    /// Lets all steps pass.
    pub(crate) fn open(&self) {
        self.change(|state| state.allowed = None);
    }

    /// Waits until step `step`, counted from 1, has come to the gate: it is planned, and everything before it is done.
    pub(crate) fn wait_for_step(&self, step: u64) {
        drop(self.wait_until("the step", |state| state.begun >= step));
    }

    /// Lets one step pass and waits for the next one to come; returns its number.
    pub(crate) fn advance(&self) -> u64 {
        let next = self.lock().begun + 1;
        self.allow(1);
        self.wait_for_step(next);
        next
    }

    /// Lets so many more steps of an asynchronous backend have results.
    pub(crate) fn allow_results(&self, steps: u64) {
        self.change(|state| state.results = Some(state.results.unwrap_or(state.collected) + steps));
    }

    /// Waits until so many steps have asked for their results.
    pub(crate) fn wait_for_collection(&self, steps: u64) {
        drop(self.wait_until("the results' turn", |state| state.collected >= steps));
    }

    /// Steps that have asked for their results.
    pub(crate) fn collections(&self) -> u64 {
        self.lock().collected
    }

    fn enter_collection(&self) {
        self.change(|state| state.collected += 1);
        drop(self.wait_until("the results", |state| state.results.is_none_or(|results| state.collected <= results)));
    }

    /// Steps that have come to the gate.
    pub(crate) fn steps(&self) -> u64 {
        self.lock().begun
    }

    /// Holds loads of adapters, or lets them go on.
    pub(crate) fn hold_loads(&self, held: bool) {
        self.change(|state| state.loads_held = held);
    }

    /// Waits until so many loads have begun.
    pub(crate) fn wait_for_loads(&self, loads: u64) {
        drop(self.wait_until("the load", |state| state.loads_begun >= loads));
    }

    /// Lets the next call of `operation` fail.
    pub(crate) fn break_next(&self, operation: Operation, fault: Fault) {
        self.change(|state| state.fault = Some((operation, fault)));
    }

    /// The most runs of rows with the same adapter, and the most sequences, that any step had so far.
    pub(crate) fn widest_step(&self) -> (usize, usize) {
        let state = self.lock();
        (state.segments_max, state.sequences_max)
    }

    fn enter_step(&self, segments: usize) {
        self.change(|state| {
            state.begun += 1;
            state.segments_max = state.segments_max.max(segments);
        });
        drop(self.wait_until("the gate's opening", |state| state.allowed.is_none_or(|allowed| state.begun <= allowed)));
    }

    fn enter_load(&self) {
        self.change(|state| state.loads_begun += 1);
        drop(self.wait_until("the load's turn", |state| !state.loads_held));
    }

    fn strike(&self, operation: Operation) -> Result<(), KernelError> {
        let mut state = self.lock();
        let Some((_, fault)) = state.fault.take_if(|(at, _)| *at == operation) else { return Ok(()) };
        drop(state);
        match fault {
            Fault::Panic => panic!("injected panic"),
            Fault::OutOfMemory => Err(KernelError::OutOfMemory { what: "injected", bytes: 1 << 40 }),
            Fault::DeviceLost => Err(KernelError::ThreadPanicked("injected loss".into())),
        }
    }
}

fn for_cpu<'a>(layer: LayerAttention<'a, Probe>) -> LayerAttention<'a, Cpu> {
    LayerAttention { layer: layer.layer, window: layer.window, rope: layer.rope, qk_norm: layer.qk_norm }
}

/// As the CPU takes it, which gets all tokens.
fn known<'a>(step: &StepRows<'a>) -> StepRows<'a> {
    StepRows { drawn: &[], ..*step }
}

impl Probe {
    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Probe {
    type Linear = <Cpu as Backend>::Linear;
    type Embedding = <Cpu as Backend>::Embedding;
    type Vector = <Cpu as Backend>::Vector;
    type Rope = <Cpu as Backend>::Rope;
    type Adapter = <Cpu as Backend>::Adapter;
    type Pages = <Cpu as Backend>::Pages;
    type PageSet = <Cpu as Backend>::PageSet;
    type Tensor = <Cpu as Backend>::Tensor;

    fn describe(&self) -> String {
        self.cpu.describe()
    }

    fn is_asynchronous(&self) -> bool {
        self.asynchronous
    }

    fn load_linear(&self, spec: &LinearSpec<'_>) -> Result<Self::Linear, KernelError> {
        self.cpu.load_linear(spec)
    }

    fn load_embedding(
        &self,
        source: &TensorSource<'_>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        offset: usize,
    ) -> Result<Self::Embedding, KernelError> {
        self.cpu.load_embedding(source, owner, offset)
    }

    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError> {
        self.cpu.load_vector(values)
    }

    fn load_rope(&self, table: &RopeTable) -> Result<Self::Rope, KernelError> {
        self.cpu.load_rope(table)
    }

    fn load_adapter(
        &self,
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        pages: Self::PageSet,
    ) -> Result<Self::Adapter, KernelError> {
        self.controls.enter_load();
        self.controls.strike(Operation::LoadAdapter)?;
        self.cpu.load_adapter(weights, output_scales, layers, pages)
    }

    fn adapter_bytes(&self, adapter: &Self::Adapter) -> usize {
        self.cpu.adapter_bytes(adapter)
    }

    fn adapter_pages(&self, sizes: &AdapterSizes, page_bytes: usize) -> usize {
        self.cpu.adapter_pages(sizes, page_bytes)
    }

    fn new_pages(&self, spec: &AttentionSpec, layers: usize, pages: usize) -> Result<Self::Pages, KernelError> {
        self.cpu.new_pages(spec, layers, pages)
    }

    fn page_bytes(&self, spec: &AttentionSpec, layers: usize) -> usize {
        self.cpu.page_bytes(spec, layers)
    }

    fn take_pages(&self, pool: &mut Self::Pages, pages: &[u32]) -> Result<Self::PageSet, KernelError> {
        self.cpu.take_pages(pool, pages)
    }

    fn new_tensor(&self, numbers: Numbers, rows_max: usize, width: usize) -> Result<Self::Tensor, KernelError> {
        self.cpu.new_tensor(numbers, rows_max, width)
    }

    fn read_tensor(&self, tensor: &Self::Tensor) -> Vec<f32> {
        self.cpu.read_tensor(tensor)
    }

    fn set_rows(&self, tensor: &mut Self::Tensor, rows: usize) {
        self.cpu.set_rows(tensor, rows);
    }

    fn forward(
        &self,
        scope: &ForwardScope<'_, Self>,
        pages: &mut Self::Pages,
        run: &mut dyn FnMut(&mut Self::Pages) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.under_way().drawn = scope.rows.drawn.to_vec();
        run(pages)
    }

    fn embed(
        &self,
        table: &Self::Embedding,
        tokens: &[Token],
        lora: &LoraRows<'_, Self::Adapter>,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError> {
        self.controls.enter_step(lora.segments.len());
        self.controls.strike(Operation::Embed)?;
        let mut tokens = tokens.to_vec();
        let under_way = self.under_way();
        for DrawnToken { row, sample } in &under_way.drawn {
            let unknown = std::mem::replace(&mut tokens[*row as usize], under_way.tokens[*sample as usize]);
            assert_eq!(unknown, 0, "row {row} is drawn and has a token");
        }
        self.cpu.embed(table, &tokens, lora, out)
    }

    fn add_rms_norm(
        &self,
        residual: &mut Self::Tensor,
        delta: Option<&Self::Tensor>,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError> {
        self.cpu.add_rms_norm(residual, delta, weight, eps, out)
    }

    fn linear(
        &self,
        linear: &Self::Linear,
        lora: &LoraRows<'_, Self::Adapter>,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError> {
        self.cpu.linear(linear, lora, x, out)
    }

    fn rope_and_store(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &mut Self::Tensor,
        pages: &mut Self::Pages,
    ) -> Result<(), KernelError> {
        self.controls.change(|state| state.sequences_max = state.sequences_max.max(step.sequences.len()));
        self.cpu.rope_and_store(spec, &known(step), for_cpu(layer), qkv, pages)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        step: &StepRows<'_>,
        layer: LayerAttention<'_, Self>,
        qkv: &Self::Tensor,
        pages: &Self::Pages,
        out: &mut Self::Tensor,
    ) -> Result<(), KernelError> {
        self.controls.strike(Operation::Attention)?;
        self.cpu.attention(spec, &known(step), for_cpu(layer), qkv, pages, out)
    }

    fn swiglu(&self, gate_up: &Self::Tensor, out: &mut Self::Tensor) -> Result<(), KernelError> {
        self.cpu.swiglu(gate_up, out)
    }

    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor) -> Result<(), KernelError> {
        self.cpu.gather_rows(x, rows, out)
    }

    fn sample(
        &self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        self.controls.strike(Operation::Sample)?;
        self.cpu.sample(logits, rows, out)
    }

    fn enqueue_sample(
        &self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<SampledRow>,
    ) -> Result<(), KernelError> {
        self.sample(logits, rows, out)?;
        if self.asynchronous {
            let mut under_way = self.under_way();
            assert!(under_way.samplings.len() < 2, "two samplings are to be collected");
            under_way.tokens = out.iter().map(|sampled| sampled.token).collect();
            under_way.samplings.push_back(std::mem::take(out));
        }
        Ok(())
    }

    fn collect_sample(&self, out: &mut Vec<SampledRow>) -> Result<(), KernelError> {
        if self.asynchronous {
            self.controls.enter_collection();
            *out = self.under_way().samplings.pop_front().expect("a sampling was enqueued");
        }
        Ok(())
    }
}
