//! Adapters on linears and on the embedding table, against the definition and against themselves.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use openlora_kernels::cuda::device::{Device, Element, Memory, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::lora::{CudaAdapter, LoraLimits, LoraLinear, LoraPlan};
use openlora_kernels::cuda::pages::CudaPages;
use openlora_kernels::cuda::step::{StepLimits, StepMemory};
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::{KernelError, LoraRows, LoraSegment, SequenceRows, SiteSpan, StepRows, reference};
use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, Site, SiteWeights};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{emulated, emulated_with, sanitised};

pub(crate) const LAYERS: usize = 2;
const RANKS: [usize; 7] = [1, 3, 8, 16, 17, 64, 256];
/// Pages that hold most factors of these tests whole.
pub(crate) const PAGE: usize = 1 << 17;

fn random(rng: &mut StdRng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// The number that an element holds instead.
fn rounded(element: Element, value: f32) -> f32 {
    match element {
        Element::F32 => value,
        Element::Bf16 => bf16::from_f32(value).to_f32(),
        Element::F16 => f16::from_f32(value).to_f32(),
    }
}

/// Numbers that the element holds, as a file has them: so that nothing is rounded when they are loaded.
fn matrix(rng: &mut StdRng, element: Element, rows: usize, cols: usize, scale: f32) -> Matrix {
    let values = random(rng, rows * cols, scale);
    let elements = match element {
        Element::F32 => Elements::F32(values),
        Element::F16 => Elements::F16(values.into_iter().map(f16::from_f32).collect()),
        Element::Bf16 => Elements::Bf16(values.into_iter().map(bf16::from_f32).collect()),
    };
    Matrix { rows, cols, elements }
}

pub(crate) fn site(
    rng: &mut StdRng,
    site: Site,
    (inputs, outputs): (usize, usize),
    rank: usize,
    element: Element,
) -> SiteWeights {
    SiteWeights {
        site,
        a: matrix(rng, element, rank, inputs, 1.0 / (inputs as f32).sqrt()),
        b: matrix(rng, element, outputs, rank, 1.0 / (rank as f32).sqrt()),
        scale: rng.random_range(0.5..2.0),
        b_bias: None,
        magnitude: None,
    }
}

/// Weights and DoRA's output scales of one adapter.
#[derive(Clone)]
pub(crate) struct Adapter {
    pub(crate) weights: AdapterWeights,
    pub(crate) output_scales: Vec<Option<Vec<f32>>>,
}

impl Adapter {
    pub(crate) fn new(rng: &mut StdRng, mut sites: Vec<SiteWeights>, (b_bias, dora): (bool, bool)) -> Self {
        for site in &mut sites {
            site.b_bias = b_bias.then(|| random(rng, site.b.rows, 1.0));
        }
        let output_scales = sites.iter().map(|site| dora.then(|| random(rng, site.b.rows, 1.5))).collect();
        Self { weights: AdapterWeights { generation: Generation([7; 32]), sites }, output_scales }
    }

    /// In as many pages as it needs, handed out backwards and full of NaN; one fewer is refused.
    fn load<D: Device>(&self, device: &Arc<D>, element: Element, page_bytes: usize) -> CudaAdapter<D> {
        let needed = CudaAdapter::<D>::pages_needed(&self.weights.sizes(), page_bytes, element);
        let mut pool = CudaPages::new(device, needed, page_bytes).expect("memory");
        pool.poison().expect("poisoned");
        let pages: Vec<u32> = (0..needed as u32).rev().collect();
        let mut load = |pages: &[u32]| {
            let pages = pool.take(pages).expect("free");
            CudaAdapter::load(&self.weights, &self.output_scales, LAYERS, element, pages)
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
#[derive(Clone)]
pub(crate) struct World {
    element: Element,
    out_element: Element,
    page_bytes: usize,
    linear: LoraLinear,
    pub(crate) adapters: Vec<Adapter>,
    /// (rows, adapter) of each segment.
    segments: Vec<(usize, Option<usize>)>,
    x: Vec<f32>,
    /// W x without bias.
    product: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl World {
    pub(crate) fn new(
        element: Element,
        inputs: usize,
        outputs: [usize; 3],
        segments: Vec<(usize, Option<usize>)>,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(3);
        let mut start = 0;
        let spans = [Module::Q, Module::K, Module::V].into_iter().zip(outputs).map(|(module, outputs)| {
            let site = Site { layer: 1, module };
            start += outputs;
            SiteSpan { site, index: site.index(LAYERS), outputs: start - outputs..start }
        });
        let sites = spans.collect();
        let mut world = Self {
            element,
            out_element: element,
            page_bytes: PAGE,
            linear: LoraLinear { sites, inputs, outputs: start, bias: false, embedding: false },
            adapters: Vec::new(),
            segments,
            x: Vec::new(),
            product: Vec::new(),
            bias: None,
        };
        let rows = world.rows();
        let values = |values: Vec<f32>| values.into_iter().map(|value| rounded(element, value)).collect();
        world.x = values(random(&mut rng, rows * inputs, 2.0));
        world.product = values(random(&mut rng, rows * start, 3.0));
        world
    }

    fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.0).sum()
    }

    /// Adds an adapter with ranks for q, k and v; 0 leaves a site out.
    pub(crate) fn add(&mut self, rng: &mut StdRng, ranks: [usize; 3], extras: (bool, bool)) {
        let sites = self.linear.sites.iter().zip(ranks).filter(|(_, rank)| *rank > 0);
        let sites = sites
            .map(|(span, rank)| site(rng, span.site, (self.linear.inputs, span.outputs.len()), rank, self.element));
        let sites = sites.collect();
        self.adapters.push(Adapter::new(rng, sites, extras));
    }

    fn with_bias(mut self) -> Self {
        self.bias = Some(random(&mut StdRng::seed_from_u64(4), self.linear.outputs, 2.0));
        self.linear.bias = true;
        self
    }

    /// What the definition says.
    fn expected(&self) -> Vec<f32> {
        let mut out = self.product.clone();
        let mut adapter_of_row = self.segments.iter().flat_map(|(rows, adapter)| vec![*adapter; *rows]);
        for (out, x) in out.chunks_exact_mut(self.linear.outputs).zip(self.x.chunks_exact(self.linear.inputs)) {
            let adapter = adapter_of_row.next().expect("one for each row").map(|i| &self.adapters[i]);
            for span in &self.linear.sites {
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

    fn run(&self) -> Vec<f32> {
        let device = emulated();
        Loaded::new(self, &device).run(0..self.rows(), &self.segments)
    }

    /// Fails unless what comes out is what the definition says, as close as the element allows.
    #[track_caller]
    pub(crate) fn check(&self, what: &str) -> Vec<f32> {
        let found = self.run();
        // z is rounded to the element, and so is the sum; the latter not where it is f32.
        let tolerance = match (self.element, self.out_element) {
            (Element::F32, _) => 1e-5,
            (Element::F16, Element::F32) => 1e-3,
            (Element::F16, _) => 1.5e-3,
            (Element::Bf16, Element::F32) => 8e-3,
            (Element::Bf16, _) => 1e-2,
        };
        assert_close(&found, &self.expected(), &self.product, tolerance, &format!("{:?} {what}", self.element));
        found
    }
}

/// Fails unless each value is within `tolerance` of the expected, relative to the largest of it, 1, and what was added to `base`.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], base: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, ((found, expected), base)) in found.iter().zip(expected).zip(base).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max((expected - base).abs()).max(1.0);
        assert!(close, "{what}: element {i} is {found}, expected {expected}");
    }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|value| value.is_finite()), "something was read that nobody wrote");
    values.iter().map(|value| value.to_bits()).collect()
}

/// A world on a device.
pub(crate) struct Loaded<'a> {
    world: &'a World,
    device: Arc<Emulated>,
    pub(crate) adapters: Vec<CudaAdapter<Emulated>>,
    plan: LoraPlan<Emulated>,
    step: StepMemory<Emulated>,
    bias: Option<Memory<Emulated>>,
}

impl<'a> Loaded<'a> {
    pub(crate) fn new(world: &'a World, device: &Arc<Emulated>) -> Self {
        let adapters =
            world.adapters.iter().map(|adapter| adapter.load(device, world.element, world.page_bytes)).collect();
        let ranks = world.adapters.iter().map(|adapter| adapter.weights.rank_max());
        let rows = world.rows();
        let limits = LoraLimits { rows, segments: world.segments.len().max(1), rank: ranks.max().unwrap_or(1) };
        // Another linear before it: plans of several lie beside each other.
        let other = LoraLinear { inputs: 5, ..world.linear.clone() };
        let other =
            LoraLinear { sites: other.sites.into_iter().map(|span| SiteSpan { index: 0, ..span }).collect(), ..other };
        let linears = [other, world.linear.clone()];
        let plan = LoraPlan::new(device, world.element, &linears, limits).expect("memory");
        let step = StepMemory::new(device, StepLimits { rows, table_entries: 1 }).expect("memory");
        let bias = world.bias.as_ref().map(|bias| Memory::holding(device, bias).expect("memory"));
        Self { world, device: Arc::clone(device), adapters, plan, step, bias }
    }

    /// Writes a step of so many rows with these segments.
    fn write(&mut self, segments: &[(usize, Option<usize>)]) {
        let mut row = 0;
        let lora: Vec<_> = segments
            .iter()
            .map(|(rows, adapter)| {
                row += rows;
                LoraSegment { row: row - rows, rows: *rows, adapter: adapter.map(|i| &self.adapters[i]) }
            })
            .collect();
        let segments = self.plan.segments(&LoraRows { segments: &lora }).expect("their own pages");
        write_step(&mut self.step, &vec![0; row], &segments);
    }

    fn launch(
        &self,
        x: &CudaTensor<Emulated>,
        out: &mut CudaTensor<Emulated>,
        rows_max: usize,
    ) -> Result<(), KernelError> {
        self.plan.plan(self.step.view())?;
        self.plan.shrink(1, x, rows_max)?;
        self.plan.expand(1, out, self.bias.as_ref().map(Memory::address), rows_max)
    }

    fn tensors(&self, rows: Range<usize>) -> (CudaTensor<Emulated>, CudaTensor<Emulated>) {
        let (inputs, outputs) = (self.world.linear.inputs, self.world.linear.outputs);
        let x = &self.world.x[rows.start * inputs..rows.end * inputs];
        let product = &self.world.product[rows.start * outputs..rows.end * outputs];
        let tensor =
            |element, values, width| CudaTensor::holding(&self.device, element, values, width).expect("memory");
        (tensor(self.world.element, x, inputs), tensor(self.world.out_element, product, outputs))
    }

    /// What comes out for some of the world's rows, with the segments given.
    pub(crate) fn run(&mut self, rows: Range<usize>, segments: &[(usize, Option<usize>)]) -> Vec<f32> {
        self.write(segments);
        let (x, mut out) = self.tensors(rows.clone());
        self.launch(&x, &mut out, rows.len()).expect("launched");
        out.values().expect("values")
    }
}

fn write_step<D: Device>(step: &mut StepMemory<D>, tokens: &[u32], segments: &[openlora_kernels::cuda::step::Segment]) {
    let sequences = [SequenceRows { row: 0, rows: tokens.len(), table: 0, blocks: 1 }];
    let positions: Vec<u32> = (0..tokens.len() as u32).collect();
    let rows = StepRows { tokens, drawn: &[], positions: &positions, sequences: &sequences, block_tables: &[0] };
    step.write(&rows, segments).expect("written");
}

/// Which adapter each row has, of `adapters`, in runs.
fn popularity(kind: &str, rows: usize, adapters: usize) -> Vec<(usize, Option<usize>)> {
    let mut segments: Vec<(usize, Option<usize>)> = Vec::new();
    match kind {
        "same" => segments.push((rows, Some(0))),
        "distinct" => segments.extend((0..rows).map(|row| (1, Some(row % adapters)))),
        "base" => segments.push((rows, None)),
        // Half of what is left to each, and rows of the base model in between.
        _ => {
            let (mut left, mut number) = (rows, 0);
            while left > 0 {
                let count = left.div_ceil(2).min(left);
                segments.push((count, (number % 3 != 1).then_some(number % adapters)));
                left -= count;
                number += 1;
            }
        }
    }
    segments
}

/// Adapters of all ranks, each with other ranks at the three sites and the last without one.
fn all_ranks(world: &mut World, extras: (bool, bool)) {
    let mut rng = StdRng::seed_from_u64(5);
    for i in 0..RANKS.len() {
        // DoRA for some adapters and not for others.
        let extras = (extras.0, extras.1 && i % 2 == 0);
        let missing = if i == 2 { 0 } else { RANKS[(i + 4) % 7] };
        world.add(&mut rng, [RANKS[i], RANKS[(i + 2) % 7], missing], extras);
    }
}

const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

const KINDS: [&str; 4] = ["same", "distinct", "zipf", "base"];

#[test]
fn mixed_ranks_match_the_definition() {
    sanitised(|| {
        for element in ELEMENTS {
            for (inputs, outputs) in [(70, [90, 33, 64]), (576, [576, 192, 192])] {
                for (rows, kind) in [1, 7, 133].into_iter().flat_map(|rows| KINDS.map(|kind| (rows, kind))) {
                    // The definition takes its time.
                    if inputs == 70 || rows < 133 || kind == "zipf" {
                        let mut world = World::new(element, inputs, outputs, popularity(kind, rows, RANKS.len()));
                        all_ranks(&mut world, (false, false));
                        world.check(&format!("{inputs} inputs, {rows} rows, {kind}"));
                    }
                }
            }
        }
    });
}

#[test]
fn every_rank_alone_matches_the_definition() {
    sanitised(|| {
        for element in ELEMENTS {
            for rank in RANKS {
                for rows in [1, 7, 17] {
                    let mut world = World::new(element, 70, [90, 8, 64], popularity("same", rows, 1));
                    world.add(&mut StdRng::seed_from_u64(rank as u64), [rank; 3], (false, false));
                    world.check(&format!("rank {rank}, {rows} rows"));
                    world.out_element = Element::F32;
                    world.check(&format!("rank {rank}, {rows} rows to f32"));
                }
            }
        }
    });
}

#[test]
fn biases_and_dora_match_the_definition() {
    sanitised(|| {
        for element in ELEMENTS {
            for (inputs, outputs) in [(70, [90, 33, 64]), (576, [576, 192, 192])] {
                for extras in [(true, false), (false, true), (true, true)] {
                    let mut world = World::new(element, inputs, outputs, popularity("zipf", 29, RANKS.len()));
                    all_ranks(&mut world, extras);
                    world.check(&format!("{inputs} inputs, {extras:?}"));
                    world.with_bias().check(&format!("{inputs} inputs, {extras:?}, bias"));
                }
            }
        }
    });
}

#[test]
fn sums_over_many_splits_match_the_definition() {
    sanitised(|| {
        for element in ELEMENTS {
            // Two splits and a little, and a last one that is not a multiple of anything.
            for inputs in [2_056, 3_001] {
                let mut world = World::new(element, inputs, [40, 8, 520], popularity("zipf", 21, 3));
                let mut rng = StdRng::seed_from_u64(6);
                for ranks in [[16, 3, 8], [8, 0, 17], [0, 33, 5]] {
                    world.add(&mut rng, ranks, (false, false));
                }
                world.check(&format!("{inputs} inputs"));
            }
        }
    });
}

#[test]
fn long_segments_match_the_definition_and_have_the_bits_of_short_ones() {
    sanitised(|| {
        for (element, inputs, outputs) in [(Element::Bf16, 200, [72, 8, 24]), (Element::F16, 1_154, [33, 9, 15])] {
            let segments = vec![(3, Some(0)), (300, Some(1)), (2, None), (259, Some(0))];
            let mut world = World::new(element, inputs, outputs, segments);
            let mut rng = StdRng::seed_from_u64(7);
            world.add(&mut rng, [16, 8, 40], (false, false));
            world.add(&mut rng, [9, 0, 24], (true, true));
            let world = world.with_bias();
            world.check("long segments");
            let device = emulated();
            let mut loaded = Loaded::new(&world, &device);
            let all = world.rows();
            let together = bits(&loaded.run(0..all, &world.segments));
            let shrunk = loaded.plan.read_shrunk(1).expect("read");
            // Of the ranks that site q has in each adapter, in each split.
            let z_row = 3 * 48;
            let sums = |z: &[f32], row: usize, adapter: usize| {
                let ranks = [16, 9][adapter];
                let split = |split: usize| &z[(split * all + row) * z_row..][..ranks];
                bits(&(0..inputs.div_ceil(1_024)).flat_map(split).copied().collect::<Vec<_>>())
            };
            let width = world.linear.outputs;
            for (rows, adapter) in [(3..4, 1), (150..166, 1), (302..303, 1), (305..310, 0), (561..564, 0)] {
                let alone = loaded.run(rows.clone(), &[(rows.len(), Some(adapter))]);
                assert_eq!(bits(&alone), together[rows.start * width..rows.end * width], "{element:?} rows {rows:?}");
                let z = loaded.plan.read_shrunk(1).expect("read");
                for row in rows.clone() {
                    let alone = sums(&z, row - rows.start, adapter);
                    assert_eq!(alone, sums(&shrunk, row, adapter), "{element:?} sums of row {row}");
                }
            }
        }
    });
}

#[test]
fn a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_multiprocessors() {
    sanitised(|| {
        let segments =
            vec![(3, Some(0)), (2, None), (25, Some(1)), (1, Some(2)), (9, Some(3)), (1, Some(0)), (17, Some(4))];
        for element in ELEMENTS {
            for (extras, biased) in [((false, false), false), ((true, true), true)] {
                let mut world = World::new(element, 1_100, [70, 33, 520], segments.clone());
                let mut rng = StdRng::seed_from_u64(20);
                for ranks in [[8, 3, 1], [16, 0, 17], [0, 40, 0], [1, 1, 8], [33, 8, 16]] {
                    world.add(&mut rng, ranks, extras);
                }
                let world = if biased { world.with_bias() } else { world };
                let (rows, width) = (world.rows(), world.linear.outputs);
                let together = bits(&world.run());
                for multiprocessors in [1, 132] {
                    let device = emulated_with(multiprocessors);
                    let found = Loaded::new(&world, &device).run(0..rows, &world.segments);
                    assert_eq!(bits(&found), together, "{element:?}, {multiprocessors} multiprocessors");
                }
                let device = emulated();
                let mut loaded = Loaded::new(&world, &device);
                let adapters: Vec<_> = segments.iter().flat_map(|(rows, adapter)| vec![*adapter; *rows]).collect();
                for row in [0, 3, 5, 12, 29, 30, 39, 40, rows - 1] {
                    let alone = bits(&loaded.run(row..row + 1, &[(1, adapters[row])]));
                    assert_eq!(alone, together[row * width..(row + 1) * width], "{element:?} row {row}");
                }
                // Cut elsewhere, and the rows of one adapter in two segments.
                let part = bits(&loaded.run(4..31, &[(1, None), (7, Some(1)), (18, Some(1)), (1, Some(2))]));
                assert_eq!(part, together[4 * width..31 * width], "{element:?}");
            }
        }
    });
}

#[test]
fn rows_without_an_adapter_keep_their_bits() {
    sanitised(|| {
        for element in ELEMENTS {
            let segments = vec![(2, Some(0)), (19, None), (1, Some(1))];
            let mut world = World::new(element, 64, [32, 32, 32], segments);
            all_ranks(&mut world, (true, true));
            let device = emulated();
            let found = Loaded::new(&world, &device).run(0..22, &world.segments);
            assert_eq!(bits(&found[2 * 96..21 * 96]), bits(&world.product[2 * 96..21 * 96]));
            assert_ne!(found[..96], world.product[..96]);
            // A step without any segment; with a bias it is added all the same.
            let base = World { segments: vec![(22, None)], ..world.clone() };
            assert_eq!(bits(&base.run()), bits(&base.product));
            let base = base.with_bias();
            base.check("bias alone");
            assert_ne!(base.run(), base.product);
        }
    });
}

#[test]
fn more_segments_than_a_block_has_threads_match_the_definition() {
    sanitised(|| {
        for (rows, element) in [(300, Element::Bf16), (515, Element::F32)] {
            let mut world = World::new(element, 40, [16, 9, 8], popularity("distinct", rows, 3));
            let mut rng = StdRng::seed_from_u64(8);
            for ranks in [[8, 2, 1], [17, 0, 3], [0, 0, 5]] {
                world.add(&mut rng, ranks, (false, false));
            }
            world.check(&format!("{rows} segments"));
        }
    });
}

#[test]
fn factors_cut_into_pieces_and_strips_keep_every_bit() {
    sanitised(|| {
        for element in ELEMENTS {
            for (inputs, outputs, pages) in
                [(576, [576, 192, 192], [256, 5_120, 20_480]), (70, [90, 33, 64], [256, 768, 2_560])]
            {
                let mut world = World::new(element, inputs, outputs, popularity("zipf", 37, RANKS.len()));
                all_ranks(&mut world, (false, false));
                let whole = bits(&world.check("whole"));
                for page_bytes in pages {
                    let cut = World { page_bytes, ..world.clone() };
                    assert_eq!(bits(&cut.run()), whole, "{element:?} {inputs} inputs, pages of {page_bytes}");
                }
            }
        }
    });
}

#[test]
fn long_segments_of_factors_in_strips_keep_every_bit() {
    sanitised(|| {
        let mut world = World::new(Element::Bf16, 200, [72, 8, 24], vec![(270, Some(0)), (2, Some(1))]);
        let mut rng = StdRng::seed_from_u64(9);
        world.add(&mut rng, [16, 3, 40], (false, false));
        world.add(&mut rng, [9, 0, 24], (false, false));
        let whole = bits(&world.check("whole"));
        let cut = World { page_bytes: 512, ..world.clone() };
        assert_eq!(bits(&cut.run()), whole);
    });
}

#[test]
fn a_recorded_graph_serves_any_step_of_its_size() {
    sanitised(|| {
        const ROWS: usize = 16;
        for element in ELEMENTS {
            let mut world = World::new(element, 300, [90, 16, 33], vec![(ROWS, None)]);
            all_ranks(&mut world, (true, true));
            // Room for as many segments as rows.
            world.segments = vec![(1, None); ROWS];
            let world = world.with_bias();
            let steps = [
                vec![(3, Some(0)), (13, Some(1))],
                popularity("distinct", ROWS, RANKS.len()),
                vec![(1, Some(6))],
                vec![(5, None)],
                vec![(2, None), (4, Some(3)), (1, Some(2))],
                vec![(16, Some(5))],
            ];
            let device = emulated();
            let mut eager = Loaded::new(&world, &device);
            let mut recorded = Loaded::new(&world, &device);
            recorded.write(&steps[0]);
            let mut x = CudaTensor::new(&device, element, ROWS, world.linear.inputs).expect("memory");
            let mut out = CudaTensor::new(&device, element, ROWS, world.linear.outputs).expect("memory");
            x.set_rows(ROWS);
            out.set_rows(ROWS);
            let graph = device.capture(&mut || recorded.launch(&x, &mut out, ROWS)).expect("recorded");
            for segments in &steps {
                let rows: usize = segments.iter().map(|segment| segment.0).sum();
                let expected = eager.run(0..rows, segments);
                let (x_now, product) = eager.tensors(0..rows);
                copy(&device, &x_now, &x);
                copy(&device, &product, &out);
                recorded.write(segments);
                // SAFETY: everything that was recorded lives.
                unsafe { device.replay(&graph).expect("replayed") };
                let found = out.values().expect("values");
                assert_eq!(bits(&found[..expected.len()]), bits(&expected), "{element:?} {segments:?}");
            }
        }
    });
}

/// The rows of one tensor into the memory of another, on the host.
fn copy(device: &Arc<Emulated>, from: &CudaTensor<Emulated>, to: &CudaTensor<Emulated>) {
    let mut bytes = vec![0; from.rows() * from.width() * from.element().bytes()];
    // SAFETY: the first rows of a tensor, into one with more.
    unsafe {
        device.read(Stream::Compute, from.address(), &mut bytes).expect("read");
        device.write(Stream::Compute, to.address(), &bytes).expect("written");
    }
}

#[test]
fn adapters_of_the_embedding_table_match_the_definition() {
    sanitised(|| {
        for element in ELEMENTS {
            for (vocab, hidden, page_bytes) in [(60, 72, PAGE), (5_003, 609, 4_096)] {
                for to in [element, Element::F32] {
                    check_embedding(element, to, (vocab, hidden), page_bytes);
                }
            }
        }
    });
}

fn check_embedding(element: Element, to: Element, (vocab, hidden): (usize, usize), page_bytes: usize) {
    let mut rng = StdRng::seed_from_u64(15);
    let place = Site { layer: 0, module: Module::Embed };
    let adapters: Vec<Adapter> = [(8, false), (13, true), (64, false)]
        .into_iter()
        .map(|(rank, dora)| {
            let site = site(&mut rng, place, (vocab, hidden), rank, element);
            Adapter::new(&mut rng, vec![site], (dora, dora))
        })
        .collect();
    let segments = [(2, Some(0)), (3, None), (19, Some(1)), (1, Some(2)), (2, Some(0))];
    let rows: usize = segments.iter().map(|segment| segment.0).sum();
    // The last token, the first, and some all over the table; and one that it does not have, of which nothing is read.
    let mut tokens: Vec<u32> = (0..rows).map(|i| ((vocab - 1 + i * (vocab / 11 + 2)) % vocab) as u32).collect();
    tokens[rows - 1] = u32::MAX;
    let embedded: Vec<f32> = random(&mut rng, rows * hidden, 1.0).into_iter().map(|x| rounded(to, x)).collect();
    let mut expected = embedded.clone();
    let of_rows = segments.iter().flat_map(|(rows, adapter)| vec![*adapter; *rows]);
    for ((adapter, token), out) in of_rows.zip(&tokens).zip(expected.chunks_exact_mut(hidden)) {
        let adapter = adapter.filter(|_| (*token as usize) < vocab);
        if let Some((site, scale)) = adapter.and_then(|i: usize| adapters[i].site(place)) {
            reference::lora::embedding(site, scale, *token, out);
        }
    }
    let device = emulated();
    let loaded: Vec<_> = adapters.iter().map(|adapter| adapter.load(&device, element, page_bytes)).collect();
    let span = SiteSpan { site: place, index: place.index(LAYERS), outputs: 0..hidden };
    let linear = LoraLinear { sites: vec![span], inputs: vocab, outputs: hidden, bias: false, embedding: true };
    let limits = LoraLimits { rows, segments: segments.len(), rank: 64 };
    let plan = LoraPlan::new(&device, element, &[linear], limits).expect("memory");
    let mut step = StepMemory::new(&device, StepLimits { rows, table_entries: 1 }).expect("memory");
    let mut run = |rows: Range<usize>, segments: &[(usize, Option<usize>)]| {
        let mut row = 0;
        let lora: Vec<_> = segments
            .iter()
            .map(|(rows, adapter)| {
                row += rows;
                LoraSegment { row: row - rows, rows: *rows, adapter: adapter.map(|i| &loaded[i]) }
            })
            .collect();
        write_step(&mut step, &tokens[rows.clone()], &plan.segments(&LoraRows { segments: &lora }).expect("own pages"));
        let values = &embedded[rows.start * hidden..rows.end * hidden];
        let mut out = CudaTensor::holding(&device, to, values, hidden).expect("memory");
        plan.plan(step.view()).expect("planned");
        plan.embed(0, step.view(), &mut out, rows.len()).expect("launched");
        out.values().expect("values")
    };
    let found = run(0..rows, &segments);
    let tolerance = match to {
        Element::F32 => 1e-5,
        Element::F16 => 1e-3,
        Element::Bf16 => 8e-3,
    };
    assert_close(&found, &expected, &embedded, tolerance, &format!("{element:?} to {to:?}, {vocab} tokens"));
    for (row, adapter) in [(0, Some(0)), (3, None), (9, Some(1)), (rows - 3, Some(2)), (rows - 1, Some(0))] {
        let alone = run(row..row + 1, &[(1, adapter)]);
        assert_eq!(bits(&alone), bits(&found[row * hidden..(row + 1) * hidden]), "token {row} alone");
    }
}

#[test]
fn numbers_that_the_element_cannot_hold_are_refused() {
    let mut rng = StdRng::seed_from_u64(16);
    let place = Site { layer: 1, module: Module::K };
    let device = emulated();
    for (element, value, refused) in [
        (Element::F16, 65_519.0, false),
        (Element::F16, 65_520.0, true),
        (Element::F16, f32::NAN, true),
        (Element::Bf16, 65_520.0, false),
        (Element::Bf16, f32::MAX, true),
        (Element::Bf16, f32::INFINITY, true),
        (Element::F32, f32::MAX, false),
    ] {
        for in_b in [false, true] {
            let mut site = site(&mut rng, place, (33, 20), 3, Element::F32);
            let matrix = if in_b { &mut site.b } else { &mut site.a };
            let Elements::F32(numbers) = &mut matrix.elements else { unreachable!("made so") };
            numbers[37] = value;
            let adapter = Adapter::new(&mut rng, vec![site], (false, false));
            let mut pool = CudaPages::new(&device, 1, PAGE).expect("memory");
            let pages = pool.take(&[0]).expect("free");
            let loaded = CudaAdapter::load(&adapter.weights, &adapter.output_scales, LAYERS, element, pages);
            match loaded {
                Ok(adapter) => assert!(!refused && adapter.byte_len() > 0, "{element:?} {value}"),
                Err(KernelError::AdapterRange { site, value: found }) => {
                    assert!(refused && site == place && found.to_bits() == value.to_bits(), "{element:?} {value}");
                }
                Err(error) => panic!("{element:?} {value}: {error}"),
            }
            // Loaded and dropped or refused, the page is free again.
            drop(pool.take(&[0]).expect("free again"));
        }
    }
}

#[test]
fn factors_that_do_not_fit_each_other_are_refused() {
    let place = Site { layer: 1, module: Module::K };
    let load = |change: &dyn Fn(&mut SiteWeights), scale: Option<Vec<f32>>| {
        let mut rng = StdRng::seed_from_u64(17);
        let mut site = site(&mut rng, place, (5, 3), 2, Element::F32);
        change(&mut site);
        let weights = AdapterWeights { generation: Generation([1; 32]), sites: vec![site] };
        let device = emulated();
        let mut pool = CudaPages::new(&device, 1, PAGE).expect("memory");
        CudaAdapter::load(&weights, &[scale], LAYERS, Element::F32, pool.take(&[0]).expect("free"))
    };
    load(&|_| (), Some(vec![1.0; 3])).expect("it fits");
    let changes: [&dyn Fn(&mut SiteWeights); 5] = [
        &|site| site.a.rows = 1,
        &|site| site.b.cols = 3,
        &|site| site.b_bias = Some(vec![0.0; 4]),
        &|site| site.site.layer = LAYERS as u32,
        &|site| site.a = Matrix { rows: 0, cols: 5, elements: Elements::F32(Vec::new()) },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let error = load(change, None).expect_err("does not fit");
        assert!(matches!(error, KernelError::AdapterShape { .. }), "{i}: {error}");
    }
    load(&|_| (), Some(vec![1.0; 2])).expect_err("two factors for three outputs");
}

#[test]
#[should_panic(expected = "model.layers.1.self_attn.k_proj: rank 17 of 16 at most")]
fn an_adapter_of_a_larger_rank_than_there_is_room_for_is_refused() {
    run_one((33, 20), 17);
}

#[test]
#[should_panic(expected = "model.layers.1.self_attn.k_proj: an adapter of 40 inputs and 20 outputs")]
fn an_adapter_that_does_not_fit_the_linear_is_refused() {
    run_one((40, 20), 16);
}

/// A step with one adapter of such sizes on a linear of 33 inputs and 20 outputs, with room for ranks up to 16.
fn run_one(sizes: (usize, usize), rank: usize) {
    let device = emulated();
    let mut rng = StdRng::seed_from_u64(21);
    let place = Site { layer: 1, module: Module::K };
    let weights = vec![site(&mut rng, place, sizes, rank, Element::F32)];
    let adapter = Adapter::new(&mut rng, weights, (false, false)).load(&device, Element::Bf16, PAGE);
    let span = SiteSpan { site: place, index: place.index(LAYERS), outputs: 0..20 };
    let linear = LoraLinear { sites: vec![span], inputs: 33, outputs: 20, bias: false, embedding: false };
    let limits = LoraLimits { rows: 1, segments: 1, rank: 16 };
    let plan = LoraPlan::new(&device, Element::Bf16, &[linear], limits).expect("memory");
    let segments = [LoraSegment { row: 0, rows: 1, adapter: Some(&adapter) }];
    plan.segments(&LoraRows { segments: &segments }).expect("own pages");
}
