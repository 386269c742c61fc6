//! Every operation of the CPU backend but the linear product, against its reference and against itself: on each
//! instruction set this machine has, in both precisions, with different numbers of threads, over odd sizes, with outputs
//! and caches full of NaN beforehand.

mod attention;
mod lora;
mod pages;
mod rows;
mod sample;

use openlora_kernels::cpu::{CpuTensor, Isa, Pool};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Seeded random numbers; the seed is the test's own.
fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Numbers in `-scale..scale`.
fn random(rng: &mut StdRng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Every instruction set with one, two and three threads.
fn machines() -> impl Iterator<Item = (Isa, Pool)> {
    let threads = |isa: &Isa| [1, 2, 3].map(|threads| (*isa, Pool::new(threads).expect("threads")));
    Isa::available().iter().flat_map(threads)
}

/// A tensor for `rows` rows, full of NaN.
fn poisoned(rows: usize, width: usize) -> CpuTensor {
    CpuTensor::from_values(&vec![f32::NAN; rows * width], width).expect("memory")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Fails unless each value is within `tolerance` of the expected, relative to the larger of it and 1.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close, "{what}: element {i} is {found}, expected {expected}");
    }
}
