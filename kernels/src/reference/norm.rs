//! RMSNorm with the residual addition before it.

/// `residual += delta` where given, then `out = residual / sqrt(mean(residual^2) + eps) * weight`, row by row (Zhang and
/// Sennrich 2019, equation 4; eps as in Llama). All `[rows, weight.len()]`.
pub fn add_rms_norm(residual: &mut [f32], delta: Option<&[f32]>, weight: &[f32], eps: f32, out: &mut [f32]) {
    if let Some(delta) = delta {
        for (value, delta) in residual.iter_mut().zip(delta) {
            *value += delta;
        }
    }
    for (row, out) in residual.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        rms_norm(row, weight, eps, out);
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` of one row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (f64::from(*x) * factor) as f32 * weight;
    }
}
