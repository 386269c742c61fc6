//! Every operation of a backend but the plain linear, against its reference: inputs are read back from the device first, so that what
//! uploading rounds is no error. Each check returns its largest error as a share of what is allowed.

use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, SamplingParams, Site, SiteWeights};

use super::{Random, RandomMatrix, Rounding, upload, upload_into};
use crate::reference::sample::{Draw, distribution, log_softmax, uniform};
use crate::{
    AttentionSpec, Backend, BlockFormat, LayerAttention, LinearSpec, LoraRows, LoraSegment, Numbers, RopeTable,
    SampleRow, SampledRow, SequenceRows, SiteSpan, StepRows, reference,
};

impl Rounding {
    /// Half a unit in the last place of a number near 1, with some f32 sums.
    fn unit(self) -> f32 {
        match self {
            Self::F32 | Self::Blocks => 1e-6,
            Self::Floats(bits) => 2.0_f32.powi(-bits),
        }
    }
}

fn numbers(random: &mut Random, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| random.number() * scale).collect()
}

/// The largest error as a share of `allowed(i)`.
fn worst_of(found: &[f32], expected: &[f32], what: &str, allowed: impl Fn(usize) -> f32) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}: number of outputs");
    let mut worst = 0.0_f32;
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let share = (found - expected).abs() / allowed(i);
        // A NaN, which is what an output that was not written holds, fails as well.
        assert!(share <= 1.0, "{what}: output {i} is {found}, expected {expected} within {}", allowed(i));
        worst = worst.max(share);
    }
    worst
}

/// RMSNorm with the residual, SwiGLU and picked rows agree with their references, for widths that fill no vector and any number of
/// rows.
///
/// # Panics
/// When they do not.
pub fn row_operations_agree_with_reference<B: Backend>(backend: &B, rounding: Rounding) -> f32 {
    let (mut random, mut worst, unit) = (Random::new(11), 0.0_f32, rounding.unit());
    for (width, rows) in [(64, 1), (100, 7), (576, 133), (1028, 33)] {
        let what = format!("{rows} rows of {width}");
        let mut residual = backend.new_tensor(Numbers::F32, rows, width).expect("memory");
        upload_into(backend, &numbers(&mut random, rows * width, 3.0), width, &mut residual);
        let delta = upload(backend, &numbers(&mut random, rows * width, 2.0), width);
        let weight = numbers(&mut random, width, 1.5);
        let (mut sum, delta_values) = (backend.read_tensor(&residual), backend.read_tensor(&delta));
        let mut expected = vec![0.0; rows * width];
        reference::norm::add_rms_norm(&mut sum, Some(&delta_values), &weight, 1e-5, &mut expected);
        let weight = backend.load_vector(&weight).expect("memory");
        let mut out = upload(backend, &vec![f32::NAN; rows * width], width);
        backend.add_rms_norm(&mut residual, Some(&delta), &weight, 1e-5, &mut out).expect("norm");
        let of_sum = |i: usize| sum[i].abs() * 1e-6 + 1e-6;
        worst = worst.max(worst_of(&backend.read_tensor(&residual), &sum, &format!("residual, {what}"), of_sum));
        let of_norm = |i: usize| expected[i].abs() * (unit + 1e-5) + 1e-5;
        worst = worst.max(worst_of(&backend.read_tensor(&out), &expected, &format!("norm, {what}"), of_norm));

        let gate_up = upload(backend, &numbers(&mut random, rows * 2 * width, 6.0), 2 * width);
        let values = backend.read_tensor(&gate_up);
        let mut expected = vec![0.0; rows * width];
        for (row, expected) in values.chunks_exact(2 * width).zip(expected.chunks_exact_mut(width)) {
            let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
            for (i, expected) in expected.iter_mut().enumerate() {
                *expected = (silu(row[i]) * f64::from(row[width + i])) as f32;
            }
        }
        let mut out = upload(backend, &vec![f32::NAN; rows * width], width);
        backend.swiglu(&gate_up, &mut out).expect("swiglu");
        let of_gate = |i: usize| expected[i].abs() * (unit + 1e-5) + 1e-5;
        worst = worst.max(worst_of(&backend.read_tensor(&out), &expected, &format!("SwiGLU, {what}"), of_gate));

        let picked: Vec<u32> = (0..rows.div_ceil(2)).map(|_| random.below(rows) as u32).collect();
        // What it holds is overwritten.
        let mut out = upload(backend, &vec![f32::NAN; rows * 2 * width], 2 * width);
        backend.gather_rows(&gate_up, &picked, &mut out).expect("gather");
        let expected: Vec<f32> =
            picked.iter().flat_map(|row| &values[*row as usize * 2 * width..][..2 * width]).copied().collect();
        assert!(backend.read_tensor(&out) == expected, "picked rows, {what}");
    }
    worst
}

