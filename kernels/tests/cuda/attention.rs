//! Attention over pages against its reference, and that a row's bits are its own.

use std::sync::Arc;

use half::{bf16, f16};
use openlora_kernels::conformance::Random;
use openlora_kernels::cuda::attention::{
    Attention, AttentionBounds, AttentionPartials, AttentionPlan, KvLayer, attention,
};
use openlora_kernels::cuda::device::{Device, Element, Memory, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::pages::page_bytes;
use openlora_kernels::cuda::step::{StepLimits, StepMemory};
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::{AttentionSpec, SequenceRows, StepRows, reference};

use crate::support::{emulated, emulated_with, sanitised};

const LAYERS: usize = 2;
const LAYER: usize = 1;
/// Shared memory of a block of an H200, and of a device of compute capability 8.9.
const LARGE: u32 = 227 << 10;
const SMALL: u32 = 99 << 10;

/// heads, kv_heads, head_dim, block_size
pub(crate) type Sizes = (usize, usize, usize, usize);

pub(crate) fn spec((heads, kv_heads, head_dim, block_size): Sizes) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, block_size, scale: 1.0 / (head_dim as f32).sqrt(), norm_eps: 1e-6 }
}

/// `values` as they are after rounding to `element`.
pub(crate) fn rounded(element: Element, values: Vec<f32>) -> Vec<f32> {
    match element {
        Element::F32 => values,
        Element::Bf16 => values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
        Element::F16 => values.into_iter().map(|x| f16::from_f32(x).to_f32()).collect(),
    }
}

pub(crate) fn random_values(random: &mut Random, count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|_| random.number() * size).collect()
}

pub(crate) fn write(memory: &mut Memory<Emulated>, element: Element, at: usize, values: &[f32]) {
    let offset = at * element.bytes();
    match element {
        Element::F32 => memory.write(offset, values),
        Element::Bf16 => memory.write(offset, &values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<_>>()),
        Element::F16 => memory.write(offset, &values.iter().map(|x| f16::from_f32(*x).to_bits()).collect::<Vec<_>>()),
    }
    .expect("write");
}

/// Block tables for so many blocks each, of pages in random order; and the number of pages.
pub(crate) fn tables(blocks: &[usize], random: &mut Random) -> (Vec<Vec<u32>>, usize) {
    let pages = blocks.iter().sum::<usize>() + 3;
    let mut free: Vec<u32> = (0..pages as u32).collect();
    let mut next = || free.swap_remove(random.below(free.len()));
    (blocks.iter().map(|count| (0..*count).map(|_| next()).collect()).collect(), pages)
}

/// A sequence: its queries `[tokens, heads head_dim]`, keys and values `[tokens, kv_heads, head_dim]`.
struct Tokens {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    table: Vec<u32>,
}

/// Sequences in pages on a device. Every place of a page that is no token's holds NaN.
struct World {
    device: Arc<Emulated>,
    spec: AttentionSpec,
    element: Element,
    window: Option<usize>,
    shared_bytes: u32,
    sequences: Vec<Tokens>,
    pages: Memory<Emulated>,
    page_bytes: usize,
}

/// Of a step: a sequence, the position of its first row, its rows.
type Part = (usize, usize, usize);

impl World {
    fn new(
        device: Arc<Emulated>,
        sizes: Sizes,
        element: Element,
        window: Option<usize>,
        lengths: &[usize],
        seed: u64,
    ) -> Self {
        let spec = spec(sizes);
        let mut random = Random::new(seed);
        let blocks: Vec<usize> = lengths.iter().map(|tokens| tokens.div_ceil(spec.block_size)).collect();
        // The pages' order is another one than the numbers', which must not change with the seed's use.
        let (tables, pages_count) = tables(&blocks, &mut Random::new(seed + 1));
        let page_bytes = page_bytes(&spec, LAYERS, element);
        let pages = Memory::new(&device, pages_count * page_bytes).expect("memory");
        let mut some = |count: usize| rounded(element, random_values(&mut random, count, 3.0));
        let sequences = lengths
            .iter()
            .zip(tables)
            .map(|(tokens, table)| {
                let kv = tokens * spec.kv_heads * spec.head_dim;
                let queries = some(tokens * spec.heads * spec.head_dim);
                Tokens { queries, keys: some(kv), values: some(kv), table }
            })
            .collect();
        let mut world = Self { device, spec, element, window, shared_bytes: LARGE, sequences, pages, page_bytes };
        for (sequence, tokens) in lengths.iter().enumerate() {
            world.fill(sequence, 0..*tokens, None);
        }
        world
    }

