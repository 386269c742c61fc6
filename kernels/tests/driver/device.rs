//! The driver's part of a device, against a stand-in (`fake.rs`). What does not ask the stand-in runs on a real GPU too:
//! `cargo nextest run -p openlora-kernels --test driver --run-ignored only on_a_gpu`, a process for each test.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};

use bytemuck::{NoUninit, Pod, Zeroable};
use half::bf16;
use openlora_kernels::KernelError;
use openlora_kernels::cuda::device::{Address, Device, Element, Gemm, Launch, Memory, Stream};
use openlora_kernels::cuda::driver::{CudaLanding, Driver, Options, Products};

use super::fake::{Fake, open};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Add {
    out: Address,
    count: u32,
    value: u32,
}

/// Adds `value` to the first `count` numbers at `out`.
fn add(driver: &Driver, stream: Stream, out: Address, count: u32, value: u32) -> Result<(), KernelError> {
    let params = Add { out, count, value };
    // SAFETY: tests keep the memory until they have read it; the kernel writes `count` numbers.
    unsafe { driver.launch(stream, &Launch::new("add", [count.div_ceil(128), 1], 128, &params)) }
}

fn write<T: NoUninit>(driver: &Driver, stream: Stream, to: Address, values: &[T]) -> Result<(), KernelError> {
    // SAFETY: tests write within their own allocations.
    unsafe { driver.write(stream, to, bytemuck::cast_slice(values)) }
}

fn read<T: Pod>(driver: &Driver, stream: Stream, from: Address, count: usize) -> Result<Vec<T>, KernelError> {
    let mut values = vec![T::zeroed(); count];
    // SAFETY: tests read within their own allocations.
    unsafe { driver.read(stream, from, bytemuck::cast_slice_mut(&mut values)) }.map(|()| values)
}

/// Numbers that differ from place to place.
fn numbers(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed)).collect()
}

fn text(error: KernelError) -> String {
    error.to_string()
}

// What holds on a GPU and on the stand-in.

fn bytes_come_back(driver: &Arc<Driver>) {
    // The last is more than twice what is pinned, and no multiple of anything.
    for (count, stream) in [(1, Stream::Compute), (1 << 20, Stream::Copy), (9_000_001, Stream::Compute)] {
        let memory = Memory::new(driver, count * 4).unwrap();
        let mut values = numbers(count, 7);
        write(driver, stream, memory.address(), &values).unwrap();
        let expected = values.clone();
        values.fill(0);
        assert!(read::<u32>(driver, stream, memory.address(), count).unwrap() == expected, "{count} numbers");
    }
    // Many small ones, each to its own place.
    let memory = Memory::new(driver, 40_000 * 4).unwrap();
    let values = numbers(40_000, 9);
    for (number, value) in values.iter().enumerate() {
        write(driver, Stream::Compute, memory.address().plus(number * 4), &[*value]).unwrap();
    }
    assert!(read::<u32>(driver, Stream::Compute, memory.address(), 40_000).unwrap() == values);
    // SAFETY: within the allocation.
    unsafe { driver.zero(Stream::Compute, memory.address().plus(4), 39_998 * 4).unwrap() };
    let left: Vec<u32> = read(driver, Stream::Compute, memory.address(), 40_000).unwrap();
    assert_eq!((left[0], left[39_999]), (values[0], values[39_999]));
    assert!(left[1..39_999].iter().all(|value| *value == 0));
}

fn kernels_run_in_order(driver: &Arc<Driver>) {
    let mut memory = Memory::holding(driver, &numbers(1000, 0)).unwrap();
    add(driver, Stream::Compute, memory.address(), 1000, 3).unwrap();
    add(driver, Stream::Compute, memory.address(), 10, 4).unwrap();
    let found: Vec<u32> = memory.read(0, 1000).unwrap();
    assert_eq!(found[..10], numbers(10, 7));
    assert_eq!(found[10..], numbers(1000, 3)[10..]);
    memory.write(0, &[1_u32]).unwrap();
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [1]);

    let params = Add { out: memory.address(), count: 1, value: 1 };
    // SAFETY: none of these is launched.
    let refused = |launch: &Launch<'_>| text(unsafe { driver.launch(Stream::Compute, launch) }.unwrap_err());
    let error = refused(&Launch::new("missing", [1, 1], 128, &params));
    assert_eq!(error, "cuda:0: launching missing: no kernel of this name was compiled");
    let error = refused(&Launch { params: &[0; 12], ..Launch::new("add", [1, 1], 128, &params) });
    assert_eq!(error, "cuda:0: launching add: its argument has 16 bytes, not 12");
    let error = refused(&Launch::new("add", [1, 1], 128, &params).shared(1 << 20));
    assert!(error.contains("launching add (128 x 1 x 1 threads, 1048576 bytes shared)"), "{error}");
    // Nothing of that is for ever.
    let most = driver.properties().shared_bytes_max;
    // SAFETY: as in `add`.
    unsafe { driver.launch(Stream::Compute, &Launch::new("add", [1, 1], 128, &params).shared(most - 1024)).unwrap() };
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [2]);
}

