//! Sampling on the device, against the reference's distributions and against itself.

use std::sync::Arc;

use openlora_kernels::cuda::device::{Device, Element, Stream};
use openlora_kernels::cuda::emulated::Emulated;
use openlora_kernels::cuda::sample::{SampleLimits, Sampler};
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::reference::sample as reference;
use openlora_kernels::reference::sample::Draw;
use openlora_kernels::{SampleRow, SampledRow};
use openlora_types::{SamplingParams, Token};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::support::{emulated, emulated_with, sanitised};

/// Rows of a launch beyond those there are.
const SPARE: usize = 2;
/// Alternatives there is room for.
const TOP: usize = 20;

fn params(change: impl Fn(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams::default();
    change(&mut params);
    params
}

fn draw(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow::Draw { params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 }
}

fn random(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Logits like a model's: few large ones, many small ones.
fn peaked(vocab: usize, seed: u64) -> Vec<f32> {
    random(seed, vocab, 1.0).into_iter().map(|x| 12.0 * x * x * x).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn with_spare(logits: &[f32], vocab: usize) -> Vec<f32> {
    logits.iter().copied().chain(std::iter::repeat_n(f32::NAN, SPARE * vocab)).collect()
}

/// Samples with a launch for more rows than there are.
fn run(device: &Arc<Emulated>, logits: &[f32], vocab: usize, rows: &[SampleRow<'_>]) -> Vec<SampledRow> {
    let limits = SampleLimits { rows: rows.len() + SPARE, vocab, top: TOP };
    let mut sampler = Sampler::new(device, limits).expect("memory");
    let all = with_spare(logits, vocab);
    let mut tensor = CudaTensor::holding(device, Element::F32, &all, vocab).expect("memory");
    sampler.prepare(rows).expect("prepare");
    sampler.launch(Stream::Compute, &mut tensor, rows.len() + SPARE).expect("launch");
    let mut out = vec![SampledRow { token: 9, logprob: f32::NAN, top: Vec::new() }; 2];
    sampler.fetch().expect("a copy").collect(device, &mut out).expect("results");
    assert_eq!(bits(&tensor.values().expect("values")), bits(&all), "the logits are put back, other rows left alone");
    out
}

/// Parameters that cut in different ways.
fn many_params() -> Vec<SamplingParams> {
    let mut all = vec![SamplingParams::default()];
    for (temperature, top_k, top_p, min_p) in [
        (0.7, 0, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 40, 1.0, 0.0),
        (1.3, 100_000, 0.95, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.0, 0, 0.1, 0.0),
        (5.0, 0, 0.99, 0.0),
        (100.0, 0, 0.5, 0.0),
        (0.8, 50, 0.9, 0.02),
        (1.0, 0, 1.0, 0.1),
        (2.0, 0, 0.7, 0.05),
        (1e-30, 0, 0.9, 0.0),
        (100.0, 30, 0.6, 0.0),
    ] {
        all.push(params(|p| (p.temperature, p.top_k, p.top_p, p.min_p) = (temperature, top_k, top_p, min_p)));
    }
    all.push(params(|p| {
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.2, 0.5, 0.3);
        (p.top_p, p.logit_bias) = (0.95, vec![(5, 3.0), (40, -100.0), (5, 1.0)]);
    }));
    all.push(params(|p| (p.frequency_penalty, p.temperature) = (-1.0, 0.9)));
    all
}

/// Fails unless the token is where the random number says in the probabilities, in order of the token.
#[track_caller]
fn assert_in_place(token: Token, probabilities: &[f64], uniform: f64, what: &str) {
    let before: f64 = probabilities[..token as usize].iter().sum();
    let after = before + probabilities[token as usize];
    assert!(after > before, "{what}: token {token} is impossible");
    assert!(before - 3e-6 <= uniform && uniform <= after + 3e-6, "{what}: token {token}: {before} {uniform} {after}");
}

/// Draws with each of `all` from the same logits, and checks each draw's place and log-probability.
fn check_places(device: &Arc<Emulated>, logits: &[f32], all: &[SamplingParams], what: &str) {
    let vocab = logits.len();
    let (prompt, generated) = ([5, 17, 17, vocab as u32 - 1], [8, 8, 8, 21, 17]);
    let row = |(i, params)| {
        let sample_index = i as u32 % 3;
        SampleRow::Draw { params, sample_index, prompt: &prompt, generated: &generated, banned: &[2, 3], top: 0 }
    };
    let rows: Vec<_> = all.iter().enumerate().map(row).collect();
    let log_softmax = reference::log_softmax(logits);
    for (i, found) in run(device, &logits.repeat(rows.len()), vocab, &rows).iter().enumerate() {
        let draw = Draw { params: &all[i], prompt: &prompt, generated: &generated, banned: &[2, 3] };
        let uniform = reference::uniform(all[i].seed, i as u32 % 3, 5);
        let what = format!("{what}: {:?}", all[i]);
        assert_in_place(found.token, &reference::distribution(logits, &draw), uniform, &what);
        let expected = log_softmax[found.token as usize];
        assert!((f64::from(found.logprob) - expected).abs() < 1e-4, "{what}: raw log-probability {}", found.logprob);
    }
}

fn seeded(all: Vec<SamplingParams>, seeds: std::ops::Range<u64>) -> Vec<SamplingParams> {
    seeds.flat_map(|seed| all.iter().map(move |p| SamplingParams { seed, ..p.clone() })).collect()
}

#[test]
fn a_draw_is_the_token_at_the_random_number_s_place() {
    sanitised(|| {
        let device = emulated();
        for (vocab, seed) in [(50, 0), (1_000, 1), (1_003, 2)] {
            check_places(&device, &peaked(vocab, 4), &seeded(many_params(), seed..seed + 1), "peaked");
        }
        check_places(&device, &random(1, 333, 0.01), &seeded(many_params(), 3..4), "flat");
    });
}

#[test]
fn equal_logits_are_kept_as_the_reference_keeps_them() {
    sanitised(|| {
        let device = emulated();
        let rounded: Vec<f32> = peaked(801, 2).into_iter().map(|x| x.round() + 0.0).collect();
        check_places(&device, &rounded, &seeded(many_params(), 5..6), "rounded");
        check_places(&device, &vec![1.5; 600], &seeded(many_params(), 8..9), "equal");
    });
}

#[test]
fn a_vocabulary_of_many_splits_is_one_distribution() {
    sanitised(|| {
        let device = emulated();
        // More tokens above any bound than can be listed: 19,003 of equal weight or nearly so, at an odd width.
        check_places(&device, &random(3, 19_003, 0.01), &seeded(many_params(), 11..12), "flat");
        check_places(&device, &vec![-2.5; 12_000], &seeded(many_params(), 12..13), "equal");
        let mut few = many_params();
        few.truncate(10);
        check_places(&device, &peaked(49_152, 5), &seeded(few, 13..14), "peaked");
    });
}

#[test]
fn a_list_that_is_just_full_is_drawn_from_like_any_other() {
    sanitised(|| {
        let device = emulated();
        let cut = [params(|p| p.top_p = 0.99), params(|p| p.top_k = 4_090), params(|p| p.min_p = 0.5)];
        // 4,096 tokens of equal weight, one less and one more; two are banned.
        for kept in [4_097, 4_098, 4_099] {
            let logits: Vec<f32> = (0..6_000).map(|i| if i < kept { 3.0 } else { -30.0 }).collect();
            check_places(&device, &logits, &seeded(cut.to_vec(), 20..22), &format!("{kept}"));
        }
    });
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn tokens(value: &Value) -> Vec<Token> {
    value.as_array().expect("an array").iter().map(|token| token.as_u64().expect("a token") as Token).collect()
}

#[test]
fn draws_follow_the_probabilities_of_transformers() {
    sanitised(|| {
        let device = emulated();
        let text = include_str!("../../../fixtures/sampling.json");
        let fixture: Value = serde_json::from_str(text).expect("JSON");
        let cases = fixture["cases"].as_array().expect("cases");
        assert!(cases.len() > 30, "the fixture's cases");
        for (seed, case) in cases.iter().enumerate() {
            let name = case["logits"].as_str().expect("a name");
            let logits: Vec<f32> = numbers(&fixture["logits"][name]).into_iter().map(|x| x as f32).collect();
            let (prompt, generated) = (tokens(&case["prompt"]), tokens(&case["generated"]));
            let number =
                |key: &str, neutral: f64| case.get(key).map_or(neutral, |value| value.as_f64().expect("a number"));
            let bias = case.get("logit_bias").and_then(Value::as_array).into_iter().flatten();
            let params = params(|p| {
                p.seed = seed as u64;
                p.temperature = number("temperature", 1.0) as f32;
                p.top_k = number("top_k", 0.0) as u32;
                p.top_p = number("top_p", 1.0) as f32;
                p.min_p = number("min_p", 0.0) as f32;
                p.repetition_penalty = number("repetition_penalty", 1.0) as f32;
                p.presence_penalty = number("presence_penalty", 0.0) as f32;
                p.frequency_penalty = number("frequency_penalty", 0.0) as f32;
                let pair = |pair: &Value| (numbers(pair)[0] as Token, numbers(pair)[1] as f32);
                p.logit_bias = bias.clone().map(pair).collect();
            });
            let row = |sample_index| SampleRow::Draw {
                params: &params,
                sample_index,
                prompt: &prompt,
                generated: &generated,
                banned: &[],
                top: 0,
            };
            let rows: Vec<_> = (0..3).map(row).collect();
            let expected = numbers(&case["probabilities"]);
            for (i, found) in run(&device, &logits.repeat(3), logits.len(), &rows).iter().enumerate() {
                let uniform = reference::uniform(seed as u64, i as u32, generated.len() as u32);
                assert_in_place(found.token, &expected, uniform, &case.to_string());
            }
        }
    });
}

#[test]
fn drawn_frequencies_follow_the_distribution() {
    sanitised(|| {
        let device = emulated();
        let logits = [1.0, 0.0, 2.0, -1.0, 0.5, f32::NEG_INFINITY, 1.5];
        for (draws, top_p) in [(600_usize, 1.0), (150, 0.8)] {
            let all: Vec<SamplingParams> =
                (0..draws as u64).map(|seed| params(|p| (p.seed, p.top_p) = (seed, top_p))).collect();
            let rows: Vec<_> = all.iter().map(draw).collect();
            let nothing = Draw { params: &all[0], prompt: &[], generated: &[], banned: &[] };
            let expected = reference::distribution(&logits, &nothing);
            let mut counts = [0.0; 7];
            for row in run(&device, &logits.repeat(draws), 7, &rows) {
                counts[row.token as usize] += 1.0 / draws as f64;
            }
            for (count, p) in counts.iter().zip(&expected) {
                // Five standard deviations.
                assert!((count - p).abs() <= 5.0 * (p * (1.0 - p) / draws as f64).sqrt(), "{count} for {p}");
            }
        }
    });
}

#[test]
fn greedy_takes_the_largest_and_the_lower_token_of_equals() {
    sanitised(|| {
        let device = emulated();
        for vocab in [333, 20_000] {
            let mut logits = peaked(vocab, 5);
            // The equals are in different splits where there are several.
            let far = vocab - 33;
            (logits[40], logits[41], logits[far]) = (50.0, 60.0, 60.0);
            let greedy = params(|p| p.temperature = 0.0);
            let biased = params(|p| (p.temperature, p.logit_bias) = (0.0, vec![(40, 20.0)]));
            let penalised = params(|p| (p.temperature, p.repetition_penalty) = (0.0, 2.0));
            let frequent = params(|p| (p.temperature, p.frequency_penalty) = (0.0, 2.0));
            let with = |params, generated, banned| SampleRow::Draw {
                params,
                sample_index: 0,
                prompt: &[],
                generated,
                banned,
                top: 0,
            };
            let (twice, both) = ([41, 41], [41, far as u32]);
            let often = [vec![41; 6], vec![far as u32; 5]].concat();
            let rows = [
                draw(&greedy),
                draw(&biased),
                with(&penalised, &twice, &[]),
                with(&penalised, &both, &[]),
                with(&greedy, &[], &[41]),
                with(&greedy, &[], &both),
                with(&frequent, &often[..10], &[]),
                with(&frequent, &often, &[]),
            ];
            let out = run(&device, &logits.repeat(rows.len()), vocab, &rows);
            let far = far as u32;
            // Six times 2 less is below 50; five times as well; four times is 52.
            assert_eq!(out.iter().map(|row| row.token).collect::<Vec<_>>(), [41, 40, far, 40, far, 40, far, 40]);
        }
    });
}

#[test]
fn minus_zero_equals_zero() {
    sanitised(|| {
        let device = emulated();
        let mut logits = vec![-5.0; 70];
        (logits[11], logits[60]) = (-0.0, 0.0);
        let (greedy, best) = (params(|p| p.temperature = 0.0), params(|p| p.top_k = 1));
        let found = run(&device, &logits.repeat(9), 70, &[draw(&greedy); 9]);
        assert!(found.iter().all(|row| row.token == 11));
        let seeds: Vec<_> = (0..9).map(|seed| SamplingParams { seed, ..best.clone() }).collect();
        let rows: Vec<_> = seeds.iter().map(draw).collect();
        let found = run(&device, &logits.repeat(9), 70, &rows);
        assert!(found.iter().any(|row| row.token == 11) && found.iter().any(|row| row.token == 60), "both are kept");
    });
}

#[test]
fn alternatives_are_the_raw_best_in_order() {
    sanitised(|| {
        let device = emulated();
        // The last has more equals than can be listed.
        for (vocab, equal) in [(2_001, false), (30_002, false), (9_000, true)] {
            let mut logits = if equal { vec![2.25; vocab] } else { peaked(vocab, 6) };
            (logits[1_999], logits[3], logits[2_000]) = (11.5, 11.5, 20.0);
            let log_softmax = reference::log_softmax(&logits);
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let biased = params(|p| p.logit_bias = vec![(7, 100.0), (2_000, -100.0)]);
            for top in [1, 5, TOP] {
                let biased =
                    SampleRow::Draw { params: &biased, sample_index: 0, prompt: &[], generated: &[], banned: &[], top };
                let without = SampleRow::Score { token: 9, top: 0 };
                let out =
                    run(&device, &logits.repeat(3), vocab, &[SampleRow::Score { token: 9, top }, biased, without]);
                assert_eq!(out.iter().map(|row| row.token).collect::<Vec<_>>(), [9, 7, 9]);
                assert!(out[2].top.is_empty());
                for found in &out {
                    let tokens: Vec<usize> = found.top.iter().map(|top| top.token as usize).collect();
                    assert_eq!(tokens, order[..found.top.len()], "{vocab}");
                    for top in &found.top {
                        assert!((f64::from(top.logprob) - log_softmax[top.token as usize]).abs() < 1e-4);
                    }
                    assert!((f64::from(found.logprob) - log_softmax[found.token as usize]).abs() < 1e-4);
                }
                assert_eq!(out.iter().map(|row| row.top.len()).collect::<Vec<_>>(), [top, top, 0]);
            }
        }
        let few = run(&device, &[1.0, 3.0, 2.0], 3, &[SampleRow::Score { token: 0, top: 8 }]);
        assert_eq!(few[0].top.iter().map(|top| top.token).collect::<Vec<_>>(), [1, 2, 0], "no more than there are");
    });
}

#[test]
fn log_probabilities_of_a_large_vocabulary_are_exact_to_a_ten_thousandth() {
    sanitised(|| {
        let device = emulated();
        let vocab = 49_152;
        let logits = random(7, vocab, 15.0);
        let expected = reference::log_softmax(&logits);
        let scored = [0, 8_191, 8_192, 33_333, 49_151];
        let rows = scored.map(|token| SampleRow::Score { token, top: 0 });
        for (found, token) in run(&device, &logits.repeat(5), vocab, &rows).iter().zip(scored) {
            assert!((f64::from(found.logprob) - expected[token as usize]).abs() < 1e-4, "{token}");
        }
    });
}

#[test]
fn a_draw_depends_on_nothing_in_the_batch() {
    sanitised(|| {
        let vocab = 517;
        let all = many_params();
        let logits: Vec<f32> = (0..all.len()).flat_map(|row| peaked(vocab, 50 + row as u64)).collect();
        let history: Vec<Token> = vec![4, 9, 9, 100, 516];
        let row = |(i, params)| {
            let (prompt, generated) = (history.as_slice(), history.as_slice());
            SampleRow::Draw { params, sample_index: 1, prompt, generated, banned: &[3], top: i % 4 }
        };
        let rows: Vec<_> = all.iter().enumerate().map(row).collect();
        let devices = [1, 7, 132].map(emulated_with);
        let together = exact(&run(&devices[0], &logits, vocab, &rows));
        for device in &devices[1..] {
            assert_eq!(exact(&run(device, &logits, vocab, &rows)), together);
        }
        let turned: Vec<_> = rows.iter().rev().copied().collect();
        let turned_logits: Vec<f32> = logits.chunks(vocab).rev().flatten().copied().collect();
        let mut found = exact(&run(&devices[1], &turned_logits, vocab, &turned));
        found.reverse();
        assert_eq!(found, together, "in the other order");
        for (row, together) in together.iter().enumerate().step_by(2) {
            let alone = run(&devices[1], &logits[row * vocab..(row + 1) * vocab], vocab, &rows[row..row + 1]);
            assert_eq!(&exact(&alone)[0], together);
        }
    });
}

/// Results with the bits of their numbers.
fn exact(rows: &[SampledRow]) -> Vec<Vec<(Token, u32)>> {
    let row = |row: &SampledRow| {
        let top = row.top.iter().map(|top| (top.token, top.logprob.to_bits()));
        std::iter::once((row.token, row.logprob.to_bits())).chain(top).collect()
    };
    rows.iter().map(row).collect()
}

#[test]
fn when_every_token_is_banned_the_best_raw_one_is_taken() {
    sanitised(|| {
        let device = emulated();
        let banned: Vec<Token> = (0..40).collect();
        let mut logits = random(8, 40, 1.0);
        logits[23] = 5.0;
        // Were they not banned, some of these would draw others.
        let mut all = vec![params(|p| p.temperature = 0.0), params(|p| p.top_p = 0.5)];
        all.extend((0..30).map(|seed| params(|p| (p.seed, p.temperature) = (seed, 3.0))));
        let row = |params| SampleRow::Draw {
            params,
            sample_index: 0,
            prompt: &[],
            generated: &[],
            banned: banned.as_slice(),
            top: 1,
        };
        let rows: Vec<_> = all.iter().map(row).collect();
        for out in run(&device, &logits.repeat(rows.len()), 40, &rows) {
            assert_eq!((out.token, out.top[0].token), (23, 23));
            assert!(out.logprob.is_finite());
        }
    });
}

#[test]
fn not_a_number_and_infinity_are_defined() {
    sanitised(|| {
        let device = emulated();
        let greedy = params(|p| p.temperature = 0.0);
        let cut = params(|p| (p.top_p, p.top_k, p.repetition_penalty) = (0.9, 4, 1.5));
        let (nucleus, default) = (params(|p| p.top_p = 0.9), SamplingParams::default());
        let everything = vec![f32::NAN; 37];
        let nothing = vec![f32::NEG_INFINITY; 37];
        let (mut one, mut infinite) = (everything.clone(), random(9, 37, 1.0));
        one[36] = 1.0;
        (infinite[20], infinite[3]) = (f32::INFINITY, f32::NAN);
        for params in [&greedy, &cut, &nucleus, &default] {
            for (logits, token, logprob) in [
                (&everything, 0, f32::NEG_INFINITY),
                (&nothing, 0, f32::NEG_INFINITY),
                (&one, 36, 0.0),
                (&infinite, 20, 0.0),
            ] {
                let row =
                    SampleRow::Draw { params, sample_index: 0, prompt: &[1], generated: &[2], banned: &[5], top: 2 };
                let out = run(&device, logits, 37, &[row]);
                assert_eq!((out[0].token, out[0].logprob), (token, logprob), "{logits:?}");
                // Unlike the token, the first alternative is the raw best by definition: the same one here.
                assert_eq!((out[0].top[0].token, out[0].top[0].logprob), (token, logprob), "{logits:?}");
                assert!(!out[0].top[1].logprob.is_nan());
            }
        }
    });
}

#[test]
fn tokens_that_the_head_does_not_have_are_skipped() {
    sanitised(|| {
        let params = params(|p| (p.repetition_penalty, p.presence_penalty) = (1.5, 0.5));
        let row = SampleRow::Draw {
            params: &params,
            sample_index: 0,
            prompt: &[50, u32::MAX],
            generated: &[99],
            banned: &[100],
            top: 0,
        };
        assert!(run(&emulated(), &peaked(50, 10), 50, &[row])[0].token < 50);
    });
}

#[test]
fn a_recorded_graph_serves_steps_of_fewer_rows_and_other_parameters() {
    sanitised(|| {
        let device = emulated();
        let (vocab, rows_max) = (9_001, 6);
        let all = many_params();
        let history: Vec<Token> = (0..300).map(|i| i * 37 % 9_001).collect();
        let logits: Vec<f32> = (0..rows_max).flat_map(|row| peaked(vocab, 70 + row as u64)).collect();
        let limits = SampleLimits { rows: rows_max, vocab, top: TOP };
        let mut sampler = Sampler::new(&device, limits).expect("memory");
        let mut tensor = CudaTensor::holding(&device, Element::F32, &logits, vocab).expect("memory");
        let graph = device.capture(&mut || sampler.launch(Stream::Compute, &mut tensor, rows_max)).expect("capture");
        let row = |(i, params): (usize, _)| match i % 5 {
            4 => SampleRow::Score { token: i as u32, top: 2 },
            _ => SampleRow::Draw {
                params,
                sample_index: 2,
                prompt: &history[..i * 9],
                generated: &history[i * 9..i * 19],
                banned: &[3],
                top: i % 3,
            },
        };
        let rows: Vec<_> = all.iter().enumerate().map(row).collect();
        // The lists of changes grow from step to step, and move.
        for step in [&rows[..6], &rows[6..8], &rows[8..13], &rows[13..], &rows[..0]] {
            sampler.prepare(step).expect("prepare");
            // SAFETY: all that was recorded lives on.
            unsafe { device.replay(&graph) }.expect("replay");
            let mut out = Vec::new();
            let mut sampled = sampler.fetch().expect("a copy");
            sampled.collect(&device, &mut out).expect("results");
            sampler.reuse(sampled);
            let eager = run(&device, &logits[..step.len() * vocab], vocab, step);
            assert_eq!(exact(&out), exact(&eager));
            assert_eq!(bits(&tensor.values().expect("values")), bits(&logits), "the logits are put back");
        }
    });
}
