//! The linear of the reference.

use crate::LinearSpec;

use super::dequantise::dequantise_row;

/// `x W^T + bias` on the dequantised weights: `x: [rows, inputs]`, result `[rows, outputs]`. Each output is summed in f64 in
/// the order of its inputs, so that the result is the exact sum rounded once for all practical purposes.
///
/// # Panics
/// When `x` is not whole rows of the parts' inputs, or a part is not sound.
#[must_use]
pub fn linear(spec: &LinearSpec<'_>, x: &[f32]) -> Vec<f32> {
    let inputs = spec.parts.first().map_or(0, |part| part.cols);
    let outputs: usize = spec.parts.iter().map(|part| part.rows).sum();
    assert!(inputs > 0 && x.len().is_multiple_of(inputs), "{} numbers in rows of {inputs}", x.len());
    let rows = x.len() / inputs;
    let mut result = vec![0.0; rows * outputs];
    let mut weights = vec![0.0; inputs];
    let all_rows = spec.parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row)));
    for (output, (part, row)) in all_rows.enumerate() {
        dequantise_row(part, row, &mut weights);
        let bias = spec.bias.as_ref().map_or(0.0, |bias| bias[output]);
        for (x, result) in x.chunks_exact(inputs).zip(result.chunks_exact_mut(outputs)) {
            let sum: f64 = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            result[output] = (sum + f64::from(bias)) as f32;
        }
    }
    result
}
