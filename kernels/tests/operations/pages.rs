//! Pages that go from KV to adapters and back, through the backend's interface.

use std::sync::{Arc, mpsc};

use openlora_kernels::cpu::lora::CpuAdapter;
use openlora_kernels::cpu::pages::{CpuPageSet, CpuPages};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{
    AttentionSpec, Backend, BlockFormat, KernelError, LayerAttention, LinearSpec, LoraRows, LoraSegment, Precision,
    RopeTable, SequenceRows, SiteSpan, StepRows, TensorSource, conformance,
};
use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, Site, SiteWeights};

use crate::{bits, poisoned, random, rng};

const LAYERS: usize = 2;
const SPEC: AttentionSpec =
    AttentionSpec { heads: 4, kv_heads: 2, head_dim: 20, block_size: 16, scale: 0.25, norm_eps: 1e-6 };
const WIDTH: usize = (4 + 2 * 2) * 20;
/// Of the one sequence: three blocks.
const TOKENS: usize = 41;
const INPUTS: usize = 70;
const OUTPUTS: usize = 90;
const SITE: Site = Site { layer: 1, module: Module::Up };

struct World {
    cpu: Cpu,
    linear: <Cpu as Backend>::Linear,
    weights: AdapterWeights,
    /// The adapter's.
    pages: usize,
}

impl World {
    fn new(precision: Precision) -> Self {
        let cpu = Cpu::new(2, precision, Isa::detect()).expect("threads");
        let mut rng = rng(41);
        let base: Vec<u8> = random(&mut rng, INPUTS * OUTPUTS, 0.2).iter().flat_map(|x| x.to_le_bytes()).collect();
        let (name, format) = ("up", BlockFormat::F32);
        let part = TensorSource { name, format, rows: OUTPUTS, cols: INPUTS, bytes: &base, row_order: None };
        let span = SiteSpan { site: SITE, index: SITE.index(LAYERS), outputs: 0..OUTPUTS };
        let spec = LinearSpec { parts: vec![part], bias: None, sites: vec![span] };
        let linear = cpu.load_linear(&spec).expect("a sound linear");
        let rank = 150;
        let mut matrix = |rows, cols| {
            let elements = Elements::F32(random(&mut rng, rows * cols, 0.1));
            Matrix { rows, cols, elements }
        };
        let (a, b) = (matrix(rank, INPUTS), matrix(OUTPUTS, rank));
        let site = SiteWeights { site: SITE, a, b, scale: 0.5, b_bias: None, magnitude: None };
        let weights = AdapterWeights { generation: Generation([3; 32]), sites: vec![site] };
        let page_bytes = cpu.page_bytes(&SPEC, LAYERS);
        let pages = cpu.adapter_pages(&weights.sizes(), page_bytes);
        assert!(pages >= 4, "an adapter of {pages} pages is not cut");
        Self { cpu, linear, weights, pages }
    }

    /// A pool full of NaN.
    fn pool(&self, pages: usize) -> CpuPages {
        let mut pool = self.cpu.new_pages(&SPEC, LAYERS, pages).expect("memory");
        pool.fill(f32::NAN);
        pool
    }

    fn load(&self, pages: CpuPageSet) -> CpuAdapter {
        self.cpu.load_adapter(&self.weights, &[None], LAYERS, pages).expect("it fits")
    }

    /// The sequence's keys and values into `table`, a part at a time, and what its last rows attend to in every layer.
    fn attend(&self, pool: &mut CpuPages, table: &[u32]) -> Result<Vec<u32>, KernelError> {
        let half = SPEC.head_dim / 2;
        let rope =
            RopeTable { rotary_dim: SPEC.head_dim, cos: vec![0.6; TOKENS * half], sin: vec![0.8; TOKENS * half] };
        let mut found = Vec::new();
        for layer in 0..LAYERS {
            let values = random(&mut rng(layer as u64), TOKENS * WIDTH, 2.0);
            let layer = LayerAttention { layer, window: None, rope: &rope, qk_norm: None };
            for rows in [0..30, 30..TOKENS] {
                let mut qkv = conformance::upload(&self.cpu, &values[rows.start * WIDTH..rows.end * WIDTH], WIDTH);
                let positions: Vec<u32> = rows.clone().map(|position| position as u32).collect();
                let tokens = vec![0; rows.len()];
                let sequences = [SequenceRows { row: 0, rows: rows.len(), table: 0, blocks: table.len() }];
                let step =
                    StepRows { tokens: &tokens, positions: &positions, sequences: &sequences, block_tables: table };
                self.cpu.rope_and_store(&SPEC, &step, layer, &mut qkv, pool)?;
                let mut out = poisoned(rows.len(), SPEC.heads * SPEC.head_dim);
                self.cpu.attention(&SPEC, &step, layer, &qkv, pool, &mut out)?;
                found.extend(bits(out.values()));
            }
        }
        Ok(found)
    }

