//! What works row by row: against the references, in every element, with outputs full of NaN beforehand.

use std::sync::Arc;

use openlora_kernels::cuda::device::{Address, Device, Element, Memory, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::rows::{
    DeviceList, NormWeight, PagePair, Rows, add_bias, add_rms_norm, copy_blocks, embed, gather_rows, swiglu, take_drawn,
};
use openlora_kernels::cuda::step::{StepLimits, StepMemory};
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::{DrawnToken, SequenceRows, StepRows, reference};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{emulated, emulated_with, sanitised};

const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];
const ROWS: [usize; 3] = [1, 7, 133];
const WIDTHS: [usize; 5] = [1, 20, 70, 576, 4096];
/// Rows of a launch beyond those there are.
const SPARE: usize = 3;

fn random(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Every size but the largest in both directions, which would only take time.
fn sizes() -> impl Iterator<Item = (usize, usize)> {
    ROWS.into_iter().flat_map(|rows| WIDTHS.map(|width| (rows, width))).filter(|(rows, width)| rows * width < 100_000)
}

/// How far a result in `element` may be from the exact one, relative to the larger of it and 1.
fn tolerance(element: Element) -> f32 {
    match element {
        Element::F32 => 2e-6,
        Element::Bf16 => 4.1e-3,
        Element::F16 => 5.1e-4,
    }
}

fn tensor(device: &Arc<Emulated>, element: Element, values: &[f32], width: usize) -> CudaTensor<Emulated> {
    CudaTensor::holding(device, element, values, width).expect("memory")
}

/// Values as a tensor of `element` holds them.
fn rounded(device: &Arc<Emulated>, element: Element, values: &[f32], width: usize) -> Vec<f32> {
    tensor(device, element, values, width).values().expect("values")
}

/// `values` and `SPARE` rows more, of numbers from which outputs that are NaN would not stay so.
fn with_spare(values: &[f32], width: usize) -> Vec<f32> {
    values.iter().copied().chain(std::iter::repeat_n(7.0, SPARE * width)).collect()
}

/// A list that names so many rows, as counts do.
fn counted(device: &Arc<Emulated>, rows: usize) -> (DeviceList<Emulated, u32>, Rows) {
    let mut list = DeviceList::new(device, rows + SPARE).expect("memory");
    list.write(&vec![0; rows]).expect("write");
    let rows = list.rows();
    (list, rows)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Fails unless the first values are close and all others are NaN: rows that a step does not have are left alone.
#[track_caller]
fn assert_rows(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close, "{what}: element {i} is {found}, expected {expected}");
    }
    assert!(found.len() > expected.len(), "{what}: no spare rows");
    assert!(found[expected.len()..].iter().all(|value| value.is_nan()), "{what}: rows beyond the count were written");
}

#[test]
fn embedding_reads_the_tokens_rows() {
    sanitised(|| {
        let device = emulated();
        for ((rows, hidden), element) in sizes().flat_map(|size| ELEMENTS.map(|element| (size, element))) {
            let vocab = 37;
            let values = rounded(&device, element, &random(1, vocab * hidden, 2.0), hidden);
            let table = tensor(&device, element, &values, hidden);
            let tokens: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % vocab as u32).collect();
            let step = step_of(&device, &tokens);
            let mut expected = vec![0.0; rows * hidden];
            reference::embed::embed(&values, hidden, &tokens, &mut expected);
            for out_element in [Element::F32, element] {
                let mut out = CudaTensor::new(&device, out_element, rows + SPARE, hidden).expect("memory");
                // SAFETY: the step's memory has room for the rows and lives on.
                unsafe { embed(&*device, Stream::Compute, &step.view(), rows + SPARE, &table, &mut out) }
                    .expect("embedding");
                let what = format!("{element:?} into {out_element:?}, {rows} x {hidden}");
                assert_rows(&out.values().expect("values"), &expected, 0.0, &what);
            }
        }
    });
}

