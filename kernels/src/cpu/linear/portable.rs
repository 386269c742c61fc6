//! The kernels in plain Rust: what the vector kernels compute, lane by lane in the same order. A vector kernel may fuse a
//! multiplication with an addition where this one rounds twice; nothing else differs.

#![expect(clippy::needless_range_loop, reason = "a row number indexes accumulators, activations and outputs alike")]

use half::f16;

use super::Tile;
use super::activations::{Group, SECOND_STEPS};
use crate::cpu::pack::{BLOCK, PANEL, Q4_BLOCK_BYTES, Q8_CODES, Q8_PAIR_BYTES};

fn f16_column(bytes: &[u8], column: usize) -> f32 {
    f16::from_le_bytes([bytes[column * 2], bytes[column * 2 + 1]]).to_f32()
}

/// 32 codes of one output times 32 codes of one row.
fn dot(codes: impl Fn(usize) -> i32, x: &[i8; BLOCK]) -> i32 {
    x.iter().enumerate().map(|(input, x)| codes(input) * i32::from(*x)).sum()
}

/// `out[row] = panel * row` for the first `rows` rows of a group, on a Q4 panel.
pub(super) fn q4(panel: &[u8], activations: Group<'_>, rows: usize, out: &mut Tile) {
    for row in 0..rows {
        for column in 0..PANEL {
            let mut sum = 0.0;
            let blocks = activations.blocks.iter().zip(activations.seconds);
            for (weights, (x, second)) in panel.chunks_exact(Q4_BLOCK_BYTES).zip(blocks) {
                let (d, m) = (f16_column(weights, column), f16_column(&weights[32..], column));
                let code = |input: usize| {
                    let byte = weights[64 + input % 16 / 4 * 64 + column * 4 + input % 4];
                    i32::from(if input < 16 { byte & 15 } else { byte >> 4 })
                };
                let mut total = dot(code, &x.codes[row]) as f32;
                if x.has_second >> row & 1 == 1 {
                    total += dot(code, &second.codes[row]) as f32 * (1.0 / SECOND_STEPS);
                }
                sum += total * (d * x.scale[row]);
                sum += m * x.scaled_sum[row];
            }
            out[row][column] = sum;
        }
    }
}

/// As [`q4`], on a Q8 panel.
pub(super) fn q8(panel: &[u8], activations: Group<'_>, rows: usize, out: &mut Tile) {
    for row in 0..rows {
        for column in 0..PANEL {
            let mut sum = 0.0;
            for (block, (x, second)) in activations.blocks.iter().zip(activations.seconds).enumerate() {
                let pair = &panel[block / 2 * Q8_PAIR_BYTES..];
                let (d, weights) = (f16_column(&pair[block % 2 * 32..], column), &pair[64 + block % 2 * Q8_CODES..]);
                let code = |input: usize| i32::from(weights[input / 4 * 64 + column * 4 + input % 4]);
                let mut total = (dot(code, &x.codes[row]) + x.offset[row]) as f32;
                if x.has_second >> row & 1 == 1 {
                    total += (dot(code, &second.codes[row]) + second.offset[row]) as f32 * (1.0 / SECOND_STEPS);
                }
                sum += total * (d * x.scale[row]);
            }
            out[row][column] = sum;
        }
    }
}

/// As [`q4`], on an f32 panel and f32 rows of `inputs` elements.
pub(super) fn f32(panel: &[f32], x: &[f32], inputs: usize, out: &mut Tile) {
    for (x, out) in x.chunks_exact(inputs).zip(out) {
        out.fill(0.0);
        for (x, weights) in x.iter().zip(panel.chunks_exact(PANEL)) {
            for (out, weight) in out.iter_mut().zip(weights) {
                *out += x * weight;
            }
        }
    }
}
