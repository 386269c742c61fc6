//! Adapters on linears and on the embedding table.

use half::{bf16, f16};
use openlora_kernels::cpu::embed::{CpuEmbedding, embed};
use openlora_kernels::cpu::kv::page_bytes;
use openlora_kernels::cpu::lora::{Adapt, CpuAdapter, LoraScratch, apply, rescales};
use openlora_kernels::cpu::pages::CpuPages;
use openlora_kernels::cpu::{CpuTensor, Isa, Pool};
use openlora_kernels::{
    AttentionSpec, BlockFormat, KernelError, LoraRows, LoraSegment, Precision, SiteSpan, TensorSource, reference,
};
use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, Site, SiteWeights};
use rand::Rng;
use rand::rngs::StdRng;
use std::sync::Arc;

use crate::{assert_close, bits, machines, random, rng};

const LAYERS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    F32,
    F16,
    Bf16,
}

fn matrix(rng: &mut StdRng, format: Format, rows: usize, cols: usize, scale: f32) -> Matrix {
    let values = random(rng, rows * cols, scale);
    let elements = match format {
        Format::F32 => Elements::F32(values),
        Format::F16 => Elements::F16(values.into_iter().map(f16::from_f32).collect()),
        Format::Bf16 => Elements::Bf16(values.into_iter().map(bf16::from_f32).collect()),
    };
    Matrix { rows, cols, elements }
}

/// What an adapter has beside A and B.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    b_bias: bool,
    dora: bool,
}

fn site(
    rng: &mut StdRng,
    module: Module,
    (inputs, outputs): (usize, usize),
    rank: usize,
    format: Format,
) -> SiteWeights {
    SiteWeights {
        site: Site { layer: if matches!(module, Module::Embed) { 0 } else { 1 }, module },
        a: matrix(rng, format, rank, inputs, 1.0 / (inputs as f32).sqrt()),
        b: matrix(rng, format, outputs, rank, 1.0 / (rank as f32).sqrt()),
        scale: rng.random_range(0.25..2.0),
        b_bias: None,
        magnitude: None,
    }
}

/// Sizes of KV whose pages, of one layer, hold `elements` numbers, a multiple of 512.
fn page_of(elements: usize) -> AttentionSpec {
    let head_dim = 16 * (elements / 512);
    let spec = AttentionSpec { heads: 1, kv_heads: 1, head_dim, block_size: 16, scale: 1.0, norm_eps: 0.0 };
    assert_eq!(page_bytes(&spec, 1, Precision::F32), elements * 4);
    spec
}

/// Weights and DoRA's output scales of one adapter.
struct Adapter {
    weights: AdapterWeights,
    output_scales: Vec<Option<Vec<f32>>>,
}

impl Adapter {
    fn new(rng: &mut StdRng, mut sites: Vec<SiteWeights>, extras: Extras) -> Self {
        for site in &mut sites {
            site.b_bias = extras.b_bias.then(|| random(rng, site.b.rows, 1.0));
        }
        let output_scales = sites.iter().map(|site| extras.dora.then(|| random(rng, site.b.rows, 1.0))).collect();
        Self { weights: AdapterWeights { generation: Generation([7; 32]), sites }, output_scales }
    }

    /// In pages that hold any of the tests' adapters whole.
    fn load(&self, precision: Precision) -> CpuAdapter {
        self.load_into(&page_of(64 * 512), precision)
    }

    /// In as many pages for KV of `spec` in one layer as it needs, handed out backwards and full of NaN; one fewer is refused.
    fn load_into(&self, spec: &AttentionSpec, precision: Precision) -> CpuAdapter {
        let needed = CpuAdapter::pages(&self.weights.sizes(), page_bytes(spec, 1, precision), precision);
        let mut pool = CpuPages::new(spec, 1, needed, precision).expect("memory");
        pool.fill(f32::NAN);
        let pages: Vec<u32> = (0..needed as u32).rev().collect();
        let mut load = |pages: &[u32]| {
            let pages = pool.take(pages).expect("free");
            CpuAdapter::load(&self.weights, &self.output_scales, LAYERS, precision, pages)
        };
        let error = load(&pages[1..]).expect_err("a page is missing");
        let counted =
            matches!(error, KernelError::AdapterPages { needed: n, given } if (n, given) == (needed, needed - 1));
        assert!(counted, "{needed} pages: {error}");
        load(&pages).expect("a good adapter")
    }

