//! Block formats to f32, operation for operation as ggml's `dequantize_row_*` (ggml-quants.c): no fused multiply-add, so
//! the numbers agree bit for bit with every other reader of the format.

use half::{bf16, f16};

use crate::{BlockFormat, KernelError, TensorSource};

/// Elements of a k-quant super-block.
const SUPER: usize = 256;

impl<'a> TensorSource<'a> {
    /// Checks that the bytes are exactly what shape and format need, that rows are whole blocks, and that `row_order` names
    /// existing rows, one per row.
    ///
    /// # Errors
    /// [`KernelError::Width`], [`KernelError::TensorSize`], [`KernelError::RowOrder`]
    pub fn check(&self) -> Result<(), KernelError> {
        let (elements, block_bytes) = (self.format.block_elements(), self.format.block_bytes());
        if !self.cols.is_multiple_of(elements) {
            return Err(KernelError::Width { name: self.name.into(), cols: self.cols, multiple: elements });
        }
        let expected = (self.cols / elements).saturating_mul(block_bytes).saturating_mul(self.rows);
        if self.bytes.len() != expected {
            return Err(KernelError::TensorSize {
                name: self.name.into(),
                format: self.format.name(),
                rows: self.rows,
                cols: self.cols,
                expected,
                found: self.bytes.len(),
            });
        }
        let fits = |order: &[u32]| order.len() == self.rows && order.iter().all(|row| (*row as usize) < self.rows);
        if self.row_order.is_some_and(|order| !fits(order)) {
            return Err(KernelError::RowOrder { name: self.name.into(), rows: self.rows });
        }
        Ok(())
    }

    /// Bytes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.cols / self.format.block_elements() * self.format.block_bytes()
    }

    /// The bytes of row `row`, `row_order` applied.
    ///
    /// # Panics
    /// On a row that does not exist, or a source that [`TensorSource::check`] refuses.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [u8] {
        let row = self.row_order.map_or(row, |order| order[row] as usize);
        let bytes = self.row_bytes();
        &self.bytes[row * bytes..(row + 1) * bytes]
    }
}

/// Row `row` of `source` (`row_order` applied) as f32 into `out`, `[cols]`.
///
/// # Panics
/// When `out` is not `cols` long, or on a source that [`TensorSource::check`] refuses.
pub fn dequantise_row(source: &TensorSource<'_>, row: usize, out: &mut [f32]) {
    assert_eq!(out.len(), source.cols, "one number per input");
    dequantise(source.format, source.row(row), out);
}

/// Whole blocks of `format` as f32.
///
/// # Panics
/// When `out` is not the number of elements `bytes` holds.
pub fn dequantise(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    let (elements, block_bytes) = (format.block_elements(), format.block_bytes());
    assert_eq!(bytes.len() * elements, out.len() * block_bytes, "whole blocks of {}", format.name());
    let block = match format {
        BlockFormat::F32 => f32_block,
        BlockFormat::F16 => f16_block,
        BlockFormat::Bf16 => bf16_block,
        BlockFormat::Q8_0 => q8_0_block,
        BlockFormat::Q4_0 => q4_0_block,
        BlockFormat::Q4_1 => q4_1_block,
        BlockFormat::Q5_0 => q5_0_block,
        BlockFormat::Q5_1 => q5_1_block,
        BlockFormat::Q4K => q4_k_block,
        BlockFormat::Q6K => q6_k_block,
    };
    for (bytes, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(elements)) {
        block(bytes, out);
    }
}

/// The little-endian f16 at `offset`.
pub(crate) fn f16_at(bytes: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([bytes[offset], bytes[offset + 1]]).to_f32()
}

fn f32_block(bytes: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
}

fn f16_block(bytes: &[u8], out: &mut [f32]) {
    out[0] = f16_at(bytes, 0);
}

fn bf16_block(bytes: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
}

/// `{ d: f16, q: [i8; 32] }`
fn q8_0_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, 0);
    for (out, q) in out.iter_mut().zip(&bytes[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

/// `{ d: f16, q: [u8; 16] }`: byte j holds element j in its low half and element j + 16 in its high half.
fn q4_0_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, 0);
    for (j, q) in bytes[2..].iter().enumerate() {
        out[j] = f32::from((q & 15).cast_signed() - 8) * d;
        out[j + 16] = f32::from((q >> 4).cast_signed() - 8) * d;
    }
}

/// `{ d: f16, m: f16, q: [u8; 16] }`
fn q4_1_block(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(bytes, 0), f16_at(bytes, 2));
    for (j, q) in bytes[4..].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The 5-bit codes of `{ high: u32, q: [u8; 16] }`: bit j of `high` is the fifth bit of element j.
pub(crate) fn q5_codes(bytes: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|j| {
        let q = bytes[4 + j % 16];
        let low = if j < 16 { q & 15 } else { q >> 4 };
        low | ((high >> j & 1) << 4) as u8
    })
}

/// `{ d: f16, high: u32, q: [u8; 16] }`
fn q5_0_block(bytes: &[u8], out: &mut [f32]) {
    let d = f16_at(bytes, 0);
    for (out, q) in out.iter_mut().zip(q5_codes(&bytes[2..])) {
        *out = f32::from(q.cast_signed() - 16) * d;
    }
}