/// A step of these tokens, with room for more.
fn step_of(device: &Arc<Emulated>, tokens: &[u32]) -> StepMemory<Emulated> {
    let limits = StepLimits { rows: tokens.len() + SPARE, table_entries: 1 };
    let mut step = StepMemory::new(device, limits).expect("memory");
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let sequences = [SequenceRows { row: 0, rows: tokens.len(), table: 0, blocks: 0 }];
    step.write(&StepRows { tokens, drawn: &[], positions: &positions, sequences: &sequences, block_tables: &[] }, &[])
        .expect("write");
    step
}

#[test]
fn drawn_rows_take_their_tokens_from_a_sampling_and_others_keep_theirs() {
    sanitised(|| {
        let device = emulated();
        // As many as one block takes, one more, and so on; every other row, in the opposite order of the sampling's.
        for count in [1, 3, 256, 257, 700] {
            let tokens: Vec<u32> = (0..2 * count).map(|row| if row % 2 == 1 { 0 } else { 5_000 + row }).collect();
            let drawn: Vec<_> = (0..count).map(|i| DrawnToken { row: 2 * i + 1, sample: count - 1 - i }).collect();
            let results: Vec<u32> = (0..count).flat_map(|sample| [9_000 + sample, 1, 2, 3]).collect();
            let results = Memory::holding(&device, &results).expect("memory");
            let mut step =
                StepMemory::new(&device, StepLimits { rows: tokens.len(), table_entries: 3 }).expect("memory");
            let sequences = [SequenceRows { row: 0, rows: tokens.len(), table: 0, blocks: 3 }];
            let (positions, block_tables) = (vec![1; tokens.len()], [7, 8, 9]);
            let rows = StepRows {
                tokens: &tokens,
                drawn: &drawn,
                positions: &positions,
                sequences: &sequences,
                block_tables: &block_tables,
            };
            step.write(&rows, &[]).expect("write");
            // SAFETY: there is a result for each sample named.
            unsafe { take_drawn(&*device, Stream::Compute, &step, results.address()) }.expect("launch");
            let read = |at: Address, count: usize| {
                let mut found = vec![0_u32; count];
                // SAFETY: the step has so many.
                unsafe { device.read(Stream::Compute, at, bytemuck::cast_slice_mut(&mut found)) }.expect("read");
                found
            };
            let token = |row: u32| if row % 2 == 1 { 9_000 + count - 1 - row / 2 } else { 5_000 + row };
            assert_eq!(read(step.view().tokens, tokens.len()), (0..2 * count).map(token).collect::<Vec<_>>());
            assert_eq!(read(step.view().block_tables, 3), block_tables);
        }
    });
}

fn write_drawn(drawn: &[DrawnToken]) {
    let mut step = StepMemory::new(&emulated(), StepLimits { rows: 4, table_entries: 1 }).expect("memory");
    let rows = StepRows { tokens: &[0; 3], drawn, positions: &[0; 3], sequences: &[], block_tables: &[] };
    step.write(&rows, &[]).expect("write");
}

#[test]
#[should_panic(expected = "drawn rows of 3")]
fn a_drawn_row_that_the_step_does_not_have_is_refused() {
    write_drawn(&[DrawnToken { row: 3, sample: 0 }]);
}

#[test]
#[should_panic(expected = "drawn rows of 3")]
fn drawn_rows_out_of_order_are_refused() {
    write_drawn(&[DrawnToken { row: 1, sample: 0 }, DrawnToken { row: 1, sample: 2 }]);
}

#[test]
fn a_token_that_the_table_does_not_have_gives_nan() {
    sanitised(|| {
        let device = emulated();
        for (hidden, element) in [(20, Element::F32), (16, Element::Bf16)] {
            let table = tensor(&device, element, &random(2, 5 * hidden, 1.0), hidden);
            let step = step_of(&device, &[4, 5, u32::MAX, 0]);
            let mut out = tensor(&device, Element::F32, &vec![0.0; 4 * hidden], hidden);
            // SAFETY: the step's memory has room for the rows and lives on.
            unsafe { embed(&*device, Stream::Compute, &step.view(), 4, &table, &mut out) }.expect("embedding");
            let nan: Vec<bool> =
                out.values().expect("values").chunks(hidden).map(|row| row.iter().all(|x| x.is_nan())).collect();
            assert_eq!(nan, [false, true, true, false]);
        }
    });
}

