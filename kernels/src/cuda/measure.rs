//! Times operations alone, by the device's own clock, beside what they must move and compute: for `openlora bench --device cuda`.
//!
//! An operation is recorded several times as one graph, so that what launching costs the host is no part of it, and replayed;
//! the time is the median of the replays. Inputs are random and never zeros, which cost a GPU less. Where one call touches less than
//! [`Effort::rotate_bytes`], calls take turns among several sets of buffers, so that none finds its own in a cache.

mod attention;
mod lora;

pub use lora::{LoraRig, Part};

use std::sync::Arc;

use openlora_types::ModelShape;

use super::device::{Device, Element, Gemm, Memory, Stream};
use super::rows::{self, DeviceList, NormWeight, PagePair, Rows};
use super::sample::{SampleLimits, Sampler};
use super::step::{StepLimits, StepMemory};
use super::tensor::CudaTensor;
use crate::conformance::Random;
use crate::{AttentionSpec, KernelError, SampleRow, SequenceRows, StepRows};

/// Sets of buffers at most.
const SETS_MAX: usize = 64;
/// Calls of a recording at most.
const CALLS_MAX: usize = 512;
/// Bytes of random numbers that are made; longer buffers repeat them.
const PATTERN_BYTES: usize = 8 << 20;
/// Bytes of a page of [`Measure::copy`].
const PAGE_BYTES: usize = 1 << 20;

/// How carefully is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Replays that count.
    pub samples: usize,
    /// What one replay should take at least, in milliseconds: the clock ticks every half microsecond.
    pub replay_ms: f32,
    /// Bytes that the sets of buffers have together, several times a cache.
    pub rotate_bytes: usize,
}

impl Effort {
    /// For a GPU.
    pub const GPU: Self = Self { samples: 15, replay_ms: 0.5, rotate_bytes: 256 << 20 };
    /// For tests.
    pub const ONCE: Self = Self { samples: 1, replay_ms: 0.0, rotate_bytes: 0 };
}

/// What an operation must move through memory, each input read once and each output written once, and compute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
}

/// What a call took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Median over the replays, in milliseconds.
    pub milliseconds: f64,
    /// The fastest.
    pub best: f64,
    /// The slowest.
    pub worst: f64,
    /// What it must move and compute.
    pub work: Work,
}

/// Times operations of a model's sizes.
#[derive(Debug)]
pub struct Measure<D: Device> {
    device: Arc<D>,
    element: Element,
    effort: Effort,
    shape: ModelShape,
    pattern: Vec<u8>,
}

impl<D: Device> Measure<D> {
    /// For a model's sizes in numbers of `element`.
    #[must_use]
    pub fn new(device: &Arc<D>, element: Element, shape: ModelShape, effort: Effort) -> Self {
        let mut random = Random::new(1);
        let mut number = || random.number();
        let pattern = match element {
            Element::F32 => (0..PATTERN_BYTES / 4).flat_map(|_| number().to_le_bytes()).collect(),
            Element::Bf16 => {
                (0..PATTERN_BYTES / 2).flat_map(|_| half::bf16::from_f32(number()).to_le_bytes()).collect()
            }
            Element::F16 => (0..PATTERN_BYTES / 2).flat_map(|_| half::f16::from_f32(number()).to_le_bytes()).collect(),
        };
        Self { device: Arc::clone(device), element, effort, shape, pattern }
    }

    /// Attention's sizes, with blocks of 16 tokens.
    fn spec(&self) -> AttentionSpec {
        let ModelShape { heads, kv_heads, head_dim, .. } = self.shape;
        let scale = (head_dim as f32).sqrt().recip();
        AttentionSpec { heads, kv_heads, head_dim, block_size: 16, scale, norm_eps: 1e-6 }
    }

    /// Sets of buffers for calls that touch `bytes`.
    fn sets(&self, bytes: f64) -> usize {
        ((self.effort.rotate_bytes as f64 / bytes.max(1.0)).ceil() as usize).clamp(1, SETS_MAX)
    }

