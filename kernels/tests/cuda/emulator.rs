//! The emulated device does what a GPU does, and makes an error of what a GPU leaves undefined.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use openlora_kernels::KernelError;
use openlora_kernels::cuda::device::{Address, Device, Element, Gemm, Launch, Memory, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::sources::Source;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{MEMORY, emulated, emulated_with, notices_races, sanitised, sanitised_fails};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Numbers {
    input: Address,
    output: Address,
    count: u32,
    unused: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Product {
    a: Address,
    b: Address,
    d: Address,
}

fn probe() -> Arc<Emulated> {
    let probe = Source { name: "emulator_probe.cu", text: include_str!("emulator_probe.cu") };
    Emulated::with_sources(7, &[probe]).expect("the emulated device")
}

fn launch(device: &Emulated, launch: &Launch<'_>) -> Result<(), KernelError> {
    // SAFETY: the tests pass addresses of what they allocate, or mean not to and see the sanitiser end the process.
    unsafe { device.launch(Stream::Compute, launch) }
}

fn numbers(input: &Memory<Emulated>, output: &Memory<Emulated>, count: u32) -> Numbers {
    Numbers { input: input.address(), output: output.address(), count, unused: 0 }
}

#[test]
fn a_barrier_lets_threads_see_what_others_wrote() {
    sanitised(|| {
        let device = probe();
        for (threads, grid) in [(32, [1, 1]), (512, [3, 5]), (1024, [2, 2])] {
            let blocks = grid[0] * grid[1];
            let out = Memory::new(&device, (blocks * threads * 4) as usize).expect("memory");
            let params = numbers(&out, &out, 1);
            launch(&device, &Launch::new("probe_barrier", grid, threads, &params).shared(threads * 4)).expect("launch");
            let expected: Vec<u32> =
                (0..blocks).flat_map(|block| (0..threads).map(move |i| block * 1000 + threads - 1 - i)).collect();
            assert_eq!(out.read::<u32>(0, expected.len()).expect("read"), expected);
        }
    });
}

#[test]
fn a_missing_barrier_shows_as_poison() {
    sanitised(|| {
        let device = probe();
        let out = Memory::new(&device, 128 * 4).expect("memory");
        let params = numbers(&out, &out, 0);
        let launched = launch(&device, &Launch::new("probe_barrier", [1, 1], 128, &params).shared(512));
        if notices_races() {
            let message = launched.expect_err("a race").to_string();
            assert!(message.contains("a race for byte"), "{message}");
            return;
        }
        launched.expect("launch");
        let seen = out.read::<u32>(0, 128).expect("read");
        assert!(seen.contains(&u32::MAX), "no thread ran before the one it needs");
    });
}

#[test]
fn races_are_errors() {
    sanitised(|| {
        if !notices_races() {
            return;
        }
        let device = probe();
        for (which, expected) in [
            (0, None),
            (1, Some(("of shared memory", "with no barrier between"))),
            (2, Some(("of shared memory", "emulator_probe.cu:"))),
            (3, Some(("for byte 0 of shared memory", "emulator_probe.cu:"))),
            (4, Some(("of an allocation: writes", "of another block wrote"))),
            (5, Some(("of an allocation: ", "of another block "))),
            (6, Some(("of shared memory", "emulator_probe.cu:"))),
            (7, Some(("of shared memory", "emulator_probe.cu:"))),
            (8, None),
            (9, Some(("of shared memory: writes", " read at emulator_probe.cu:"))),
        ] {
            let input = Memory::holding(&device, &[1_u32; 128]).expect("memory");
            let output = Memory::new(&device, 512).expect("memory");
            let params = numbers(&input, &output, which);
            // Blocks beyond the first write the same numbers: one block where that is no matter.
            let grid = [if [0, 1, 2, 3, 6, 7, 9].contains(&which) { 1 } else { 2 }, 1];
            let launches = (0..8).map(|_| launch(&device, &Launch::new("probe_races", grid, 64, &params).shared(1024)));
            let errors: Vec<String> = launches.filter_map(Result::err).map(|error| error.to_string()).collect();
            match expected {
                None => assert!(errors.is_empty(), "{which}: {errors:?}"),
                // Not in every order where only writes are remembered.
                Some((what, other)) => {
                    assert!(errors.len() >= if which == 5 { 1 } else { 8 }, "{which}: {errors:?}");
                    assert!(errors.iter().all(|e| e.contains(what) && e.contains(other)), "{which}: {errors:?}");
                }
            }
        }
    });
}

#[test]
fn shuffles_and_votes_are_those_of_a_gpu() {
    sanitised(|| {
        let device = probe();
        let mut rng = StdRng::seed_from_u64(1);
        let values: Vec<u32> = (0..128).map(|_| rng.random::<u32>() >> rng.random_range(0..32)).collect();
        let input = Memory::holding(&device, &values).expect("memory");
        let out = Memory::new(&device, 128 * 16 * 4).expect("memory");
        launch(&device, &Launch::new("probe_warp", [1, 1], 128, &numbers(&input, &out, 0))).expect("launch");
        let found = out.read::<u32>(0, 128 * 16).expect("read");
        for (thread, found) in found.chunks_exact(16).enumerate() {
            let warp: &[u32] = &values[thread / 32 * 32..][..32];
            let lane = thread % 32;
            let x = warp[lane];
            let ballot = (0..32).fold(0, |all, lane| all | (warp[lane] & 1) << lane);
            let expected = [
                warp[(lane * 7 + 3) % 32],
                warp[lane / 8 * 8 + 5],
                warp[lane ^ 9],
                if lane >= 3 { warp[lane - 3] } else { x },
                if lane + 3 < 32 { warp[lane + 3] } else { x },
                if lane % 8 >= 3 { warp[lane - 3] } else { x },
                if lane % 8 + 3 < 8 { warp[lane + 3] } else { x },
                ballot,
                u32::from(warp.contains(&values[7])),
                u32::from(warp.iter().all(|x| *x == values[7])),
                warp[lane ^ 1],
                lane as u32 ^ 1,
                496_f32.to_bits(),
                2_f32.to_bits(),
                (-14_i32) as u32,
                x.count_ones() + ((if x == 0 { 0 } else { x.trailing_zeros() + 1 }) << 8) + (x.leading_zeros() << 16),
            ];
            assert_eq!(found, expected, "thread {thread}");
        }
    });
}

/// a, b and d of `d += a b`, and what d is then.
fn product(element: Element) -> (Vec<u16>, Vec<u16>, Vec<f32>, Vec<f32>) {
    let mut rng = StdRng::seed_from_u64(2);
    let mut some = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-64..64) as f32 / 8.0).collect() };
    let (a, b, d) = (some(256), some(128), some(128));
    // Multiples of 1/64 below 2^17: every sum is exact, in any order.
    let expected =
        (0..128).map(|i| d[i] + (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum::<f32>()).collect();
    let bits = |values: Vec<f32>| -> Vec<u16> {
        match element {
            Element::Bf16 => values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect(),
            _ => values.iter().map(|x| f16::from_f32(*x).to_bits()).collect(),
        }
    };
    (bits(a), bits(b), d, expected)
}