#[test]
fn rms_norm_matches_its_reference_at_every_width() {
    sanitised(|| {
        let device = emulated();
        // The last is wider than what the threads keep in registers, in one-number packs as well.
        let wide = [(2, 8_192), (2, 16_400), (2, 4_098)];
        for ((rows, width), element) in sizes().chain(wide).flat_map(|size| ELEMENTS.map(|element| (size, element))) {
            let x = random(3, rows * width, 3.0);
            let delta = rounded(&device, element, &random(4, rows * width, 3.0), width);
            let weight = random(5, width, 2.0);
            for delta in [None, Some(&delta)] {
                let (mut sums, mut expected) = (x.clone(), vec![0.0; x.len()]);
                reference::norm::add_rms_norm(&mut sums, delta.map(Vec::as_slice), &weight, 1e-5, &mut expected);
                let (_list, counted) = counted(&device, rows);
                let mut residual = tensor(&device, Element::F32, &with_spare(&x, width), width);
                let delta = delta.map(|delta| tensor(&device, element, &with_spare(delta, width), width));
                let mut out = CudaTensor::new(&device, element, rows + SPARE, width).expect("memory");
                let weight = Memory::holding(&device, &weight).expect("memory");
                let norm = NormWeight { weight: &weight, eps: 1e-5 };
                // SAFETY: the list with the count lives on.
                unsafe {
                    add_rms_norm(&*device, Stream::Compute, counted, &mut residual, delta.as_ref(), &norm, &mut out)
                }
                .expect("norm");
                let what = format!("{element:?} {rows} x {width}, addend {}", delta.is_some());
                let found = residual.values().expect("values");
                assert_eq!(bits(&found[..sums.len()]), bits(&sums), "{what}: the residual is a plain sum");
                assert!(found[sums.len()..].iter().all(|value| *value == 7.0), "{what}: residual beyond the count");
                assert_rows(&out.values().expect("values"), &expected, tolerance(element), &what);
            }
        }
    });
}

#[test]
fn swiglu_matches_its_reference_at_every_width() {
    sanitised(|| {
        let device = emulated();
        for ((rows, width), element) in sizes().flat_map(|size| ELEMENTS.map(|element| (size, element))) {
            let mut gate_up = random(6, rows * 2 * width, 20.0);
            (gate_up[0], gate_up[width]) = (-200.0, 3.0);
            let gate_up = rounded(&device, element, &gate_up, 2 * width);
            let mut expected = vec![0.0; rows * width];
            reference::swiglu::swiglu(&gate_up, width, &mut expected);
            let (_list, counted) = counted(&device, rows);
            let gate_up = tensor(&device, element, &with_spare(&gate_up, 2 * width), 2 * width);
            let mut out = CudaTensor::new(&device, element, rows + SPARE, width).expect("memory");
            // SAFETY: the list with the count lives on.
            unsafe { swiglu(&*device, Stream::Compute, counted, &gate_up, &mut out) }.expect("swiglu");
            let what = format!("{element:?} {rows} x {width}");
            assert_rows(&out.values().expect("values"), &expected, tolerance(element), &what);
        }
    });
}

#[test]
fn a_bias_is_added_to_every_row_there_is() {
    sanitised(|| {
        let device = emulated();
        for ((rows, width), element) in sizes().flat_map(|size| ELEMENTS.map(|element| (size, element))) {
            let x = rounded(&device, element, &random(7, rows * width, 4.0), width);
            let bias = random(8, width, 4.0);
            let sums: Vec<f32> = x.iter().zip(bias.iter().cycle()).map(|(x, bias)| x + bias).collect();
            let expected = rounded(&device, element, &sums, width);
            let (_list, counted) = counted(&device, rows);
            let mut out = tensor(&device, element, &with_spare(&x, width), width);
            let bias = Memory::holding(&device, &bias).expect("memory");
            // SAFETY: the list with the count lives on.
            unsafe { add_bias(&*device, Stream::Compute, counted, &bias, &mut out) }.expect("bias");
            let expected = with_spare(&expected, width);
            assert_eq!(bits(&out.values().expect("values")), bits(&expected), "{element:?} {rows} x {width}");
        }
    });
}

