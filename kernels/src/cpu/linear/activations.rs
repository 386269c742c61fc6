//! Activations in 8 bits: per row and 32 inputs the codes q = round(x (1 / s)), s = largest |x| / 127, ties to even, and what
//! the kernels need beside them.
//!
//! A few channels of a transformer are far larger than the rest (Dettmers et al. 2022, LLM.int8(), section 3), and the
//! rounding of their blocks is most of what 8 bits lose. So blocks whose s stands out in their row have a second digit,
//! r = round((x (1 / s) - q) 254), -127..=127: x is s (q + r / 254) there. Which blocks have one depends on their own row alone.

use std::ops::Range;

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

/// Steps of the second digit in one of the first: with 254 it is at most 127.
pub const SECOND_STEPS: f32 = 254.0;
/// A block has a second digit when the logarithm to base 2 of its scale is at least this far above the row's mean, in units
/// of 2^-23, as the bits of an f32 count (linearly between powers of two). With 2, four times the mean, that is 3% of
/// SmolLM2-135M's blocks; docs/cpu.md has what other limits cost and gain.
const STANDS_OUT: u32 = 2 << 23;
/// What an allocation that fails is called.
const WHAT: &str = "quantised activations";

/// One block of 32 inputs of [`GROUP`] rows. A row's 32 codes stay together: the kernels broadcast four at a time.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct ActivationBlock {
    /// The codes, -127..=127.
    pub codes: [[i8; BLOCK]; GROUP],
    /// s of each row.
    pub scale: [f32; GROUP],
    /// s times the sum of the codes, second digits included: what a weight minimum is multiplied with.
    pub scaled_sum: [f32; GROUP],
    /// -128 times the sum of the codes: where the dot product with codes stored plus 128 starts.
    pub offset: [i32; GROUP],
    /// Bit i: row i has a second digit here.
    pub has_second: u32,
    unused: [u32; 7],
}

/// The second digits of an [`ActivationBlock`]; only the rows that have one are filled in. They lie apart because most
/// blocks have none.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct SecondDigits {
    /// The codes, -127..=127.
    pub codes: [[i8; BLOCK]; GROUP],
    /// -128 times the sum of the codes.
    pub offset: [i32; GROUP],
}

/// One group of rows, block by block in order of inputs.
#[derive(Clone, Copy)]
pub struct Group<'a> {
    /// The blocks.
    pub blocks: &'a [ActivationBlock],
    /// For each of them its second digits.
    pub seconds: &'a [SecondDigits],
}

/// The quantised rows of one linear's input: group by group, within a group block by block. Grows when it must and is
/// reused from call to call.
#[derive(Debug)]
pub struct Activations {
    blocks: Aligned<ActivationBlock>,
    seconds: Aligned<SecondDigits>,
    /// For each (group, chunk of blocks) the sums over its scales' bits, by row.
    scale_bits: Aligned<[u64; GROUP]>,
    blocks_per_row: usize,
}