fn multiply(kernel: &str, element: Element) -> (Vec<f32>, Vec<f32>) {
    let device = probe();
    let (a, b, d, expected) = product(element);
    let a = Memory::holding(&device, &a).expect("memory");
    let b = Memory::holding(&device, &b).expect("memory");
    let d = Memory::holding(&device, &d).expect("memory");
    let params = Product { a: a.address(), b: b.address(), d: d.address() };
    launch(&device, &Launch::new(kernel, [1, 1], 32, &params).shared(768)).expect("launch");
    (d.read(0, 128).expect("read"), expected)
}

/// The PTX manual's formulas, "Matrix Fragments for mma.m16n8k16 with floating point type": row and column of the numbers i = 0, 1, ...
/// of a lane, two to a register, the first in the low half.
mod manual {
    pub(super) fn a(lane: usize, i: usize) -> (usize, usize) {
        let (group, in_group) = (lane >> 2, lane % 4);
        let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
        (row, in_group * 2 + (i & 1) + if i < 4 { 0 } else { 8 })
    }

    pub(super) fn b(lane: usize, i: usize) -> (usize, usize) {
        let (group, in_group) = (lane >> 2, lane % 4);
        (in_group * 2 + (i & 1) + if i < 2 { 0 } else { 8 }, group)
    }

    /// One to a register.
    pub(super) fn d(lane: usize, i: usize) -> (usize, usize) {
        let (group, in_group) = (lane >> 2, lane % 4);
        (if i < 2 { group } else { group + 8 }, in_group * 2 + (i & 1))
    }
}

