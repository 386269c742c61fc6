//! Rotary embedding, the KV cache and attention together, as a step runs them.

use openlora_kernels::cpu::attention::{Attend, AttentionScratch, attention};
use openlora_kernels::cpu::kv::page_bytes;
use openlora_kernels::cpu::pages::CpuPages;
use openlora_kernels::cpu::rope::rope_and_store;
use openlora_kernels::cpu::{Cpu, CpuTensor, Isa, Pool};
use openlora_kernels::{
    AttentionSpec, Backend, DrawnToken, LayerAttention, Precision, RopeTable, SequenceRows, StepRows, reference,
};
use rand::Rng;
use rand::seq::SliceRandom;

use crate::{assert_close, bits, machines, poisoned, random, rng};

/// A model's attention layer and the sequences it sees.
struct World {
    spec: AttentionSpec,
    window: Option<usize>,
    rope: RopeTable,
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    precision: Precision,
    /// `[tokens, width]` before rotary embedding, for each sequence.
    sequences: Vec<Vec<f32>>,
}

/// (heads, kv_heads, head_dim, block_size)
type Sizes = (usize, usize, usize, usize);

/// SmolLM2's; no groups; one key-value head; a group of 7; nothing that 16 divides; long heads; more heads in a group than a
/// tile has rows.
const SIZES: [Sizes; 7] =
    [(9, 3, 64, 16), (4, 4, 32, 16), (8, 1, 128, 32), (14, 2, 64, 16), (2, 2, 34, 5), (6, 2, 256, 48), (30, 1, 48, 16)];

impl World {
    fn new(sizes: Sizes, lengths: &[usize], window: Option<usize>, precision: Precision) -> Self {
        let (heads, kv_heads, head_dim, block_size) = sizes;
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            block_size,
            scale: 1.0 / (head_dim as f32).sqrt(),
            norm_eps: 1e-6,
        };
        let mut rng = rng(head_dim as u64 * 31 + lengths.len() as u64);
        let width = (heads + 2 * kv_heads) * head_dim;
        let sequences = lengths.iter().map(|tokens| random(&mut rng, tokens * width, 4.0)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        Self { spec, window, rope: rope_table(head_dim, longest), qk_norm: None, precision, sequences }
    }

    fn width(&self) -> usize {
        (self.spec.heads + 2 * self.spec.kv_heads) * self.spec.head_dim
    }

    fn tokens(&self, sequence: usize) -> usize {
        self.sequences[sequence].len() / self.width()
    }

    fn layer<'a>(&'a self, norms: Option<&'a (Vec<f32>, Vec<f32>)>) -> LayerAttention<'a, Cpu> {
        let qk_norm = norms.map(|(q, k)| (q, k));
        LayerAttention { layer: 1, window: self.window, rope: &self.rope, qk_norm }
    }
}

fn rope_table(head_dim: usize, positions: usize) -> RopeTable {
    // Some elements pass through, as in models with a partial rotary factor.
    let rotary_dim = if head_dim.is_multiple_of(32) { head_dim } else { head_dim - 2 };
    let angles = (0..positions).flat_map(|position| {
        let frequency = move |i: usize| 10_000_f32.powf(-2.0 * i as f32 / rotary_dim as f32);
        (0..rotary_dim / 2).map(move |i| position as f32 * frequency(i))
    });
    RopeTable { rotary_dim, cos: angles.clone().map(f32::cos).collect(), sin: angles.map(f32::sin).collect() }
}

/// A run of a world on a backend: its cache, its block tables, and how far each sequence has come.
struct Run<'a> {
    world: &'a World,
    isa: Isa,
    pool: &'a Pool,
    kv: CpuPages,
    tables: Vec<Vec<u32>>,
    done: Vec<usize>,
    scratch: AttentionScratch,
    /// `[tokens, heads head_dim]` of each sequence.
    outputs: Vec<Vec<f32>>,
}

