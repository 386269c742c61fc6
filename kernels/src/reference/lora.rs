//! What an adapter does to one linear's output and to one embedding: the definition in [`SiteWeights`], row by row.

use openlora_types::{SiteWeights, Token};

/// Turns `out = W x` of one row into the adapted output, `bias` being the base linear's and `output_scale` DoRA's
/// `m / ||W + scale B A||`:
/// - LoRA (Hu et al. 2021, equation 3): `W x + scale (B A x + b_bias) + bias`
/// - DoRA (Liu et al. 2024, equation 5): `output_scale (W x + scale (B A x + b_bias)) + bias`
pub fn linear(site: &SiteWeights, output_scale: Option<&[f32]>, bias: Option<&[f32]>, x: &[f32], out: &mut [f32]) {
    let a = site.a.elements.to_f32_vec();
    let shrunk: Vec<f64> = a.chunks_exact(site.a.cols).map(|row| dot(row, x)).collect();
    expand(site, &shrunk, output_scale, bias, out);
}

/// Adds the adapter's part to `out`, the embedding of `token`: `scale B A[:, token]`, and DoRA's factor over all of it.
pub fn embedding(site: &SiteWeights, output_scale: Option<&[f32]>, token: Token, out: &mut [f32]) {
    let a = site.a.elements.to_f32_vec();
    let shrunk: Vec<f64> = a.chunks_exact(site.a.cols).map(|row| f64::from(row[token as usize])).collect();
    expand(site, &shrunk, output_scale, None, out);
}

fn expand(site: &SiteWeights, shrunk: &[f64], output_scale: Option<&[f32]>, bias: Option<&[f32]>, out: &mut [f32]) {
    let b = site.b.elements.to_f32_vec();
    for (i, (out, b)) in out.iter_mut().zip(b.chunks_exact(site.b.cols)).enumerate() {
        let product: f64 = b.iter().zip(shrunk).map(|(b, s)| f64::from(*b) * s).sum();
        let b_bias = site.b_bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
        let adapted = f64::from(*out) + f64::from(site.scale) * (product + b_bias);
        let scaled = output_scale.map_or(1.0, |scale| f64::from(scale[i])) * adapted;
        *out = (scaled + bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32;
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