/// One sequence of [`attention_agrees_with_reference`]: rows that are in the cache, then rows of the step.
const SEQUENCES: [(usize, usize); 6] = [(300, 1), (0, 133), (40, 7), (0, 1), (15, 1), (530, 2)];

/// Rotary embedding, storing and attention agree with their references: sequences that decode beside others that are prefilled, in
/// shuffled pages full of NaN, with and without a window, for several numbers and lengths of heads, each on a backend of its own, as
/// a backend serves one model.
///
/// # Panics
/// When they do not.
pub fn attention_agrees_with_reference<B: Backend>(
    new: &dyn Fn() -> B,
    rounding: Rounding,
    poison: fn(&mut B::Pages),
) -> f32 {
    let spec = |heads, kv_heads, head_dim: usize| AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        block_size: 16,
        scale: (head_dim as f32).sqrt().recip(),
        norm_eps: 1e-6,
    };
    let mut worst = 0.0_f32;
    for (spec, window) in [
        (spec(9, 3, 64), None),
        (spec(8, 2, 128), None),
        (spec(4, 4, 64), Some(50)),
        (spec(14, 2, 64), None),
        (spec(3, 1, 20), Some(7)),
    ] {
        worst = worst.max(attention_case(&new(), rounding, poison, &spec, window));
    }
    worst
}

