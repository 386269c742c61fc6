//! Which tokens a draw may give, and the draw.

use std::cmp::Ordering;

use openlora_types::{SamplingParams, Token};

use super::super::vector_math::{LANES, Simd, exp_to_88};
use super::{BLOCK, first_at_least, largest, vector};

/// What may be drawn.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kept {
    /// Every token is impossible.
    Nothing,
    /// Greedy.
    One(Token),
    /// Every token with a weight.
    All,
    /// [`Keeper::candidates`].
    Candidates,
}

/// A token that may be kept.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: Token,
    logit: f32,
    weight: f32,
}

impl Candidate {
    /// More probable first; the lower token first among equals.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

/// The weight of all candidates.
fn weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
}

/// Distances below the largest logit, in units of the temperature, within which tokens are listed: most distributions
/// have nearly all their weight within one of the first, and few tokens.
const DISTANCES: [f32; 4] = [3.0, 7.0, 14.0, f32::INFINITY];

/// Finds what may be drawn, and draws. Its buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    largest: f32,
    /// 1 / temperature.
    sharpness: f32,
    /// In order of the token.
    candidates: Vec<Candidate>,
    sorted: Vec<Candidate>,
    /// Weight of each block of [`BLOCK`] vectors.
    blocks: Vec<f64>,
}

impl Keeper {
    /// Makes room for a vocabulary.
    pub(super) fn reserve(&mut self, vocab: usize) {
        self.candidates.clear();
        self.candidates.reserve(vocab);
        self.sorted.clear();
        self.sorted.reserve(vocab);
        self.blocks.clear();
        self.blocks.reserve(vocab.div_ceil(LANES * BLOCK));
    }

    /// Decides what may be drawn from `logits`, to which penalties, biases and bans have been applied.
    #[inline(always)]
    pub(super) fn keep<S: Simd>(&mut self, simd: S, logits: &[f32], params: &SamplingParams) -> Kept {
        self.largest = largest(simd, logits);
        if self.largest == f32::NEG_INFINITY {
            return Kept::Nothing;
        }
        if params.temperature == 0.0 {
            return Kept::One(first_at_least(simd, logits, self.largest));
        }
        // Finite, so that the largest logit's distance of 0 stays 0.
        self.sharpness = (1.0 / params.temperature).min(f32::MAX);
        let top_k = (params.top_k > 0).then_some(params.top_k as usize).filter(|top_k| *top_k < logits.len());
        let top_p = (params.top_p < 1.0).then_some(f64::from(params.top_p));
        match (top_k, top_p) {
            (None, None) if params.min_p == 0.0 => return Kept::All,
            // Within the nucleus of all tokens, which needs the weight of all.
            (None, Some(top_p)) if params.min_p == 0.0 => {
                let target = top_p * self.total(simd, logits);
                // The margin is for the rounding of the total, which is summed in another order.
                self.list(simd, logits, 0.0, |candidates| weight(candidates) >= target * (1.0 + 1e-5));
                self.keep_nucleus(target);
                return Kept::Candidates;
            }
            (None, _) => self.list(simd, logits, params.min_p, |_| false),
            (Some(top_k), _) => {
                self.list(simd, logits, params.min_p, |candidates| candidates.len() >= top_k);
                self.keep_top_k(top_k);
            }
        }
        if let Some(top_p) = top_p {
            self.keep_nucleus(top_p * weight(&self.candidates));
        }
        Kept::Candidates
    }

    /// How far each token of vector `i` is below the largest, in units of the temperature: 0 and less.
    #[inline(always)]
    fn distances<S: Simd>(&self, simd: S, logits: &[f32], i: usize) -> S::V {
        let distance = simd.sub(vector(simd, logits, i), simd.splat(self.largest));
        simd.mul(distance, simd.splat(self.sharpness))
    }

    /// The weights of vector `i`'s tokens: `e^((x - largest) / temperature)`.
    #[inline(always)]
    fn weights<S: Simd>(&self, simd: S, logits: &[f32], i: usize) -> S::V {
        exp_to_88(simd, self.distances(simd, logits, i))
    }