    /// Random numbers of the element.
    fn random(&self, bytes: usize) -> Result<Memory<D>, KernelError> {
        let mut memory = Memory::new(&self.device, bytes)?;
        for start in (0..bytes).step_by(PATTERN_BYTES) {
            memory.write(start, &self.pattern[..PATTERN_BYTES.min(bytes - start)])?;
        }
        Ok(memory)
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<CudaTensor<D>, KernelError> {
        let memory = self.random(rows * width * self.element.bytes())?;
        Ok(CudaTensor::of(memory, self.element, rows, width))
    }

    fn tensor_f32(&self, rows: usize, width: usize) -> Result<CudaTensor<D>, KernelError> {
        let mut random = Random::new(2);
        let values: Vec<f32> = (0..1 << 18).map(|_| random.number() * 4.0).collect();
        let mut memory = Memory::new(&self.device, rows * width * 4)?;
        for start in (0..rows * width).step_by(values.len()) {
            memory.write(start * 4, &values[..values.len().min(rows * width - start)])?;
        }
        Ok(CudaTensor::of(memory, Element::F32, rows, width))
    }

    fn tensors(&self, sets: usize, rows: usize, width: usize) -> Result<Vec<CudaTensor<D>>, KernelError> {
        (0..sets).map(|_| self.tensor(rows, width)).collect()
    }

    /// Times `call(i)`, the call that uses set `i` of `sets`.
    ///
    /// # Safety
    /// What it enqueues is sound, also when it is enqueued again, as long as this runs.
    unsafe fn time(
        &self,
        work: Work,
        sets: usize,
        call: &mut dyn FnMut(usize) -> Result<(), KernelError>,
    ) -> Result<Timing, KernelError> {
        let device = &*self.device;
        // Nothing may be made ready while it is recorded.
        (0..sets).try_for_each(&mut *call)?;
        device.synchronise()?;
        let mut record = |calls: usize| device.capture(&mut || (0..calls).try_for_each(|i| call(i % sets)));
        let replayed = |graph: &D::Graph| -> Result<f32, KernelError> {
            let from = device.record_timed(Stream::Compute)?;
            // SAFETY: the caller's promise.
            unsafe { device.replay(graph)? };
            let to = device.record_timed(Stream::Compute)?;
            device.elapsed(&from, &to)
        };
        let (mut calls, mut graph) = (sets, record(sets)?);
        replayed(&graph)?;
        let once = replayed(&graph)?;
        if once < self.effort.replay_ms {
            let more = (self.effort.replay_ms / once.max(1e-3)).ceil() as usize;
            calls = (sets * more).min(CALLS_MAX).max(sets);
            graph = record(calls)?;
            replayed(&graph)?;
        }
        let samples = (0..self.effort.samples.max(1)).map(|_| Ok(f64::from(replayed(&graph)?) / calls as f64));
        let mut samples = samples.collect::<Result<Vec<f64>, KernelError>>()?;
        device.synchronise()?;
        samples.sort_by(f64::total_cmp);
        let (best, worst) = (samples[0], samples[samples.len() - 1]);
        Ok(Timing { milliseconds: samples[samples.len() / 2], best, worst, work })
    }

    /// Copying `bytes` from one place of the memory to another: what memory can do, bytes read and bytes written.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn copy(&self, bytes: usize) -> Result<Timing, KernelError> {
        let count = bytes.div_ceil(PAGE_BYTES);
        let pages = self.random(2 * count * PAGE_BYTES)?;
        let mut pairs = DeviceList::new(&self.device, count)?;
        let pair = |from: usize| PagePair { from: from as u32, to: (count + from) as u32 };
        pairs.write(&(0..count).map(pair).collect::<Vec<_>>())?;
        let work = Work { bytes: (2 * count * PAGE_BYTES) as f64, flops: 0.0 };
        // SAFETY: pages and pairs live as long as this runs.
        unsafe {
            self.time(work, 1, &mut |_| rows::copy_blocks(&*self.device, Stream::Compute, &pairs, &pages, PAGE_BYTES))
        }
    }

