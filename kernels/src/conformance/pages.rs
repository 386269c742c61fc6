//! Pages that go from KV to adapters and back: each has one owner at a time, and who had it before leaves no trace.
//!
//! That an adapter is refused whose page has changed owner behind its back cannot be brought about through [`Backend`]; a
//! backend's own tests show it.

use std::sync::mpsc;

use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, Site, SiteWeights};

use super::{Random, upload};
use crate::{
    AttentionSpec, Backend, BlockFormat, KernelError, LayerAttention, LinearSpec, LoraRows, LoraSegment, RopeTable,
    SequenceRows, SiteSpan, StepRows, TensorSource,
};

const LAYERS: usize = 2;
const SPEC: AttentionSpec =
    AttentionSpec { heads: 4, kv_heads: 2, head_dim: 20, block_size: 16, scale: 0.25, norm_eps: 1e-6 };
const WIDTH: usize = (4 + 2 * 2) * 20;
/// Of the one sequence, in [`BLOCKS`] blocks.
const TOKENS: usize = 41;
const BLOCKS: usize = 3;
const INPUTS: usize = 70;
const OUTPUTS: usize = 90;
const RANK: usize = 150;
const SITE: Site = Site { layer: 1, module: Module::Up };

/// A sequence, and a linear with an adapter of several pages.
struct World<'a, B: Backend> {
    backend: &'a B,
    /// Fills a pool with NaN.
    poison: fn(&mut B::Pages),
    linear: B::Linear,
    weights: AdapterWeights,
    /// The adapter's.
    pages: usize,
}

fn numbers(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.number() * scale).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|value| value.is_finite()), "something was read that nobody wrote");
    values.iter().map(|value| value.to_bits()).collect()
}

impl<'a, B: Backend> World<'a, B> {
    fn new(backend: &'a B, poison: fn(&mut B::Pages)) -> Self {
        let base: Vec<u8> = numbers(1, INPUTS * OUTPUTS, 0.2).iter().flat_map(|x| x.to_le_bytes()).collect();
        let (name, format) = ("up", BlockFormat::F32);
        let part = TensorSource { name, format, rows: OUTPUTS, cols: INPUTS, bytes: &base, row_order: None };
        let span = SiteSpan { site: SITE, index: SITE.index(LAYERS), outputs: 0..OUTPUTS };
        let spec = LinearSpec { parts: vec![part], bias: None, sites: vec![span] };
        let linear = backend.load_linear(&spec).expect("a sound linear");
        let matrix = |seed, rows, cols| {
            let elements = Elements::F32(numbers(seed, rows * cols, 0.1));
            Matrix { rows, cols, elements }
        };
        let (a, b) = (matrix(2, RANK, INPUTS), matrix(3, OUTPUTS, RANK));
        let site = SiteWeights { site: SITE, a, b, scale: 0.5, b_bias: None, magnitude: None };
        let weights = AdapterWeights { generation: Generation([3; 32]), sites: vec![site] };
        let pages = backend.adapter_pages(&weights.sizes(), backend.page_bytes(&SPEC, LAYERS));
        assert!(pages >= 4, "an adapter of {pages} pages is not cut");
        Self { backend, poison, linear, weights, pages }
    }

    fn pool(&self, pages: usize) -> B::Pages {
        let mut pool = self.backend.new_pages(&SPEC, LAYERS, pages).expect("memory");
        (self.poison)(&mut pool);
        pool
    }

    fn load(&self, pages: B::PageSet) -> B::Adapter {
        self.backend.load_adapter(&self.weights, &[None], LAYERS, pages).expect("it fits")
    }

