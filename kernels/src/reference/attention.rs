//! Causal attention of one query row over the keys and values before it.

use crate::AttentionSpec;

/// `softmax(scale q K^T) V` for each query head (Vaswani et al. 2017, equation 1), heads `h` reading key and value head
/// `h / (heads / kv_heads)` (grouped-query attention, Ainslie et al. 2023).
///
/// `q` and `out`: `[heads, head_dim]`. `keys` and `values`: `[tokens, kv_heads, head_dim]`, the row's own token last; the row sees
/// the last `window` of them, itself included.
pub fn attention(
    spec: &AttentionSpec,
    window: Option<usize>,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    let (head_dim, stride) = (spec.head_dim, spec.kv_heads * spec.head_dim);
    let tokens = keys.len() / stride;
    let first = tokens - window.unwrap_or(tokens).min(tokens);
    for (head, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
        let kv_head = head / (spec.heads / spec.kv_heads);
        let part = |of: &'_ [f32], token: usize| of[token * stride + kv_head * head_dim..][..head_dim].to_vec();
        let dot = |k: Vec<f32>| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(k)).sum::<f64>();
        let scores: Vec<f64> = (first..tokens).map(|t| dot(part(keys, t)) * f64::from(spec.scale)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sums = vec![0.0; head_dim];
        for (token, weight) in (first..tokens).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(part(values, token)) {
                *sum += weight / total * f64::from(value);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum as f32;
        }
    }
}
