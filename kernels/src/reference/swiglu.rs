//! The gated feed-forward activation.

/// `out = silu(gate) * up`, `silu(x) = x / (1 + e^-x)` (SwiGLU, Shazeer 2020, equation 6). `gate_up: [rows, 2 width]`, the gate
/// first; `out: [rows, width]`.
pub fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32]) {
    for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at(width);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = f64::from(*gate);
            *out = (gate / (1.0 + (-gate).exp()) * f64::from(*up)) as f32;
        }
    }
}