    /// Writes keys and values of some positions to their pages; `instead` of their own.
    fn fill(&mut self, sequence: usize, positions: std::ops::Range<usize>, instead: Option<f32>) {
        let Self { spec: AttentionSpec { kv_heads, head_dim, block_size, .. }, .. } = *self;
        for position in positions {
            let tokens = &self.sequences[sequence];
            let page = tokens.table[position / block_size] as usize * self.page_bytes / self.element.bytes();
            for head in 0..kv_heads {
                let from = (position * kv_heads + head) * head_dim;
                let to = page + ((LAYER * kv_heads + head) * 2 * block_size + position % block_size) * head_dim;
                for (values, to) in [(&tokens.keys, to), (&tokens.values, to + block_size * head_dim)] {
                    let values = instead.map_or_else(|| values[from..][..head_dim].to_vec(), |x| vec![x; head_dim]);
                    write(&mut self.pages, self.element, to, &values);
                }
            }
        }
    }

    fn kv(&self) -> KvLayer {
        KvLayer { pages: self.pages.address(), page_bytes: self.page_bytes, layer: LAYER }
    }

    fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window.unwrap_or(usize::MAX))
    }

    /// What `attention` is to give for one row.
    fn expected(&self, sequence: usize, position: usize) -> Vec<f32> {
        let (width, kv) = (self.spec.heads * self.spec.head_dim, self.spec.kv_heads * self.spec.head_dim);
        let tokens = &self.sequences[sequence];
        let mut out = vec![0.0; width];
        let seen = self.first_seen(position) * kv..(position + 1) * kv;
        let query = &tokens.queries[position * width..][..width];
        let (keys, values) = (&tokens.keys[seen.clone()], &tokens.values[seen]);
        reference::attention::attention(&self.spec, None, query, keys, values, &mut out);
        out
    }

    fn bounds(&self, parts: &[Part]) -> AttentionBounds {
        AttentionBounds {
            rows: parts.iter().map(|part| part.2).sum(),
            rows_each: parts.iter().map(|part| part.2).max().unwrap_or(1),
            table_entries: parts.iter().map(|part| self.sequences[part.0].table.len()).sum(),
        }
    }

    /// A step, with memory that is just large enough, fresh and so full of NaN.
    fn step(&self, parts: &[Part]) -> Vec<Vec<f32>> {
        let mut launch = Launch::new(self, self.bounds(parts));
        launch.load(self, parts);
        launch.enqueue(self).expect("launches");
        launch.rows()
    }

    /// The output of each row of a step, by its sequence and position.
    fn bits(&self, parts: &[Part]) -> Vec<((usize, usize), Vec<u32>)> {
        let numbers = parts.iter().flat_map(|(s, first, rows)| (*first..first + rows).map(|position| (*s, position)));
        numbers.zip(self.step(parts)).map(|(key, row)| (key, row.iter().map(|x| x.to_bits()).collect())).collect()
    }
}

/// What a step's launches need.
struct Launch {
    step: StepMemory<Emulated>,
    plan: AttentionPlan<Emulated>,
    partials: AttentionPartials<Emulated>,
    bounds: AttentionBounds,
    tensors: (CudaTensor<Emulated>, CudaTensor<Emulated>),
}

impl Launch {
    fn new(world: &World, bounds: AttentionBounds) -> Self {
        let World { device, spec, element, .. } = world;
        let limits = StepLimits { rows: bounds.rows, table_entries: bounds.table_entries };
        let width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
        Self {
            step: StepMemory::new(device, limits).expect("memory"),
            plan: AttentionPlan::new(device, spec, bounds, world.window, world.shared_bytes).expect("memory"),
            partials: AttentionPartials::new(device, spec, bounds).expect("memory"),
            bounds,
            tensors: (
                CudaTensor::new(device, *element, bounds.rows, width).expect("memory"),
                CudaTensor::new(device, *element, bounds.rows, spec.heads * spec.head_dim).expect("memory"),
            ),
        }
    }