#[test]
fn registers_of_the_tensor_cores_hold_what_the_ptx_manual_says() {
    sanitised(|| {
        let device = probe();
        for (kernel, element) in [("probe_fragments_bf16", Element::Bf16), ("probe_fragments_f16", Element::F16)] {
            let (a, b, d, expected) = product(element);
            let mut registers = Vec::new();
            for lane in 0..32 {
                let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
                let of_a = |i| {
                    let (row, column) = manual::a(lane, i);
                    a[row * 16 + column]
                };
                let of_b = |i| {
                    let (row, column) = manual::b(lane, i);
                    b[row * 8 + column]
                };
                registers.extend((0..4).map(|r| pair(of_a(r * 2), of_a(r * 2 + 1))));
                registers.extend((0..2).map(|r| pair(of_b(r * 2), of_b(r * 2 + 1))));
                registers.extend((0..4).map(|i| {
                    let (row, column) = manual::d(lane, i);
                    d[row * 8 + column].to_bits()
                }));
            }
            let input = Memory::holding(&device, &registers).expect("memory");
            let out = Memory::new(&device, 32 * 4 * 4).expect("memory");
            launch(&device, &Launch::new(kernel, [1, 1], 32, &numbers(&input, &out, 0))).expect("launch");
            for (at, found) in out.read::<f32>(0, 128).expect("read").into_iter().enumerate() {
                let (row, column) = manual::d(at / 4, at % 4);
                assert_eq!(found, expected[row * 8 + column], "{kernel}: lane {}, d{}", at / 4, at % 4);
            }
        }
    });
}

/// As the PTX manual has ldmatrix: lanes 8 m to 8 m + 7 name the rows of matrix m, and a lane's register m holds two numbers of row
/// lane / 4 from column 2 (lane % 4) on; transposed, of column lane / 4 from row 2 (lane % 4) on.
#[test]
fn ldmatrix_hands_out_matrices_as_the_ptx_manual_says() {
    sanitised(|| {
        let device = probe();
        // Every number of the four matrices is its place.
        let values: Vec<u16> = (0..256).collect();
        let input = Memory::holding(&device, &values).expect("memory");
        for trans in [false, true] {
            let out = Memory::new(&device, 512).expect("memory");
            let params = numbers(&input, &out, u32::from(trans));
            launch(&device, &Launch::new("probe_matrices", [1, 1], 32, &params).shared(512)).expect("launch");
            let found = out.read::<u16>(0, 256).expect("read");
            for (at, found) in found.into_iter().enumerate() {
                let (lane, matrix, i) = (at / 8, at / 2 % 4, at % 2);
                let (along, across) = (lane / 4, lane % 4 * 2 + i);
                let (row, column) = if trans { (across, along) } else { (along, across) };
                assert_eq!(usize::from(found), matrix * 64 + row * 8 + column, "lane {lane}, register {matrix}");
            }
        }
    });
}

#[test]
fn products_through_shared_memory_are_those_of_the_matrices() {
    sanitised(|| {
        for (kernel, element) in [("probe_mma_bf16", Element::Bf16), ("probe_mma_f16", Element::F16)] {
            let (found, expected) = multiply(kernel, element);
            assert_eq!(found, expected, "{kernel}");
        }
    });
}

#[test]
fn a_forgotten_wait_gives_poison() {
    sanitised(|| {
        let (found, _) = multiply("probe_forgotten_wait", Element::Bf16);
        assert!(found.iter().all(|x| x.is_nan()), "{found:?}");
    });
}

#[test]
fn ldmatrix_has_what_was_written_before_a_barrier_only() {
    sanitised(|| {
        let device = probe();
        for synced in [true, false] {
            let out = Memory::new(&device, 512).expect("memory");
            let params = numbers(&out, &out, u32::from(synced));
            let launched = launch(&device, &Launch::new("probe_rows", [1, 1], 32, &params).shared(512));
            if notices_races() {
                assert_eq!(launched.is_ok(), synced, "{launched:?}");
                continue;
            }
            launched.expect("launch");
            let found = out.read::<u32>(0, 128).expect("read");
            // Lane l of matrix m has word l % 4 of the row that lane 8 m + l / 4 names.
            let expected: Vec<u32> = (0..128).map(|i| (31 - (i / 32 * 8 + i % 32 / 4)) * 4 + i % 4).collect();
            if synced {
                assert_eq!(found, expected);
            } else {
                assert!(found.contains(&u32::MAX), "every lane found its row complete: {found:?}");
            }
        }
    });
}