    /// The linear with the adapter for some rows, others without.
    fn apply(&self, adapter: &CpuAdapter) -> Vec<u32> {
        let x = conformance::upload(&self.cpu, &random(&mut rng(9), 7 * INPUTS, 1.0), INPUTS);
        let mut out = poisoned(7, OUTPUTS);
        let segments =
            [LoraSegment { row: 0, rows: 2, adapter: None }, LoraSegment { row: 2, rows: 5, adapter: Some(adapter) }];
        self.cpu.linear(&self.linear, &LoraRows { segments: &segments }, &x, &mut out).expect("linear");
        assert!(out.values().iter().all(|value| value.is_finite()));
        bits(out.values())
    }

    /// What [`Self::attend`] and [`Self::apply`] give on memory of their own.
    fn expected(&self) -> (Vec<u32>, Vec<u32>) {
        let attended = self.attend(&mut self.pool(3), &[0, 1, 2]).expect("free pages");
        assert!(attended.iter().all(|value| f32::from_bits(*value).is_finite()));
        let mut pool = self.pool(self.pages);
        let all: Vec<u32> = (0..self.pages as u32).collect();
        (attended, self.apply(&self.load(pool.take(&all).expect("free pages"))))
    }
}

#[test]
fn pages_that_change_owner_give_the_same_bits_as_fresh_ones() {
    for precision in [Precision::Quantised, Precision::F32] {
        let world = World::new(precision);
        let (attended, applied) = world.expected();
        let mut pool = world.pool(world.pages + 3);
        let count = pool_pages(&world);
        // Every page is KV and an adapter's in turn.
        for round in 0..count {
            let mut order: Vec<u32> = (0..count).map(|page| (page + round) % count).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            let (table, pages) = order.split_at(3);
            let adapter = world.load(world.cpu.take_pages(&mut pool, pages).expect("free pages"));
            assert_eq!(world.apply(&adapter), applied, "{precision:?} round {round}");
            assert_eq!(world.attend(&mut pool, table).expect("free pages"), attended, "{precision:?} round {round}");
            assert_eq!(world.apply(&adapter), applied, "{precision:?} round {round}, after KV was written");
        }
    }
}

fn pool_pages(world: &World) -> u32 {
    world.pages as u32 + 3
}

#[test]
fn a_block_table_that_names_an_adapters_page_is_refused_and_changes_nothing() {
    let world = World::new(Precision::Quantised);
    let (attended, applied) = world.expected();
    let mut pool = world.pool(world.pages + 3);
    let pages: Vec<u32> = (2..2 + world.pages as u32).collect();
    let set = world.cpu.take_pages(&mut pool, &pages).expect("free pages");
    let last = pool_pages(&world) - 1;
    let refused = |pool: &mut CpuPages, what: &str| {
        for table in [[0, 2, last], [pages[world.pages - 1], 0, 1], [0, 1, last + 1]] {
            let error = world.attend(pool, &table).expect_err("not KV");
            assert!(matches!(error, KernelError::Page { .. }), "{what} {table:?}: {error}");
        }
    };
    refused(&mut pool, "while it loads");
    let adapter = world.load(set);
    refused(&mut pool, "when it is loaded");
    assert_eq!(world.apply(&adapter), applied);
    let error = world.cpu.take_pages(&mut pool, &[0, 3]).expect_err("owned already");
    assert!(matches!(error, KernelError::Page { page: 3, .. }), "{error}");
    drop(adapter);
    assert_eq!(world.attend(&mut pool, &[pages[1], 2, last]).expect("free again"), attended);
}

#[test]
fn adapters_are_loaded_on_other_threads_while_steps_run() {
    for precision in [Precision::Quantised, Precision::F32] {
        let world = Arc::new(World::new(precision));
        let (attended, applied) = world.expected();
        let mut pool = world.pool(2 * world.pages + 3);
        let count = 2 * world.pages as u32 + 3;
        let (to_load, sets) = mpsc::channel::<CpuPageSet>();
        let (loaded, adapters) = mpsc::channel();
        let loader = std::thread::spawn({
            let world = Arc::clone(&world);
            move || sets.into_iter().for_each(|set| loaded.send(world.load(set)).expect("somebody waits"))
        });
        let mut resident: Option<CpuAdapter> = None;
        let mut free: Vec<u32> = (0..count).collect();
        let mut held = Vec::new();
        for round in 0..40 {
            let pages: Vec<u32> = free.drain(..world.pages).collect();
            to_load.send(pool.take(&pages).expect("free pages")).expect("the loader lives");
            // While it is being loaded: KV beside it, and the adapter that was loaded before.
            for _ in 0..3 {
                assert_eq!(world.attend(&mut pool, &free[..3]).expect("free pages"), attended, "round {round}");
                if let Some(adapter) = &resident {
                    assert_eq!(world.apply(adapter), applied, "round {round}");
                }
            }
            // The one before is dropped elsewhere; only when that is over are its pages named again.
            if let Some(adapter) = resident.take() {
                std::thread::spawn(move || drop(adapter)).join().expect("no panic");
                free.append(&mut held);
            }
            held = pages;
            resident = Some(adapters.recv().expect("the loader lives"));
        }
        drop(to_load);
        loader.join().expect("no panic");
    }
}