    /// Writes a step. k and v in qkv are NaN: only the pages have them.
    fn load(&mut self, world: &World, parts: &[Part]) {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = world.spec;
        let (mut sequences, mut table, mut positions, mut qkv) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (sequence, first, rows) in parts {
            let tokens = &world.sequences[*sequence];
            let blocks = tokens.table.len();
            sequences.push(SequenceRows { row: positions.len(), rows: *rows, table: table.len(), blocks });
            table.extend(&tokens.table);
            positions.extend((*first..first + rows).map(|position| position as u32));
            for query in tokens.queries.chunks_exact(heads * head_dim).skip(*first).take(*rows) {
                qkv.extend(query);
                qkv.extend(std::iter::repeat_n(f32::NAN, 2 * kv_heads * head_dim));
            }
        }
        let tokens = vec![0; positions.len()];
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &sequences,
            block_tables: &table,
        };
        self.step.write(&step, &[]).expect("step");
        self.tensors.0.set_rows(positions.len());
        self.tensors.1.set_rows(positions.len());
        copy_to(world, &self.tensors.0, &qkv);
    }

    fn enqueue(&mut self, world: &World) -> Result<(), openlora_kernels::KernelError> {
        let device = &*world.device;
        if world.element != Element::F32 {
            self.plan.make(device, Stream::Compute, self.step.view())?;
        }
        let sizes = Attention {
            spec: &world.spec,
            step: self.step.view(),
            kv: world.kv(),
            plan: &self.plan,
            partials: &self.partials,
            bounds: self.bounds,
        };
        attention(device, Stream::Compute, &sizes, &self.tensors.0, &mut self.tensors.1)
    }

    fn rows(&self) -> Vec<Vec<f32>> {
        let out = &self.tensors.1;
        out.values().expect("read").chunks_exact(out.width()).map(<[f32]>::to_vec).collect()
    }
}

/// Puts values into a tensor that exists.
fn copy_to(world: &World, tensor: &CudaTensor<Emulated>, values: &[f32]) {
    let bytes: Vec<u8> = match world.element {
        Element::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Element::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
    };
    // SAFETY: the tensor has room for its rows.
    unsafe { world.device.write(Stream::Compute, tensor.address(), &bytes).expect("write") };
}

/// How far an output may be from the exact one of the same numbers. P is rounded to the element, weights as well as their sum, and
/// so is the output: with u the element's unit roundoff, u times the mean distance of the values from the output, which is at most
/// the largest value, and u times the output. f32 keeps P; what is left there is the rounding of sums and of 2^x. Values are below 3.
fn allowed(element: Element) -> f32 {
    match element {
        Element::F32 => 3.0 * 1e-5,
        Element::Bf16 => 3.0 * 2.0 / 256.0,
        Element::F16 => 3.0 * 2.0 / 2048.0,
    }
}

fn check(world: &World, parts: &[Part], what: &str) {
    let found = world.step(parts);
    let mut row = 0;
    for &(sequence, first, rows) in parts {
        for position in first..first + rows {
            let checked = position < first + 2 || position + 2 >= first + rows || position % 17 == 0;
            assert!(found[row].iter().all(|x| x.is_finite()), "{what}: sequence {sequence}, position {position}");
            if checked {
                let expected = world.expected(sequence, position);
                for (i, (found, expected)) in found[row].iter().zip(&expected).enumerate() {
                    let error = (found - expected).abs();
                    assert!(
                        error <= allowed(world.element),
                        "{what}: sequence {sequence}, position {position}: output {i} is {found}, expected {expected}"
                    );
                }
            }
            row += 1;
        }
    }
}

/// One row at the borders of tiles, splits and blocks; chunks of few and of many rows.
const LENGTHS: [usize; 8] = [1, 15, 16, 17, 255, 256, 257, 700];
const PARTS: [Part; 8] =
    [(0, 0, 1), (1, 0, 15), (2, 0, 16), (3, 16, 1), (4, 250, 5), (5, 255, 1), (6, 240, 17), (7, 690, 10)];

fn agrees_with_reference(element: Element, head_dims: &[usize]) {
    let groups = [(4, 4), (9, 3), (8, 2), (8, 1)];
    let blocks = [1, 7, 16, 32];
    let windows = [None, Some(1), Some(100), Some(300)];
    for (i, head_dim) in head_dims.iter().enumerate() {
        for (j, (heads, kv_heads)) in groups.into_iter().enumerate() {
            // Each head length meets each group, block size and window, and each pair of those meets somewhere.
            let (block_size, window) = (blocks[(i + j) % 4], windows[(i + j + i / 2 + j / 2) % 4]);
            let sizes = (heads, kv_heads, *head_dim, block_size);
            let mut world = World::new(emulated(), sizes, element, window, &LENGTHS, 3);
            // What no row of the step sees must not be touched: pages before a window may be another's by now.
            for (sequence, first, _) in PARTS {
                let unseen = 0..world.first_seen(first);
                world.fill(sequence, unseen, Some(f32::NAN));
            }
            check(&world, &PARTS, &format!("{sizes:?} {element:?} {window:?}"));
        }
    }
}

#[test]
fn attention_agrees_with_its_reference_in_bf16() {
    sanitised(|| agrees_with_reference(Element::Bf16, &[20, 64, 80]));
}