    fn site(&self, site: Site) -> Option<(&SiteWeights, Option<&[f32]>)> {
        let i = self.weights.sites.iter().position(|weights| weights.site == site)?;
        Some((&self.weights.sites[i], self.output_scales[i].as_deref()))
    }
}

/// A fused linear of three sites and a step of rows with mixed adapters.
struct World {
    inputs: usize,
    spans: Vec<SiteSpan>,
    adapters: Vec<Adapter>,
    /// (rows, adapter) of each segment.
    segments: Vec<(usize, Option<usize>)>,
    x: Vec<f32>,
    /// W x without bias.
    product: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl World {
    fn new(seed: u64, inputs: usize, outputs: [usize; 3], segments: Vec<(usize, Option<usize>)>) -> Self {
        let mut rng = rng(seed);
        let mut start = 0;
        let spans = [Module::Q, Module::K, Module::V].into_iter().zip(outputs).map(|(module, outputs)| {
            let site = Site { layer: 1, module };
            start += outputs;
            SiteSpan { site, index: site.index(LAYERS), outputs: start - outputs..start }
        });
        let spans: Vec<_> = spans.collect();
        let rows: usize = segments.iter().map(|segment| segment.0).sum();
        let x = random(&mut rng, rows * inputs, 2.0);
        let product = random(&mut rng, rows * start, 3.0);
        Self { inputs, spans, adapters: Vec::new(), segments, x, product, bias: None }
    }

    fn outputs(&self) -> usize {
        self.spans.last().map_or(0, |span| span.outputs.end)
    }

    /// Adds an adapter with ranks for q, k and v; 0 leaves a site out.
    fn add(&mut self, rng: &mut StdRng, ranks: [usize; 3], format: Format, extras: Extras) {
        let sites = self.spans.iter().zip(ranks).filter(|(_, rank)| *rank > 0);
        let sites =
            sites.map(|(span, rank)| site(rng, span.site.module, (self.inputs, span.outputs.len()), rank, format));
        let sites = sites.collect();
        self.adapters.push(Adapter::new(rng, sites, extras));
    }

    /// What the definition says.
    fn expected(&self) -> Vec<f32> {
        let mut out = self.product.clone();
        let mut adapter_of_row = self.segments.iter().flat_map(|(rows, adapter)| vec![*adapter; *rows]);
        for (out, x) in out.chunks_exact_mut(self.outputs()).zip(self.x.chunks_exact(self.inputs)) {
            let adapter = adapter_of_row.next().expect("one for each row").map(|i| &self.adapters[i]);
            for span in &self.spans {
                let out = &mut out[span.outputs.clone()];
                let bias = self.bias.as_ref().map(|bias| &bias[span.outputs.clone()]);
                match adapter.and_then(|adapter| adapter.site(span.site)) {
                    Some((site, scale)) => reference::lora::linear(site, scale, bias, x, out),
                    None => out.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(out, bias)| *out += bias),
                }
            }
        }
        out
    }

    /// The linear's epilogue as the backend runs it, for some rows with their segments.
    fn run(&self, pool: &Pool, isa: Isa, loaded: &[CpuAdapter], rows: std::ops::Range<usize>) -> Vec<f32> {
        let mut segments = Vec::new();
        let mut row = 0;
        for (count, adapter) in &self.segments {
            let (first, end) = (rows.start.max(row), rows.end.min(row + count));
            if first < end {
                let adapter = adapter.map(|i| &loaded[i]);
                segments.push(LoraSegment { row: first - rows.start, rows: end - first, adapter });
            }
            row += count;
        }
        let lora = LoraRows { segments: &segments };
        let outputs = self.outputs();
        let x = &self.x[rows.start * self.inputs..rows.end * self.inputs];
        let x = CpuTensor::from_values(x, self.inputs).expect("memory");
        let mut out = self.product[rows.start * outputs..rows.end * outputs].to_vec();
        let bias = self.bias.as_deref();
        let deferred = bias.filter(|_| rescales(&self.spans, lora));
        if deferred.is_none() {
            for row in out.chunks_exact_mut(outputs) {
                row.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(out, bias)| *out += bias);
            }
        }
        let mut out = CpuTensor::from_values(&out, outputs).expect("memory");
        let adapt = Adapt { sites: &self.spans, lora, bias: deferred };
        let mut scratch = LoraScratch::default();
        scratch.reserve(rows.len(), 3 * 256);
        apply(pool, isa, adapt, &x, &mut out, &mut scratch).expect("pages that are the adapters' own");
        pool.check().expect("no thread panicked");
        out.values().to_vec()
    }

    fn load(&self, precision: Precision) -> Vec<CpuAdapter> {
        self.adapters.iter().map(|adapter| adapter.load(precision)).collect()
    }
}