#[test]
fn a_wait_leaves_the_last_groups_pending() {
    sanitised(|| {
        let device = probe();
        let values: Vec<u32> = (1..=12).collect();
        let input = Memory::holding(&device, &values).expect("memory");
        for pending in 0..3 {
            let out = Memory::new(&device, 48).expect("memory");
            launch(&device, &Launch::new("probe_groups", [1, 1], 32, &numbers(&input, &out, pending)).shared(48))
                .expect("launch");
            // Of the second group only six bytes are asked for: zeros follow.
            let mut expected = vec![1, 2, 3, 4, 5, 6, 0, 0, 9, 10, 11, 12];
            expected[12 - 4 * pending as usize..].fill(u32::MAX);
            assert_eq!(out.read::<u32>(0, 12).expect("read"), expected, "{pending} pending");
        }
    });
}

/// Runs one of the things that must not be done, and says what the device said.
fn wrong(which: u32) -> String {
    let device = probe();
    let input = Memory::holding(&device, &[0_u32; 128]).expect("memory");
    let out = Memory::new(&device, 512).expect("memory");
    let outcome = launch(&device, &Launch::new("probe_wrong", [2, 1], 128, &numbers(&input, &out, which)).shared(1024));
    // The device goes on working.
    launch(&device, &Launch::new("probe_increment", [2, 1], 64, &numbers(&input, &out, 128))).expect("a launch after");
    assert_eq!(out.read::<u32>(0, 128).expect("read"), [1; 128]);
    outcome.expect_err("this must be refused").to_string()
}

#[test]
fn what_a_gpu_leaves_undefined_is_an_error() {
    sanitised(|| {
        for (which, expected) in [
            (0, "1 of 128 threads have ended, but thread 0 waits at __syncthreads (emulator_probe.cu:"),
            (1, "while others wait at __syncthreads"),
            (2, "with mask aaaaaaaa, which is not full"),
            (3, "is at "),
            (4, "96 of 128 threads have ended, but thread 0 waits at __syncwarp"),
            (5, "ldmatrix_x4 (emulator_probe.cu:"),
            (6, "not aligned to 16 bytes"),
            (7, "to what is not shared memory"),
            (8, "__trap"),
            (9, "wrote 1 bytes before its shared memory"),
        ] {
            let message = wrong(which);
            assert!(message.contains(expected), "{which}: {message}");
        }
    });
}

#[test]
fn shared_memory_and_allocations_hold_nan_at_first() {
    sanitised(|| {
        let device = probe();
        let out = Memory::new(&device, 512).expect("memory");
        assert!(out.read::<f32>(0, 128).expect("read").iter().all(|x| x.is_nan()));
        for _ in 0..2 {
            launch(&device, &Launch::new("probe_wrong", [1, 1], 128, &numbers(&out, &out, 10)).shared(512))
                .expect("launch");
            assert!(out.read::<f32>(0, 128).expect("read").iter().all(|x| x.is_nan()));
        }
    });
}

#[test]
fn a_store_behind_shared_memory_ends_the_process() {
    sanitised_fails(MEMORY, "heap-buffer-overflow", || {
        wrong(11);
    });
}

#[test]
fn a_store_behind_an_allocation_ends_the_process() {
    sanitised_fails(MEMORY, "heap-buffer-overflow", || {
        wrong(12);
    });
}

