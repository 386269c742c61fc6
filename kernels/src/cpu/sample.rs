//! Sampling: from a row of logits to a token and its log-probability.
//!
//! What is drawn from is defined in [`crate::reference::sample`]; here it is found without sorting the vocabulary. Penalties,
//! biases and bans touch few logits, which are changed in place and put back. Then only the tokens within some distance of
//! the largest logit are listed, weighed (`e^((x - max) / temperature)`) and cut, the distance growing until the list must hold
//! the result ([`keep`]).
//!
//! Not a number among the logits counts as impossible, +inf as the largest finite number; neither panics. When bans leave no
//! token the most probable raw one is taken: a request always goes on.

mod keep;

use std::sync::atomic::{AtomicUsize, Ordering};

use openlora_types::{Token, TokenLogprob};

use super::pool::Disjoint;
use super::vector_math::{Kernel, LANES, Simd, dispatch, exp_to_88};
use super::{CpuTensor, Isa, Pool};
use crate::reference::sample::{Draw, uniform};
use crate::{SampleRow, SampledRow};
use keep::{Keeper, Kept};

/// Buffers that are kept from step to step.
#[derive(Debug, Default)]
pub struct SampleScratch {
    workers: Vec<Worker>,
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Worker {
    history: History,
    keeper: Keeper,
}

impl Worker {
    /// Makes room for whatever may come of `vocab` tokens and `changes` biases and bans: nothing is allocated when answers
    /// lengthen or distributions flatten. What is not used takes no memory.
    fn reserve(&mut self, vocab: usize, changes: usize) {
        self.history.reserve(vocab, changes);
        self.keeper.reserve(vocab);
    }
}

/// [`crate::Backend::sample`]. The logits are the same afterwards.
///
/// # Panics
/// When there is not one entry of `rows` for each row of logits, or on a scored token outside the vocabulary.
pub fn sample(
    pool: &Pool,
    isa: Isa,
    logits: &mut CpuTensor,
    rows: &[SampleRow<'_>],
    out: &mut Vec<SampledRow>,
    scratch: &mut SampleScratch,
) {
    assert_eq!(logits.rows(), rows.len(), "one entry for each row of logits");
    let vocab = logits.width();
    out.truncate(rows.len());
    out.resize_with(rows.len(), SampledRow::default);
    scratch.workers.resize_with(pool.threads(), Worker::default);
    let changes = rows.iter().map(|row| match row {
        SampleRow::Draw { params, banned, .. } => params.logit_bias.len() + banned.len(),
        SampleRow::Score { .. } => 0,
    });
    let changes = changes.max().unwrap_or(0);
    scratch.workers.iter_mut().for_each(|worker| worker.reserve(vocab, changes));
    let (logits, out) = (Disjoint::new(logits.values_mut()), Disjoint::new(out));
    let workers = Disjoint::new(&mut scratch.workers);
    let next = AtomicUsize::new(0);
    let part = |worker: usize| {
        // SAFETY: each worker takes its own buffers.
        let worker = unsafe { &mut workers.slice(worker..worker + 1)[0] };
        dispatch(isa, Rows { rows, vocab, logits: &logits, out: &out, next: &next, worker });
    };
    if rows.len() > 1 { pool.run(&part) } else { part(0) }
}

/// The probability of each token to be drawn, by the same code as [`sample`]: for tests and inspection.
///
/// # Panics
/// When this machine does not have `isa`.
#[must_use]
pub fn distribution(isa: Isa, logits: &[f32], draw: &Draw<'_>) -> Vec<f64> {
    let mut probabilities = vec![0.0; logits.len()];
    let (mut worker, mut logits) = (Worker::default(), logits.to_vec());
    worker.reserve(logits.len(), draw.params.logit_bias.len() + draw.banned.len());
    let kernel = Distribution { logits: &mut logits, draw, worker: &mut worker, probabilities: &mut probabilities };
    dispatch(isa, kernel);
    probabilities
}

/// A worker's share of the rows: whichever is next.
struct Rows<'a, 'b> {
    rows: &'a [SampleRow<'b>],
    vocab: usize,
    logits: &'a Disjoint<'a, f32>,
    out: &'a Disjoint<'a, SampledRow>,
    next: &'a AtomicUsize,
    worker: &'a mut Worker,
}

impl Kernel for Rows<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(row) = self.rows.get(i) else { return };
            // SAFETY: the counter gives every row to one worker alone.
            let (logits, out) =
                unsafe { (self.logits.slice(i * self.vocab..(i + 1) * self.vocab), &mut self.out.slice(i..i + 1)[0]) };
            sample_row(simd, logits, row, out, self.worker);
        }
    }
}