/// `{ d: f16, m: f16, high: u32, q: [u8; 16] }`
fn q5_1_block(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (f16_at(bytes, 0), f16_at(bytes, 2));
    for (out, q) in out.iter_mut().zip(q5_codes(&bytes[4..])) {
        *out = f32::from(q) * d + m;
    }
}

/// The 6-bit scale and minimum of sub-block `j` in 0..8, packed in 12 bytes (`get_scale_min_k4`).
pub(crate) fn q4_k_scale_min(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        ((scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4), (scales[j + 4] >> 4) | (scales[j] >> 6 << 4))
    }
}

/// `{ d: f16, dmin: f16, scales: [u8; 12], q: [u8; 128] }`: each 32 bytes of `q` hold two sub-blocks of 32, the first in the
/// low halves.
fn q4_k_block(bytes: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(bytes, 0), f16_at(bytes, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = q4_k_scale_min(&bytes[4..16], j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let q = &bytes[16 + j / 2 * 32..][..32];
        for (out, q) in out.iter_mut().zip(q) {
            *out = scale * f32::from(if j % 2 == 0 { q & 15 } else { q >> 4 }) - min;
        }
    }
}

/// `{ low: [u8; 128], high: [u8; 64], scales: [i8; 16], d: f16 }`. Per 128 elements: 64 bytes of `low` and 32 of `high`;
/// element l, l+32, l+64, l+96 take their two high bits from byte l of `high`, lowest first. A scale serves 16 elements.
fn q6_k_block(bytes: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = f16_at(bytes, 208);
    for element in 0..SUPER {
        let (half, quarter, l) = (element / 128, element % 128 / 32, element % 32);
        let byte = low[half * 64 + quarter % 2 * 32 + l];
        let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let two = high[half * 32 + l] >> (2 * quarter) & 3;
        let q = (four | two << 4).cast_signed() - 32;
        let scale = f32::from(scales[element / 16].cast_signed());
        out[element] = d * scale * f32::from(q);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let path = format!("{}/../fixtures/gguf-blocks/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Every format against numbers computed by the `gguf` Python package, corner blocks included.
    #[test]
    fn every_format_agrees_bit_for_bit_with_gguf_py() {
        let formats = [
            (BlockFormat::F16, "f16"),
            (BlockFormat::Bf16, "bf16"),
            (BlockFormat::Q8_0, "q8_0"),
            (BlockFormat::Q4_0, "q4_0"),
            (BlockFormat::Q4_1, "q4_1"),
            (BlockFormat::Q5_0, "q5_0"),
            (BlockFormat::Q5_1, "q5_1"),
            (BlockFormat::Q4K, "q4_k"),
            (BlockFormat::Q6K, "q6_k"),
        ];
        for (format, name) in formats {
            let bytes = fixture(&format!("{name}.bin"));
            let mut expected = vec![0.0_f32; 4 * 512];
            dequantise(BlockFormat::F32, &fixture(&format!("{name}.f32")), &mut expected);
            let source = TensorSource { name, format, rows: 4, cols: 512, bytes: &bytes, row_order: None };
            source.check().expect("the fixture's shape");
            for (row, expected) in expected.chunks_exact(512).enumerate() {
                let mut found = vec![f32::NAN; 512];
                dequantise_row(&source, row, &mut found);
                for (col, (found, expected)) in found.iter().zip(expected).enumerate() {
                    assert_eq!(
                        found.to_bits(),
                        expected.to_bits(),
                        "{name} row {row} column {col}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn row_order_moves_rows() {
        let bytes: Vec<u8> = [1.0_f32, 2.0, 3.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        let order = [2, 0, 1];
        let source = TensorSource {
            name: "t",
            format: BlockFormat::F32,
            rows: 3,
            cols: 1,
            bytes: &bytes,
            row_order: Some(&order),
        };
        source.check().expect("sound");
        let rows: Vec<f32> = (0..3)
            .map(|row| {
                let mut out = [0.0];
                dequantise_row(&source, row, &mut out);
                out[0]
            })
            .collect();
        assert_eq!(rows, [3.0, 1.0, 2.0]);
    }

    #[test]
    fn wrong_shapes_are_refused_by_name() {
        let bytes = [0_u8; 34 * 2];
        let source = TensorSource {
            name: "blk.0",
            format: BlockFormat::Q8_0,
            rows: 2,
            cols: 32,
            bytes: &bytes,
            row_order: None,
        };
        source.check().expect("sound");
        let refused = [
            (TensorSource { cols: 33, ..source }, "blk.0: 33 inputs; the block formats need a multiple of 32"),
            (TensorSource { rows: 3, ..source }, "blk.0: expected 102 bytes for Q8_0 of shape [3, 32], found 68"),
            (TensorSource { rows: usize::MAX, ..source }, "blk.0: expected"),
            (TensorSource { row_order: Some(&[0, 2]), ..source }, "blk.0: the row order does not name rows below 2"),
            (TensorSource { row_order: Some(&[0]), ..source }, "blk.0: the row order does not name rows below 2"),
        ];
        for (source, message) in refused {
            let error = source.check().expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