#[test]
fn gathered_rows_are_those_picked() {
    sanitised(|| {
        let device = emulated();
        for ((rows, width), element) in sizes().flat_map(|size| ELEMENTS.map(|element| (size, element))) {
            let x = rounded(&device, element, &random(9, rows * width, 4.0), width);
            let picked: Vec<u32> = (0..rows as u32 / 2 + 2).map(|i| i * 5 % rows as u32).collect();
            let expected: Vec<f32> =
                picked.iter().flat_map(|row| &x[*row as usize * width..][..width]).copied().collect();
            let mut list = DeviceList::new(&device, picked.len() + SPARE).expect("memory");
            // What was in the list before would be good indices.
            list.write(&vec![0; picked.len() + SPARE]).expect("write");
            list.write(&picked).expect("write");
            let x = tensor(&device, element, &x, width);
            let mut out = CudaTensor::new(&device, element, picked.len() + SPARE, width).expect("memory");
            gather_rows(&*device, Stream::Compute, &list, picked.len() + SPARE, &x, &mut out).expect("gather");
            assert_rows(&out.values().expect("values"), &expected, 0.0, &format!("{element:?} {rows} x {width}"));
        }
        let x = tensor(&device, Element::F32, &[1.0; 12], 4);
        let mut out = tensor(&device, Element::F32, &[0.0; 8], 4);
        let mut list = DeviceList::new(&device, 2).expect("memory");
        list.write(&[3, 2]).expect("write");
        gather_rows(&*device, Stream::Compute, &list, 2, &x, &mut out).expect("gather");
        let found = out.values().expect("values");
        assert!(found[..4].iter().all(|x| x.is_nan()) && found[4..] == [1.0; 4], "row 3 of 3: {found:?}");
    });
}

#[test]
fn pages_are_copied_whole_and_no_other_is_touched() {
    sanitised(|| {
        let device = emulated();
        for page_bytes in [256, 32_768, 256 * 131] {
            let (pages, words) = (9, page_bytes / 4);
            let before: Vec<u32> = (0..pages * words).map(|i| i as u32 ^ 0x5a5a_0000).collect();
            let memory = Memory::holding(&device, &before).expect("memory");
            let mut list = DeviceList::new(&device, 5).expect("memory");
            let pair = |from, to| PagePair { from, to };
            list.write(&[pair(7, 6); 5]).expect("write");
            // The pool has no page 9, and the last pair is not there any more.
            list.write(&[pair(8, 0), pair(2, 5), pair(9, 1), pair(3, 9)]).expect("write");
            copy_blocks(&*device, Stream::Compute, &list, &memory, page_bytes).expect("copy");
            let mut expected = before.clone();
            expected.copy_within(8 * words..9 * words, 0);
            expected.copy_within(2 * words..3 * words, 5 * words);
            assert_eq!(memory.read::<u32>(0, before.len()).expect("read"), expected, "pages of {page_bytes} bytes");
        }
    });
}

/// Everything at once on `device`: embedding, bias, norm and SwiGLU of rows with these tokens.
fn chain(device: &Arc<Emulated>, element: Element, tokens: &[u32]) -> [Vec<Vec<u32>>; 3] {
    let (rows, width) = (tokens.len(), 148);
    let table = tensor(device, element, &random(10, 40 * width, 3.0), width);
    let [weight, bias] = [11, 12].map(|seed| Memory::holding(device, &random(seed, width, 1.0)).expect("memory"));
    let step = step_of(device, tokens);
    let new = |element, width| CudaTensor::new(device, element, rows, width).expect("memory");
    let mut residual = new(Element::F32, width);
    let (mut normed, mut gated) = (new(element, width), new(element, width / 2));
    let norm = NormWeight { weight: &weight, eps: 1e-6 };
    let (stream, counted) = (Stream::Compute, Rows::of_step(&step.view(), rows));
    // SAFETY: the step's memory has room for the rows and lives on.
    unsafe {
        embed(&**device, stream, &step.view(), rows, &table, &mut residual).expect("embedding");
        add_bias(&**device, stream, counted, &bias, &mut residual).expect("bias");
        add_rms_norm(&**device, stream, counted, &mut residual, None, &norm, &mut normed).expect("norm");
        swiglu(&**device, stream, counted, &normed, &mut gated).expect("swiglu");
    }
    [residual, normed, gated].map(|tensor| tensor.values().expect("values").chunks(tensor.width()).map(bits).collect())
}