fn streams_wait_for_each_other(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &[0_u32]).unwrap();
    driver.synchronise().unwrap();
    for round in 1..300 {
        write(driver, Stream::Copy, memory.address(), &[round]).unwrap();
        let copied = driver.record(Stream::Copy).unwrap();
        driver.wait(Stream::Compute, &copied).unwrap();
        add(driver, Stream::Compute, memory.address(), 1, 1000).unwrap();
        let added = driver.record(Stream::Compute).unwrap();
        driver.wait(Stream::Copy, &added).unwrap();
        drop((copied, added));
        assert_eq!(read::<u32>(driver, Stream::Copy, memory.address(), 1).unwrap(), [round + 1000]);
    }
}

fn time_passes_between_two_points(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &[0_u32; 256]).unwrap();
    let first = driver.record_timed(Stream::Compute).unwrap();
    add(driver, Stream::Compute, memory.address(), 256, 1).unwrap();
    let second = driver.record_timed(Stream::Compute).unwrap();
    add(driver, Stream::Compute, memory.address(), 256, 1).unwrap();
    add(driver, Stream::Compute, memory.address(), 256, 1).unwrap();
    let third = driver.record_timed(Stream::Compute).unwrap();
    let [whole, one, two] =
        [(&first, &third), (&first, &second), (&second, &third)].map(|(from, to)| driver.elapsed(from, to).unwrap());
    assert!(one > 0.0 && two > 0.0 && (whole - one - two).abs() <= 0.01, "{one} and {two} make {whole} milliseconds");
    // What orders streams keeps no time.
    let untimed = driver.record(Stream::Compute).unwrap();
    let error = text(driver.elapsed(&first, &untimed).unwrap_err());
    assert!(error.ends_with("their time was not kept"), "{error}");
}

/// Enqueues a copy of the first `count` numbers.
fn enqueue_read(
    driver: &Driver,
    memory: &Memory<Driver>,
    count: usize,
    landing: &mut CudaLanding,
) -> Result<(), KernelError> {
    assert!(count * 4 <= memory.bytes());
    // SAFETY: within the allocation, just checked.
    unsafe { driver.enqueue_read(Stream::Compute, memory.address(), count * 4, landing) }
}

fn landed(driver: &Driver, landing: &mut CudaLanding) -> Vec<u32> {
    driver.landed(landing).unwrap().chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
}

fn results_are_as_of_where_they_were_enqueued(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &numbers(1000, 0)).unwrap();
    let mut landings = [driver.landing(4000).unwrap(), driver.landing(4000).unwrap()];
    assert!(driver.landed(&mut landings[0]).unwrap().is_empty(), "nothing was enqueued");
    for round in 0..300 {
        let [older, newer] = &mut landings;
        add(driver, Stream::Compute, memory.address(), 1000, 3).unwrap();
        enqueue_read(driver, &memory, 1000, older).unwrap();
        add(driver, Stream::Compute, memory.address(), 1000, 4).unwrap();
        enqueue_read(driver, &memory, round, newer).unwrap();
        let seed = 7 * round as u32;
        assert_eq!(landed(driver, older), numbers(1000, seed + 3));
        assert_eq!(landed(driver, newer), numbers(round, seed + 7));
        assert_eq!(landed(driver, newer), numbers(round, seed + 7), "it stays");
    }
    // One that nobody waits for is lost in the next, or with its memory.
    let [landing, other] = &mut landings;
    enqueue_read(driver, &memory, 10, landing).unwrap();
    enqueue_read(driver, &memory, 5, landing).unwrap();
    assert_eq!(landed(driver, landing), numbers(5, 2100));
    enqueue_read(driver, &memory, 10, other).unwrap();
    drop(landings);

    let mut small = driver.landing(4).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| enqueue_read(driver, &memory, 2, &mut small))).is_err(), "no room");
    driver
        .capture(&mut || {
            let not = |outcome: Result<(), KernelError>| {
                let error = text(outcome.unwrap_err());
                assert!(error.ends_with("not while steps are recorded"), "{error}");
            };
            not(enqueue_read(driver, &memory, 1, &mut small));
            not(driver.landed(&mut small).map(drop));
            not(driver.landing(4).map(drop));
            Ok(())
        })
        .unwrap();
}