#[inline(always)]
fn sample_row<S: Simd>(simd: S, logits: &mut [f32], row: &SampleRow<'_>, out: &mut SampledRow, worker: &mut Worker) {
    let largest = largest(simd, logits);
    let log_total = f64::from(largest) + total(simd, logits, largest).ln();
    let logprob = |logit: f32| (f64::from(possible(logit)) - log_total) as f32;
    let count = match *row {
        SampleRow::Draw { top, .. } | SampleRow::Score { top, .. } => top,
    };
    most_probable(simd, logits, count, &mut out.top);
    out.top.iter_mut().for_each(|top| top.logprob = logprob(top.logprob));
    out.token = match *row {
        SampleRow::Score { token, .. } => token,
        SampleRow::Draw { params, sample_index, prompt, generated, banned, .. } => {
            let draw = Draw { params, prompt, generated, banned };
            let uniform = uniform(params.seed, sample_index, generated.len() as u32);
            draw_token(simd, logits, &draw, uniform, worker)
        }
    };
    // Where every logit is -inf or NaN there is no distribution; the difference of infinities would be NaN.
    let impossible = largest == f32::NEG_INFINITY;
    out.logprob = if impossible { f32::NEG_INFINITY } else { logprob(logits[out.token as usize]) };
}

#[inline(always)]
fn draw_token<S: Simd>(simd: S, logits: &mut [f32], draw: &Draw<'_>, uniform: f64, worker: &mut Worker) -> Token {
    worker.history.adjust(logits, draw);
    let token = match worker.keeper.keep(simd, logits, draw.params) {
        Kept::Nothing => None,
        Kept::One(token) => Some(token),
        Kept::All => Some(worker.keeper.draw_from_all(simd, logits, uniform)),
        Kept::Candidates => Some(worker.keeper.draw_from_candidates(uniform)),
    };
    worker.history.restore(logits);
    token.unwrap_or_else(|| first_at_least(simd, logits, largest(simd, logits)))
}

struct Distribution<'a, 'b> {
    logits: &'a mut [f32],
    draw: &'a Draw<'b>,
    worker: &'a mut Worker,
    probabilities: &'a mut [f64],
}

impl Kernel for Distribution<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Worker { history, keeper } = self.worker;
        history.adjust(self.logits, self.draw);
        let kept = keeper.keep(simd, self.logits, self.draw.params);
        match kept {
            Kept::Nothing => {}
            Kept::One(token) => self.probabilities[token as usize] = 1.0,
            Kept::All => keeper.weigh_all(simd, self.logits, self.probabilities),
            Kept::Candidates => keeper.weigh_candidates(self.probabilities),
        }
        history.restore(self.logits);
        if matches!(kept, Kept::Nothing) {
            self.probabilities[first_at_least(simd, self.logits, largest(simd, self.logits)) as usize] = 1.0;
        }
        let total: f64 = self.probabilities.iter().sum();
        self.probabilities.iter_mut().for_each(|probability| *probability /= total);
    }
}

/// Changes logits as a request's history and parameters say, and remembers what they were.
#[derive(Debug, Default)]
struct History {
    /// By token, at least the vocabulary's: 0 when not seen, else [`SEEN`] and how often it was generated. All 0 between rows.
    seen: Vec<u32>,
    /// The tokens with an entry in `seen`.
    distinct: Vec<Token>,
    /// Tokens and their logits before each change, in order.
    before: Vec<(Token, f32)>,
}

/// Marks a token of prompt or answer.
const SEEN: u32 = 1 << 31;

impl History {
    fn reserve(&mut self, vocab: usize, changes: usize) {
        if self.seen.len() < vocab {
            self.seen = vec![0; vocab];
        }
        self.distinct.clear();
        self.distinct.reserve(vocab);
        self.before.clear();
        self.before.reserve(vocab + changes);
    }