#[test]
fn a_row_s_bits_depend_on_that_row_alone() {
    sanitised(|| {
        let devices = [1, 7, 132].map(emulated_with);
        let tokens: Vec<u32> = (0..29).map(|i| i * 11 % 40).collect();
        for element in ELEMENTS {
            let together = chain(&devices[0], element, &tokens);
            for device in &devices[1..] {
                assert_eq!(chain(device, element, &tokens), together, "{element:?}");
            }
            for (row, token) in tokens.iter().enumerate() {
                let alone = chain(&devices[1], element, &[*token]);
                for (alone, together) in alone.iter().zip(&together) {
                    assert_eq!(alone[0], together[row], "{element:?}: row {row}");
                }
            }
        }
    });
}

#[test]
fn a_recorded_graph_serves_steps_with_fewer_rows_whatever_ran_between() {
    sanitised(|| {
        let device = emulated();
        let (rows_max, width, longest) = (16, 40, 700);
        let table = tensor(&device, Element::Bf16, &random(13, 50 * width, 2.0), width);
        let mut step = StepMemory::new(&device, StepLimits { rows: longest, table_entries: 1 }).expect("memory");
        step.lay_out(rows_max);
        let mut picked = DeviceList::new(&device, rows_max).expect("memory");
        picked.write(&vec![0; rows_max]).expect("write");
        let mut embedded = CudaTensor::new(&device, Element::F32, rows_max, width).expect("memory");
        let mut out = CudaTensor::new(&device, Element::F32, rows_max, width).expect("memory");
        let view = step.view();
        let graph = device
            .capture(&mut || {
                // SAFETY: the step's memory has room for the rows and lives on.
                unsafe { embed(&*device, Stream::Compute, &view, rows_max, &table, &mut embedded)? };
                gather_rows(&*device, Stream::Compute, &picked, rows_max, &embedded, &mut out)
            })
            .expect("capture");
        let table = table.values().expect("values");
        let mut write = |tokens: &[u32]| {
            let positions: Vec<u32> = (0..tokens.len() as u32).collect();
            let sequences = [SequenceRows { row: 0, rows: tokens.len(), table: 0, blocks: 0 }];
            let (positions, sequences) = (&positions, &sequences);
            let step_rows = StepRows { tokens, drawn: &[], positions, sequences, block_tables: &[] };
            step.write(&step_rows, &[]).expect("write");
            step.view()
        };
        for (rows, step_tokens, last) in [(16, 0, 15_u32), (3, 20, 2), (9, 5, 4)] {
            // One that no pass is recorded for lies elsewhere.
            assert_ne!(write(&vec![49; longest]).positions, view.positions);
            let tokens: Vec<u32> = (0..rows).map(|i| (i * 3 + step_tokens) % 50).collect();
            assert_eq!(write(&tokens), view);
            picked.write(&[last, 0]).expect("write");
            // SAFETY: all that was recorded lives on.
            unsafe { device.replay(&graph) }.expect("replay");
            let found = out.values().expect("values");
            let row = |token: u32| &table[token as usize * width..][..width];
            assert_eq!(&found[..width], row(tokens[last as usize]));
            assert_eq!(&found[width..2 * width], row(tokens[0]));
            assert!(found[2 * width..].iter().all(|x| x.is_nan()), "rows beyond the count were written");
        }
    });
}
