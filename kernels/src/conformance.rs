//! What every backend must keep, as checks that any [`Backend`] can be given: inputs, the reference's answer and how far
//! from it a backend may be. A check panics with what differs. Each backend's tests call all of them.

pub mod operations;
pub mod pages;

use std::sync::Arc;

use crate::reference;
use crate::reference::dequantise::dequantise_row;
use crate::{Backend, BlockFormat, LinearSpec, LoraRows, Numbers, TensorSource};

/// Inputs of a block that quantised backends give one activation scale at most.
const BLOCK: usize = 32;

/// A small generator (xorshift64*, Vigna 2016), so that a failing case is the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// Uniform in -1..1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Uniform below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }
}

/// A matrix with random weights of magnitude about 0.1, as it would lie in a file.
#[derive(Clone, Debug)]
pub struct RandomMatrix {
    format: BlockFormat,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl RandomMatrix {
    /// Random codes under random scales.
    #[must_use]
    pub fn new(format: BlockFormat, rows: usize, cols: usize, random: &mut Random) -> Self {
        let blocks = rows * cols / format.block_elements();
        let mut bytes: Vec<u8> = (0..blocks * format.block_bytes()).map(|_| random.bits() as u8).collect();
        // Where the f16 scales lie in a block, and their size.
        let scales: &[(usize, f32)] = match format {
            BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16 => &[],
            BlockFormat::Q8_0 => &[(0, 0.001)],
            BlockFormat::Q4_0 => &[(0, 0.02)],
            BlockFormat::Q4_1 => &[(0, 0.02), (2, -0.1)],
            BlockFormat::Q5_0 => &[(0, 0.01)],
            BlockFormat::Q5_1 => &[(0, 0.01), (2, -0.1)],
            BlockFormat::Q4K => &[(0, 0.0004), (2, 0.002)],
            BlockFormat::Q6K => &[(208, 0.00003)],
        };
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            let weight = random.number() * 0.1;
            match format {
                BlockFormat::F32 => block.copy_from_slice(&weight.to_le_bytes()),
                BlockFormat::F16 => block.copy_from_slice(&half::f16::from_f32(weight).to_le_bytes()),
                BlockFormat::Bf16 => block.copy_from_slice(&half::bf16::from_f32(weight).to_le_bytes()),
                _ => {}
            }
            for (offset, scale) in scales {
                let scale = half::f16::from_f32(scale * (1.5 + random.number()));
                block[*offset..offset + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        Self { format, rows, cols, bytes }
    }

    /// As a backend is given it.
    #[must_use]
    pub fn source(&self) -> TensorSource<'_> {
        let Self { format, rows, cols, ref bytes } = *self;
        TensorSource { name: "random", format, rows, cols, bytes, row_order: None }
    }
}

/// `values`, `[rows, width]`, on the device: read from an f32 embedding table.
///
/// # Panics
/// When the backend fails.
pub fn upload<B: Backend>(backend: &B, values: &[f32], width: usize) -> B::Tensor {
    let rows = values.len() / width;
    let mut tensor = backend.new_tensor(Numbers::Activation, rows.max(1), width).expect("memory");
    upload_into(backend, values, width, &mut tensor);
    tensor
}

/// As [`upload`], into a tensor that exists.
///
/// # Panics
/// When the backend fails.
pub fn upload_into<B: Backend>(backend: &B, values: &[f32], width: usize, tensor: &mut B::Tensor) {
    let rows = values.len() / width;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let owner: Arc<Vec<u8>> = Arc::new(bytes);
    let source =
        TensorSource { name: "upload", format: BlockFormat::F32, rows, cols: width, bytes: &owner, row_order: None };
    let table = backend.load_embedding(&source, owner.clone(), 0).expect("a sound table");
    let tokens: Vec<u32> = (0..rows as u32).collect();
    backend.embed(&table, &tokens, &LoraRows { segments: &[] }, tensor).expect("embedding");
}

/// Random activations `[rows, width]`; every seventh block of a row is large, as outlier channels are, and some are zero.
fn random_rows(rows: usize, width: usize, random: &mut Random) -> Vec<f32> {
    let block_scale: Vec<f32> =
        (0..width.div_ceil(BLOCK)).map(|block| [1.0, 0.3, 2.0, 0.0, 1.0, 1.0, 40.0][block % 7]).collect();
    (0..rows * width).map(|i| random.number() * block_scale[i % width / BLOCK]).collect()
}

/// What a backend rounds to before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rounding {
    /// f32: nothing.
    F32,
    /// Weights and activations to 8 bits, by blocks.
    Blocks,
    /// Weights, activations and results to floats with so many bits of mantissa, the leading one included: 8 of bf16, 11 of f16.
    Floats(i32),
}

/// How far `W x` may be from the exact value, per output of `rows`: half a step of every number that the backend rounds, and the
/// rounding of f32 sums.
fn allowed_errors(spec: &LinearSpec<'_>, x: &[f32], rounding: Rounding) -> Vec<f32> {
    let inputs = spec.parts[0].cols;
    let mut weights = vec![0.0; inputs];
    let all_rows = || spec.parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row)));
    let outputs = all_rows().count();
    let mut allowed = vec![0.0; x.len() / inputs * outputs];
    for (output, (part, row)) in all_rows().enumerate() {
        dequantise_row(part, row, &mut weights);
        for (x, allowed) in x.chunks_exact(inputs).zip(allowed.chunks_exact_mut(outputs)) {
            let mut sum = 0.0_f64;
            for (w, x) in weights.chunks(BLOCK).zip(x.chunks(BLOCK)) {
                let largest = |values: &[f32]| values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                let total = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).sum::<f64>();
                let (w_largest, x_largest) = (f64::from(largest(w)), f64::from(largest(x)));
                // f32 arithmetic: a relative error of 2^-24 at each of a few hundred steps.
                sum += total(w) * x_largest * 2e-5 + 1e-9;
                if let Rounding::Floats(bits) = rounding {
                    let products: f64 = w.iter().zip(x).map(|(w, x)| f64::from((w * x).abs())).sum();
                    // A weight, an activation and the result, each by half a unit in the last place; f16 has no numbers below 6e-8.
                    sum += products * 3.1 * 2.0_f64.powi(-bits) + (total(w) + total(x)) * 3e-8;
                }
                if rounding == Rounding::Blocks {
                    let w_step = match part.format {
                        BlockFormat::Q8_0 | BlockFormat::Q5_0 | BlockFormat::Q4_0 | BlockFormat::Q4_1 => 0.0,
                        // Scale and minimum rounded to 11 bits; together they are at most three times the largest weight.
                        BlockFormat::Q4K => w_largest * 3.0 / 2048.0,
                        _ => w_largest / 127.0 * 1.001 + 6e-8,
                    };
                    sum += total(w) * x_largest / 254.0 + w_step / 2.0 * total(x) * 1.01;
                }
            }
            if let (Rounding::Floats(bits), Some(bias)) = (rounding, &spec.bias) {
                sum += f64::from(bias[output].abs()) * 2.1 * 2.0_f64.powi(-bits);
            }
            allowed[output] = sum as f32;
        }
    }
    allowed
}