#[test]
fn attention_of_long_heads_agrees_with_its_reference_in_bf16() {
    sanitised(|| agrees_with_reference(Element::Bf16, &[96, 128, 256]));
}

#[test]
fn attention_agrees_with_its_reference_in_f16() {
    sanitised(|| agrees_with_reference(Element::F16, &[64, 20]));
}

#[test]
fn attention_agrees_with_its_reference_in_f32() {
    sanitised(|| agrees_with_reference(Element::F32, &[20, 64, 256]));
}

/// The kernels for devices with less shared memory have other blocks, and the same results.
#[test]
fn attention_agrees_with_its_reference_in_small_blocks() {
    sanitised(|| {
        for sizes in [(9, 3, 64, 16), (4, 2, 80, 16), (4, 4, 128, 16), (4, 2, 256, 32)] {
            let mut world = World::new(emulated(), sizes, Element::Bf16, Some(300), &LENGTHS, 4);
            let parts = [(5, 216, 40), (7, 660, 40)];
            let large = world.bits(&parts);
            world.shared_bytes = SMALL;
            check(&world, &parts, &format!("{sizes:?}"));
            assert!(world.bits(&parts) == large, "{sizes:?}: bits");
        }
    });
}

/// As on a GPU of compute capability 7.5.
#[test]
fn heads_that_shared_memory_has_no_room_for_are_an_error_with_both_sizes() {
    sanitised(|| {
        let attend = |sizes: Sizes, element: Element| {
            let mut world = World::new(emulated(), sizes, element, None, &[20], 11);
            world.shared_bytes = 64 << 10;
            let mut launch = Launch::new(&world, world.bounds(&[(0, 0, 20)]));
            launch.load(&world, &[(0, 0, 20)]);
            launch.enqueue(&world).map_err(|error| error.to_string())
        };
        assert_eq!(attend((4, 2, 64, 16), Element::F16), Ok(()));
        let error = attend((4, 2, 128, 16), Element::F16).expect_err("too long");
        for part in ["heads of 128 elements", "takes 97 KiB", "has 64;"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(attend((4, 2, 128, 16), Element::F32), Ok(()));
    });
}

/// Checks that rows have the bits they have in `expected`.
fn assert_same_bits(expected: &[((usize, usize), Vec<u32>)], found: &[((usize, usize), Vec<u32>)], what: &str) {
    for (key, bits) in found {
        let (_, expected) = expected.iter().find(|(known, _)| known == key).expect("a row that was computed before");
        assert!(bits == expected, "{what}: sequence {}, position {}", key.0, key.1);
    }
}

fn bits_are_a_rows_own(sizes: Sizes, element: Element, window: Option<usize>) {
    let lengths = [530, 300, 1, 61];
    let world = World::new(emulated(), sizes, element, window, &lengths, 5);
    let whole: Vec<Part> = lengths.iter().enumerate().map(|(i, tokens)| (i, 0, *tokens)).collect();
    let expected = world.bits(&whole);
    let what = |how: &str| format!("{sizes:?} {element:?} {window:?}: {how}");
    let assert_same = |found: Vec<_>, how: &str| assert_same_bits(&expected, &found, &what(how));
    for position in [0, 1, 63, 64, 65, 254, 255, 256, 257, 300, 511, 512, 513, 529] {
        assert_same(world.bits(&[(0, position, 1)]), "alone");
    }
    assert_same(world.bits(&[(0, 254, 4), (1, 255, 1), (3, 60, 1), (2, 0, 1)]), "few rows each");
    assert_same(world.bits(&[(3, 7, 1), (0, 253, 7), (1, 0, 30), (2, 0, 1)]), "few and many rows");
    for chunk in [7, 33, 100] {
        for first in [0, 250, 490] {
            assert_same(world.bits(&[(0, first, chunk.min(530 - first))]), &format!("chunks of {chunk}"));
        }
    }
    for multiprocessors in [1, 132] {
        let world = World::new(emulated_with(multiprocessors), sizes, element, window, &lengths, 5);
        // More pieces of work than one multiprocessor has blocks, of either kind.
        let mut parts = vec![(1, 290, 2), (0, 520, 10), (3, 0, 61), (0, 0, 530)];
        parts.extend((500..512).map(|position| (0, position, 1)));
        assert_same(world.bits(&parts), &format!("{multiprocessors} multiprocessors"));
    }
}

#[test]
fn a_row_has_the_same_bits_however_it_is_computed() {
    sanitised(|| {
        bits_are_a_rows_own((9, 3, 64, 16), Element::Bf16, None);
        bits_are_a_rows_own((9, 3, 64, 16), Element::F16, Some(100));
        bits_are_a_rows_own((2, 1, 20, 7), Element::F32, Some(300));
    });
}

#[test]
fn a_row_of_long_heads_has_the_same_bits_however_it_is_computed() {
    sanitised(|| {
        bits_are_a_rows_own((4, 1, 128, 16), Element::Bf16, Some(300));
        bits_are_a_rows_own((2, 1, 256, 16), Element::Bf16, None);
    });
}

/// More heads in a group than a tile has rows: one row is several tiles.
#[test]
fn a_group_may_have_more_heads_than_a_tile_has_rows() {
    sanitised(|| {
        let world = World::new(emulated(), (30, 1, 48, 16), Element::Bf16, None, &[300, 40], 6);
        let parts = [(0, 299, 1), (1, 20, 20)];
        check(&world, &parts, "30 heads");
        let expected = world.bits(&[(0, 280, 20), (1, 0, 40)]);
        assert_same_bits(&expected, &world.bits(&parts), "30 heads");
    });
}

/// One recording for the largest step; the steps it is replayed for are smaller, other and with other sequences.
#[test]
fn a_recorded_launch_serves_every_step_of_its_size() {
    sanitised(|| {
        for window in [None, Some(100)] {
            let world = World::new(emulated(), (8, 2, 64, 16), Element::Bf16, window, &[700, 300, 90, 33], 7);
            let bounds = AttentionBounds { rows: 40, rows_each: 40, table_entries: 120 };
            let mut launch = Launch::new(&world, bounds);
            let device = Arc::clone(&world.device);
            let graph = device.capture(&mut || launch.enqueue(&world)).expect("a recording");
            let steps: [&[Part]; 5] = [
                &[(0, 699, 1), (1, 299, 1), (2, 89, 1), (3, 32, 1)],
                &[(3, 0, 33)],
                &[(1, 0, 1)],
                &[(2, 50, 40)],
                &[(2, 10, 2), (0, 600, 30), (1, 270, 4)],
            ];
            for parts in steps {
                launch.load(&world, parts);
                // SAFETY: the memory that was recorded is that of `launch` and `world`.
                unsafe { device.replay(&graph).expect("replay") };
                let found: Vec<Vec<u32>> =
                    launch.rows().iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
                let expected: Vec<Vec<u32>> = world.bits(parts).into_iter().map(|(_, row)| row).collect();
                assert!(found == expected, "{parts:?} {window:?}");
            }
        }
    });
}

/// A graph for decode alone has no launch for many rows.
#[test]
fn a_step_that_only_decodes_takes_three_launches() {
    sanitised(|| {
        let world = World::new(emulated(), (8, 2, 64, 16), Element::Bf16, None, &[300, 20], 8);
        let mut launch = Launch::new(&world, AttentionBounds { rows: 2, rows_each: 1, table_entries: 30 });
        let device = Arc::clone(&world.device);
        let graph = device.capture(&mut || launch.enqueue(&world)).expect("a recording");
        assert_eq!(graph.len(), 3, "plan, splits, join");
    });
}

#[test]
fn a_sequence_that_is_not_a_number_touches_no_other() {
    sanitised(|| {
        for element in [Element::Bf16, Element::F32] {
            let mut world = World::new(emulated(), (6, 2, 64, 16), element, None, &[300, 290, 40], 9);
            let parts = [(0, 299, 1), (1, 289, 1), (2, 0, 40)];
            let expected = world.bits(&parts);
            world.fill(1, 100..101, Some(f32::NAN));
            for ((key, found), (_, expected)) in world.bits(&parts).into_iter().zip(&expected) {
                if key.0 == 1 {
                    assert!(found.iter().all(|bits| f32::from_bits(*bits).is_nan()), "{element:?}: {key:?} is lost");
                } else {
                    assert!(found == *expected, "{element:?}: {key:?}");
                }
            }
        }
    });
}

/// Scores that differ by hundreds and thousands: factors that are 0, and a largest score in the last tile or the first.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    sanitised(|| {
        let mut world = World::new(emulated(), (4, 2, 64, 16), Element::Bf16, None, &[600], 10);
        for (at, size) in [(3, 60.0), (300, 50.0), (599, 80.0)] {
            let width = 2 * 64;
            for x in &mut world.sequences[0].keys[at * width..(at + 1) * width] {
                *x = x.signum() * size;
            }
        }
        world.fill(0, 0..600, None);
        check(&world, &[(0, 560, 40)], "chunk");
        check(&world, &[(0, 599, 1)], "alone");
    });
}