fn recorded_steps_are_replayed(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &[0_u32; 300]).unwrap();
    let (x, w) = (Memory::holding(driver, &[1.0_f32, 2.0]).unwrap(), Memory::holding(driver, &[3.0_f32, 4.0]).unwrap());
    let out = Memory::holding(driver, &[0.0_f32]).unwrap();
    let gemm = product([1, 2, 1], Element::F32, [&x, &w, &out]);
    let given_back = Memory::<Driver>::new(driver, 256).unwrap();
    let mut given_back = Some(given_back);
    let graph = driver
        .capture(&mut || {
            let not = |outcome: Result<(), KernelError>| {
                let error = text(outcome.unwrap_err());
                assert!(error.ends_with("not while steps are recorded"), "{error}");
            };
            for stream in [Stream::Compute, Stream::Copy] {
                not(write(driver, stream, memory.address(), &[1_u32]));
                not(read::<u32>(driver, stream, memory.address(), 1).map(drop));
                not(driver.record(stream).map(drop));
            }
            not(driver.synchronise());
            not(driver.allocate(256).map(drop));
            assert!(text(driver.capture(&mut || Ok(())).unwrap_err()).ends_with("recorded already"));
            given_back = None;
            // Other threads go on with the other stream.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let other = Memory::<Driver>::new(driver, 4).unwrap();
                    write(driver, Stream::Copy, other.address(), &[5_u32]).unwrap();
                    assert_eq!(read::<u32>(driver, Stream::Copy, other.address(), 1).unwrap(), [5]);
                });
            });
            // SAFETY: within the allocation, which outlives the graph.
            unsafe { driver.zero(Stream::Compute, memory.address(), 4)? };
            add(driver, Stream::Compute, memory.address(), 300, 2)?;
            // SAFETY: as above.
            unsafe { driver.gemm(Stream::Compute, &gemm)? };
            add(driver, Stream::Compute, memory.address(), 1, 5)
        })
        .unwrap();
    assert_eq!(memory.read::<u32>(0, 300).unwrap(), [0; 300]);
    for round in 1..4 {
        // SAFETY: as above.
        unsafe { driver.replay(&graph).unwrap() };
        let found: Vec<u32> = memory.read(0, 300).unwrap();
        assert_eq!((found[0], found[1], found[299]), (7, 2 * round, 2 * round));
        assert_eq!(out.read::<f32>(0, 1).unwrap(), [11.0]);
    }
}

fn what_other_threads_do_is_no_part_of_a_recording(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &[0_u32]).unwrap();
    let other = Memory::holding(driver, &[0_u32]).unwrap();
    let (begun, begins) = mpsc::channel();
    let graph = std::thread::scope(|scope| {
        let mut theirs = None;
        let graph = driver.capture(&mut || {
            let (begun, other) = (begun.clone(), &other);
            theirs = Some(scope.spawn(move || {
                begun.send(()).unwrap();
                // As when an adapter is dropped, another is loaded and a third thread computes.
                let event = driver.record(Stream::Compute).unwrap();
                driver.wait(Stream::Copy, &event).unwrap();
                write(driver, Stream::Copy, other.address(), &[5_u32]).unwrap();
                driver.wait(Stream::Compute, &driver.record(Stream::Copy).unwrap()).unwrap();
                add(driver, Stream::Compute, other.address(), 1, 1).unwrap();
                driver.synchronise().unwrap();
                read::<u32>(driver, Stream::Compute, other.address(), 1).unwrap()
            }));
            begins.recv().unwrap();
            for _ in 0..100 {
                add(driver, Stream::Compute, memory.address(), 1, 1)?;
            }
            assert!(!theirs.as_ref().unwrap().is_finished(), "they wait for their turn");
            Ok(())
        });
        assert_eq!(theirs.unwrap().join().unwrap(), [6]);
        graph.unwrap()
    });
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [0]);
    // SAFETY: the memory outlives the graph.
    unsafe { driver.replay(&graph).unwrap() };
    assert_eq!((memory.read::<u32>(0, 1).unwrap(), other.read::<u32>(0, 1).unwrap()), (vec![100], vec![6]));
}

