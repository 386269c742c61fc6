//! Activations in 8 bits: per row and 32 inputs the codes q = round(x / s), s = largest |x| / 127, ties to even, and what
//! the kernels need beside them.

use bytemuck::{Pod, Zeroable};

use crate::KernelError;
use crate::cpu::pack::BLOCK;
use crate::cpu::pool::{Disjoint, Pool};
use crate::cpu::tensor::{Aligned, CpuTensor};
use crate::cpu::{Isa, pack};

/// Rows that a kernel computes at once: they share every weight that was loaded and unpacked.
pub const GROUP: usize = 8;
/// Below this number of elements one thread quantises faster than several start.
const PARALLEL_ELEMENTS: usize = 8_192;
/// A block whose largest element is smaller counts as zeros: 127 / largest must be finite.
pub(super) const SMALLEST: f32 = 1e-35;

/// One block of 32 inputs of [`GROUP`] rows. A row's 32 codes stay together: the kernels broadcast four at a time.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct ActivationBlock {
    /// The codes, -127..=127.
    pub codes: [[i8; BLOCK]; GROUP],
    /// s of each row.
    pub scale: [f32; GROUP],
    /// s times the sum of the codes: what a weight minimum is multiplied with.
    pub scaled_sum: [f32; GROUP],
    /// -128 times the sum of the codes: where the dot product with codes stored plus 128 starts.
    pub offset: [i32; GROUP],
}

/// The quantised rows of one linear's input: group by group, within a group block by block. Grows when it must and is
/// reused from call to call.
#[derive(Debug)]
pub struct Activations {
    blocks: Aligned<ActivationBlock>,
    blocks_per_row: usize,
}

impl Activations {
    /// Empty.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self { blocks: Aligned::zeroed(0, "quantised activations")?, blocks_per_row: 0 })
    }

    /// Makes room for `rows` of `inputs`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn reserve(&mut self, rows: usize, inputs: usize) -> Result<(), KernelError> {
        let needed = rows.div_ceil(GROUP) * inputs.div_ceil(BLOCK);
        if needed > self.blocks.len() {
            self.blocks = Aligned::zeroed(needed, "quantised activations")?;
        }
        Ok(())
    }

    /// Quantises all rows of `x`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] when there was not room and none can be made.
    pub fn quantise(&mut self, pool: &Pool, isa: Isa, x: &CpuTensor) -> Result<(), KernelError> {
        self.reserve(x.rows(), x.width())?;
        let per_row = x.width().div_ceil(BLOCK);
        self.blocks_per_row = per_row;
        if x.rows() * x.width() < PARALLEL_ELEMENTS {
            for group in 0..x.rows().div_ceil(GROUP) {
                quantise_columns(isa, x, group, 0, &mut self.blocks[group * per_row..(group + 1) * per_row]);
            }
            return Ok(());
        }
        // Work is split by (group, chunk of blocks) so that few rows occupy all threads as well.
        let (groups, chunks) = (x.rows().div_ceil(GROUP), pool.threads().min(per_row));
        let blocks = Disjoint::new(&mut self.blocks);
        pool.run(&|worker| {
            for item in pool.split(groups * chunks, worker) {
                let (group, chunk) = (item / chunks, item % chunks);
                let range = per_row * chunk / chunks..per_row * (chunk + 1) / chunks;
                // SAFETY: items differ in their group or their range of blocks, and each goes to exactly one worker.
                let out = unsafe { blocks.slice(group * per_row + range.start..group * per_row + range.end) };
                quantise_columns(isa, x, group, range.start, out);
            }
        });
        Ok(())
    }

    /// The blocks of rows `group * GROUP..`, in order of inputs.
    #[must_use]
    pub fn group(&self, group: usize) -> &[ActivationBlock] {
        &self.blocks[group * self.blocks_per_row..(group + 1) * self.blocks_per_row]
    }
}

/// Blocks `first..` of one group of rows of `x`.
fn quantise_columns(isa: Isa, x: &CpuTensor, group: usize, first: usize, out: &mut [ActivationBlock]) {
    let rows = (x.rows() - group * GROUP).min(GROUP);
    for slot in 0..rows {
        let row = &x.row(group * GROUP + slot)[first * BLOCK..];
        let row = &row[..row.len().min(out.len() * BLOCK)];
        let whole = row.len() / BLOCK;
        quantise_row(isa, &row[..whole * BLOCK], &mut out[..whole], slot);
        if whole < out.len() {
            let mut last = [0.0; BLOCK];
            last[..row.len() - whole * BLOCK].copy_from_slice(&row[whole * BLOCK..]);
            quantise_row(isa, &last, &mut out[whole..], slot);
        }
    }
}

