//! Times every operation of the CPU backend but the linear product on SmolLM2-135M's shapes, beside what the machine could do
//! at best: `cargo run --release --example operations_rate [threads] [isa]`.
//!
//! Each figure is the best of many runs, for all 30 layers of a step; "floor" is the larger of bytes over memory bandwidth and
//! multiply-adds over the f32 peak, both measured at the start.

use std::time::{Duration, Instant};

use openlora_kernels::cpu::attention::{Attend, AttentionScratch, attention};
use openlora_kernels::cpu::ceilings::{self, Ceilings};
use openlora_kernels::cpu::kv::page_bytes;
use openlora_kernels::cpu::lora::{Adapt, CpuAdapter, LoraScratch, apply};
use openlora_kernels::cpu::norm::add_rms_norm;
use openlora_kernels::cpu::pages::CpuPages;
use openlora_kernels::cpu::rope::rope_and_store;
use openlora_kernels::cpu::sample::{SampleScratch, sample};
use openlora_kernels::cpu::swiglu::swiglu;
use openlora_kernels::cpu::{Cpu, CpuTensor, Isa, Pool};
use openlora_kernels::{
    AttentionSpec, LayerAttention, LoraRows, LoraSegment, Precision, RopeTable, SampleRow, SequenceRows, SiteSpan,
    StepRows,
};
use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, SamplingParams, Site, SiteWeights};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const KV: usize = 192;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49_152;
const SPEC: AttentionSpec =
    AttentionSpec { heads: 9, kv_heads: 3, head_dim: 64, block_size: 16, scale: 0.125, norm_eps: 1e-5 };

/// Threads, instruction set, and what they can do at best.
struct Machine {
    pool: Pool,
    isa: Isa,
    ceilings: Ceilings,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |text| text.parse().expect("a number of threads"));
    let name = arguments.next();
    let isa = Isa::available().iter().copied().rfind(|isa| name.as_ref().is_none_or(|name| name == isa.name()));
    let isa = isa.expect("portable, avx2 or avx512-vnni");
    let machine = Machine {
        pool: Pool::new(threads).expect("threads"),
        isa,
        ceilings: ceilings::measure(threads).expect("memory for the measurement"),
    };
    let Ceilings { read_g_per_s, f32_g_per_s, .. } = machine.ceilings;
    let name = isa.name();
    println!("{name}, {threads} threads; {read_g_per_s:.1} GB/s, {f32_g_per_s:.0} G f32 multiply-adds/s");
    println!("{:<58} {:>10} {:>10} {:>6}", "operation, 30 layers", "ms", "floor ms", "ratio");
    for (sequences, context) in [(32, 96), (32, 1024), (1, 96), (1, 1024), (1, 8192)] {
        attention_rate(&machine, sequences, 1, context, Precision::Quantised);
    }
    attention_rate(&machine, 32, 1, 1024, Precision::F32);
    for rows in [64, 512, 2048] {
        attention_rate(&machine, 1, rows, rows, Precision::Quantised);
    }
    attention_rate(&machine, 1, 512, 8192, Precision::Quantised);
    lora_rate(&machine, "q,v r8", 32, 1, 8, false);
    lora_rate(&machine, "q,v r8, adapters out of the cache", 32, 1, 8, true);
    lora_rate(&machine, "q,v r64", 32, 1, 64, false);
    lora_rate(&machine, "q,v r8", 1, 1, 8, false);
    lora_rate(&machine, "q,v r256", 1, 1, 256, false);
    lora_rate(&machine, "q,v r8", 1, 512, 8, false);
    lora_rate(&machine, "q,v r64", 1, 512, 64, false);
    lora_rate(&machine, "q,v r8", 8, 64, 8, false);
    for rows in [1, 32, 512] {
        small_rates(&machine, rows);
    }
    for (name, params) in [
        ("greedy", SamplingParams { temperature: 0.0, ..SamplingParams::default() }),
        ("temperature", SamplingParams::default()),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..SamplingParams::default() }),
        ("top_k 40, top_p 0.9", SamplingParams { top_k: 40, top_p: 0.9, ..SamplingParams::default() }),
    ] {
        sample_rate(&machine, name, &params, 32);
        sample_rate(&machine, name, &params, 1);
    }
}