/// The largest error as a share of what is allowed.
fn assert_close(found: &[f32], expected: &[f32], allowed: &[f32], what: &str) -> f32 {
    let mut worst = 0.0_f32;
    assert_eq!(found.len(), expected.len(), "{what}: number of outputs");
    for (i, ((found, expected), allowed)) in found.iter().zip(expected).zip(allowed).enumerate() {
        // A NaN, which is what an output that was not written holds, fails as well.
        let error = (found - expected).abs();
        assert!(error <= *allowed, "{what}: output {i} is {found}, expected {expected} within {allowed}");
        worst = worst.max(error / allowed);
    }
    worst
}

/// `linear` agrees with the reference in every format, for sizes that fill no panel, mixed formats in one fused linear, and
/// any number of rows; every output is written and nothing beside it. Its largest error as a share of what is allowed.
///
/// # Panics
/// When it does not.
pub fn linear_agrees_with_reference<B: Backend>(backend: &B, rounding: Rounding) -> f32 {
    use BlockFormat::{Bf16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q6K, Q8_0};
    let cases: [(usize, &[(BlockFormat, usize)]); 14] = [
        (96, &[(Q4_0, 49)]),
        (64, &[(Q4_1, 1)]),
        (576, &[(Q4_1, 64), (Q4_1, 16), (Q4_1, 16)]),
        (32, &[(Q8_0, 33)]),
        (160, &[(Q8_0, 15)]),
        (96, &[(Q5_0, 20)]),
        (64, &[(Q5_1, 20)]),
        (512, &[(Q4K, 31)]),
        (256, &[(Q6K, 20)]),
        (50, &[(F32, 20)]),
        (70, &[(F16, 5)]),
        (33, &[(Bf16, 17)]),
        (256, &[(Q4K, 40), (Q6K, 24), (Q8_0, 7), (Q4_0, 3), (F16, 19)]),
        (1, &[(F32, 1)]),
    ];
    let (mut random, mut worst) = (Random::new(1), 0.0_f32);
    for (inputs, parts) in cases {
        let matrices: Vec<_> =
            parts.iter().map(|(format, rows)| RandomMatrix::new(*format, *rows, inputs, &mut random)).collect();
        let outputs: usize = parts.iter().map(|(_, rows)| rows).sum();
        let bias = (outputs % 2 == 1).then(|| (0..outputs).map(|_| random.number()).collect());
        let spec = LinearSpec { parts: matrices.iter().map(RandomMatrix::source).collect(), bias, sites: Vec::new() };
        let linear = backend.load_linear(&spec).expect("a sound linear");
        for rows in [1, 2, 3, 7, 33, 133] {
            let values = random_rows(rows, inputs, &mut random);
            let x = upload(backend, &values, inputs);
            let mut out = upload(backend, &vec![f32::NAN; rows * outputs], outputs);
            backend.linear(&linear, &LoraRows { segments: &[] }, &x, &mut out).expect("linear");
            let what = format!("{inputs} inputs, parts {parts:?}, {rows} rows");
            let expected = reference::linear::linear(&spec, &values);
            let allowed = allowed_errors(&spec, &values, rounding);
            worst = worst.max(assert_close(&backend.read_tensor(&out), &expected, &allowed, &what));
        }
    }
    worst
}