impl<'a> Run<'a> {
    /// `shuffle`: seed of the physical blocks' order.
    fn new(world: &'a World, isa: Isa, pool: &'a Pool, shuffle: u64) -> Self {
        let blocks = |i: usize| world.tokens(i).div_ceil(world.spec.block_size);
        let total: usize = (0..world.sequences.len()).map(blocks).sum();
        let mut numbers: Vec<u32> = (0..total as u32 + 3).collect();
        numbers.shuffle(&mut rng(shuffle));
        let mut numbers = numbers.into_iter();
        let tables = (0..world.sequences.len()).map(|i| numbers.by_ref().take(blocks(i)).collect()).collect();
        let mut kv = CpuPages::new(&world.spec, 2, total + 3, world.precision).expect("memory");
        kv.fill(f32::NAN);
        let done = vec![0; world.sequences.len()];
        let outputs = vec![Vec::new(); world.sequences.len()];
        Self { world, isa, pool, kv, tables, done, scratch: AttentionScratch::default(), outputs }
    }

    /// One step of (sequence, rows).
    fn step(&mut self, parts: &[(usize, usize)]) {
        let width = self.world.width();
        let (mut values, mut positions) = (Vec::new(), Vec::new());
        let (mut sequences, mut block_tables) = (Vec::new(), Vec::new());
        for &(sequence, rows) in parts {
            let start = self.done[sequence];
            let table = &self.tables[sequence];
            sequences.push(SequenceRows { row: positions.len(), rows, table: block_tables.len(), blocks: table.len() });
            block_tables.extend(table);
            positions.extend((start..start + rows).map(|position| position as u32));
            values.extend(&self.world.sequences[sequence][start * width..(start + rows) * width]);
            self.done[sequence] += rows;
        }
        let tokens = vec![0; positions.len()];
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &sequences,
            block_tables: &block_tables,
        };
        let mut qkv = CpuTensor::from_values(&values, width).expect("memory");
        let layer = self.world.layer(self.world.qk_norm.as_ref());
        rope_and_store(self.pool, self.isa, &self.world.spec, &step, layer, &mut qkv, &mut self.kv);
        let out_width = self.world.spec.heads * self.world.spec.head_dim;
        let mut out = poisoned(positions.len(), out_width);
        let attend = Attend { spec: &self.world.spec, step: &step, layer };
        attention(self.pool, self.isa, attend, &qkv, &self.kv, &mut out, &mut self.scratch);
        self.pool.check().expect("no thread panicked");
        for (&(sequence, _), rows) in parts.iter().zip(&sequences) {
            let rows = rows.row * out_width..(rows.row + rows.rows) * out_width;
            self.outputs[sequence].extend(&out.values()[rows]);
        }
    }

    /// All of one sequence in chunks.
    fn chunks(&mut self, sequence: usize, rows: usize) {
        while self.done[sequence] < self.world.tokens(sequence) {
            self.step(&[(sequence, rows.min(self.world.tokens(sequence) - self.done[sequence]))]);
        }
    }

    /// The keys or values of a sequence as the cache holds them, `[tokens, kv_heads, head_dim]`.
    fn cached(&self, sequence: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for position in 0..self.done[sequence] {
            let block = self.tables[sequence][position / self.world.spec.block_size];
            for head in 0..self.world.spec.kv_heads {
                let (key, value) = self.kv.token(1, block, head, position % self.world.spec.block_size);
                keys.extend(key);
                values.extend(value);
            }
        }
        (keys, values)
    }
}

/// q, k and v of a whole sequence after the reference's norms and rotation.
fn rotated(world: &World, sequence: usize) -> Vec<f32> {
    let mut qkv = world.sequences[sequence].clone();
    let positions: Vec<u32> = (0..world.tokens(sequence) as u32).collect();
    let norms = world.qk_norm.as_ref().map(|(q, k)| (q.as_slice(), k.as_slice()));
    reference::rope::rope(&world.spec, &positions, &world.rope, norms, &mut qkv);
    qkv
}

/// Checks what the cache holds and some rows' attention over it.
fn check_against_reference(run: &Run<'_>, sequence: usize, rows: impl Iterator<Item = usize>, what: &str) {
    let spec = &run.world.spec;
    let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let qkv = rotated(run.world, sequence);
    let column = |from: usize, width: usize| -> Vec<f32> {
        qkv.chunks_exact(run.world.width()).flat_map(|row| row[from..from + width].to_vec()).collect()
    };
    let (keys, values) = run.cached(sequence);
    let rounding = if run.world.precision == Precision::F32 { 3e-6 } else { 1.0 / 1024.0 };
    assert_close(&keys, &column(q_width, kv_width), rounding, &format!("{what}: keys"));
    assert_close(&values, &column(q_width + kv_width, kv_width), rounding, &format!("{what}: values"));
    let queries = column(0, q_width);
    for row in rows {
        let mut expected = vec![0.0; q_width];
        let seen = (row + 1) * kv_width;
        let query = &queries[row * q_width..(row + 1) * q_width];
        reference::attention::attention(spec, run.world.window, query, &keys[..seen], &values[..seen], &mut expected);
        let found = &run.outputs[sequence][row * q_width..(row + 1) * q_width];
        assert_close(found, &expected, 3e-5, &format!("{what}: row {row}"));
    }
}