    /// The weight of one block.
    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, logits: &[f32], block: usize) -> f64 {
        let mut sum = simd.splat(0.0);
        for i in block * BLOCK..logits.len().div_ceil(LANES).min((block + 1) * BLOCK) {
            sum = simd.add(sum, self.weights(simd, logits, i));
        }
        f64::from(simd.sum(sum))
    }

    /// The weight of all tokens.
    #[inline(always)]
    fn total<S: Simd>(&self, simd: S, logits: &[f32]) -> f64 {
        let mut total = 0.0;
        for block in 0..logits.len().div_ceil(LANES * BLOCK) {
            total += self.block(simd, logits, block);
        }
        total
    }

    /// Lists the tokens whose weight is at least `min_p`, in order: those within the first distance at which there are
    /// `enough`, or that `min_p` allows.
    #[inline(always)]
    fn list<S: Simd>(&mut self, simd: S, logits: &[f32], min_p: f32, enough: impl Fn(&[Candidate]) -> bool) {
        // A weight of 0 is no candidate. A little farther than the logarithm; the weight itself decides.
        let farthest = -min_p.max(f32::MIN_POSITIVE).ln() * 1.001 + 0.001;
        for distance in DISTANCES {
            self.collect(simd, logits, distance.min(farthest), min_p);
            if distance >= farthest || enough(&self.candidates) {
                return;
            }
        }
    }

    #[inline(always)]
    fn collect<S: Simd>(&mut self, simd: S, logits: &[f32], distance: f32, min_p: f32) {
        self.candidates.clear();
        let least = min_p.max(f32::MIN_POSITIVE);
        for i in 0..logits.len().div_ceil(LANES) {
            let distances = self.distances(simd, logits, i);
            let mut found = simd.bits(simd.at_least(distances, simd.splat(-distance)));
            if found == 0 {
                continue;
            }
            let (mut logit_lanes, mut weight_lanes) = ([0.0; LANES], [0.0; LANES]);
            simd.store(vector(simd, logits, i), &mut logit_lanes);
            simd.store(exp_to_88(simd, distances), &mut weight_lanes);
            while found != 0 {
                let lane = found.trailing_zeros() as usize;
                found &= found - 1;
                let (logit, weight) = (logit_lanes[lane], weight_lanes[lane]);
                if weight >= least {
                    self.candidates.push(Candidate { token: (i * LANES + lane) as Token, logit, weight });
                }
            }
        }
    }

    /// Drops what is less probable than the `k`-th; its equals stay.
    fn keep_top_k(&mut self, k: usize) {
        if k >= self.candidates.len() {
            return;
        }
        self.sorted.clone_from(&self.candidates);
        let (_, last, _) = self.sorted.select_nth_unstable_by(k - 1, Candidate::order);
        let least = last.logit;
        self.candidates.retain(|candidate| candidate.logit >= least);
    }

    /// Keeps the most probable tokens until their weight reaches `target`.
    ///
    /// Halves the part that holds the last kept token, so that the whole takes linear time.
    fn keep_nucleus(&mut self, target: f64) {
        self.sorted.clone_from(&self.candidates);
        let (mut part, mut before) = (self.sorted.as_mut_slice(), 0.0);
        while part.len() > 1 {
            let middle = part.len() / 2;
            part.select_nth_unstable_by(middle, Candidate::order);
            let (first, rest) = part.split_at_mut(middle);
            let half = weight(first);
            if before + half >= target {
                part = first;
            } else {
                before += half;
                part = rest;
            }
        }
        if let Some(&last) = part.first() {
            self.candidates.retain(|candidate| candidate.order(&last) != Ordering::Greater);
        }
    }

    /// The candidate at `uniform` of the way through their weights, in order of the token.
    pub(super) fn draw_from_candidates(&self, uniform: f64) -> Token {
        let mut left = uniform * weight(&self.candidates);
        for candidate in &self.candidates {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.token;
            }
        }
        // Only rounding leads here: the last one it is.
        self.candidates.last().expect("the most probable token is a candidate").token
    }

    /// The token at `uniform` of the way through all weights, in order of the token.
    #[inline(always)]
    pub(super) fn draw_from_all<S: Simd>(&mut self, simd: S, logits: &[f32], uniform: f64) -> Token {
        let vectors = logits.len().div_ceil(LANES);
        let mut blocks = std::mem::take(&mut self.blocks);
        blocks.clear();
        for block in 0..vectors.div_ceil(BLOCK) {
            blocks.push(self.block(simd, logits, block));
        }
        let mut left = uniform * blocks.iter().sum::<f64>();
        // The last block with a weight when rounding leads past the end.
        let mut chosen = blocks.iter().rposition(|weight| *weight > 0.0).expect("the most probable token has weight 1");
        for (block, weight) in blocks.iter().enumerate() {
            if left < *weight {
                chosen = block;
                break;
            }
            left -= weight;
        }
        self.blocks = blocks;
        let mut token = 0;
        for i in chosen * BLOCK..vectors.min((chosen + 1) * BLOCK) {
            let mut lanes = [0.0; LANES];
            simd.store(self.weights(simd, logits, i), &mut lanes);
            for (lane, weight) in lanes.into_iter().enumerate().filter(|(_, weight)| *weight > 0.0) {
                token = (i * LANES + lane) as Token;
                left -= f64::from(weight);
                if left < 0.0 {
                    return token;
                }
            }
        }
        token
    }

    /// Writes the weights of all tokens.
    #[inline(always)]
    pub(super) fn weigh_all<S: Simd>(&self, simd: S, logits: &[f32], weights: &mut [f64]) {
        for (i, weights) in weights.chunks_mut(LANES).enumerate() {
            let mut lanes = [0.0; LANES];
            simd.store(self.weights(simd, logits, i), &mut lanes);
            weights.iter_mut().zip(lanes).for_each(|(weight, lane)| *weight = f64::from(lane));
        }
    }

    /// Writes the weights of the candidates.
    pub(super) fn weigh_candidates(&self, weights: &mut [f64]) {
        for candidate in &self.candidates {
            weights[candidate.token as usize] = f64::from(candidate.weight);
        }
    }
}