impl Activations {
    /// Empty.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new() -> Result<Self, KernelError> {
        Ok(Self {
            blocks: Aligned::zeroed(0, WHAT)?,
            seconds: Aligned::zeroed(0, WHAT)?,
            scale_bits: Aligned::zeroed(0, WHAT)?,
            blocks_per_row: 0,
        })
    }

    /// Makes room for `rows` of `inputs`, quantised by `threads`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn reserve(&mut self, threads: usize, rows: usize, inputs: usize) -> Result<(), KernelError> {
        let groups = rows.div_ceil(GROUP);
        let blocks = groups * inputs.div_ceil(BLOCK);
        if blocks > self.seconds.len() {
            self.blocks = Aligned::zeroed(blocks, WHAT)?;
            self.seconds = Aligned::zeroed(blocks, WHAT)?;
        }
        if groups * threads > self.scale_bits.len() {
            self.scale_bits = Aligned::zeroed(groups * threads, WHAT)?;
        }
        Ok(())
    }

    /// Quantises all rows of `x`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] when there was not room and none can be made.
    pub fn quantise(&mut self, pool: &Pool, isa: Isa, x: &CpuTensor) -> Result<(), KernelError> {
        self.reserve(pool.threads(), x.rows(), x.width())?;
        let per_row = x.width().div_ceil(BLOCK);
        self.blocks_per_row = per_row;
        let alone = x.rows() * x.width() < PARALLEL_ELEMENTS;
        // Work is split by (group, chunk of blocks) so that few rows occupy all threads as well.
        let chunks = if alone { 1 } else { pool.threads().min(per_row) };
        let items = x.rows().div_ceil(GROUP) * chunks;
        let for_each_item = |task: &(dyn Fn(usize) + Sync)| match alone {
            true => (0..items).for_each(task),
            false => pool.run(&|worker| pool.split(items, worker).for_each(task)),
        };
        let part = |item: usize| {
            let (group, chunk) = (item / chunks, item % chunks);
            (group, per_row * chunk / chunks..per_row * (chunk + 1) / chunks)
        };
        let (blocks, seconds) = (Disjoint::new(&mut self.blocks), Disjoint::new(&mut self.seconds));

        let scale_bits = Disjoint::new(&mut self.scale_bits);
        for_each_item(&|item| {
            let (group, range) = part(item);
            // SAFETY: items differ in their group or their range of blocks, and each goes to exactly one worker.
            let (blocks, bits) = unsafe {
                let of = group * per_row;
                (blocks.slice(of + range.start..of + range.end), &mut scale_bits.slice(item..item + 1)[0])
            };
            for_each_row(x, group, &range, |slot, row, out| first_digits(isa, row, &mut blocks[out], slot));
            *bits = [0; GROUP];
            for block in blocks {
                for (bits, scale) in bits.iter_mut().zip(block.scale) {
                    *bits += u64::from(scale.to_bits());
                }
            }
        });

        // A row's blocks are compared with all of its blocks, so this begins when all scales are known.
        let scale_bits = &self.scale_bits;
        for_each_item(&|item| {
            let (group, range) = part(item);
            // SAFETY: as above.
            let (blocks, seconds) = unsafe {
                let of = group * per_row + range.start..group * per_row + range.end;
                (blocks.slice(of.clone()), seconds.slice(of))
            };
            let mut limits = [u32::MAX; GROUP];
            for (slot, limit) in limits.iter_mut().enumerate().take(x.rows() - group * GROUP) {
                let total: u64 = scale_bits[group * chunks..(group + 1) * chunks].iter().map(|bits| bits[slot]).sum();
                *limit = (total / per_row as u64) as u32 + STANDS_OUT;
            }
            for ((block, second), number) in blocks.iter_mut().zip(seconds).zip(range) {
                block.has_second = 0;
                for (slot, limit) in limits.iter().enumerate() {
                    block.has_second |= u32::from(block.scale[slot].to_bits() >= *limit) << slot;
                }
                let mut rows = block.has_second;
                while rows != 0 {
                    let slot = rows.trailing_zeros() as usize;
                    rows &= rows - 1;
                    let row = &x.row(group * GROUP + slot)[number * BLOCK..];
                    match row.first_chunk() {
                        Some(x) => second_digit(isa, x, block, second, slot),
                        None => second_digit(isa, &filled_up(row), block, second, slot),
                    }
                }
            }
        });
        Ok(())
    }

    /// The blocks of rows `group * GROUP..`.
    #[must_use]
    pub fn group(&self, group: usize) -> Group<'_> {
        let all = group * self.blocks_per_row..(group + 1) * self.blocks_per_row;
        Group { blocks: &self.blocks[all.clone()], seconds: &self.seconds[all] }
    }
}

/// Calls `task(slot, elements, blocks)` for each row of a group: elements of whole blocks, and which of the blocks `range`
/// they are, counted from its start. Where a row ends inside a block, that block comes apart, filled up with zeros.
fn for_each_row(x: &CpuTensor, group: usize, range: &Range<usize>, mut task: impl FnMut(usize, &[f32], Range<usize>)) {
    let rows = (x.rows() - group * GROUP).min(GROUP);
    for slot in 0..rows {
        let row = &x.row(group * GROUP + slot)[range.start * BLOCK..];
        let row = &row[..row.len().min(range.len() * BLOCK)];
        let whole = row.len() / BLOCK;
        task(slot, &row[..whole * BLOCK], 0..whole);
        if whole < range.len() {
            task(slot, &filled_up(&row[whole * BLOCK..]), whole..range.len());
        }
    }
}

/// The end of a row as a whole block.
fn filled_up(end: &[f32]) -> [f32; BLOCK] {
    let mut block = [0.0; BLOCK];
    block[..end.len()].copy_from_slice(end);
    block
}

/// The first digits of whole blocks of one row into place `slot` of each block of `out`.
fn first_digits(isa: Isa, row: &[f32], out: &mut [ActivationBlock], slot: usize) {
    assert!(row.len() == out.len() * BLOCK && slot < GROUP, "a block for every 32 elements");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { super::avx512::first_digits(row, out, slot) },
        // What remains is a small part of a linear there.
        _ => first_digits_portable(row, out, slot),
    }
}