/// Ranks 1 to 256 in one call, sites left out, rows without an adapter, one adapter twice.
fn mixed(inputs: usize, outputs: [usize; 3], rows: [usize; 9], format: Format, extras: Extras) -> World {
    let adapters = [Some(0), None, Some(1), Some(2), Some(3), Some(0), Some(4), None, Some(5)];
    let mut world = World::new(11, inputs, outputs, rows.into_iter().zip(adapters).collect());
    let mut rng = rng(12);
    for (i, ranks) in [[8, 0, 8], [1, 3, 13], [0, 64, 0], [256, 16, 1], [5, 5, 5], [0, 0, 2]].into_iter().enumerate() {
        // DoRA for some adapters and not for others.
        let extras = Extras { dora: extras.dora && i % 2 == 0, ..extras };
        world.add(&mut rng, ranks, format, extras);
    }
    world
}

#[test]
fn mixed_ranks_match_the_definition() {
    let sizes = [
        (576, [576, 192, 192], [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (40, [96, 33, 200], [7, 1, 3, 2, 5, 1, 35, 4, 1]),
        (17, [1, 16, 15], [1, 70, 2, 33, 1, 6, 4, 1, 8]),
    ];
    for (inputs, outputs, rows) in sizes {
        for extras in [Extras::default(), Extras { b_bias: true, dora: false }, Extras { b_bias: true, dora: true }] {
            let mut world = mixed(inputs, outputs, rows, Format::F16, extras);
            world.bias = extras.dora.then(|| random(&mut rng(13), world.outputs(), 2.0));
            let expected = world.expected();
            for precision in [Precision::Quantised, Precision::F32] {
                let loaded = world.load(precision);
                for (isa, pool) in machines() {
                    let found = world.run(&pool, isa, &loaded, 0..rows.iter().sum());
                    let what = format!("{} {inputs} {extras:?} {precision:?}", isa.name());
                    assert_close(&found, &expected, 1e-5, &what);
                }
            }
        }
    }
}

#[test]
fn factors_cut_into_pages_keep_every_bit() {
    // Pages of one row of 576 elements, of a few, and of several whole factors.
    let pages = [2, 5, 16].map(|panels| page_of(panels * 512));
    let rows = [1, 2, 9, 33, 1, 3, 2, 1, 1];
    for (inputs, outputs) in [(576, [576, 192, 192]), (41, [97, 33, 200]), (17, [1, 16, 15])] {
        for extras in [Extras::default(), Extras { b_bias: true, dora: true }] {
            let mut world = mixed(inputs, outputs, rows, Format::F16, extras);
            world.bias = extras.dora.then(|| random(&mut rng(13), world.outputs(), 2.0));
            let (expected, total) = (world.expected(), rows.iter().sum());
            for precision in [Precision::Quantised, Precision::F32] {
                let whole = world.load(precision);
                let cut = pages.each_ref().map(|spec| {
                    let load = |adapter: &Adapter| adapter.load_into(spec, precision);
                    world.adapters.iter().map(load).collect::<Vec<_>>()
                });
                for (isa, pool) in machines() {
                    let whole = world.run(&pool, isa, &whole, 0..total);
                    assert_close(&whole, &expected, 1e-5, isa.name());
                    for cut in &cut {
                        assert_eq!(bits(&world.run(&pool, isa, cut, 0..total)), bits(&whole), "{}", isa.name());
                        let alone = world.run(&pool, isa, cut, 5..6);
                        assert_eq!(bits(&alone), bits(&whole[5 * world.outputs()..6 * world.outputs()]));
                    }
                }
            }
        }
    }
}

#[test]
fn factors_whose_rows_are_longer_than_a_page_match_the_definition() {
    let page = page_of(512);
    let rows = [1, 2, 5, 33, 1, 3, 2, 1, 1];
    // Rows of A of six pages and a little, rows of B of up to four, and both with what just fits a page or does not.
    for (inputs, outputs, cut_a) in [(3_089, [48, 513, 33], true), (41, [2_003, 512, 1_300], false)] {
        let mut world = mixed(inputs, outputs, rows, Format::F16, Extras { b_bias: true, dora: true });
        world.bias = Some(random(&mut rng(13), world.outputs(), 2.0));
        let (expected, width, total) = (world.expected(), world.outputs(), rows.iter().sum());
        for precision in [Precision::Quantised, Precision::F32] {
            let whole = world.load(precision);
            let cut: Vec<_> = world.adapters.iter().map(|adapter| adapter.load_into(&page, precision)).collect();
            for (isa, pool) in machines() {
                let found = world.run(&pool, isa, &cut, 0..total);
                assert_close(&found, &expected, 1e-5, &format!("{} {inputs} {precision:?}", isa.name()));
                for row in [0, 2, 12, total - 1] {
                    let alone = bits(&world.run(&pool, isa, &cut, row..row + 1));
                    assert_eq!(alone, bits(&found[row * width..(row + 1) * width]), "{} row {row}", isa.name());
                }
                // Outputs are chains over the ranks wherever B is cut; strips of A are added up one by one.
                if !cut_a {
                    assert_eq!(bits(&found), bits(&world.run(&pool, isa, &whole, 0..total)), "{}", isa.name());
                }
            }
        }
    }
}

#[test]
fn factors_of_other_formats_are_rounded_once() {
    for format in [Format::F32, Format::Bf16] {
        let world = mixed(100, [64, 48, 80], [2, 1, 3, 1, 1, 1, 1, 1, 1], format, Extras::default());
        let expected = world.expected();
        let pool = Pool::new(1).expect("threads");
        for &isa in Isa::available() {
            let exact = world.run(&pool, isa, &world.load(Precision::F32), 0..12);
            assert_close(&exact, &expected, 1e-5, "f32");
            // bfloat16's 8 bits fit f16's 11, f32's do not.
            let tolerance = if format == Format::Bf16 { 1e-5 } else { 1.5e-3 };
            let rounded = world.run(&pool, isa, &world.load(Precision::Quantised), 0..12);
            assert_close(&rounded, &expected, tolerance, "f16");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    let rows = [3, 2, 40, 1, 33, 1, 5, 1, 4];
    for (extras, biased) in [(Extras::default(), false), (Extras { b_bias: true, dora: true }, true)] {
        let mut world = mixed(120, [70, 33, 64], rows, Format::F32, extras);
        world.bias = biased.then(|| random(&mut rng(14), world.outputs(), 2.0));
        let total = rows.iter().sum();
        for precision in [Precision::Quantised, Precision::F32] {
            let loaded = world.load(precision);
            for &isa in Isa::available() {
                let pools = [1, 2, 3].map(|threads| Pool::new(threads).expect("threads"));
                let together = bits(&world.run(&pools[0], isa, &loaded, 0..total));
                for pool in &pools[1..] {
                    assert_eq!(bits(&world.run(pool, isa, &loaded, 0..total)), together);
                }
                let width = world.outputs();
                for row in 0..total {
                    let alone = bits(&world.run(&pools[row % 3], isa, &loaded, row..row + 1));
                    assert_eq!(alone, together[row * width..(row + 1) * width], "{} row {row}", isa.name());
                }
                for (first, end) in [(1, 37), (36, 41), (60, total)] {
                    let part = bits(&world.run(&pools[1], isa, &loaded, first..end));
                    assert_eq!(part, together[first * width..end * width], "{} rows {first}..{end}", isa.name());
                }
            }
        }
    }
}

#[test]
fn rows_without_an_adapter_keep_their_bits() {
    let rows = [1, 5, 1, 1, 1, 1, 1, 7, 1];
    let world = mixed(64, [32, 32, 32], rows, Format::F16, Extras { b_bias: true, dora: true });
    let width = world.outputs();
    for (isa, pool) in machines() {
        let found = world.run(&pool, isa, &world.load(Precision::Quantised), 0..19);
        for row in (1..6).chain(11..18) {
            assert_eq!(bits(&found[row * width..][..width]), bits(&world.product[row * width..][..width]));
        }
        let base =
            World { segments: vec![(19, None)], ..mixed(64, [32, 32, 32], rows, Format::F16, Extras::default()) };
        assert_eq!(bits(&base.run(&pool, isa, &[], 0..19)), bits(&base.product));
    }
}

#[test]
fn adapters_of_the_embedding_table_match_the_definition() {
    check_embedding(60, 72, &page_of(1_024));
}

#[test]
fn adapters_of_an_embedding_table_whose_rows_are_longer_than_a_page_match_the_definition() {
    check_embedding(5_003, 1_209, &page_of(512));
}

fn check_embedding(vocab: usize, hidden: usize, page: &AttentionSpec) {
    let mut rng = rng(15);
    let adapters: Vec<Adapter> = [(8, false), (13, true), (64, false)]
        .into_iter()
        .map(|(rank, dora)| {
            let site = site(&mut rng, Module::Embed, (vocab, hidden), rank, Format::F16);
            Adapter::new(&mut rng, vec![site], Extras { b_bias: dora, dora })
        })
        .collect();
    let values = random(&mut rng, vocab * hidden, 1.0);
    let bytes: Arc<Vec<u8>> = Arc::new(values.iter().flat_map(|value| value.to_le_bytes()).collect());
    let (name, format) = ("model.embed_tokens.weight", BlockFormat::F32);
    let source = TensorSource { name, format, rows: vocab, cols: hidden, bytes: &bytes, row_order: None };
    let table = CpuEmbedding::new(&source, bytes.clone(), 0).expect("a good table");
    let segments = [(2, Some(0)), (3, None), (4, Some(1)), (1, Some(2)), (1, Some(0))];
    // The last token, the first, and some all over the table.
    let tokens: Vec<u32> = (0..11).map(|i| ((vocab - 1 + i * (vocab / 11 + 2)) % vocab) as u32).collect();
    let mut expected = vec![0.0; tokens.len() * hidden];
    reference::embed::embed(&values, hidden, &tokens, &mut expected);
    let of_rows = segments.iter().flat_map(|(rows, adapter)| vec![*adapter; *rows]);
    for ((adapter, token), out) in of_rows.zip(&tokens).zip(expected.chunks_exact_mut(hidden)) {
        let site = adapter.and_then(|i: usize| adapters[i].site(Site { layer: 0, module: Module::Embed }));
        if let Some((site, scale)) = site {
            reference::lora::embedding(site, scale, *token, out);
        }
    }
    for precision in [Precision::Quantised, Precision::F32] {
        // The last adapter's factors, of 64 rows each, lie in several pages.
        let loaded: Vec<_> = adapters.iter().map(|adapter| adapter.load_into(page, precision)).collect();
        let mut row = 0;
        let segments = segments.map(|(rows, adapter)| {
            row += rows;
            LoraSegment { row: row - rows, rows, adapter: adapter.map(|i| &loaded[i]) }
        });
        for (isa, pool) in machines() {
            let mut out = crate::poisoned(tokens.len(), hidden);
            let mut scratch = LoraScratch::default();
            embed(&pool, isa, &table, &tokens, LoraRows { segments: &segments }, &mut out, &mut scratch);
            assert_close(out.values(), &expected, 1e-5, isa.name());
            for (i, token) in tokens.iter().enumerate() {
                let adapter = segments.iter().rfind(|segment| segment.row <= i).and_then(|segment| segment.adapter);
                let alone = [LoraSegment { row: 0, rows: 1, adapter }];
                let mut one = crate::poisoned(1, hidden);
                embed(&pool, isa, &table, &[*token], LoraRows { segments: &alone }, &mut one, &mut scratch);
                assert_eq!(bits(one.values()), bits(out.row(i)), "token {i} alone");
            }
        }
    }
}

#[test]
fn adapter_bytes_count_the_factors() {
    let mut rng = rng(16);
    let sites = vec![site(&mut rng, Module::Q, (576, 576), 8, Format::F32)];
    let adapter = Adapter::new(&mut rng, sites, Extras::default());
    let factors = 8 * (576 + 576);
    let (quantised, f32) = (adapter.load(Precision::Quantised).byte_len(), adapter.load(Precision::F32).byte_len());
    assert_eq!(f32 - quantised, factors * 2);
    assert!(quantised >= factors * 2 && quantised < factors * 2 + 4_096, "{quantised}");
}

/// A plan is kept from linear to linear and serves again where everything it was made from is the same: whatever came
/// before, the bits are those of a plan made afresh.
#[test]
fn what_was_planned_for_another_layer_or_batch_changes_nothing() {
    const INPUTS: usize = 48;
    let mut rng = rng(17);
    let spans = |layer: u32, modules: &[(Module, std::ops::Range<usize>)]| -> Vec<SiteSpan> {
        let span = |(module, outputs): &(Module, std::ops::Range<usize>)| {
            let site = Site { layer, module: *module };
            SiteSpan { site, index: site.index(LAYERS), outputs: outputs.clone() }
        };
        modules.iter().map(span).collect()
    };
    let fused = [(Module::Q, 0..32), (Module::V, 32..80)];
    let alone = [(Module::V, 0..48)];
    // Ranks of q and v in each layer: the same in all, another rank that is, and one that differs from layer to layer.
    let mut adapter = |ranks: &dyn Fn(u32) -> [usize; 2]| {
        let mut sites = Vec::new();
        for layer in 0..LAYERS as u32 {
            for ((module, outputs), rank) in fused.iter().zip(ranks(layer)) {
                if rank > 0 {
                    let mut site = site(&mut rng, *module, (INPUTS, outputs.len()), rank, Format::F16);
                    site.site.layer = layer;
                    sites.push(site);
                }
            }
        }
        Adapter::new(&mut rng, sites, Extras::default()).load(Precision::Quantised)
    };
    let adapters =
        [adapter(&|_| [4, 4]), adapter(&|_| [9, 2]), adapter(&|layer| if layer == 0 { [4, 4] } else { [7, 0] })];
    let rows = 24;
    let x = CpuTensor::from_values(&random(&mut rng, rows * INPUTS, 1.0), INPUTS).expect("memory");
    let batches = [
        &[(12, Some(0)), (12, Some(1))][..],
        &[(12, Some(1)), (12, Some(0))],
        &[(3, Some(1)), (21, Some(0))],
        &[(3, Some(1)), (20, None), (1, Some(0))],
        &[(12, Some(0)), (12, Some(2))],
        &[(12, Some(2)), (12, Some(2))],
        &[(24, None)],
        &[(24, Some(2))],
        &[(12, Some(0)), (12, Some(1))],
    ];
    for threads in [1, 3] {
        let pool = Pool::new(threads).expect("threads");
        let mut kept = LoraScratch::default();
        // Layers inside, as in a model whose other linears are not adapted: one plan follows the other directly.
        for (modules, batch) in
            [&fused[..], &alone].into_iter().flat_map(|modules| batches.map(|batch| (modules, batch)))
        {
            let mut row = 0;
            let segment = |(rows, adapter): &(usize, Option<usize>)| {
                row += rows;
                LoraSegment { row: row - rows, rows: *rows, adapter: adapter.map(|i| &adapters[i]) }
            };
            let segments: Vec<_> = batch.iter().map(segment).collect();
            for layer in 0..LAYERS as u32 {
                let sites = spans(layer, modules);
                let adapt = Adapt { sites: &sites, lora: LoraRows { segments: &segments }, bias: None };
                let outputs = modules.last().expect("one").1.end;
                let [found, afresh] = [&mut kept, &mut LoraScratch::default()].map(|scratch| {
                    let zeros = vec![0.0; rows * outputs];
                    let mut out = CpuTensor::from_values(&zeros, outputs).expect("memory");
                    apply(&pool, Isa::detect(), adapt, &x, &mut out, scratch).expect("own pages");
                    bits(out.values())
                });
                assert_eq!(found, afresh, "{batch:?}, layer {layer}, {} sites, {threads} threads", sites.len());
                let some = batch.iter().any(|(_, adapter)| adapter.is_some_and(|i| i < 2));
                assert!(!some || afresh.iter().any(|bits| *bits != 0), "adapters do something");
            }
        }
    }
}