fn attention_case<B: Backend>(
    backend: &B,
    rounding: Rounding,
    poison: fn(&mut B::Pages),
    spec: &AttentionSpec,
    window: Option<usize>,
) -> f32 {
    const LAYERS: usize = 2;
    let mut random = Random::new(12 + spec.heads as u64);
    let (head_dim, width) = (spec.head_dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim);
    let length = |(before, rows): (usize, usize)| before + rows;
    let positions_max = SEQUENCES.into_iter().map(length).max().unwrap_or(0);
    let angle = |i: usize| (i / (head_dim / 2)) as f32 / 50.0_f32.powf((i % (head_dim / 2)) as f32 / head_dim as f32);
    let angles = 0..positions_max * head_dim / 2;
    let table = RopeTable {
        rotary_dim: head_dim,
        cos: angles.clone().map(|i| angle(i).cos()).collect(),
        sin: angles.map(|i| angle(i).sin()).collect(),
    };
    let rope = backend.load_rope(&table).expect("memory");
    let blocks: Vec<usize> = SEQUENCES.into_iter().map(|sequence| length(sequence).div_ceil(16)).collect();
    let pages = blocks.iter().sum::<usize>();
    let mut pool = backend.new_pages(spec, LAYERS, pages).expect("memory");
    poison(&mut pool);
    // A step coprime to the number of pages visits each once.
    let stride = (pages / 2..).find(|stride| gcd(*stride, pages) == 1).expect("some number is coprime");
    let block_tables: Vec<u32> = (0..pages).map(|i| (i * stride % pages) as u32).collect();
    let tables = |i: usize| blocks[..i].iter().sum::<usize>();
    let layer = LayerAttention { layer: 1, window, rope: &rope, qk_norm: None };
    // Rotated q, k and v of each sequence so far, as the reference has them.
    let mut known: Vec<Vec<f32>> = vec![Vec::new(); SEQUENCES.len()];
    let mut worst = 0.0_f32;
    for (stage, of) in [(0, "what was before"), (1, "the step")] {
        let rows_of = |i: usize| if stage == 0 { SEQUENCES[i].0 } else { SEQUENCES[i].1 };
        let mut sequences = Vec::new();
        let (mut positions, mut row) = (Vec::new(), 0);
        for i in 0..SEQUENCES.len() {
            let (rows, first) = (rows_of(i), if stage == 0 { 0 } else { SEQUENCES[i].0 });
            if rows > 0 {
                sequences.push((i, SequenceRows { row, rows, table: tables(i), blocks: blocks[i] }));
                positions.extend((first..first + rows).map(|position| position as u32));
                row += rows;
            }
        }
        let mut qkv = upload(backend, &numbers(&mut random, row * width, 1.5), width);
        let mut rotated = backend.read_tensor(&qkv);
        reference::rope::rope(spec, &positions, &table, None, &mut rotated);
        let spans: Vec<SequenceRows> = sequences.iter().map(|(_, span)| *span).collect();
        let tokens = vec![0; row];
        let step = StepRows {
            tokens: &tokens,
            drawn: &[],
            positions: &positions,
            sequences: &spans,
            block_tables: &block_tables,
        };
        backend.rope_and_store(spec, &step, layer, &mut qkv, &mut pool).expect("stored");
        let out_width = spec.heads * head_dim;
        let mut out = upload(backend, &vec![f32::NAN; row * out_width], out_width);
        backend.attention(spec, &step, layer, &qkv, &pool, &mut out).expect("attention");
        let mut expected = Vec::with_capacity(row * out_width);
        for (i, span) in sequences {
            for row in rotated[span.row * width..].chunks_exact(width).take(span.rows) {
                known[i].extend(row);
                expected.extend(attend(spec, window, &known[i], width));
            }
        }
        let what = format!("{of}, {} heads of {head_dim} over {}, window {window:?}", spec.heads, spec.kv_heads);
        // Scores, probabilities and values are rounded; values are up to 1.5.
        let allowed = 1.5 * (8.0 * rounding.unit() + 1e-5);
        worst = worst.max(worst_of(&backend.read_tensor(&out), &expected, &what, |_| allowed));
    }
    worst
}