fn a_recording_that_fails_leaves_nothing(driver: &Arc<Driver>) {
    let memory = Memory::holding(driver, &[0_u32]).unwrap();
    let mut fail = || {
        add(driver, Stream::Compute, memory.address(), 1, 1)?;
        Err(KernelError::ThreadPanicked("here".into()))
    };
    assert_eq!(text(driver.capture(&mut fail).unwrap_err()), "a kernel thread panicked: here");
    let mut panic = || {
        add(driver, Stream::Compute, memory.address(), 1, 1)?;
        panic!("there")
    };
    assert!(catch_unwind(AssertUnwindSafe(|| driver.capture(&mut panic))).is_err());
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [0]);
    let graph = driver.capture(&mut || add(driver, Stream::Compute, memory.address(), 1, 1)).unwrap();
    // SAFETY: the memory outlives the graph.
    unsafe { driver.replay(&graph).unwrap() };
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [1]);
}

/// A product of `[rows, inputs, outputs]` with f32 results.
fn product(shape: [usize; 3], element: Element, matrices: [&Memory<Driver>; 3]) -> Gemm {
    let [rows, inputs, outputs] = shape;
    let [x, w, out] = matrices.map(Memory::address);
    Gemm { rows, inputs, outputs, element, out_element: Element::F32, x, w, out }
}

/// Memory that holds the values as `element`, and the values as they are there.
fn holding(driver: &Arc<Driver>, element: Element, count: usize, seed: u32) -> (Memory<Driver>, Vec<f32>) {
    let values = numbers(count, seed).into_iter().map(|bits| (bits >> 8) as f32 / (1 << 23) as f32 - 1.0);
    if element == Element::F32 {
        let values: Vec<f32> = values.collect();
        return (Memory::holding(driver, &values).unwrap(), values);
    }
    let values: Vec<bf16> = values.map(bf16::from_f32).collect();
    let bits: Vec<u16> = values.iter().map(|value| value.to_bits()).collect();
    (Memory::holding(driver, &bits).unwrap(), values.into_iter().map(bf16::to_f32).collect())
}

fn products_are_right(driver: &Arc<Driver>) {
    for (element, shape) in [
        (Element::F32, [7, 20, 33]),
        (Element::Bf16, [7, 64, 40]),
        (Element::Bf16, [70, 70, 20]),
        (Element::F32, [1, 1, 1]),
        (Element::Bf16, [300, 16, 8]),
    ] {
        let [rows, inputs, outputs] = shape;
        let (x, x_values) = holding(driver, element, rows * inputs, 1);
        let (w, w_values) = holding(driver, element, outputs * inputs, 2);
        let out = Memory::holding(driver, &vec![f32::NAN; rows * outputs]).unwrap();
        // SAFETY: three matrices with room.
        unsafe { driver.gemm(Stream::Compute, &product(shape, element, [&x, &w, &out])).unwrap() };
        let found: Vec<f32> = out.read(0, rows * outputs).unwrap();
        for (row, x) in x_values.chunks(inputs).enumerate() {
            for (output, w) in w_values.chunks(inputs).enumerate() {
                let expected: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let scale: f64 = x.iter().zip(w).map(|(x, w)| f64::from((x * w).abs())).sum();
                let error = (f64::from(found[row * outputs + output]) - expected).abs();
                // f32 sums of exact products; TF32 would be off by 1e-3.
                assert!(error <= 1e-6 * scale + 1e-30, "{element:?} {shape:?} at {row}, {output}: {error}");
            }
        }
    }
    let empty = Memory::<Driver>::new(driver, 4).unwrap();
    // SAFETY: nothing is read or written.
    unsafe { driver.gemm(Stream::Compute, &product([0, 8, 8], Element::F32, [&empty; 3])).unwrap() };
}

