//! Sampling on the device (`csrc/sample.cu`): two launches for any mix of rows, whatever their parameters.
//!
//! What differs from step to step is in memory: a request for each row, and for rows with penalties, biases or bans the list of the
//! logits that change, each token once. The list is made here, because the history is here: one pass over the history, a counter
//! for each token of the vocabulary, 16 bytes to the device for each token that changes. That costs 5 ns for each token of the
//! history (measured: 41 microseconds for 8,192 tokens, 5,639 of them distinct) and nothing for rows without penalties.
//!
//! **Two samplings in flight.** Whatever they have on the device they share: one stream writes the requests of the second after the first
//! has read its own, and copies the first's results to the host before the second's are there. Each has a [`Sampled`] of its own.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use openlora_types::{Token, TokenLogprob};

use super::device::{Address, Device, Element, Launch, Memory, Stream};
use super::rows::{self, DeviceList};
use super::tensor::CudaTensor;
use crate::reference::sample::Draw;
use crate::{KernelError, SampleRow, SampledRow};

const SCAN_THREADS: u32 = 256;
const PICK_THREADS: u32 = 512;
/// Tokens that one block of `sample_scan` reads.
const SPLIT: usize = 8_192;
/// Neighbouring tokens whose largest logit is kept.
const GROUP: usize = 32;
/// Tokens that a block of `sample_pick` can list.
const LISTED: usize = 4_096;
const SCAN_SHARED_BYTES: u32 = SCAN_THREADS / 32 * 8;
/// Eight sums and a count for each warp, the list's logits and tokens.
const PICK_SHARED_BYTES: u32 = PICK_THREADS / 32 * 9 * 4 + LISTED as u32 * 8;

/// Bits of [`Change::token`].
const SEEN: u32 = 1 << 31;
const GENERATED: u32 = 1 << 30;

/// `Change` in `csrc/sample.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Change {
    token: u32,
    bias: f32,
    frequency: f32,
    before: f32,
}

/// `SampleRow` in `csrc/sample.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Request {
    changes: Address,
    starts: Address,
    draws: u32,
    token: u32,
    top: u32,
    top_k: u32,
    scale: f32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    position: u32,
    sample_index: u32,
    seed: [u32; 2],
    unused: u32,
}

/// `SampleResult` in `csrc/sample.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Found {
    token: u32,
    logprob: f32,
    top: u32,
    unused: u32,
}

/// `TokenLogprob` in `csrc/sample.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct FoundTop {
    token: u32,
    logprob: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: Address,
    logits: Address,
    requests: Address,
    split_results: Address,
    groups: [Address; 2],
    results: Address,
    tops: Address,
    vocab: u32,
    splits: u32,
    top_max: u32,
    unused: u32,
}

/// Bytes of `SplitResult` in `csrc/sample.cu`.
const SPLIT_RESULT_BYTES: usize = 32;

/// Room for the largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLimits {
    /// Rows of logits.
    pub rows: usize,
    /// Tokens that the head has.
    pub vocab: usize,
    /// Alternatives of one row, at most 4,096.
    pub top: usize,
}

/// The memory of sampling.
#[derive(Debug)]
pub struct Sampler<D: Device> {
    device: Arc<D>,
    limits: SampleLimits,
    requests: DeviceList<D, Request>,
    /// All rows' changes, then their starts. Grows; the requests have its addresses, so that recorded launches do not.
    changes: Memory<D>,
    /// What it was before, each half as large at most: giving it back would wait for the device.
    outgrown: Vec<Memory<D>>,
    split_results: Memory<D>,
    groups: [Memory<D>; 2],
    /// One for each row, then the rows' alternatives.
    results: Memory<D>,
    /// For the results of samplings that are not in flight.
    landings: Vec<D::Landing>,
    lists: Lists,
    /// Of the rows written last.
    host: Vec<Request>,
    /// Which of them change, and where their changes and starts begin in the lists.
    changed: Vec<Changed>,
}

