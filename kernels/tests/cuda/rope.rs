//! Rotary embedding, head norms and the way into the pages against their reference.

use half::{bf16, f16};
use openlora_kernels::conformance::Random;
use openlora_kernels::cuda::attention::KvLayer;
use openlora_kernels::cuda::device::{Element, Memory, Stream};
use openlora_kernels::cuda::pages::page_bytes;
use openlora_kernels::cuda::rope::{Rope, RopeMemory, rope_and_store};
use openlora_kernels::cuda::step::{StepLimits, StepMemory};
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::{AttentionSpec, RopeTable, SequenceRows, StepRows, reference};

use crate::attention::{Sizes, random_values, rounded, spec, tables};
use crate::support::{emulated, sanitised};

const LAYERS: usize = 2;
const LAYER: usize = 1;

struct Case {
    sizes: Sizes,
    rotary_dim: usize,
    norms: bool,
    element: Element,
}

/// What the device made of a step: qkv and all pages, as f32 bits.
struct Made {
    qkv: Vec<f32>,
    pages: Vec<f32>,
}

fn rope_table(rotary_dim: usize, positions: usize) -> RopeTable {
    let angle = |position: usize, i: usize| position as f32 * 10_000_f32.powf(-2.0 * i as f32 / rotary_dim as f32);
    let angles =
        (0..positions).flat_map(|position| (0..rotary_dim / 2).map(move |i| (position, i))).map(|(p, i)| angle(p, i));
    RopeTable { rotary_dim, cos: angles.clone().map(f32::cos).collect(), sin: angles.map(f32::sin).collect() }
}

fn read(memory: &Memory<openlora_kernels::cuda::emulated::Emulated>, element: Element) -> Vec<f32> {
    let count = memory.bytes() / element.bytes();
    match element {
        Element::F32 => memory.read(0, count).expect("read"),
        Element::Bf16 => {
            memory.read::<u16>(0, count).expect("read").into_iter().map(|x| bf16::from_bits(x).to_f32()).collect()
        }
        Element::F16 => {
            memory.read::<u16>(0, count).expect("read").into_iter().map(|x| f16::from_bits(x).to_f32()).collect()
        }
    }
}

/// A step of sequences that start at some position with so many rows: (first position, rows).
struct Step {
    parts: Vec<(usize, usize)>,
    tables: Vec<Vec<u32>>,
    pages: usize,
    norms: (Vec<f32>, Vec<f32>),
}

impl Step {
    fn new(case: &Case, parts: &[(usize, usize)]) -> Self {
        let mut random = Random::new(case.sizes.2 as u64);
        let norms = (random_values(&mut random, case.sizes.2, 2.0), random_values(&mut random, case.sizes.2, 2.0));
        let blocks: Vec<usize> = parts.iter().map(|(first, rows)| (first + rows).div_ceil(case.sizes.3)).collect();
        let (tables, pages) = tables(&blocks, &mut random);
        Self { parts: parts.to_vec(), tables, pages, norms }
    }

    fn positions(&self) -> Vec<u32> {
        self.parts.iter().flat_map(|(first, rows)| *first as u32..(first + rows) as u32).collect()
    }

    /// Runs it on fresh memory, with a launch for more rows than there are.
    fn run(&self, case: &Case, table: &RopeTable, values: &[f32]) -> Made {
        let device = emulated();
        let spec = spec(case.sizes);
        let (mut sequences, mut entries, positions) = (Vec::new(), Vec::new(), self.positions());
        let mut row = 0;
        for ((_, rows), table) in self.parts.iter().zip(&self.tables) {
            sequences.push(SequenceRows { row, rows: *rows, table: entries.len(), blocks: table.len() });
            entries.extend(table);
            row += rows;
        }
        let tokens = vec![0; row];
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &sequences,
            block_tables: &entries,
        };
        let limits = StepLimits { rows: row + 5, table_entries: entries.len() };
        let mut memory = StepMemory::new(&device, limits).expect("memory");
        memory.write(&step, &[]).expect("step");
        let page_bytes = page_bytes(&spec, LAYERS, case.element);
        let pages = Memory::new(&device, self.pages * page_bytes).expect("memory");
        let width = values.len() / row;
        let mut qkv = CudaTensor::holding(&device, case.element, values, width).expect("memory");
        let table = RopeMemory::new(&device, table).expect("memory");
        let norms = [&self.norms.0, &self.norms.1].map(|norm| Memory::holding(&device, norm).expect("memory"));
        let rope = Rope {
            spec: &spec,
            step: memory.view(),
            kv: KvLayer { pages: pages.address(), page_bytes, layer: LAYER },
            table: &table,
            qk_norm: case.norms.then(|| (norms[0].address(), norms[1].address())),
            rows_max: row + 5,
        };
        rope_and_store(&*device, Stream::Compute, &rope, &mut qkv).expect("launch");
        Made { qkv: qkv.values().expect("read"), pages: read(&pages, case.element) }
    }

    /// Where a row's keys of one head begin in `Made::pages`, and its values.
    fn places(&self, case: &Case, part: usize, position: usize, kv_head: usize) -> (usize, usize) {
        let (_, kv_heads, head_dim, block_size) = case.sizes;
        let page_elements = page_bytes(&spec(case.sizes), LAYERS, case.element) / case.element.bytes();
        let page = self.tables[part][position / block_size] as usize * page_elements;
        let keys = page + ((LAYER * kv_heads + kv_head) * 2 * block_size + position % block_size) * head_dim;
        (keys, keys + block_size * head_dim)
    }
}