/// What the last of a sequence's rows attends to.
fn attend(spec: &AttentionSpec, window: Option<usize>, rows: &[f32], width: usize) -> Vec<f32> {
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let part = |start: usize| rows.chunks_exact(width).flat_map(|row| row[start..start + kv].to_vec()).collect();
    let (keys, values): (Vec<f32>, Vec<f32>) = (part(q), part(q + kv));
    let mut out = vec![0.0; q];
    let last = &rows[rows.len() - width..];
    reference::attention::attention(spec, window, &last[..q], &keys, &values, &mut out);
    out
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

const LAYERS: usize = 2;
const INPUTS: usize = 1100;
const OUTPUTS: [(Module, usize); 3] = [(Module::Q, 160), (Module::K, 64), (Module::V, 72)];
/// Ranks of the adapters at each of their sites; 0 where they have none.
const RANKS: [[usize; 3]; 6] = [[8, 8, 8], [1, 0, 16], [33, 64, 3], [256, 0, 0], [0, 128, 128], [16, 16, 16]];
/// Rows and adapter of each segment.
const SEGMENTS: [(usize, Option<usize>); 9] = [
    (1, Some(0)),
    (3, Some(1)),
    (2, None),
    (19, Some(2)),
    (1, Some(3)),
    (7, Some(4)),
    (1, None),
    (300, Some(5)),
    (5, Some(3)),
];

/// More segments than a decode step has.
const MANY: usize = 261;

/// A fused linear with a bias, and adapters on it.
struct Adapted<B: Backend> {
    linear: B::Linear,
    adapters: Vec<B::Adapter>,
    weights: Vec<AdapterWeights>,
    output_scales: Vec<Vec<Option<Vec<f32>>>>,
    matrices: Vec<RandomMatrix>,
    bias: Vec<f32>,
}

impl<B: Backend> Adapted<B> {
    fn new(backend: &B, poison: fn(&mut B::Pages)) -> Self {
        let mut random = Random::new(13);
        // Numbers that every element holds, so that only products and sums are rounded.
        let held = |values: Vec<f32>| values.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
        let matrices: Vec<_> = OUTPUTS
            .map(|(_, outputs)| RandomMatrix::new(BlockFormat::Bf16, outputs, INPUTS, &mut random))
            .into_iter()
            .collect();
        let bias = numbers(&mut random, OUTPUTS.iter().map(|(_, outputs)| outputs).sum(), 1.0);
        let mut start = 0;
        let sites = OUTPUTS
            .map(|(module, outputs)| {
                let site = Site { layer: 1, module };
                start += outputs;
                SiteSpan { site, index: site.index(LAYERS), outputs: start - outputs..start }
            })
            .to_vec();
        let parts = matrices.iter().map(RandomMatrix::source).collect();
        let linear = backend.load_linear(&LinearSpec { parts, bias: Some(bias.clone()), sites }).expect("sound");
        let (mut weights, mut output_scales) = (Vec::new(), Vec::new());
        for (number, ranks) in RANKS.iter().enumerate() {
            let (mut sites, mut scales) = (Vec::new(), Vec::new());
            for ((module, outputs), rank) in OUTPUTS.into_iter().zip(*ranks).filter(|(_, rank)| *rank > 0) {
                let mut matrix = |rows: usize, cols: usize, scale: f32| Matrix {
                    rows,
                    cols,
                    elements: Elements::F32(held(numbers(&mut random, rows * cols, scale))),
                };
                let (a, b) = (matrix(rank, INPUTS, 0.05), matrix(outputs, rank, 1.0 / (rank as f32).sqrt()));
                // One has B's bias, another DoRA's factors.
                let b_bias = (number == 2).then(|| numbers(&mut random, outputs, 0.5));
                scales.push((number == 4).then(|| numbers(&mut random, outputs, 1.5)));
                let site = Site { layer: 1, module };
                sites.push(SiteWeights { site, a, b, scale: 0.5 + number as f32, b_bias, magnitude: None });
            }
            weights.push(AdapterWeights { generation: Generation([number as u8; 32]), sites });
            output_scales.push(scales);
        }
        let spec = AttentionSpec { heads: 4, kv_heads: 2, head_dim: 64, block_size: 16, scale: 1.0, norm_eps: 0.0 };
        let page_bytes = backend.page_bytes(&spec, LAYERS);
        let load = |(weights, scales): (&AdapterWeights, &Vec<Option<Vec<f32>>>)| {
            let pages = backend.adapter_pages(&weights.sizes(), page_bytes);
            let mut pool = backend.new_pages(&spec, LAYERS, pages).expect("memory");
            poison(&mut pool);
            let all: Vec<u32> = (0..pages as u32).rev().collect();
            let set = backend.take_pages(&mut pool, &all).expect("free pages");
            backend.load_adapter(weights, scales, LAYERS, set).expect("it fits")
        };
        let adapters = weights.iter().zip(&output_scales).map(load).collect();
        Self { linear, adapters, weights, output_scales, matrices, bias }
    }

    /// The linear of `x`, whose rows are of `segments`.
    fn apply(&self, backend: &B, x: &[f32], segments: &[(usize, Option<usize>)]) -> Vec<f32> {
        let mut row = 0;
        let run = |(rows, adapter): &(usize, Option<usize>)| {
            row += rows;
            LoraSegment { row: row - rows, rows: *rows, adapter: adapter.map(|adapter| &self.adapters[adapter]) }
        };
        let segments: Vec<_> = segments.iter().map(run).collect();
        let x = upload(backend, x, INPUTS);
        let width = self.bias.len();
        let mut out = upload(backend, &vec![f32::NAN; row * width], width);
        backend.linear(&self.linear, &LoraRows { segments: &segments }, &x, &mut out).expect("linear");
        backend.read_tensor(&out)
    }

    /// The reference's answer for one row, and how far from it a backend may be.
    fn expected(&self, x: &[f32], adapter: Option<usize>, unit: f32) -> (Vec<f32>, Vec<f32>) {
        let (mut all, mut allowed, mut start) = (Vec::new(), Vec::new(), 0);
        for ((module, outputs), matrix) in OUTPUTS.into_iter().zip(&self.matrices) {
            let spec = LinearSpec { parts: vec![matrix.source()], bias: None, sites: Vec::new() };
            let mut out = reference::linear::linear(&spec, x);
            // Of random signs the sum of the magnitudes is several times the root of the squares, which errors follow.
            let size =
                |out: &[f32]| out.iter().map(|value| value * value).sum::<f32>().sqrt() / (outputs as f32).sqrt();
            let mut scale = size(&out);
            let bias = &self.bias[start..start + outputs];
            start += outputs;
            let site = adapter.and_then(|adapter| {
                let sites = &self.weights[adapter].sites;
                let at = sites.iter().position(|site| site.site.module == module)?;
                Some((&sites[at], self.output_scales[adapter][at].as_deref()))
            });
            match site {
                Some((site, output_scale)) => {
                    reference::lora::linear(site, output_scale, Some(bias), x, &mut out);
                    scale += size(&out) * 2.0;
                }
                None => out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias),
            }
            allowed.extend(out.iter().map(|out| (6.0 * unit + 1e-5) * (scale * 2.0 + out.abs() + 1.0)));
            all.extend(out);
        }
        (all, allowed)
    }
}