#[derive(Clone, Copy, Debug)]
struct Changed {
    row: usize,
    change: usize,
    start: usize,
}

impl<D: Device> Sampler<D> {
    /// Room for steps within `limits`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    ///
    /// # Panics
    /// On a vocabulary of 2^30 tokens or more, none, or more than 4,096 alternatives.
    pub fn new(device: &Arc<D>, limits: SampleLimits) -> Result<Self, KernelError> {
        let SampleLimits { rows, vocab, top } = limits;
        assert!(vocab > 0 && vocab < GENERATED as usize && top <= LISTED, "{limits:?}");
        let memory = |bytes| Memory::new(device, bytes);
        let groups = rows * vocab.div_ceil(GROUP) * 4;
        let results = rows * (size_of::<Found>() + top * size_of::<FoundTop>());
        Ok(Self {
            device: Arc::clone(device),
            limits,
            requests: DeviceList::new(device, rows)?,
            changes: memory(0)?,
            outgrown: Vec::new(),
            split_results: memory(rows * vocab.div_ceil(SPLIT) * SPLIT_RESULT_BYTES)?,
            groups: [memory(groups)?, memory(groups)?],
            results: memory(results)?,
            landings: vec![device.landing(results)?, device.landing(results)?],
            lists: Lists::new(vocab),
            host: Vec::with_capacity(rows),
            changed: Vec::with_capacity(rows),
        })
    }

    /// Writes what to do with each row of logits, for launches that follow.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    ///
    /// # Panics
    /// On more rows or alternatives than the limits, or a scored token outside the vocabulary.
    pub fn prepare(&mut self, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        self.host.clear();
        self.changed.clear();
        self.lists.clear();
        for row in rows {
            let request = self.request(row);
            self.host.push(request);
        }
        let (changes, starts) = (&self.lists.changes, &self.lists.starts);
        let changes_bytes = size_of_val(changes.as_slice());
        let needed = changes_bytes + size_of_val(starts.as_slice());
        if needed > self.changes.bytes() {
            let larger = Memory::new(&self.device, needed.next_power_of_two())?;
            self.outgrown.push(std::mem::replace(&mut self.changes, larger));
        }
        if !changes.is_empty() {
            self.changes.write(0, changes)?;
            self.changes.write(changes_bytes, starts)?;
        }
        let base = self.changes.address();
        for &Changed { row, change, start } in &self.changed {
            self.host[row].changes = base.plus(change * size_of::<Change>());
            self.host[row].starts = base.plus(changes_bytes + start * 4);
        }
        self.requests.write(&self.host)
    }

    fn request(&mut self, row: &SampleRow<'_>) -> Request {
        let (vocab, mut request) = (self.limits.vocab, Request::zeroed());
        match *row {
            SampleRow::Score { token, top } => {
                assert!((token as usize) < vocab, "token {token} is scored in a vocabulary of {vocab}");
                (request.token, request.top) = (token, top as u32);
            }
            SampleRow::Draw { params, sample_index, prompt, generated, banned, top } => {
                request.draws = 1;
                request.top = top as u32;
                request.top_k = if (params.top_k as usize) < vocab { params.top_k } else { 0 };
                if params.temperature > 0.0 {
                    let scale = std::f64::consts::LOG2_E / f64::from(params.temperature);
                    // Finite, so that the largest logit's distance of 0 stays 0, and not 0, which is greedy.
                    request.scale = (scale as f32).clamp(f32::MIN_POSITIVE, f32::MAX);
                }
                (request.top_p, request.min_p) = (params.top_p, params.min_p);
                (request.repetition, request.presence) = (params.repetition_penalty, params.presence_penalty);
                (request.position, request.sample_index) = (generated.len() as u32, sample_index);
                request.seed = [params.seed as u32, (params.seed >> 32) as u32];
                let (change, start) = (self.lists.changes.len(), self.lists.starts.len());
                if self.lists.add(&Draw { params, prompt, generated, banned }) {
                    self.changed.push(Changed { row: self.host.len(), change, start });
                }
            }
        }
        assert!(request.top as usize <= self.limits.top, "{} alternatives", request.top);
        request
    }