/// Seconds of `work(0)` to `work(parts - 1)`, the best time of each part in about half a second: what disturbs a run makes it
/// slower, and a short part is seldom disturbed every time.
fn best(parts: usize, mut before: impl FnMut(), mut work: impl FnMut(usize)) -> f64 {
    let (start, mut fastest) = (Instant::now(), vec![Duration::MAX; parts]);
    while start.elapsed() < Duration::from_millis(500) {
        before();
        for (part, fastest) in fastest.iter_mut().enumerate() {
            let start = Instant::now();
            work(part);
            *fastest = start.elapsed().min(*fastest);
        }
    }
    fastest.iter().sum::<Duration>().as_secs_f64()
}

fn report(machine: &Machine, name: &str, seconds: f64, bytes: usize, multiply_adds: usize) {
    let Ceilings { read_g_per_s, f32_g_per_s, .. } = machine.ceilings;
    let floor = (bytes as f64 / read_g_per_s).max(multiply_adds as f64 / f32_g_per_s) / 1e9;
    println!("{name:<58} {:>10.3} {:>10.3} {:>6.2}", seconds * 1e3, floor * 1e3, seconds / floor);
}

/// Numbers between -1 and 1 that need no generator.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7_919 + i / 64 * 31) % 2_001) as f32 / 1_000.0 - 1.0).collect()
}

fn tensor(rows: usize, width: usize) -> CpuTensor {
    CpuTensor::from_values(&numbers(rows * width), width).expect("memory")
}

/// `sequences` sequences of `rows` new rows each, the last at position `context - 1`.
fn attention_rate(machine: &Machine, sequences: usize, rows: usize, context: usize, precision: Precision) {
    let blocks = context.div_ceil(SPEC.block_size);
    let mut kv = CpuPages::new(&SPEC, LAYERS, blocks * sequences, precision).expect("memory");
    kv.fill(0.5);
    let positions: Vec<u32> = (0..sequences).flat_map(|_| context - rows..context).map(|p| p as u32).collect();
    // Blocks of different sequences interleaved, as they are after a while of serving.
    let tables: Vec<u32> =
        (0..sequences).flat_map(|s| (0..blocks).map(move |block| (block * sequences + s) as u32)).collect();
    let parts: Vec<SequenceRows> =
        (0..sequences).map(|s| SequenceRows { row: s * rows, rows, table: s * blocks, blocks }).collect();
    let tokens = vec![0; positions.len()];
    let step =
        StepRows { tokens: &tokens, drawn: &[], positions: &positions, sequences: &parts, block_tables: &tables };
    let half = SPEC.head_dim / 2;
    let rope = RopeTable { rotary_dim: 64, cos: vec![0.6; context * half], sin: vec![0.8; context * half] };
    let mut qkv = tensor(positions.len(), HIDDEN + 2 * KV);
    let mut out = tensor(positions.len(), HIDDEN);
    let mut scratch = AttentionScratch::default();
    let layer = |layer| LayerAttention::<Cpu> { layer, window: None, rope: &rope, qk_norm: None };
    let seconds = best(
        LAYERS,
        || (),
        |i| {
            let attend = Attend { spec: &SPEC, step: &step, layer: layer(i) };
            attention(&machine.pool, machine.isa, attend, &qkv, &kv, &mut out, &mut scratch);
        },
    );
    let element = if precision == Precision::F32 { 4 } else { 2 };
    let bytes = LAYERS * sequences * context * 2 * KV * element;
    let pairs = rows * (context - rows) + rows * (rows + 1) / 2;
    let name = format!("attention, {sequences} x {rows} rows, context {context}, {precision:?}");
    report(machine, &name, seconds, bytes, LAYERS * sequences * pairs * 2 * HIDDEN);
    let seconds =
        best(LAYERS, || (), |i| rope_and_store(&machine.pool, machine.isa, &SPEC, &step, layer(i), &mut qkv, &mut kv));
    let name = format!("rope and store, {sequences} x {rows} rows");
    report(machine, &name, seconds, LAYERS * positions.len() * (HIDDEN + 2 * KV) * 4, 0);
}

/// An adapter of q and v in every layer.
fn adapter(rank: usize) -> CpuAdapter {
    let sites = (0..LAYERS).flat_map(|layer| {
        [(Module::Q, HIDDEN), (Module::V, KV)].map(|(module, outputs)| {
            let matrix = |rows, cols| Matrix { rows, cols, elements: Elements::F32(numbers(rows * cols)) };
            SiteWeights {
                site: Site { layer: layer as u32, module },
                a: matrix(rank, HIDDEN),
                b: matrix(outputs, rank),
                scale: 2.0,
                b_bias: None,
                magnitude: None,
            }
        })
    });
    let weights = AdapterWeights { generation: Generation([0; 32]), sites: sites.collect() };
    let scales = vec![None; weights.sites.len()];
    let precision = Precision::Quantised;
    let sizes = weights.sizes();
    let pages = CpuAdapter::pages(&sizes, page_bytes(&SPEC, LAYERS, precision), precision);
    let mut pool = CpuPages::new(&SPEC, LAYERS, pages, precision).expect("memory");
    let pages: Vec<u32> = (0..pages as u32).collect();
    let pages = pool.take(&pages).expect("free");
    CpuAdapter::load(&weights, &scales, LAYERS, precision, pages).expect("a good adapter")
}