#[test]
fn attention_matches_its_reference_at_block_borders_and_windows() {
    let lengths = [1, 15, 16, 17, 33, 70];
    for (i, sizes) in SIZES.into_iter().enumerate() {
        for window in [None, Some(1), Some(7), Some(40)] {
            for precision in [Precision::Quantised, Precision::F32] {
                let world = World::new(sizes, &lengths, window, precision);
                for &isa in Isa::available() {
                    let pool = Pool::new(1 + i % 3).expect("threads");
                    let mut run = Run::new(&world, isa, &pool, 5);
                    let whole: Vec<_> = (0..lengths.len()).map(|i| (i, world.tokens(i))).collect();
                    run.step(&whole);
                    for (sequence, length) in lengths.iter().enumerate() {
                        let what = format!("{} {sizes:?} {window:?} {precision:?} {sequence}", isa.name());
                        check_against_reference(&run, sequence, 0..*length, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn head_norms_come_before_the_rotation() {
    for precision in [Precision::Quantised, Precision::F32] {
        let mut world = World::new((4, 2, 64, 16), &[40], None, precision);
        world.qk_norm = Some((random(&mut rng(8), 64, 2.0), random(&mut rng(9), 64, 2.0)));
        for (isa, pool) in machines() {
            let mut run = Run::new(&world, isa, &pool, 1);
            run.chunks(0, 13);
            check_against_reference(&run, 0, 0..40, isa.name());
        }
    }
}

#[test]
fn a_row_has_the_same_bits_however_its_sequence_is_run() {
    for (sizes, window) in [((9, 3, 64, 16), None), ((9, 3, 64, 16), Some(40)), ((14, 2, 34, 5), Some(33))] {
        for precision in [Precision::Quantised, Precision::F32] {
            let world = World::new(sizes, &[150, 90, 1, 61], window, precision);
            for &isa in Isa::available() {
                let pools = [1, 2, 3].map(|threads| Pool::new(threads).expect("threads"));
                let alone = |pool, chunk, shuffle| {
                    let mut run = Run::new(&world, isa, pool, shuffle);
                    run.chunks(0, chunk);
                    bits(&run.outputs[0])
                };
                let expected = alone(&pools[0], 150, 1);
                for (i, chunk) in [1, 7, 16, 33, 150].into_iter().enumerate() {
                    assert_eq!(alone(&pools[i % 3], chunk, 2 + i as u64), expected, "{} chunks of {chunk}", isa.name());
                }
                let mut run = Run::new(&world, isa, &pools[1], 9);
                run.step(&[(1, 17), (0, 20), (3, 61)]);
                run.step(&[(0, 1), (1, 1), (2, 1)]);
                run.step(&[(1, 60), (0, 128)]);
                run.step(&[(1, 12), (0, 1)]);
                assert_eq!(bits(&run.outputs[0]), expected, "{} among others", isa.name());
            }
        }
    }
}

#[test]
fn sharing_the_spans_of_a_long_sequence_changes_no_bit() {
    // Work enough for the last step, a single row, to be shared at all.
    let length = 2_100;
    for (window, precision) in [(None, Precision::Quantised), (Some(1_500), Precision::F32)] {
        let world = World::new((6, 1, 32, 16), &[length, 40], window, precision);
        for &isa in Isa::available() {
            let run = |threads: usize, beside: bool| {
                let pool = Pool::new(threads).expect("threads");
                let mut run = Run::new(&world, isa, &pool, 3);
                run.step(&[(0, length - 2)]);
                run.step(&[(0, 1)]);
                // With a second sequence there are tiles enough, and spans are not shared.
                run.step(if beside { &[(0, 1), (1, 40)] } else { &[(0, 1)] });
                check_against_reference(
                    &run,
                    0,
                    [0, 1_023, 1_024, 2_048, length - 2, length - 1].into_iter(),
                    isa.name(),
                );
                bits(&run.outputs[0])
            };
            let expected = run(1, false);
            for (threads, beside) in [(2, false), (3, false), (2, true)] {
                assert_eq!(run(threads, beside), expected, "{} {threads} threads", isa.name());
            }
        }
    }
}

#[test]
fn what_a_row_may_not_see_is_not_touched() {
    let (tokens, window) = (60, 20);
    for precision in [Precision::Quantised, Precision::F32] {
        let clean = World::new((9, 3, 64, 16), &[tokens], Some(window), precision);
        let mut poisoned = World::new((9, 3, 64, 16), &[tokens], Some(window), precision);
        // Token 25's key and value: rows 25..45 see them, the others must not notice.
        let (width, q_width) = (clean.width(), 9 * 64);
        poisoned.sequences[0][25 * width + q_width..26 * width].fill(f32::NAN);
        for (isa, pool) in machines() {
            let outputs = [&clean, &poisoned].map(|world| {
                let mut run = Run::new(world, isa, &pool, 4);
                run.step(&[(0, tokens)]);
                run.outputs.swap_remove(0)
            });
            let [clean, poisoned] = outputs.map(|output| output.chunks(q_width).map(bits).collect::<Vec<_>>());
            assert_eq!(clean[..25], poisoned[..25], "{}", isa.name());
            assert_eq!(clean[45..], poisoned[45..], "{}", isa.name());
            let seen = poisoned[25..45].iter().flatten();
            assert!(seen.into_iter().all(|value| f32::from_bits(*value).is_nan()), "{}", isa.name());
        }
    }
}

#[test]
fn page_bytes_are_what_the_layout_says() {
    let spec = World::new((9, 3, 64, 16), &[1], None, Precision::F32).spec;
    let numbers = 30 * 3 * 16 * 64 * 2;
    assert_eq!(page_bytes(&spec, 30, Precision::Quantised), numbers * 2);
    assert_eq!(page_bytes(&spec, 30, Precision::F32), numbers * 4);
}

#[test]
fn random_steps_agree_with_the_reference() {
    let mut rng = rng(77);
    for round in 0..12 {
        let sizes = SIZES[rng.random_range(0..SIZES.len())];
        let window = [None, Some(rng.random_range(1..60))][round % 2];
        let lengths: Vec<usize> = (0..4).map(|_| rng.random_range(1..90)).collect();
        let world = World::new(sizes, &lengths, window, [Precision::Quantised, Precision::F32][round / 2 % 2]);
        let pool = Pool::new(2).expect("threads");
        for &isa in Isa::available() {
            let mut run = Run::new(&world, isa, &pool, round as u64);
            loop {
                let mut parts = Vec::new();
                for (sequence, tokens) in lengths.iter().enumerate() {
                    let left = tokens - run.done[sequence];
                    if left > 0 && rng.random_bool(0.7) {
                        parts.push((sequence, rng.random_range(1..=left.min(30))));
                    }
                }
                if !parts.is_empty() {
                    run.step(&parts);
                } else if run.done == lengths {
                    break;
                }
            }
            for (sequence, length) in lengths.iter().enumerate() {
                let what = format!("round {round} {} {sizes:?} {window:?}", isa.name());
                check_against_reference(&run, sequence, 0..*length, &what);
            }
        }
    }
}

#[test]
#[should_panic(expected = "1 drawn tokens, where each sampling is done when it returns")]
fn tokens_that_the_host_does_not_know_are_refused() {
    let world = World::new((1, 1, 16, 4), &[1], None, Precision::F32);
    let cpu = Cpu::new(1, world.precision, Isa::detect()).expect("threads");
    let mut pages = cpu.new_pages(&world.spec, 1, 1).expect("memory");
    let step = StepRows {
        tokens: &[0],
        drawn: &[DrawnToken { row: 0, sample: 0 }],
        positions: &[0],
        sequences: &[SequenceRows { row: 0, rows: 1, table: 0, blocks: 1 }],
        block_tables: &[0],
    };
    let mut qkv = CpuTensor::from_values(&world.sequences[0], world.width()).expect("memory");
    let _ = cpu.rope_and_store(&world.spec, &step, world.layer(None), &mut qkv, &mut pages);
}