/// Adapters of mixed ranks, with B's bias and with DoRA's factors, on segments of any number of rows in one step, also on more segments
/// than a decode step has, agree with the reference.
///
/// # Panics
/// When they do not.
pub fn adapters_agree_with_reference<B: Backend>(backend: &B, rounding: Rounding, poison: fn(&mut B::Pages)) -> f32 {
    let adapted = Adapted::new(backend, poison);
    let mut random = Random::new(14);
    let many: Vec<_> = (0..MANY).map(|i| (1, Some(i % RANKS.len()))).collect();
    let width = adapted.bias.len();
    let mut worst = 0.0_f32;
    for segments in [SEGMENTS.as_slice(), &many] {
        let rows: usize = segments.iter().map(|(rows, _)| rows).sum();
        let x = backend.read_tensor(&upload(backend, &numbers(&mut random, rows * INPUTS, 1.0), INPUTS));
        let found = adapted.apply(backend, &x, segments);
        let mut row = 0;
        for &(rows, adapter) in segments {
            // Rows of a long one are alike, and so are those of many: some of each.
            for at in (row..row + rows).step_by(if rows > 32 { 13 } else { 1 }) {
                if segments.len() < MANY || at % 13 == 0 {
                    let (expected, allowed) = adapted.expected(&x[at * INPUTS..][..INPUTS], adapter, rounding.unit());
                    let what = format!("row {at} of {} segments, adapter {adapter:?}", segments.len());
                    worst = worst.max(worst_of(&found[at * width..][..width], &expected, &what, |i| allowed[i]));
                }
            }
            row += rows;
        }
        assert!(found.iter().all(|value| value.is_finite()), "an output is not finite");
    }
    worst
}

/// A row under an adapter has the same bits alone and among others, in steps of at most 64 rows: backends may join sums in another
/// order in larger ones.
///
/// # Panics
/// When it has not.
pub fn adapted_rows_do_not_depend_on_each_other<B: Backend>(backend: &B, poison: fn(&mut B::Pages)) {
    let adapted = Adapted::new(backend, poison);
    let mut random = Random::new(15);
    let (width, x) = (adapted.bias.len(), numbers(&mut random, 40 * INPUTS, 1.0));
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for round in 0..6 {
        let mut segments: Vec<(usize, Option<usize>)> = Vec::new();
        let mut rows = 0;
        while rows < 40 {
            let count = (1 + random.below(9)).min(40 - rows);
            let adapter = random.below(RANKS.len() + 1);
            segments.push((count, (adapter < RANKS.len()).then_some(adapter)));
            rows += count;
        }
        let together = adapted.apply(backend, &x, &segments);
        let mut row = 0;
        for (rows, adapter) in segments {
            let alone = adapted.apply(backend, &x[row * INPUTS..][..INPUTS], &[(1, adapter)]);
            let found = &together[row * width..][..width];
            assert!(bits(found) == bits(&alone), "round {round}, row {row}, adapter {adapter:?}");
            row += rows;
        }
    }
}

