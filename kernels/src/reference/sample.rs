//! Sampling: the distribution a request draws from, and the random numbers it draws with.

use std::collections::{HashMap, HashSet};

use openlora_types::{SamplingParams, Token};

/// What one draw depends on beside the logits. See [`crate::SampleRow::Draw`] for the fields.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// Prompt tokens.
    pub prompt: &'a [Token],
    /// Tokens generated so far.
    pub generated: &'a [Token],
    /// Tokens that must not be drawn.
    pub banned: &'a [Token],
}

/// ln softmax of a row of logits.
#[must_use]
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| (f64::from(*x) - f64::from(largest)).exp()).sum();
    logits.iter().map(|x| f64::from(*x) - f64::from(largest) - total.ln()).collect()
}

/// The logits after everything that acts on logits, in vLLM's order: bans, biases, the repetition penalty over prompt and
/// answer (CTRL, Keskar et al. 2019, section 4.1), then the frequency and presence penalties over the answer.
#[must_use]
pub fn adjusted_logits(logits: &[f32], draw: &Draw<'_>) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for &token in draw.banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
    for &(token, bias) in &draw.params.logit_bias {
        logits[token as usize] += bias;
    }
    for &token in draw.prompt.iter().chain(draw.generated).collect::<HashSet<_>>() {
        let logit = &mut logits[token as usize];
        let penalty = draw.params.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
    let mut counts = HashMap::<Token, f32>::new();
    for &token in draw.generated {
        *counts.entry(token).or_default() += 1.0;
    }
    for (token, count) in counts {
        logits[token as usize] -= draw.params.frequency_penalty * count;
        logits[token as usize] -= draw.params.presence_penalty;
    }
    logits
}

/// The probability of every token to be drawn: [`adjusted_logits`], temperature, `min_p`, `top_k`, `top_p`. Temperature 0 is all
/// on the largest, the lower token among equals.
///
/// `min_p` drops what is less probable than `min_p` times the most probable; `top_k` keeps the k most probable and what equals
/// the last of them; `top_p` (Holtzman et al. 2020, section 3.1), on the renormalised rest, keeps a token when those before
/// it (more probable, or equal and of lower number) hold less than `top_p`.
///
/// When every token is banned the result is all on the largest raw logit.
#[must_use]
pub fn distribution(logits: &[f32], draw: &Draw<'_>) -> Vec<f64> {
    let adjusted = adjusted_logits(logits, draw);
    let order = |of: &[f32]| {
        let mut order: Vec<usize> = (0..of.len()).collect();
        order.sort_by(|&a, &b| of[b].total_cmp(&of[a]).then(a.cmp(&b)));
        order
    };
    let mut probabilities = vec![0.0; logits.len()];
    let sorted = order(&adjusted);
    let largest = f64::from(adjusted[sorted[0]]);
    if largest == f64::NEG_INFINITY {
        probabilities[order(logits)[0]] = 1.0;
        return probabilities;
    }
    let params = draw.params;
    if params.temperature == 0.0 {
        probabilities[sorted[0]] = 1.0;
        return probabilities;
    }
    let weight = |token: usize| ((f64::from(adjusted[token]) - largest) / f64::from(params.temperature)).exp();
    let last = sorted[(params.top_k as usize).clamp(1, sorted.len()) - 1];
    let kept: Vec<usize> = sorted
        .into_iter()
        .filter(|&token| weight(token) > 0.0 && weight(token) >= f64::from(params.min_p))
        .filter(|&token| params.top_k == 0 || adjusted[token] >= adjusted[last])
        .collect();
    let total: f64 = kept.iter().map(|&token| weight(token)).sum();
    let mut before = 0.0;
    for token in kept {
        if params.top_p < 1.0 && before >= f64::from(params.top_p) * total {
            break;
        }
        before += weight(token);
        probabilities[token] = weight(token);
    }
    probabilities.iter_mut().for_each(|probability| *probability /= before);
    probabilities
}

/// Philox4x32-10, a counter-based generator: the random bits are a function of key and counter alone (Salmon et al. 2011,
/// "Parallel random numbers: as easy as 1, 2, 3", section 3.3).
#[must_use]
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let (a, b) = (u64::from(c0) * 0xD251_1F53, u64::from(c2) * 0xCD9E_8D57);
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
    }
    [c0, c1, c2, c3]
}

/// The number in [0, 1) that decides a draw: 53 bits of [`philox4x32`] keyed by the request's seed, counted by the token's
/// position in the answer and the sample's index in the request. So a preempted and recomputed sequence draws the same.
#[must_use]
pub fn uniform(seed: u64, sample_index: u32, position: u32) -> f64 {
    let [low, high, ..] = philox4x32([seed as u32, (seed >> 32) as u32], [position, sample_index, 0, 0]);
    ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_authors_known_answers() {
        // kat_vectors of the authors' Random123 distribution, philox4x32 with 10 rounds.
        let cases = [
            ([0, 0], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 2], [u32::MAX; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, counter, expected) in cases {
            assert_eq!(philox4x32(key, counter), expected);
        }
    }
}