    /// Enqueues sampling from `logits: [rows, vocab]` in f32, for as many of the first `rows_max` rows as were prepared when it runs.
    /// The logits are the same afterwards.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When there is no room for `rows_max` rows, or the logits are not of the limits' shape.
    pub fn launch(&self, stream: Stream, logits: &mut CudaTensor<D>, rows_max: usize) -> Result<(), KernelError> {
        let SampleLimits { rows, vocab, top } = self.limits;
        assert!(rows_max <= rows && rows_max <= logits.rows(), "{rows_max} rows of {}", logits.rows());
        assert!(logits.width() == vocab && logits.element() == Element::F32, "logits of another shape");
        if rows_max == 0 {
            return Ok(());
        }
        let splits = vocab.div_ceil(SPLIT) as u32;
        let params = Params {
            rows: self.requests.rows().count,
            logits: logits.address(),
            requests: self.requests.items(),
            split_results: self.split_results.address(),
            groups: [self.groups[0].address(), self.groups[1].address()],
            results: self.results.address(),
            tops: self.results.address().plus(rows * size_of::<Found>()),
            vocab: vocab as u32,
            splits,
            top_max: top as u32,
            unused: 0,
        };
        let rows_max = rows_max as u32;
        let scan = Launch::new("sample_scan", [splits, rows_max], SCAN_THREADS, &params).shared(SCAN_SHARED_BYTES);
        let pick = Launch::new("sample_pick", [rows_max, 1], PICK_THREADS, &params).shared(PICK_SHARED_BYTES);
        // SAFETY: the logits have the rows, just checked; all other memory is this sampler's, made for that many rows, and requests
        // name tokens below the vocabulary's size and addresses in `changes`, which is not given back before its launches are over.
        unsafe {
            rows::launch(&*self.device, stream, scan)?;
            rows::launch(&*self.device, stream, pick)
        }
    }

    /// Enqueues a copy of the results to the host, of as many rows as were prepared last.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When two are in flight already.
    pub fn fetch(&mut self) -> Result<Sampled<D>, KernelError> {
        let with_tops = self.host.iter().rposition(|request| request.top > 0).map_or(0, |last| last + 1);
        let bytes = match with_tops {
            0 => self.host.len() * size_of::<Found>(),
            rows => self.limits.rows * size_of::<Found>() + rows * self.limits.top * size_of::<FoundTop>(),
        };
        let mut landing = self.landings.pop().expect("two samplings are in flight: collect one first");
        self.results.enqueue_read(bytes, &mut landing)?;
        Ok(Sampled { limits: self.limits, rows: self.host.len(), landing })
    }

    /// Takes back what [`Sampler::fetch`] gave, for another.
    pub fn reuse(&mut self, sampled: Sampled<D>) {
        // Not that of a sampler that had less room.
        if sampled.limits == self.limits {
            self.landings.push(sampled.landing);
        }
    }

    /// Where the results of the rows prepared last are on the device, and how many rows those are.
    #[must_use]
    pub fn drawn(&self) -> (Address, usize) {
        (self.results.address(), self.host.len())
    }
}

/// A sampling whose results are on their way to the host.
#[derive(Debug)]
pub struct Sampled<D: Device> {
    limits: SampleLimits,
    rows: usize,
    landing: D::Landing,
}