/// bf16 numbers that repeat after a prime number of them: made fast also where tests are not optimised.
fn repeated(driver: &Arc<Driver>, count: usize, seed: u32) -> Memory<Driver> {
    let bits: Vec<u16> = numbers(100_003, seed)
        .into_iter()
        .map(|bits| bf16::from_f32(bits as f32 / (1 << 31) as f32 - 1.0).to_bits())
        .collect();
    let memory = Memory::<Driver>::new(driver, count * 2).unwrap();
    for start in (0..count).step_by(bits.len()) {
        let some = &bits[..bits.len().min(count - start)];
        write(driver, Stream::Compute, memory.address().plus(start * 2), some).unwrap();
    }
    memory
}

/// The bits of a row are the same alone and in any number of rows of its class.
fn rows_keep_their_bits(driver: &Arc<Driver>, shapes: &[[usize; 2]], classes: &[&[usize]]) {
    for [inputs, outputs] in shapes.iter().copied() {
        let rows_max = classes.iter().flat_map(|class| class.iter()).copied().max().unwrap();
        let (w, x) = (repeated(driver, outputs * inputs, 3), repeated(driver, rows_max * inputs, 4));
        let out = Memory::<Driver>::new(driver, rows_max * outputs * 4).unwrap();
        for class in classes {
            let mut first: Option<Vec<u32>> = None;
            for rows in class.iter().copied() {
                // SAFETY: three matrices with room.
                unsafe {
                    let gemm = product([rows, inputs, outputs], Element::Bf16, [&x, &w, &out]);
                    driver.gemm(Stream::Compute, &gemm).unwrap();
                }
                let found: Vec<u32> = out.read(0, rows * outputs).unwrap();
                let first = first.get_or_insert_with(|| found.clone());
                let common = first.len().min(found.len());
                assert!(first[..common] == found[..common], "{rows} rows of {inputs} x {outputs}");
            }
        }
    }
}

const CLASSES: [&[usize]; 3] = [&[1, 64, 33, 7, 2], &[65, 256, 133], &[257, 1000, 2048]];

// On the stand-in.

macro_rules! stand_in {
    ($($body:ident;)*) => {$(
        #[test]
        fn $body() {
            let fake = Fake::new();
            super::$body(&fake.open().unwrap());
            assert_eq!(fake.live(), []);
        }
    )*};
}

mod with_a_stand_in {
    use super::*;

    stand_in! {
        bytes_come_back;
        kernels_run_in_order;
        streams_wait_for_each_other;
        time_passes_between_two_points;
        results_are_as_of_where_they_were_enqueued;
        recorded_steps_are_replayed;
        what_other_threads_do_is_no_part_of_a_recording;
        a_recording_that_fails_leaves_nothing;
        products_are_right;
    }
}

/// `cargo nextest run -p openlora-kernels --test driver --run-ignored only on_a_gpu`
mod on_a_gpu {
    use super::*;

    fn device() -> Arc<Driver> {
        open(&Options::default()).unwrap()
    }

    macro_rules! gpu {
        ($($body:ident;)*) => {$(
            #[test]
            #[ignore = "needs a GPU"]
            fn $body() {
                super::$body(&device());
            }
        )*};
    }

    gpu! {
        bytes_come_back;
        kernels_run_in_order;
        streams_wait_for_each_other;
        time_passes_between_two_points;
        results_are_as_of_where_they_were_enqueued;
        recorded_steps_are_replayed;
        what_other_threads_do_is_no_part_of_a_recording;
        a_recording_that_fails_leaves_nothing;
        products_are_right;
    }

    /// Of Llama-3.1-8B: qkv, o, gate and up, down; and one that is small and odd.
    const SHAPES: [[usize; 2]; 5] = [[4096, 6144], [4096, 4096], [4096, 28672], [14336, 4096], [576, 100]];