/// The q, k, v linear's adapters: `adapters` of them with `rows` rows each.
fn lora_rate(machine: &Machine, name: &str, adapters: usize, rows: usize, rank: usize, cold: bool) {
    let loaded: Vec<CpuAdapter> = (0..adapters).map(|_| adapter(rank)).collect();
    let segments: Vec<_> = loaded
        .iter()
        .enumerate()
        .map(|(i, adapter)| LoraSegment { row: i * rows, rows, adapter: Some(adapter) })
        .collect();
    let spans: Vec<Vec<SiteSpan>> = (0..LAYERS as u32)
        .map(|layer| {
            let columns =
                [(Module::Q, 0..HIDDEN), (Module::K, HIDDEN..HIDDEN + KV), (Module::V, HIDDEN + KV..HIDDEN + 2 * KV)];
            let span = |(module, outputs)| {
                let site = Site { layer, module };
                SiteSpan { site, index: site.index(LAYERS), outputs }
            };
            columns.into_iter().map(span).collect()
        })
        .collect();
    let (x, mut out) = (tensor(adapters * rows, HIDDEN), tensor(adapters * rows, HIDDEN + 2 * KV));
    let mut scratch = LoraScratch::default();
    let mut other = vec![1_u64; if cold { 48 << 20 } else { 0 }];
    let seconds = best(
        LAYERS,
        || other.iter_mut().for_each(|x| *x += 1),
        |layer| {
            let adapt = Adapt { sites: &spans[layer], lora: LoraRows { segments: &segments }, bias: None };
            apply(&machine.pool, machine.isa, adapt, &x, &mut out, &mut scratch)
                .expect("pages that are the adapters' own");
        },
    );
    let elements = LAYERS * rank * (2 * HIDDEN + HIDDEN + KV);
    let name = format!("LoRA {name}, {adapters} adapters x {rows} rows");
    report(machine, &name, seconds, adapters * elements * 2, adapters * rows * elements);
}

fn small_rates(machine: &Machine, rows: usize) {
    // Adding zeros takes as long and keeps the residual finite over all runs.
    let (mut residual, mut delta, mut out) = (tensor(rows, HIDDEN), tensor(rows, HIDDEN), tensor(rows, HIDDEN));
    delta.values_mut().fill(0.0);
    let weight = vec![0.5; HIDDEN];
    let seconds = best(
        2 * LAYERS,
        || (),
        |_| add_rms_norm(&machine.pool, machine.isa, &mut residual, Some(&delta), &weight, 1e-5, &mut out),
    );
    report(machine, &format!("add and RMSNorm, {rows} rows"), seconds, 2 * LAYERS * rows * HIDDEN * 4, 0);
    let (gate_up, mut out) = (tensor(rows, 2 * INTERMEDIATE), tensor(rows, INTERMEDIATE));
    let seconds = best(LAYERS, || (), |_| swiglu(&machine.pool, machine.isa, &gate_up, &mut out));
    report(machine, &format!("SwiGLU, {rows} rows"), seconds, LAYERS * rows * 3 * INTERMEDIATE * 4, 0);
}

fn sample_rate(machine: &Machine, name: &str, params: &SamplingParams, rows: usize) {
    // A peaked distribution, as models have.
    let logits: Vec<f32> = numbers(rows * VOCAB).into_iter().map(|x| 14.0 * x * x * x).collect();
    let mut logits = CpuTensor::from_values(&logits, VOCAB).expect("memory");
    let draw = SampleRow::Draw { params, sample_index: 0, prompt: &[1, 2], generated: &[3], banned: &[], top: 0 };
    let (rows_of_step, mut out) = (vec![draw; rows], Vec::new());
    let mut scratch = SampleScratch::default();
    let seconds =
        best(1, || (), |_| sample(&machine.pool, machine.isa, &mut logits, &rows_of_step, &mut out, &mut scratch));
    report(machine, &format!("sample {name}, {rows} rows (once)"), seconds, rows * VOCAB * 4, 0);
}