    /// Tokens outside the vocabulary are skipped: an adapter's tokenizer may have some that the head cannot produce.
    fn adjust(&mut self, logits: &mut [f32], draw: &Draw<'_>) {
        self.before.clear();
        for &(token, bias) in &draw.params.logit_bias {
            self.change(logits, token, |logit| logit + bias);
        }
        for &token in draw.banned {
            self.change(logits, token, |_| f32::NEG_INFINITY);
        }
        let (repetition, frequency) = (draw.params.repetition_penalty, draw.params.frequency_penalty);
        let presence = draw.params.presence_penalty;
        if !draw.params.has_penalties() {
            return;
        }
        let prompt = if repetition == 1.0 { &[] } else { draw.prompt };
        let history = prompt.iter().map(|token| (*token, 0)).chain(draw.generated.iter().map(|token| (*token, 1)));
        for (token, times) in history {
            let Some(seen) = self.seen.get_mut(token as usize) else { continue };
            if *seen == 0 {
                self.distinct.push(token);
            }
            *seen = (*seen | SEEN) + times;
        }
        let mut distinct = std::mem::take(&mut self.distinct);
        for token in distinct.drain(..) {
            let times = std::mem::take(&mut self.seen[token as usize]) & !SEEN;
            self.change(logits, token, |logit| {
                let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
                if times > 0 { logit - frequency * times as f32 - presence } else { logit }
            });
        }
        self.distinct = distinct;
    }

    fn change(&mut self, logits: &mut [f32], token: Token, to: impl Fn(f32) -> f32) {
        if let Some(logit) = logits.get_mut(token as usize) {
            self.before.push((token, *logit));
            *logit = to(*logit);
        }
    }

    /// Undoes [`History::adjust`].
    fn restore(&mut self, logits: &mut [f32]) {
        for (token, logit) in self.before.drain(..).rev() {
            logits[token as usize] = logit;
        }
    }
}

/// A logit as it is computed with: NaN is impossible, +inf the largest finite number.
#[inline(always)]
fn possible(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

/// Vector `i` of the logits, each [`possible`]; lanes past the end are impossible.
#[inline(always)]
fn vector<S: Simd>(simd: S, logits: &[f32], i: usize) -> S::V {
    let impossible = simd.splat(f32::NEG_INFINITY);
    let rest = &logits[i * LANES..];
    let values = match rest.first_chunk() {
        Some(chunk) => simd.load(chunk),
        None => {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            lanes[..rest.len()].copy_from_slice(rest);
            simd.load(&lanes)
        }
    };
    // The second operand is the result for NaN.
    simd.min(simd.max(values, impossible), simd.splat(f32::MAX))
}

/// The largest logit.
#[inline(always)]
fn largest<S: Simd>(simd: S, logits: &[f32]) -> f32 {
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for i in 0..logits.len().div_ceil(LANES) {
        largest = simd.max(vector(simd, logits, i), largest);
    }
    simd.largest(largest)
}

/// The first token whose logit is at least `least`; 0 if there is none.
#[inline(always)]
fn first_at_least<S: Simd>(simd: S, logits: &[f32], least: f32) -> Token {
    let least = simd.splat(least);
    for i in 0..logits.len().div_ceil(LANES) {
        let found = simd.bits(simd.at_least(vector(simd, logits, i), least));
        if found != 0 {
            return (i * LANES) as Token + found.trailing_zeros();
        }
    }
    0
}

/// Vectors that are summed in f32 before the sum is added to an f64.
const BLOCK: usize = 64;

/// The sum of `e^(x - largest)` over all tokens.
#[inline(always)]
fn total<S: Simd>(simd: S, logits: &[f32], largest: f32) -> f64 {
    let (vectors, mut total) = (logits.len().div_ceil(LANES), 0.0);
    let shift = simd.splat(largest);
    for block in (0..vectors).step_by(BLOCK) {
        let mut sum = simd.splat(0.0);
        for i in block..vectors.min(block + BLOCK) {
            sum = simd.add(sum, exp_to_88(simd, simd.sub(vector(simd, logits, i), shift)));
        }
        total += f64::from(simd.sum(sum));
    }
    total
}

/// The `count` largest logits, best first, the lower token first among equals; logits stand in the `logprob` fields.
#[inline(always)]
fn most_probable<S: Simd>(simd: S, logits: &[f32], count: usize, top: &mut Vec<TokenLogprob>) {
    top.clear();
    let count = count.min(logits.len());
    if count == 0 {
        return;
    }
    let mut least = f32::NEG_INFINITY;
    for i in 0..logits.len().div_ceil(LANES) {
        let mut found = simd.bits(simd.at_least(vector(simd, logits, i), simd.splat(least)));
        while found != 0 {
            let token = i * LANES + found.trailing_zeros() as usize;
            found &= found - 1;
            let Some(&logit) = logits.get(token) else { break };
            let logit = possible(logit);
            // Tokens come in ascending order, so an equal one belongs behind.
            let place = top.partition_point(|other| other.logprob >= logit);
            if place < count {
                top.truncate(count - 1);
                top.insert(place, TokenLogprob { token: token as Token, logprob: logit });
            }
            if top.len() == count {
                least = top[count - 1].logprob;
            }
        }
    }
}
