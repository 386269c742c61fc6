//! The CPU's linear: the conformance checks on every instruction set this machine has, and that neither threads nor
//! instruction sets change a result beyond what they may.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use openlora_kernels::conformance::Rounding;
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{
    Backend, BlockFormat, KernelError, LinearSpec, LoraRows, Numbers, Precision, SiteSpan, TensorSource, conformance,
    reference,
};
use openlora_types::{Module, Site};

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PRECISIONS: [Precision; 2] = [Precision::Quantised, Precision::F32];

fn cpu(threads: usize, precision: Precision, isa: Isa) -> Cpu {
    Cpu::new(threads, precision, isa).expect("threads")
}

#[test]
fn every_format_size_and_row_count_agrees_with_the_reference() {
    for isa in Isa::available() {
        for precision in PRECISIONS {
            let rounding = match precision {
                Precision::F32 => Rounding::F32,
                Precision::Quantised => Rounding::Blocks,
            };
            conformance::linear_agrees_with_reference(&cpu(2, precision, *isa), rounding);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for isa in Isa::available() {
        for precision in PRECISIONS {
            conformance::linear_rows_do_not_depend_on_each_other(&cpu(2, precision, *isa));
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let rows: Vec<usize> = (0..133).rev().collect();
    for isa in Isa::available() {
        for precision in PRECISIONS {
            let one = conformance::linear_rows(&cpu(1, precision, *isa), &rows);
            for threads in [2, 3, 7] {
                assert_eq!(conformance::linear_rows(&cpu(threads, precision, *isa), &rows), one, "{threads} threads");
            }
        }
    }
}

#[test]
fn instruction_sets_differ_by_rounding_only() {
    let rows: Vec<usize> = (0..40).collect();
    for precision in PRECISIONS {
        let portable = conformance::linear_rows(&cpu(1, precision, Isa::Portable), &rows);
        for isa in Isa::available() {
            let found = conformance::linear_rows(&cpu(1, precision, *isa), &rows);
            for (found, portable) in found.iter().zip(&portable) {
                let largest = portable.iter().map(|bits| f32::from_bits(*bits).abs()).fold(0.0, f32::max);
                for (found, portable) in found.iter().zip(portable) {
                    let error = (f32::from_bits(*found) - f32::from_bits(*portable)).abs();
                    assert!(error <= 4e-6 * largest, "{} differs by {error} of {largest}", isa.name());
                }
            }
        }
    }
}

/// `[rows, 32]` f32 weights that are all `value`.
fn flat(value: f32, rows: usize) -> Vec<u8> {
    std::iter::repeat_n(value.to_le_bytes(), rows * 32).flatten().collect()
}

fn source(bytes: &[u8], rows: usize, cols: usize) -> TensorSource<'_> {
    TensorSource { name: "blk.0.q", format: BlockFormat::F32, rows, cols, bytes, row_order: None }
}

#[test]
fn a_block_that_stands_out_is_multiplied_with_two_digits() {
    const INPUTS: usize = 320;
    let mut random = conformance::Random::new(5);
    for format in [BlockFormat::Q4_1, BlockFormat::Q8_0] {
        let matrix = conformance::RandomMatrix::new(format, 40, INPUTS, &mut random);
        let spec = LinearSpec { parts: vec![matrix.source()], bias: None, sites: Vec::new() };
        // In row r, block r is 100 times the rest; 11 rows are a full group and a part of one.
        let x: Vec<f32> = (0..11 * INPUTS)
            .map(|i| random.number() * if i / INPUTS % 10 == i % INPUTS / 32 { 100.0 } else { 1.0 })
            .collect();
        let expected = reference::linear::linear(&spec, &x);
        for isa in Isa::available() {
            let cpu = cpu(2, Precision::Quantised, *isa);
            let linear = cpu.load_linear(&spec).expect("sound");
            let x = conformance::upload(&cpu, &x, INPUTS);
            let mut out = cpu.new_tensor(Numbers::Activation, 11, 40).expect("memory");
            cpu.linear(&linear, &LoraRows { segments: &[] }, &x, &mut out).expect("linear");
            let error: f64 = cpu.read_tensor(&out).iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let size: f64 = expected.iter().map(|b| f64::from(*b).powi(2)).sum();
            // One digit leaves a relative error of about 1/127/sqrt(12)/sqrt(1/3) = 4e-3 in the block that is nearly all
            // of the result; two digits leave the other blocks' share of that, 3%.
            assert!((error / size).sqrt() < 4e-4, "{}: {format:?} {:e}", isa.name(), (error / size).sqrt());
        }
    }
}

#[test]
fn linears_whose_parts_do_not_fit_are_refused_by_name() {
    let bytes = flat(1.0, 4);
    let sound = LinearSpec { parts: vec![source(&bytes, 4, 32)], bias: None, sites: Vec::new() };
    let span = |outputs| SiteSpan { site: Site { layer: 0, module: Module::Q }, index: 0, outputs };
    let cases = [
        (LinearSpec { parts: vec![source(&bytes, 4, 31)], ..sound.clone() }, "blk.0.q: expected 496 bytes for F32"),
        (
            LinearSpec { parts: vec![source(&bytes, 4, 32), source(&bytes, 8, 16)], ..sound.clone() },
            "blk.0.q: 16 inputs, but the linear it is part of has 32",
        ),
        (
            LinearSpec { bias: Some(vec![0.0; 3]), ..sound.clone() },
            "blk.0.q: 3 bias values, but the linear it is part of has 4",
        ),
        (LinearSpec { sites: vec![span(0..5)], ..sound.clone() }, "blk.0.q: 5 outputs up to its last site"),
    ];
    for precision in PRECISIONS {
        let cpu = cpu(1, precision, Isa::detect());
        cpu.load_linear(&sound).expect("sound");
        for (spec, message) in &cases {
            let error = cpu.load_linear(spec).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}

#[test]
fn weights_that_are_not_numbers_never_become_a_loaded_linear() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut bytes = flat(1.0, 40);
        bytes[37 * 128 + 64..][..4].copy_from_slice(&bad.to_le_bytes());
        let infinite_scale = [[0x00, 0x7c].as_slice(), &[1; 32]].concat();
        for precision in PRECISIONS {
            let cpu = cpu(2, precision, Isa::detect());
            let spec = LinearSpec { parts: vec![source(&bytes, 40, 32)], bias: None, sites: Vec::new() };
            let error = cpu.load_linear(&spec).expect_err("not finite");
            assert!(matches!(&error, KernelError::WeightRange { name, row: 37 } if name == "blk.0.q"), "{error}");
            let q8 = TensorSource { format: BlockFormat::Q8_0, ..source(&infinite_scale, 1, 32) };
            let error = cpu.load_linear(&LinearSpec { parts: vec![q8], bias: None, sites: Vec::new() });
            assert!(matches!(error, Err(KernelError::WeightRange { .. })), "an infinite scale");
        }
    }
}

#[test]
fn row_order_is_applied_when_packing() {
    let bytes: Vec<u8> = (0..40).flat_map(|row| flat(row as f32, 1)).collect();
    let order: Vec<u32> = (0..40).rev().collect();
    for precision in PRECISIONS {
        let cpu = cpu(2, precision, Isa::detect());
        let part = TensorSource { row_order: Some(&order), ..source(&bytes, 40, 32) };
        let linear = cpu.load_linear(&LinearSpec { parts: vec![part], bias: None, sites: Vec::new() }).expect("sound");
        let x = conformance::upload(&cpu, &[1.0; 32], 32);
        let mut out = cpu.new_tensor(Numbers::Activation, 1, 40).expect("memory");
        cpu.linear(&linear, &LoraRows { segments: &[] }, &x, &mut out).expect("linear");
        for (output, found) in cpu.read_tensor(&out).iter().enumerate() {
            let expected = (39 - output) as f32 * 32.0;
            assert!((found - expected).abs() <= expected * 1e-3, "output {output}: {found}, expected {expected}");
        }
    }
}

#[test]
fn a_linear_allocates_nothing_once_the_largest_tensor_exists() {
    let bytes = flat(0.5, 100);
    for precision in PRECISIONS {
        // One thread: then every allocation would be this thread's.
        let cpu = cpu(1, precision, Isa::detect());
        let spec = LinearSpec { parts: vec![source(&bytes, 100, 32)], bias: Some(vec![1.0; 100]), sites: Vec::new() };
        let linear = cpu.load_linear(&spec).expect("sound");
        let mut out = cpu.new_tensor(Numbers::Activation, 300, 100).expect("memory");
        for rows in [1, 300, 20] {
            let x = conformance::upload(&cpu, &vec![1.0; rows * 32], 32);
            let before = ALLOCATIONS.get();
            cpu.linear(&linear, &LoraRows { segments: &[] }, &x, &mut out).expect("linear");
            assert_eq!(ALLOCATIONS.get(), before, "{rows} rows");
            assert!(cpu.read_tensor(&out).iter().all(|value| (value - 17.0).abs() < 0.05), "sixteen and the bias");
        }
    }
}

#[test]
fn a_panic_in_a_kernel_is_an_error_of_this_and_every_later_operation() {
    let bytes = flat(0.5, 4);
    for threads in [1, 2] {
        let cpu = cpu(threads, Precision::F32, Isa::detect());
        let spec = LinearSpec { parts: vec![source(&bytes, 4, 32)], bias: None, sites: Vec::new() };
        let linear = cpu.load_linear(&spec).expect("sound");
        let x = conformance::upload(&cpu, &[1.0; 32], 32);
        let owner = std::sync::Arc::new(bytes.clone());
        let table = cpu.load_embedding(&source(&owner, 4, 32), owner.clone(), 0).expect("sound");
        let mut out = cpu.new_tensor(Numbers::Activation, 8, 32).expect("memory");
        let none = LoraRows { segments: &[] };
        let error = cpu.embed(&table, &[0, 4, 0, 4, 0, 4, 0, 4], &none, &mut out).expect_err("no such token");
        assert!(matches!(error, KernelError::ThreadPanicked(_)), "{error}");
        let mut out = cpu.new_tensor(Numbers::Activation, 1, 4).expect("memory");
        let error = cpu.linear(&linear, &none, &x, &mut out).expect_err("poisoned");
        assert!(matches!(error, KernelError::ThreadPanicked(_)), "{error}");
    }
}