/// Greedy and random draws, log-probabilities and alternatives agree with the reference, for parameters of every kind; the same
/// request draws the same alone.
///
/// # Panics
/// When they do not.
pub fn samples_agree_with_reference<B: Backend>(backend: &B) -> f32 {
    let mut worst = 0.0_f32;
    for vocab in [300, 20_000] {
        worst = worst.max(sample_case(backend, vocab));
    }
    worst
}

fn sample_case<B: Backend>(backend: &B, vocab: usize) -> f32 {
    let mut random = Random::new(vocab as u64);
    let of = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        params
    };
    let mut all = vec![
        of(&|p| p.temperature = 0.0),
        of(&|_| ()),
        of(&|p| p.temperature = 0.3),
        of(&|p| p.top_k = 5),
        of(&|p| p.top_p = 0.6),
        of(&|p| p.min_p = 0.05),
        of(&|p| (p.top_k, p.top_p, p.temperature) = (40, 0.9, 1.7)),
        of(&|p| (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.3, 0.5, -0.2)),
        of(&|p| p.logit_bias = vec![(7, 6.0), (8, -50.0)]),
    ];
    all.iter_mut().enumerate().for_each(|(i, params)| params.seed = 1000 + i as u64 * 77);
    let values: Vec<f32> = (0..all.len() * vocab).map(|_| random.number().powi(3) * 12.0).collect();
    let (prompt, generated, banned) = ([3, 7, 9], [5, 7, 7, 11], [2]);
    let draw = |params| SampleRow::Draw {
        params,
        sample_index: 0,
        prompt: &prompt,
        generated: &generated,
        banned: &banned,
        top: 5,
    };
    let run = |values: &[f32], rows: &[SampleRow<'_>]| -> Vec<SampledRow> {
        let mut logits = backend.new_tensor(Numbers::F32, rows.len(), vocab).expect("memory");
        upload_into(backend, values, vocab, &mut logits);
        let mut out = Vec::new();
        backend.sample(&mut logits, rows, &mut out).expect("sampled");
        out
    };
    let mut logits = backend.new_tensor(Numbers::F32, all.len(), vocab).expect("memory");
    upload_into(backend, &values, vocab, &mut logits);
    let values = backend.read_tensor(&logits);
    let rows: Vec<_> = all.iter().map(draw).collect();
    let together = run(&values, &rows);
    let mut worst = 0.0_f32;
    for (i, (found, params)) in together.iter().zip(&all).enumerate() {
        let what = format!("{vocab} tokens, parameters {i}");
        let raw = &values[i * vocab..][..vocab];
        let (token, logprobs) = (found.token as usize, log_softmax(raw));
        let error = (f64::from(found.logprob) - logprobs[token]).abs() as f32 / 1e-3;
        assert!(error <= 1.0, "{what}: log-probability {} of {token}, expected {}", found.logprob, logprobs[token]);
        worst = worst.max(error);
        let reference = Draw { params, prompt: &prompt, generated: &generated, banned: &banned };
        let probabilities = distribution(raw, &reference);
        let place = uniform(params.seed, 0, generated.len() as u32);
        let before: f64 = probabilities[..token].iter().sum();
        let after = before + probabilities[token];
        let in_place = probabilities[token] > 0.0 && before - 1e-4 <= place && place <= after + 1e-4;
        assert!(in_place, "{what}: {token} lies from {before} to {after}, drawn at {place}");
        let mut best: Vec<usize> = (0..vocab).collect();
        best.sort_by(|a, b| raw[*b].total_cmp(&raw[*a]).then(a.cmp(b)));
        let tops: Vec<usize> = found.top.iter().map(|top| top.token as usize).collect();
        assert_eq!(tops, best[..5], "{what}: alternatives");
        assert!(run(raw, &[draw(params)])[0] == *found, "{what}: alone it draws another");
    }
    worst
}