    #[test]
    #[ignore = "needs a GPU"]
    fn rows_of_a_class_keep_their_bits() {
        rows_keep_their_bits(&device(), &SHAPES, &CLASSES);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn with_one_algorithm_all_rows_keep_their_bits() {
        let products = Products { one_algorithm: true, ..Products::default() };
        let driver = open(&Options { products, ..Options::default() }).unwrap();
        rows_keep_their_bits(&driver, &SHAPES, &[&[1, 64, 7, 65, 256, 257, 2048]]);
    }

    #[test]
    #[ignore = "needs a GPU, and a process of its own"]
    fn an_illegal_address_loses_the_device() {
        let driver = device();
        add(&driver, Stream::Compute, Address(0x100), 1000, 1).unwrap();
        let first = text(driver.synchronise().unwrap_err());
        assert!(first.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{first}");
        for _ in 0..3 {
            assert_eq!(text(driver.allocate(256).unwrap_err()), first);
            assert_eq!(text(driver.synchronise().unwrap_err()), first);
        }
    }
}

#[test]
fn opening_again_and_again_leaves_nothing() {
    let fake = Fake::new();
    for _ in 0..3 {
        let driver = fake.open().unwrap();
        assert_eq!(driver.kernels().collect::<Vec<_>>(), ["add"]);
        let properties = driver.properties();
        assert_eq!((properties.name.as_str(), properties.compute), ("Fake H200", (9, 0)));
        assert_eq!((properties.multiprocessors, properties.shared_bytes_max), (132, 232_448));
        let before = driver.memory_free().unwrap();
        let memory = Memory::<Driver>::new(&driver, 1 << 20).unwrap();
        assert_eq!(driver.memory_free().unwrap(), before - (1 << 20));
        let event = driver.record(Stream::Compute).unwrap();
        let graph = driver.capture(&mut || Ok(())).unwrap();
        write(&driver, Stream::Copy, memory.address(), &[1_u32; 1000]).unwrap();
        // Whatever goes last.
        drop(driver);
        drop((graph, memory, event));
        assert_eq!(fake.live(), []);
    }
}

#[test]
fn whatever_fails_while_opening_is_told_and_leaves_nothing() {
    let opened = Fake::new();
    drop(opened.open().unwrap());
    let steps = [
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuStreamCreate",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuModuleLoadData",
        "cuModuleGetFunctionCount",
        "cuModuleEnumerateFunctions",
        "cuFuncGetName",
        "cuFuncLoad",
        "cuFuncGetParamInfo",
        "cuFuncGetAttribute",
        "cuFuncSetAttribute",
        "cublasLtCreate",
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
    ];
    for step in steps {
        assert!(opened.calls(step) > 0, "{step}");
        // The first time and the second, where there is one: a harmless error, and running out of memory.
        for (after, status) in [(0, 1), (1, 2)] {
            let fake = Fake::new();
            fake.fail(step, status, after);
            match fake.open() {
                Ok(_) => assert!(after > 0, "{step}"),
                Err(KernelError::OutOfMemory { .. }) => assert_eq!(status, 2),
                Err(error) => assert!(text(error).contains(['(']), "{step}"),
            }
            assert_eq!(fake.live(), [], "{step} fails after {after}");
        }
    }
}

#[test]
fn a_driver_or_device_that_does_not_do_is_named() {
    let fake = Fake::new();
    fake.set_version(12_030);
    let error = text(fake.open().unwrap_err());
    assert_eq!(error, "cuda:0: asking the driver's version: it is for CUDA 12.3; 12.4 or newer is needed");
    fake.set_version(13_000);
    let error = text(open(&Options { ordinal: 3, ..fake.options() }).unwrap_err());
    let expected = "cuda:3: looking for the device: CUDA_ERROR_INVALID_DEVICE (101): as told by the driver";
    assert_eq!(error, expected);
    // NVRTC 13 and cuBLASLt 13 make nothing that a driver for 12 runs.
    fake.set_version(12_080);
    let options = fake.options();
    let places =
        openlora_kernels::cuda::Places { nvrtc: None, folders: options.places.folders[..1].to_vec(), ..options.places };
    let error = text(open(&Options { places, ..fake.options() }).unwrap_err());
    assert!(
        error.contains("loading libnvrtc.so.12: libnvrtc.so.12 was not found") && !error.contains(".so.13"),
        "{error}"
    );
}

#[test]
fn writes_return_without_waiting() {
    let fake = Fake::new();
    let driver = fake.open().unwrap();
    let memory = Memory::<Driver>::new(&driver, 1 << 20).unwrap();
    let waits = || fake.calls("cuEventSynchronize") + fake.calls("cuStreamSynchronize");
    let before = waits();
    for _ in 0..15 {
        write(&driver, Stream::Compute, memory.address(), &vec![1_u8; 1 << 20]).unwrap();
    }
    for number in 0..1000 {
        write(&driver, Stream::Compute, memory.address().plus(number), &[1_u8]).unwrap();
    }
    assert_eq!(waits(), before);
    // A ring that is full waits for its oldest copy, not for all.
    for _ in 0..2 {
        write(&driver, Stream::Compute, memory.address(), &vec![1_u8; 1 << 20]).unwrap();
    }
    assert!((1..=2).contains(&(waits() - before)), "{}", waits() - before);
}

#[test]
fn results_are_waited_for_alone_and_take_nothing_from_the_driver() {
    let fake = Fake::new();
    let driver = fake.open().unwrap();
    let memory = Memory::holding(&driver, &[0_u32]).unwrap();
    let mut landings = [driver.landing(4).unwrap(), driver.landing(4).unwrap()];
    let taken = || ["cuMemHostAlloc", "cuMemAlloc_v2", "cuEventCreate"].map(|function| fake.calls(function));
    let whole = || fake.calls("cuStreamSynchronize");
    let mut before = None;
    for round in 0..100 {
        let [older, newer] = &mut landings;
        let base = 30 * round;
        for (landing, value) in [(&mut *older, 10), (newer, 20)] {
            add(&driver, Stream::Compute, memory.address(), 1, value).unwrap();
            enqueue_read(&driver, &memory, 1, landing).unwrap();
        }
        assert_eq!(landed(&driver, older), [base + 10]);
        assert_eq!(fake.number(memory.address()), base + 10, "what was enqueued later has not run");
        assert_eq!(landed(&driver, newer), [base + 30]);
        // The first round's events are there to be used again.
        assert_eq!(*before.get_or_insert((taken(), whole())), (taken(), whole()), "round {round}");
    }
}

#[test]
fn a_lost_device_stays_lost() {
    // What the driver says later, by a call that has nothing to do with the fault.
    for call in [
        "cuLaunchKernel",
        "cuStreamSynchronize",
        "cuEventSynchronize",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuEventRecord",
        "cublasLtMatmul",
    ] {
        let fake = Fake::new();
        let driver = fake.open().unwrap();
        let memory = Memory::holding(&driver, &[0_u32; 4]).unwrap();
        let event = driver.record(Stream::Compute).unwrap();
        let graph = driver.capture(&mut || Ok(())).unwrap();
        let landings = [(); 2].map(|()| RefCell::new(driver.landing(4).unwrap()));
        enqueue_read(&driver, &memory, 1, &mut landings[0].borrow_mut()).unwrap();
        // cuBLASLt's own words for it.
        fake.fail(call, if call == "cublasLtMatmul" { 13 } else { 700 }, 0);
        let gemm = product([1, 1, 1], Element::F32, [&memory; 3]);
        let at = memory.address();
        let calls: [&dyn Fn() -> Result<(), KernelError>; 12] = [
            &|| add(&driver, Stream::Compute, at, 1, 1),
            &|| write(&driver, Stream::Compute, at, &[1_u32]),
            &|| driver.record(Stream::Copy).map(drop),
            // SAFETY: the memory is alive.
            &|| unsafe { driver.gemm(Stream::Compute, &gemm) },
            &|| driver.landed(&mut landings[0].borrow_mut()).map(drop),
            &|| enqueue_read(&driver, &memory, 1, &mut landings[1].borrow_mut()),
            &|| driver.synchronise(),
            &|| read::<u32>(&driver, Stream::Compute, at, 1).map(drop),
            &|| driver.memory_free().map(drop),
            &|| driver.allocate(256).map(drop),
            &|| driver.wait(Stream::Copy, &event),
            // SAFETY: nothing is in the graph.
            &|| unsafe { driver.replay(&graph) },
        ];
        let first = calls.iter().find_map(|call| call().err()).map(text).expect("a fault");
        let expected =
            if call == "cublasLtMatmul" { "EXECUTION_FAILED (13)" } else { "CUDA_ERROR_ILLEGAL_ADDRESS (700)" };
        assert!(first.starts_with("cuda:0: ") && first.contains(expected), "{first}");
        let before = fake.calls("cuCtxSetCurrent");
        for call in calls {
            assert_eq!(text(call().unwrap_err()), first);
        }
        assert!(text(driver.capture(&mut || panic!("recorded")).unwrap_err()) == first);
        // Without asking the driver again.
        assert_eq!(fake.calls("cuCtxSetCurrent"), before);
        drop((landings, graph, event, memory, driver));
    }
}

#[test]
fn harmless_errors_pass() {
    let fake = Fake::new();
    let driver = fake.open().unwrap();
    let memory = Memory::holding(&driver, &[5_u32]).unwrap();
    fake.fail("cuMemcpyHtoDAsync_v2", 1, 0);
    let error = text(write(&driver, Stream::Compute, memory.address(), &[6_u32]).unwrap_err());
    let expected = "cuda:0: writing to the device: CUDA_ERROR_INVALID_VALUE (1): as told by the driver";
    assert_eq!(error, expected);
    let error = driver.allocate(2 << 30).unwrap_err();
    assert!(matches!(error, KernelError::OutOfMemory { bytes: 0x8000_0000, .. }), "{error}");
    fake.fail("cuStreamEndCapture", 901, 0);
    let error = text(driver.capture(&mut || Ok(())).unwrap_err());
    assert!(error.contains("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), "{error}");
    assert_eq!(memory.read::<u32>(0, 1).unwrap(), [5]);
}

#[test]
fn algorithms_are_chosen_once_for_a_class_and_keep_bits() {
    let fake = Fake::new();
    // By their places among the answers: split in f32, plain.
    const SPLIT: i32 = 2;
    const PLAIN: i32 = 5;
    let both = |one_algorithm, split| Products { one_algorithm, split };
    let all = [
        (both(false, true), [SPLIT, SPLIT, PLAIN], [64, 256, 2048]),
        (both(false, false), [PLAIN; 3], [64, 256, 2048]),
    ];
    for (products, algorithms, asked) in all {
        let driver = open(&Options { products, ..fake.options() }).unwrap();
        let before = fake.calls("cublasLtMatmulAlgoGetHeuristic");
        let memory = Memory::holding(&driver, &vec![0.0_f32; 3000]).unwrap();
        for ((class, algorithm), asked) in CLASSES.iter().zip(algorithms).zip(asked) {
            for (number, rows) in class.iter().copied().enumerate() {
                let gemm = product([rows, 1, 1], Element::F32, [&memory; 3]);
                // SAFETY: the memory has room for as many rows.
                unsafe { driver.gemm(Stream::Compute, &gemm).unwrap() };
                assert_eq!(fake.algorithm(), algorithm, "{rows} rows");
                if number == 0 {
                    assert_eq!(fake.asked_rows(), asked);
                }
            }
        }
        assert_eq!(fake.calls("cublasLtMatmulAlgoGetHeuristic") - before, 3);
    }
    let driver = open(&Options { products: both(true, true), ..fake.options() }).unwrap();
    let before = fake.calls("cublasLtMatmulAlgoGetHeuristic");
    rows_keep_their_bits(&driver, &[[16, 5]], &[&[1, 64, 65, 257]]);
    assert_eq!((fake.algorithm(), fake.calls("cublasLtMatmulAlgoGetHeuristic") - before), (PLAIN, 1));
    // Every number of rows is prepared once.
    let memory = Memory::holding(&driver, &vec![0.0_f32; 64]).unwrap();
    let gemm = product([2, 1, 1], Element::F32, [&memory; 3]);
    // SAFETY: the memory has room for as many rows.
    unsafe { driver.gemm(Stream::Compute, &gemm).unwrap() };
    let made = fake.calls("cublasLtMatrixLayoutCreate");
    for _ in 0..10 {
        // SAFETY: as above.
        unsafe { driver.gemm(Stream::Compute, &gemm).unwrap() };
    }
    assert_eq!(fake.calls("cublasLtMatrixLayoutCreate"), made);
    // SAFETY: it is refused.
    let error = text(unsafe { driver.gemm(Stream::Copy, &gemm) }.unwrap_err());
    assert!(error.contains("compute stream only"), "{error}");
}