#[test]
fn a_load_from_an_odd_address_is_an_error() {
    sanitised(|| {
        if notices_races() {
            let message = wrong(13);
            assert!(message.contains("reads 4 bytes at emulator_probe.cu:"), "{message}");
        }
    });
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Conversions {
    input: Address,
    bf16s: Address,
    f16s: Address,
    from_bf16: Address,
    from_f16: Address,
    count: u32,
    unused: u32,
}

#[test]
fn conversions_round_as_the_cpu_does() {
    sanitised(|| {
        let device = probe();
        let mut rng = StdRng::seed_from_u64(3);
        // Every sign and exponent, with fractions near where rounding turns and in between; any bits; and all of half precision.
        let mut values = Vec::new();
        for top in 0..512_u32 {
            for fraction in [0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_ffff] {
                values.push(f32::from_bits(top << 23 | fraction));
                values.push(f32::from_bits(top << 23 | rng.random_range(0..1 << 23)));
            }
        }
        values.extend((0..50_000).map(|_| f32::from_bits(rng.random())));
        values.extend((0..65_536_u32).map(|bits| f16::from_bits(bits as u16).to_f32()));
        let count = values.len();
        let input = Memory::holding(&device, &values).expect("memory");
        let [bf16s, f16s] = [(); 2].map(|()| Memory::new(&device, count * 2).expect("memory"));
        let [from_bf16, from_f16] = [(); 2].map(|()| Memory::new(&device, 65_536 * 4).expect("memory"));
        let params = Conversions {
            input: input.address(),
            bf16s: bf16s.address(),
            f16s: f16s.address(),
            from_bf16: from_bf16.address(),
            from_f16: from_f16.address(),
            count: count as u32,
            unused: 0,
        };
        launch(&device, &Launch::new("probe_convert", [(count as u32).div_ceil(256), 1], 256, &params))
            .expect("launch");
        let bf16s = bf16s.read::<u16>(0, count).expect("read");
        let f16s = f16s.read::<u16>(0, count).expect("read");
        for (i, value) in values.into_iter().enumerate() {
            let clamped = if value.is_nan() { value } else { value.clamp(-65504.0, 65504.0) };
            assert_eq!(bf16s[i], bf16::from_f32(value).to_bits(), "bf16 of {value:e} {:#x}", value.to_bits());
            assert_eq!(f16s[i], f16::from_f32(clamped).to_bits(), "f16 of {value:e} {:#x}", value.to_bits());
        }
        let from_bf16 = from_bf16.read::<u32>(0, 65_536).expect("read");
        let from_f16 = from_f16.read::<u32>(0, 65_536).expect("read");
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits).to_f32(), f16::from_bits(bits).to_f32());
            // A kernel's bf16 is shifted up, signalling NaN too.
            assert_eq!(from_bf16[usize::from(bits)], u32::from(bits) << 16);
            assert!(b.is_nan() || b.to_bits() == u32::from(bits) << 16);
            assert_eq!(from_f16[usize::from(bits)], h.to_bits(), "f16 {bits:#x}");
        }
    });
}

#[test]
fn products_are_sums_over_ascending_k() {
    sanitised(|| {
        let device = probe();
        let mut rng = StdRng::seed_from_u64(4);
        let (rows, inputs, outputs) = (3, 37, 5);
        let mut some = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (x, w) = (some(rows * inputs), some(outputs * inputs));
        let sums: Vec<f32> = (0..rows * outputs)
            .map(|i| (0..inputs).fold(0.0, |sum, k| sum + x[i / outputs * inputs + k] * w[i % outputs * inputs + k]))
            .collect();
        let x = Memory::holding(&device, &x).expect("memory");
        let w = Memory::holding(&device, &w).expect("memory");
        let out = Memory::new(&device, rows * outputs * 4).expect("memory");
        let gemm = Gemm {
            rows,
            inputs,
            outputs,
            element: Element::F32,
            out_element: Element::F32,
            x: x.address(),
            w: w.address(),
            out: out.address(),
        };
        // SAFETY: the memory just allocated for it.
        unsafe { device.gemm(Stream::Compute, &gemm) }.expect("gemm");
        assert_eq!(out.read::<f32>(0, rows * outputs).expect("read"), sums);
        let rounded = Gemm { out_element: Element::Bf16, ..gemm };
        // SAFETY: the same memory, half of it.
        unsafe { device.gemm(Stream::Compute, &rounded) }.expect("gemm");
        let expected: Vec<u16> = sums.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
        assert_eq!(out.read::<u16>(0, rows * outputs).expect("read"), expected);
        let beyond = Gemm { rows: rows + 1, ..gemm };
        // SAFETY: refused, as x is too small.
        let refused = unsafe { device.gemm(Stream::Compute, &beyond) };
        assert!(refused.expect_err("x has too few rows").to_string().contains("not inside an allocation"));
    });
}