/// Half a unit in the last place of the element, and what f32 arithmetic and rsqrt lose of the numbers that are added.
fn assert_close(found: &[f32], expected: &[f32], element: Element, what: &str) {
    let unit = match element {
        Element::F32 => 0.0,
        Element::Bf16 => 1.0 / 256.0,
        Element::F16 => 1.0 / 2048.0,
    };
    let largest = expected.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let allowed = expected.abs() * unit * 1.01 + largest * 1e-6;
        assert!((found - expected).abs() <= allowed, "{what}: element {i} is {found}, expected {expected}");
    }
}

const PARTS: [(usize, usize); 4] = [(0, 7), (40, 1), (13, 20), (31, 2)];

fn check(case: &Case) {
    let spec @ AttentionSpec { heads, kv_heads, head_dim, .. } = spec(case.sizes);
    let what = format!("{:?} {} {:?}, norms {}", case.sizes, case.rotary_dim, case.element, case.norms);
    let step = Step::new(case, &PARTS);
    let table = rope_table(case.rotary_dim, 41);
    let positions = step.positions();
    let width = (heads + 2 * kv_heads) * head_dim;
    let values = rounded(case.element, random_values(&mut Random::new(7), positions.len() * width, 3.0));
    let made = step.run(case, &table, &values);
    let mut expected = values.clone();
    let norms = case.norms.then_some((step.norms.0.as_slice(), step.norms.1.as_slice()));
    reference::rope::rope(&spec, &positions, &table, norms, &mut expected);
    let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut written = 0;
    let mut row = 0;
    for (part, (first, rows)) in PARTS.into_iter().enumerate() {
        for position in first..first + rows {
            let what = format!("{what}: sequence {part}, position {position}");
            let at = row * width;
            for head in 0..heads {
                let at = at + head * head_dim..at + (head + 1) * head_dim;
                assert_close(&made.qkv[at.clone()], &expected[at], case.element, &format!("{what}: query {head}"));
            }
            for head in 0..kv_heads {
                let (keys, vals) = step.places(case, part, position, head);
                let at = at + q_width + head * head_dim;
                let key = &expected[at..at + head_dim];
                assert_close(&made.pages[keys..keys + head_dim], key, case.element, &format!("{what}: key {head}"));
                let value = &values[at + kv_width..at + kv_width + head_dim];
                assert_eq!(&made.pages[vals..vals + head_dim], value, "{what}: value {head}");
                written += 2 * head_dim;
            }
            row += 1;
        }
    }
    let numbers = made.pages.iter().filter(|x| !x.is_nan()).count();
    assert_eq!(numbers, written, "{what}: nothing else in the pages was written");
}

#[test]
fn rope_agrees_with_its_reference_and_stores_keys_and_values() {
    sanitised(|| {
        let all = [((4, 4, 64, 16), 64), ((9, 3, 64, 7), 32), ((8, 1, 128, 32), 128), ((2, 2, 20, 1), 20)];
        let more = [((2, 1, 80, 16), 20), ((3, 1, 34, 5), 30), ((2, 1, 256, 16), 256), ((4, 2, 96, 48), 2)];
        for (i, (sizes, rotary_dim)) in all.into_iter().chain(more).enumerate() {
            for element in [Element::F32, Element::Bf16, Element::F16] {
                for norms in [false, true] {
                    // All of one head length, and one element of the others.
                    if i < 4 || norms == (i % 2 == 0) {
                        check(&Case { sizes, rotary_dim, norms, element });
                    }
                }
            }
        }
    });
}

#[test]
fn a_rotated_row_does_not_depend_on_the_rows_beside_it() {
    sanitised(|| {
        let case = Case { sizes: (9, 3, 64, 16), rotary_dim: 64, norms: true, element: Element::Bf16 };
        let (table, width) = (rope_table(64, 64), 15 * 64);
        let values = rounded(case.element, random_values(&mut Random::new(8), 50 * width, 3.0));
        let whole = Step::new(&case, &[(0, 50)]);
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let expected = whole.run(&case, &table, &values);
        for (position, row) in values.chunks_exact(width).enumerate() {
            let alone = Step::new(&case, &[(position, 1)]);
            let made = alone.run(&case, &table, row);
            assert!(bits(&made.qkv) == bits(&expected.qkv[position * width..][..width]), "position {position}");
            for head in 0..3 {
                let (here, _) = alone.places(&case, 0, position, head);
                let (there, _) = whole.places(&case, 0, position, head);
                let (here, there) = (&made.pages[here..here + 64], &expected.pages[there..there + 64]);
                assert!(bits(here) == bits(there), "key {head} at position {position}");
            }
        }
    });
}