    /// A product: `x: [rows, inputs]` by `w: [outputs, inputs]`, results of the element or in f32.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn product(&self, rows: usize, inputs: usize, outputs: usize, to_f32: bool) -> Result<Timing, KernelError> {
        let out_element = if to_f32 { Element::F32 } else { self.element };
        let size = self.element.bytes();
        let bytes = ((rows + outputs) * inputs * size + rows * outputs * out_element.bytes()) as f64;
        let work = Work { bytes, flops: 2.0 * rows as f64 * inputs as f64 * outputs as f64 };
        let sets = self.sets(bytes);
        let (x, w) = (self.tensors(sets, rows, inputs)?, self.tensors(sets, outputs, inputs)?);
        let out: Vec<_> = (0..sets)
            .map(|_| Memory::new(&self.device, rows * outputs * out_element.bytes()))
            .collect::<Result<_, _>>()?;
        let mut call = |i: usize| {
            let (x, w, out): (&CudaTensor<D>, &CudaTensor<D>, &Memory<D>) = (&x[i], &w[i], &out[i]);
            let (element, x, w, out) = (self.element, x.address(), w.address(), out.address());
            let gemm = Gemm { rows, inputs, outputs, element, out_element, x, w, out };
            // SAFETY: three matrices of these sizes.
            unsafe { self.device.gemm(Stream::Compute, &gemm) }
        };
        // SAFETY: the matrices live as long as this runs.
        unsafe { self.time(work, sets, &mut call) }
    }

    /// RMSNorm of `rows` rows, a residual added before.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn norm(&self, rows: usize) -> Result<Timing, KernelError> {
        let width = self.shape.hidden;
        // The residual is read and written.
        let bytes = (rows * width * (8 + 2 * self.element.bytes())) as f64;
        let work = Work { bytes, flops: 5.0 * (rows * width) as f64 };
        let sets = self.sets(bytes);
        let mut residual = (0..sets).map(|_| self.tensor_f32(rows, width)).collect::<Result<Vec<_>, _>>()?;
        let (delta, mut out) = (self.tensors(sets, rows, width)?, self.tensors(sets, rows, width)?);
        let weight = Memory::holding(&self.device, &vec![1.0_f32; width])?;
        let norm = NormWeight { weight: &weight, eps: 1e-5 };
        let count = Memory::holding(&self.device, &[rows as u32; 4])?;
        let rows = Rows { count: count.address(), max: rows };
        let mut call = |i: usize| {
            let (residual, out) = (&mut residual[i], &mut out[i]);
            // SAFETY: the count lives as long as this runs.
            unsafe { rows::add_rms_norm(&*self.device, Stream::Compute, rows, residual, Some(&delta[i]), &norm, out) }
        };
        // SAFETY: the tensors live as long as this runs.
        unsafe { self.time(work, sets, &mut call) }
    }

    /// SwiGLU of `rows` rows.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn swiglu(&self, rows: usize) -> Result<Timing, KernelError> {
        let width = self.shape.intermediate;
        let bytes = (3 * rows * width * self.element.bytes()) as f64;
        let work = Work { bytes, flops: 5.0 * (rows * width) as f64 };
        let sets = self.sets(bytes);
        let (gate_up, mut out) = (self.tensors(sets, rows, 2 * width)?, self.tensors(sets, rows, width)?);
        let count = Memory::holding(&self.device, &[rows as u32; 4])?;
        let rows = Rows { count: count.address(), max: rows };
        // SAFETY: the count and the tensors live as long as this runs.
        unsafe {
            self.time(work, sets, &mut |i| rows::swiglu(&*self.device, Stream::Compute, rows, &gate_up[i], &mut out[i]))
        }
    }

    /// Drawing a token from each of `rows` rows of logits, at temperature 1.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn sample(&self, rows: usize) -> Result<Timing, KernelError> {
        let vocab = self.shape.vocab;
        let bytes = (rows * vocab * 4) as f64;
        let work = Work { bytes, flops: 0.0 };
        let sets = self.sets(bytes);
        let mut logits = (0..sets).map(|_| self.tensor_f32(rows, vocab)).collect::<Result<Vec<_>, _>>()?;
        let mut sampler = Sampler::new(&self.device, SampleLimits { rows, vocab, top: 1 })?;
        let params = openlora_types::SamplingParams::default();
        let draw =
            SampleRow::Draw { params: &params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 };
        sampler.prepare(&vec![draw; rows])?;
        // SAFETY: the sampler and the logits live as long as this runs.
        unsafe { self.time(work, sets, &mut |i| sampler.launch(Stream::Compute, &mut logits[i], rows)) }
    }

    /// A step on the device: `sequences` of `rows` rows each, the last of `context` tokens.
    fn step(&self, sequences: usize, rows: usize, context: usize) -> Result<StepMemory<D>, KernelError> {
        let blocks = context.div_ceil(self.spec().block_size);
        let limits = StepLimits { rows: sequences * rows, table_entries: sequences * blocks };
        let mut memory = StepMemory::new(&self.device, limits)?;
        let sequence = |i| SequenceRows { row: i * rows, rows, table: i * blocks, blocks };
        let spans: Vec<SequenceRows> = (0..sequences).map(sequence).collect();
        let tokens: Vec<u32> = (0..sequences * rows).map(|row| (row * 7919 % self.shape.vocab) as u32).collect();
        let positions: Vec<u32> = (0..sequences * rows).map(|row| (context - rows + row % rows) as u32).collect();
        let block_tables: Vec<u32> = (0..(sequences * blocks) as u32).collect();
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &spans,
            block_tables: &block_tables,
        };
        memory.write(&step, &[])?;
        Ok(memory)
    }
}