fn first_digits_portable(row: &[f32], out: &mut [ActivationBlock], slot: usize) {
    for (x, out) in row.chunks_exact(BLOCK).zip(out) {
        // As integers, magnitudes order the same and NaN is the largest of all; `f32::max` would drop it.
        let largest = x.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
        let largest = f32::from_bits(largest);
        // Not `<`: a NaN must not become zeros.
        let scale = if largest <= SMALLEST { 0.0 } else { largest / 127.0 };
        let inverse = inverse(scale);
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

/// What elements are multiplied with to become codes.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The second digits of row `slot` of one block, `x`, whose first digits are known.
fn second_digit(isa: Isa, x: &[f32; BLOCK], block: &mut ActivationBlock, out: &mut SecondDigits, slot: usize) {
    let inverse = inverse(block.scale[slot]);
    let sum = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { super::avx512::second_digit(x, inverse, &block.codes[slot], &mut out.codes[slot]) },
        _ => second_digit_portable(x, inverse, &block.codes[slot], &mut out.codes[slot]),
    };
    out.offset[slot] = sum.wrapping_mul(-128);
    block.scaled_sum[slot] += block.scale[slot] * (sum as f32 / SECOND_STEPS);
    block.has_second |= 1 << slot;
}

/// Returns the sum of the codes.
fn second_digit_portable(x: &[f32; BLOCK], inverse: f32, first: &[i8; BLOCK], out: &mut [i8; BLOCK]) -> i32 {
    let mut sum = 0;
    for ((x, first), code) in x.iter().zip(first).zip(out) {
        *code = ((x * inverse - f32::from(*first)) * SECOND_STEPS).round_ties_even() as i8;
        sum += i32::from(*code);
    }
    sum
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
                    let (found, expected) = (found.group(group), expected.group(group));
                    for (found, expected) in found.blocks.iter().zip(expected.blocks) {
                        assert_eq!(found.has_second, expected.has_second);
                        for slot in 0..if group == 0 { 8 } else { 3 } {
                            assert_eq!(found.codes[slot], expected.codes[slot]);
                            assert_eq!(found.scale[slot].to_bits(), expected.scale[slot].to_bits());
                            assert_eq!(found.scaled_sum[slot].to_bits(), expected.scaled_sum[slot].to_bits());
                            assert_eq!(found.offset[slot], expected.offset[slot]);
                        }
                    }
                    let has_second = expected.blocks.iter().map(|block| block.has_second);
                    assert!(has_second.clone().any(|rows| rows != 0));
                    for (rows, (found, expected)) in has_second.zip(found.seconds.iter().zip(expected.seconds)) {
                        for slot in (0..GROUP).filter(|slot| rows >> slot & 1 == 1) {
                            assert_eq!(found.codes[slot], expected.codes[slot]);
                            assert_eq!(found.offset[slot], expected.offset[slot]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_that_stand_out_in_their_row_have_a_second_digit_and_no_others() {
        // Row 0: block 5 is large. Row 1: all alike. Row 2: 2 and 3 are large, 8 is twice the mean, which is not enough; larger ones
        // in other rows do not matter.
        let size = |row: usize, block: usize| match (row, block) {
            (0, 5) => 30.0,
            (2, 2 | 3) => 5.0,
            (2, 8) => 1.8,
            (0 | 2, _) => 0.5,
            _ => 100.0,
        };
        let values: Vec<f32> =
            (0..3 * 320).map(|i| size(i / 320, i % 320 / 32) * ((i * 31 % 64) as f32 - 31.5) / 32.0).collect();
        for isa in Isa::available() {
            let (found, x) = quantised(*isa, &values, 320, 2);
            let group = found.group(0);
            let rows: Vec<u32> = group.blocks.iter().map(|block| block.has_second).collect();
            assert_eq!(rows, [0, 0, 4, 4, 0, 1, 0, 0, 0, 0]);
            for (block, (first, second)) in group.blocks.iter().zip(group.seconds).enumerate() {
                for slot in (0..3).filter(|slot| first.has_second >> slot & 1 == 1) {
                    let codes = first.codes[slot].iter().zip(&second.codes[slot]);
                    let mut sum = 0.0;
                    for ((q, r), x) in codes.zip(&x.row(slot)[block * BLOCK..]) {
                        let value = first.scale[slot] * (f32::from(*q) + f32::from(*r) / SECOND_STEPS);
                        sum += value;
                        assert!((value - x).abs() <= first.scale[slot] / SECOND_STEPS * 0.51, "{value} for {x}");
                    }
                    assert!((first.scaled_sum[slot] - sum).abs() <= 1e-5 * first.scale[slot] * 127.0 * 32.0);
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
                for (block, x) in activations.group(row / GROUP).blocks.iter().zip(x.row(row).chunks(BLOCK)) {
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
            assert_eq!((tiny.group(0).blocks[0].scale[0], tiny.group(0).blocks[0].codes[0]), (0.0, [0; 32]));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, 15, 31] {
                    values.fill(1.0);
                    values[place] = bad;
                    let (found, _) = quantised(*isa, &values, 32, 1);
                    assert!(!found.group(0).blocks[0].scale[0].is_finite(), "{bad} at {place} on {}", isa.name());
                }
            }
        }
    }
}