    /// The sequence's keys and values into `table`, a part at a time, and what its rows attend to in every layer.
    fn attend(&self, pool: &mut B::Pages, table: &[u32]) -> Result<Vec<u32>, KernelError> {
        let half = SPEC.head_dim / 2;
        let rope =
            RopeTable { rotary_dim: SPEC.head_dim, cos: vec![0.6; TOKENS * half], sin: vec![0.8; TOKENS * half] };
        let rope = self.backend.load_rope(&rope).expect("memory");
        let mut found = Vec::new();
        for layer in 0..LAYERS {
            let values = numbers(10 + layer as u64, TOKENS * WIDTH, 2.0);
            let layer = LayerAttention { layer, window: None, rope: &rope, qk_norm: None };
            for rows in [0..30, 30..TOKENS] {
                let mut qkv = upload(self.backend, &values[rows.start * WIDTH..rows.end * WIDTH], WIDTH);
                let positions: Vec<u32> = rows.clone().map(|position| position as u32).collect();
                let tokens = vec![0; rows.len()];
                let sequences = [SequenceRows { row: 0, rows: rows.len(), table: 0, blocks: table.len() }];
                let step = StepRows {
                    tokens: &tokens,
                    drawn: &[],
                    positions: &positions,
                    sequences: &sequences,
                    block_tables: table,
                };
                self.backend.rope_and_store(&SPEC, &step, layer, &mut qkv, pool)?;
                let mut out = self.poisoned(rows.len(), SPEC.heads * SPEC.head_dim);
                self.backend.attention(&SPEC, &step, layer, &qkv, pool, &mut out)?;
                found.extend(bits(&self.backend.read_tensor(&out)));
            }
        }
        Ok(found)
    }

    /// The linear with the adapter for some rows, others without.
    fn apply(&self, adapter: &B::Adapter) -> Vec<u32> {
        let x = upload(self.backend, &numbers(9, 7 * INPUTS, 1.0), INPUTS);
        let mut out = self.poisoned(7, OUTPUTS);
        let segments =
            [LoraSegment { row: 0, rows: 2, adapter: None }, LoraSegment { row: 2, rows: 5, adapter: Some(adapter) }];
        self.backend.linear(&self.linear, &LoraRows { segments: &segments }, &x, &mut out).expect("linear");
        bits(&self.backend.read_tensor(&out))
    }

    fn poisoned(&self, rows: usize, width: usize) -> B::Tensor {
        upload(self.backend, &vec![f32::NAN; rows * width], width)
    }

    /// What [`Self::attend`] and [`Self::apply`] give on memory of their own.
    fn expected(&self) -> (Vec<u32>, Vec<u32>) {
        let attended = self.attend(&mut self.pool(BLOCKS), &[0, 1, 2]).expect("free pages");
        let mut pool = self.pool(self.pages);
        let all: Vec<u32> = (0..self.pages as u32).collect();
        (attended, self.apply(&self.load(self.backend.take_pages(&mut pool, &all).expect("free pages"))))
    }
}

/// Pages that change owner give the same bits as fresh ones: every page of a pool is KV and an adapter's in turn, in any
/// order, and neither owner disturbs the other. `poison` fills a pool with NaN.
///
/// # Panics
/// When they do not.
pub fn pages_that_change_owner_give_the_same_bits_as_fresh_ones<B: Backend>(backend: &B, poison: fn(&mut B::Pages)) {
    let world = World::new(backend, poison);
    let (attended, applied) = world.expected();
    let count = world.pages + BLOCKS;
    let mut pool = world.pool(count);
    for round in 0..count {
        let mut order: Vec<u32> = (0..count).map(|page| ((page + round) % count) as u32).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let (table, pages) = order.split_at(BLOCKS);
        let adapter = world.load(backend.take_pages(&mut pool, pages).expect("free pages"));
        assert_eq!(world.apply(&adapter), applied, "round {round}");
        assert_eq!(world.attend(&mut pool, table).expect("free pages"), attended, "round {round}");
        assert_eq!(world.apply(&adapter), applied, "round {round}, after KV was written");
    }
}