/// The rows that [`linear_rows`] computes: a fused linear with mixed formats on `rows` of the same input, in this order.
///
/// # Panics
/// When the backend fails.
pub fn linear_rows<B: Backend>(backend: &B, rows: &[usize]) -> Vec<Vec<u32>> {
    const INPUTS: usize = 768;
    let mut random = Random::new(2);
    let all = random_rows(200, INPUTS, &mut random);
    let formats = [(BlockFormat::Q4_1, 100), (BlockFormat::Q6K, 50), (BlockFormat::Q4K, 37)];
    let matrices = formats.map(|(format, rows)| RandomMatrix::new(format, rows, INPUTS, &mut random));
    let parts = matrices.iter().map(RandomMatrix::source).collect();
    let spec = LinearSpec { parts, bias: None, sites: Vec::new() };
    let linear = backend.load_linear(&spec).expect("a sound linear");
    let values: Vec<f32> = rows.iter().flat_map(|row| &all[row * INPUTS..(row + 1) * INPUTS]).copied().collect();
    let x = upload(backend, &values, INPUTS);
    let mut out = backend.new_tensor(Numbers::Activation, rows.len(), 187).expect("memory");
    backend.linear(&linear, &LoraRows { segments: &[] }, &x, &mut out).expect("linear");
    backend.read_tensor(&out).chunks_exact(187).map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

/// A row of `linear` has the same bits alone and among any others, in any order.
///
/// # Panics
/// When it has not.
pub fn linear_rows_do_not_depend_on_each_other<B: Backend>(backend: &B) {
    linear_rows_do_not_depend_on_up_to(backend, usize::MAX);
}

/// As [`linear_rows_do_not_depend_on_each_other`], among `rows_max` rows at most.
///
/// # Panics
/// When it has not.
pub fn linear_rows_do_not_depend_on_up_to<B: Backend>(backend: &B, rows_max: usize) {
    let alone: Vec<_> = (0..200).map(|row| linear_rows(backend, &[row]).remove(0)).collect();
    let mut random = Random::new(3);
    for count in (2..=40).chain([64, 133, 200]).filter(|count| *count <= rows_max) {
        let rows: Vec<usize> = (0..count).map(|_| random.below(200)).collect();
        for (place, (found, row)) in linear_rows(backend, &rows).iter().zip(&rows).enumerate() {
            assert_eq!(found, &alone[*row], "row {row} at place {place} of {count}");
        }
    }
}