/// Whole blocks of one row into place `slot` of each block of `out`.
fn quantise_row(isa: Isa, row: &[f32], out: &mut [ActivationBlock], slot: usize) {
    assert!(row.len() == out.len() * BLOCK && slot < GROUP, "a block for every 32 elements");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { super::avx512::quantise_row(row, out, slot) },
        // What remains is a small part of a linear there.
        _ => quantise_row_portable(row, out, slot),
    }
}

fn quantise_row_portable(row: &[f32], out: &mut [ActivationBlock], slot: usize) {
    for (x, out) in row.chunks_exact(BLOCK).zip(out) {
        // As integers, magnitudes order the same and NaN is the largest of all; `f32::max` would drop it.
        let largest = x.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
        let largest = f32::from_bits(largest);
        // Not `<`: a NaN must not become zeros.
        let (scale, inverse) = if largest <= SMALLEST { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
        let mut sum = 0;
        for (x, code) in x.iter().zip(&mut out.codes[slot]) {
            *code = (x * inverse).round_ties_even() as i8;
            sum += i32::from(*code);
        }
        out.scale[slot] = scale;
        out.scaled_sum[slot] = scale * sum as f32;
        out.offset[slot] = -128 * sum;
    }
}

// The kernels address the codes of a block by four inputs.
const _: () = assert!(BLOCK.is_multiple_of(4) && pack::PANEL == 16);

#[cfg(test)]
mod tests {
    use super::*;

    fn quantised(isa: Isa, values: &[f32], width: usize, threads: usize) -> (Activations, CpuTensor) {
        let pool = Pool::new(threads).expect("pool");
        let x = CpuTensor::from_values(values, width).expect("memory");
        let mut activations = Activations::new().expect("memory");
        activations.quantise(&pool, isa, &x).expect("memory");
        (activations, x)
    }

    #[test]
    fn codes_scales_and_sums_are_the_same_on_every_instruction_set_and_thread_count() {
        let width = 32 * 37 + 5;
        let values: Vec<f32> = (0..11 * width)
            .map(|i| match i % 97 {
                0 => 1e-38,
                1 => -3.5e4,
                2 => 0.0,
                _ => ((i * 7919 % 20011) as f32 / 10005.5 - 1.0) * (1 << (i / 600 % 12)) as f32,
            })
            .collect();
        let (expected, _) = quantised(Isa::Portable, &values, width, 1);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let (found, _) = quantised(*isa, &values, width, threads);
                for group in 0..2 {
                    for (found, expected) in found.group(group).iter().zip(expected.group(group)) {
                        let rows = if group == 0 { 8 } else { 3 };
                        for slot in 0..rows {
                            assert_eq!(found.codes[slot], expected.codes[slot]);
                            assert_eq!(found.scale[slot].to_bits(), expected.scale[slot].to_bits());
                            assert_eq!(found.scaled_sum[slot].to_bits(), expected.scaled_sum[slot].to_bits());
                            assert_eq!(found.offset[slot], expected.offset[slot]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_element_is_within_half_a_step() {
        let values: Vec<f32> = (0..640).map(|i| ((i * 31 % 101) as f32 - 50.0) * 0.37).collect();
        for isa in Isa::available() {
            let (activations, x) = quantised(*isa, &values, 64, 1);
            for row in 0..x.rows() {
                for (block, x) in activations.group(row / GROUP).iter().zip(x.row(row).chunks(BLOCK)) {
                    let slot = row % GROUP;
                    for (code, x) in block.codes[slot].iter().zip(x) {
                        let error = (f32::from(*code) * block.scale[slot] - x).abs();
                        assert!(error <= block.scale[slot] * 0.500_01, "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn tiny_blocks_are_zeros_and_numbers_that_are_not_finite_stay_so() {
        for isa in Isa::available() {
            let mut values = vec![1e-36_f32; 32];
            let (tiny, _) = quantised(*isa, &values, 32, 1);
            assert_eq!((tiny.group(0)[0].scale[0], tiny.group(0)[0].codes[0]), (0.0, [0; 32]));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, 15, 31] {
                    values.fill(1.0);
                    values[place] = bad;
                    let (found, _) = quantised(*isa, &values, 32, 1);
                    assert!(!found.group(0)[0].scale[0].is_finite(), "{bad} at {place} on {}", isa.name());
                }
            }
        }
    }
}