#[test]
fn a_recorded_graph_runs_when_it_is_replayed() {
    sanitised(|| {
        let device = probe();
        let mut memory = Memory::holding(&device, &[0_u32; 100]).expect("memory");
        let params = numbers(&memory, &memory, 100);
        let increment = Launch::new("probe_increment", [2, 1], 64, &params);
        let graph = device
            .capture(&mut || {
                launch(&device, &increment)?;
                launch(&device, &increment)?;
                assert!(device.synchronise().is_err(), "there is nothing to wait for");
                assert!(memory.read::<u32>(0, 1).is_err(), "reads are refused");
                memory.write(0, &[1_u32]).expect_err("writes are refused");
                Ok(())
            })
            .expect("capture");
        assert_eq!(graph.len(), 2);
        assert_eq!(memory.read::<u32>(0, 100).expect("read"), [0; 100], "nothing has run yet");
        for _ in 0..3 {
            // SAFETY: what it was recorded with is still allocated.
            unsafe { device.replay(&graph) }.expect("replay");
        }
        assert_eq!(memory.read::<u32>(0, 100).expect("read"), [6; 100]);
        // One that fails leaves the device as it was.
        assert!(device.capture(&mut || launch(&device, &Launch::new("no_such_kernel", [1, 1], 32, &0_u32))).is_err());
        launch(&device, &increment).expect("launch");
        assert_eq!(memory.read::<u32>(0, 100).expect("read"), [7; 100]);
    });
}

#[test]
fn a_launch_that_a_gpu_refuses_is_refused() {
    sanitised(|| {
        let device = probe();
        let memory = Memory::new(&device, 64).expect("memory");
        let params = numbers(&memory, &memory, 0);
        let refused = |wrong: Launch<'_>| launch(&device, &wrong).expect_err("a wrong launch").to_string();
        let increment = Launch::new("probe_increment", [1, 1], 64, &params);
        assert!(refused(Launch { threads: 96, ..increment }).contains("threads of a block: 96, expected 64"));
        assert!(refused(Launch { threads: 33, ..increment }).contains("33 threads"));
        assert!(refused(Launch { grid: [0, 1], ..increment }).contains("a grid of [0, 1]"));
        assert!(refused(increment.shared(228 << 10)).contains("shared memory"));
        assert!(refused(Launch { params: &[0; 23], ..increment }).contains("bytes of the argument: 23, expected 24"));
        assert!(refused(Launch { kernel: "nothing", ..increment }).contains("no kernel has this name"));
        // SAFETY: refused, as the allocation is shorter.
        let beyond = unsafe { device.write(Stream::Compute, memory.address().plus(60), &[0; 5]) };
        assert!(beyond.expect_err("beyond the end").to_string().contains("not inside an allocation"));
    });
}

#[test]
fn the_products_kernels_are_all_loaded() {
    sanitised(|| {
        for multiprocessors in [1, 7, 132] {
            assert_eq!(emulated_with(multiprocessors).properties().multiprocessors, multiprocessors);
        }
        let device = emulated();
        assert_eq!(device.properties().multiprocessors, 7);
        let memory = Memory::new(&device, 64).expect("memory");
        let free = device.memory_free().expect("memory");
        assert!(matches!(Memory::new(&device, free + 1), Err(KernelError::OutOfMemory { .. })));
        drop(memory);
        assert_eq!(device.memory_free().expect("memory"), free + 64);
    });
}

#[test]
fn copies_are_late_unless_something_waits_for_them() {
    sanitised(|| {
        let device = probe();
        let memory = Memory::holding(&device, &[0_u32; 4]).expect("memory");
        let seen = || memory.read::<u32>(0, 4).expect("read");
        let copy = |at: usize, value: u32| {
            // SAFETY: within the allocation.
            unsafe { device.write(Stream::Copy, memory.address().plus(at * 4), bytemuck::bytes_of(&value)) }
                .expect("write");
        };
        copy(0, 1);
        copy(1, 2);
        let event = device.record(Stream::Copy).expect("record");
        copy(2, 3);
        assert_eq!(seen(), [0; 4], "nothing has waited");
        let other = device.record(Stream::Compute).expect("record");
        device.wait(Stream::Copy, &other).expect("wait");
        assert_eq!(seen(), [0; 4], "the other way round");
        device.wait(Stream::Compute, &event).expect("wait");
        assert_eq!(seen(), [1, 2, 0, 0], "up to the event");
        device.wait(Stream::Compute, &event).expect("wait");
        assert_eq!(seen(), [1, 2, 0, 0], "it has been passed");
        device.synchronise().expect("synchronise");
        assert_eq!(seen(), [1, 2, 3, 0]);
        copy(3, 4);
        // SAFETY: within the allocation.
        unsafe { device.read(Stream::Copy, memory.address(), &mut [0; 4]) }.expect("read");
        assert_eq!(seen(), [1, 2, 3, 4], "a read of that stream waits for it");
        copy(3, 5);
        let late = device.record(Stream::Copy).expect("record");
        device.wait(Stream::Compute, &late).expect("wait");
        assert_eq!(seen(), [1, 2, 3, 5]);
    });
}