impl<D: Device> Sampled<D> {
    /// Waits for the results, not for what was enqueued after them, and fills `out` with one for each row; its buffers are reused.
    ///
    /// # Errors
    /// A device failure.
    pub fn collect(&mut self, device: &D, out: &mut Vec<SampledRow>) -> Result<(), KernelError> {
        let bytes = device.landed(&mut self.landing)?;
        out.truncate(self.rows);
        out.resize_with(self.rows, SampledRow::default);
        let tops = bytes.get(self.limits.rows * size_of::<Found>()..).unwrap_or_default();
        for (row, (found, out)) in bytes.chunks_exact(size_of::<Found>()).zip(out).enumerate() {
            let found: Found = bytemuck::pod_read_unaligned(found);
            (out.token, out.logprob) = (found.token, found.logprob);
            out.top.clear();
            if found.top > 0 {
                let top_of = |top: &[u8]| {
                    let FoundTop { token, logprob } = bytemuck::pod_read_unaligned(top);
                    TokenLogprob { token, logprob }
                };
                let tops = &tops[row * self.limits.top * size_of::<FoundTop>()..];
                out.top.extend(tops.chunks_exact(size_of::<FoundTop>()).take(found.top as usize).map(top_of));
            }
        }
        Ok(())
    }
}

/// What changes in the logits of all rows of a step.
#[derive(Debug)]
struct Lists {
    /// By token: 0 when it has no change in this row, else one more than its place in `row`. All 0 between rows.
    places: Vec<u32>,
    /// One row's changes, in the order they were found; `frequency` counts until all are.
    row: Vec<Change>,
    /// All rows' changes, each row's in order of its splits.
    changes: Vec<Change>,
    /// Where the changes of each split begin, counted from the row's first, and where the last split's end.
    starts: Vec<u32>,
}

impl Lists {
    fn new(vocab: usize) -> Self {
        Self { places: vec![0; vocab], row: Vec::new(), changes: Vec::new(), starts: Vec::new() }
    }

    fn clear(&mut self) {
        self.changes.clear();
        self.starts.clear();
    }

    /// Adds a row; says whether anything changes in it. Tokens outside the vocabulary are skipped: an adapter's tokenizer may have some
    /// that the head cannot produce. Biases of one token are added up.
    fn add(&mut self, draw: &Draw<'_>) -> bool {
        for &(token, bias) in &draw.params.logit_bias {
            self.change(token, |change| change.bias += bias);
        }
        for &token in draw.banned {
            self.change(token, |change| change.bias = f32::NEG_INFINITY);
        }
        let (repetition, frequency) = (draw.params.repetition_penalty, draw.params.frequency_penalty);
        if repetition != 1.0 {
            for &token in draw.prompt {
                self.change(token, |change| change.token |= SEEN);
            }
        }
        if draw.params.has_penalties() {
            for &token in draw.generated {
                self.change(token, |change| {
                    change.token |= SEEN | GENERATED;
                    change.frequency += 1.0;
                });
            }
        }
        if self.row.is_empty() {
            return false;
        }
        self.sort_by_split(frequency);
        true
    }

    fn change(&mut self, token: Token, how: impl FnOnce(&mut Change)) {
        let Some(place) = self.places.get_mut(token as usize) else { return };
        if *place == 0 {
            self.row.push(Change { token, bias: 0.0, frequency: 0.0, before: 0.0 });
            *place = self.row.len() as u32;
        }
        how(&mut self.row[*place as usize - 1]);
    }

    /// Moves the row's changes into `changes`, those of a split together.
    fn sort_by_split(&mut self, frequency: f32) {
        let (splits, first) = (self.places.len().div_ceil(SPLIT), self.changes.len());
        let token_of = |change: &Change| (change.token & !(SEEN | GENERATED)) as usize;
        // One entry more than there will be: entry i + 1 counts split i - 1, so that after the sums entry i + 1 is where split i
        // begins, and once all are placed where it ends.
        let starts = self.starts.len();
        self.starts.resize(starts + splits + 2, 0);
        for change in &self.row {
            self.starts[starts + token_of(change) / SPLIT + 2] += 1;
        }
        for split in starts + 1..self.starts.len() {
            self.starts[split] += self.starts[split - 1];
        }
        self.changes.resize(first + self.row.len(), Change::zeroed());
        for mut change in self.row.drain(..) {
            let token = token_of(&change);
            self.places[token] = 0;
            change.frequency *= frequency;
            let next = &mut self.starts[starts + token / SPLIT + 1];
            self.changes[first + *next as usize] = change;
            *next += 1;
        }
        self.starts.pop();
    }
}