/// A page has one owner: a block table that names an adapter's page, or none of the pool, is refused and changes nothing,
/// while the adapter loads and after; a second adapter is refused it, and gets none of what it asked for; who gives a page
/// back, loaded or not, gives it to all. `poison` fills a pool with NaN.
///
/// # Panics
/// When it has not.
pub fn a_page_has_one_owner<B: Backend>(backend: &B, poison: fn(&mut B::Pages)) {
    let world = World::new(backend, poison);
    let (attended, applied) = world.expected();
    let count = (world.pages + BLOCKS) as u32;
    let mut pool = world.pool(count as usize);
    let pages: Vec<u32> = (2..count - 1).collect();
    let refused = |pool: &mut B::Pages, what: &str| {
        for (table, page) in [([0, 2, 1], 2), ([count - 2, 0, 1], count - 2), ([0, 1, count], count)] {
            let error = world.attend(pool, &table).expect_err("not KV");
            let named = matches!(error, KernelError::Page { page: named, .. } if named == page);
            assert!(named, "{what} {table:?}: {error}");
        }
        for (taken, page) in [(vec![0, 3], 3), (vec![1, 1], 1), (vec![0, count], count)] {
            let Err(error) = backend.take_pages(pool, &taken) else { panic!("{what}: {taken:?} were taken") };
            let named = matches!(error, KernelError::Page { page: named, .. } if named == page);
            assert!(named, "{what} {taken:?}: {error}");
        }
        // What could not be taken together was not taken at all.
        assert_eq!(world.attend(pool, &[0, 1, count - 1]).expect("free pages"), attended, "{what}");
    };
    let set = backend.take_pages(&mut pool, &pages).expect("free pages");
    refused(&mut pool, "while it loads");
    let adapter = world.load(set);
    refused(&mut pool, "when it is loaded");
    assert_eq!(world.apply(&adapter), applied);
    drop(adapter);
    assert_eq!(world.attend(&mut pool, &[pages[1], 2, count - 1]).expect("free again"), attended);
    drop(backend.take_pages(&mut pool, &pages).expect("free again"));
    // A load that fails gives its pages back as well.
    let few = backend.take_pages(&mut pool, &pages[1..]).expect("free again");
    let Err(error) = backend.load_adapter(&world.weights, &[None], LAYERS, few) else { panic!("a page is missing") };
    let counted = matches!(error, KernelError::AdapterPages { needed, given } if needed == given + 1);
    assert!(counted, "{error}");
    assert_eq!(world.apply(&world.load(backend.take_pages(&mut pool, &pages).expect("free again"))), applied);
}

/// Adapters are loaded and dropped on other threads while steps run, and no bit of either changes. `poison` fills a pool with
/// NaN.
///
/// # Panics
/// When one does.
pub fn adapters_are_loaded_on_other_threads_while_steps_run<B: Backend>(backend: &B, poison: fn(&mut B::Pages)) {
    let world = World::new(backend, poison);
    let (attended, applied) = world.expected();
    let count = 2 * world.pages + BLOCKS;
    let mut pool = world.pool(count);
    std::thread::scope(|threads| {
        let (to_load, sets) = mpsc::channel::<B::PageSet>();
        let (loaded, adapters) = mpsc::channel();
        let world = &world;
        threads.spawn(move || sets.into_iter().for_each(|set| loaded.send(world.load(set)).expect("somebody waits")));
        let mut resident: Option<B::Adapter> = None;
        let mut free: Vec<u32> = (0..count as u32).collect();
        let mut held = Vec::new();
        for round in 0..40 {
            let pages: Vec<u32> = free.drain(..world.pages).collect();
            to_load.send(backend.take_pages(&mut pool, &pages).expect("free pages")).expect("the loader lives");
            // While it is being loaded: KV beside it, and the adapter that was loaded before.
            for _ in 0..3 {
                assert_eq!(world.attend(&mut pool, &free[..BLOCKS]).expect("free pages"), attended, "round {round}");
                if let Some(adapter) = &resident {
                    assert_eq!(world.apply(adapter), applied, "round {round}");
                }
            }
            // The one before is dropped elsewhere; only when that is over are its pages named again.
            if let Some(adapter) = resident.take() {
                threads.spawn(move || drop(adapter)).join().expect("no panic");
                free.append(&mut held);
            }
            held = pages;
            resident = Some(adapters.recv().expect("the loader lives"));
        }
    });
}
