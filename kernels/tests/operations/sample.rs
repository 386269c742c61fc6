//! Sampling.

use openlora_kernels::cpu::sample::{SampleScratch, distribution, sample};
use openlora_kernels::cpu::{CpuTensor, Isa, Pool};
use openlora_kernels::reference::sample as reference;
use openlora_kernels::reference::sample::Draw;
use openlora_kernels::{SampleRow, SampledRow};
use openlora_types::{SamplingParams, Token};
use serde_json::Value;

use crate::{bits, machines, random, rng};

fn params(change: impl Fn(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams::default();
    change(&mut params);
    params
}

fn draw(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow::Draw { params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 }
}

fn run(pool: &Pool, isa: Isa, logits: &[f32], width: usize, rows: &[SampleRow<'_>]) -> Vec<SampledRow> {
    let mut tensor = CpuTensor::from_values(logits, width).expect("memory");
    let mut out = vec![SampledRow { token: 9, logprob: f32::NAN, top: Vec::new() }; 2];
    sample(pool, isa, &mut tensor, rows, &mut out, &mut SampleScratch::default());
    pool.check().expect("no thread panicked");
    assert_eq!(bits(tensor.values()), bits(logits), "the logits are put back");
    out
}

/// Logits like a model's: few large ones, many small ones.
fn peaked(vocab: usize, seed: u64) -> Vec<f32> {
    random(&mut rng(seed), vocab, 1.0).into_iter().map(|x| 12.0 * x * x * x).collect()
}

fn tokens(value: &Value) -> Vec<Token> {
    value.as_array().expect("an array").iter().map(|token| token.as_u64().expect("a token") as Token).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|number| number.as_f64().expect("a number")).collect()
}

#[test]
fn probabilities_are_those_of_transformers() {
    let text = include_str!("../../../fixtures/sampling.json");
    let fixture: Value = serde_json::from_str(text).expect("JSON");
    let cases = fixture["cases"].as_array().expect("cases");
    assert!(cases.len() > 30, "the fixture's cases");
    for case in cases {
        let name = case["logits"].as_str().expect("a name");
        let logits: Vec<f32> = numbers(&fixture["logits"][name]).into_iter().map(|x| x as f32).collect();
        let (prompt, generated) = (tokens(&case["prompt"]), tokens(&case["generated"]));
        let number = |key: &str, neutral: f64| case.get(key).map_or(neutral, |value| value.as_f64().expect("a number"));
        let bias = case.get("logit_bias").and_then(Value::as_array).into_iter().flatten();
        let params = params(|p| {
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
        let draw = Draw { params: &params, prompt: &prompt, generated: &generated, banned: &[] };
        let expected = numbers(&case["probabilities"]);
        let mut all = vec![("reference", reference::distribution(&logits, &draw))];
        all.extend(Isa::available().iter().map(|isa| (isa.name(), distribution(*isa, &logits, &draw))));
        for (who, found) in all {
            for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
                // Weights below f32's range are 0; what is cut is 0 in both.
                let right = if *found > 0.0 { *expected > 0.0 } else { *expected < 1e-37 };
                assert!(right, "{who}: token {token} of {case}");
                assert!((found - expected).abs() < 2e-6, "{who}: token {token} is {found}, not {expected}: {case}");
            }
        }
    }
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
    ] {
        all.push(params(|p| (p.temperature, p.top_k, p.top_p, p.min_p) = (temperature, top_k, top_p, min_p)));
    }
    all.push(params(|p| {
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.2, 0.5, 0.3);
        (p.top_p, p.logit_bias) = (0.95, vec![(5, 3.0), (400, -100.0), (5, 1.0)]);
    }));
    all
}

#[test]
fn distributions_match_the_reference_over_a_vocabulary() {
    let vocab = 5_003;
    let flat = random(&mut rng(1), vocab, 0.01);
    let rounded = peaked(vocab, 2).into_iter().map(|x| x.round() + 0.0).collect();
    for logits in [peaked(vocab, 3), flat, rounded, vec![1.5; vocab]] {
        for params in many_params() {
            let (prompt, generated) = ([5, 17, 17, 4_999], [8, 8, 8, 21, 17]);
            let draw = Draw { params: &params, prompt: &prompt, generated: &generated, banned: &[2, 3] };
            let expected = reference::distribution(&logits, &draw);
            for &isa in Isa::available() {
                let found = distribution(isa, &logits, &draw);
                // A cut may fall one token beside the reference's where the sum is within rounding of it.
                let (kept, expected_kept) = (count(&found), count(&expected));
                let slack = if params.top_p < 1.0 { 1 + expected_kept / 10_000 } else { 0 };
                assert!(
                    kept.abs_diff(expected_kept) <= slack,
                    "{}: {kept}, not {expected_kept}: {params:?}",
                    isa.name()
                );
                for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let close = (found - expected).abs() <= 1e-6 + expected * 2e-5;
                    let at_the_cut = (*found == 0.0) != (*expected == 0.0) && slack > 0;
                    assert!(close || at_the_cut, "{}: {token} is {found}, not {expected}: {params:?}", isa.name());
                }
            }
        }
    }
}

fn count(probabilities: &[f64]) -> usize {
    probabilities.iter().filter(|probability| **probability > 0.0).count()
}

#[test]
fn a_draw_is_the_token_at_the_random_number_s_place() {
    let vocab = 1_003;
    let logits = peaked(vocab, 4);
    let all: Vec<SamplingParams> =
        (0..20).flat_map(|seed| many_params().into_iter().map(move |p| SamplingParams { seed, ..p })).collect();
    for (isa, pool) in machines() {
        let generated: Vec<Token> = vec![7; 3];
        let row = |(i, params)| {
            let sample_index = i as u32 % 3;
            SampleRow::Draw { params, sample_index, prompt: &[], generated: &generated, banned: &[], top: 0 }
        };
        let rows: Vec<_> = all.iter().enumerate().map(row).collect();
        let logits_of_all = logits.repeat(rows.len());
        let log_softmax = reference::log_softmax(&logits);
        for (i, found) in run(&pool, isa, &logits_of_all, vocab, &rows).iter().enumerate() {
            let draw = Draw { params: &all[i], prompt: &[], generated: &generated, banned: &[] };
            let probabilities = distribution(isa, &logits, &draw);
            let before: f64 = probabilities[..found.token as usize].iter().sum();
            let after = before + probabilities[found.token as usize];
            let uniform = reference::uniform(all[i].seed, i as u32 % 3, 3);
            assert!(probabilities[found.token as usize] > 0.0, "{}: an impossible token", isa.name());
            assert!(before - 1e-6 <= uniform && uniform <= after + 1e-6, "{before} {uniform} {after} {:?}", all[i]);
            let expected = log_softmax[found.token as usize];
            assert!((f64::from(found.logprob) - expected).abs() < 1e-4, "raw log-probability");
        }
    }
}

#[test]
fn drawn_frequencies_follow_the_distribution() {
    let logits = [1.0, 0.0, 2.0, -1.0, 0.5, f32::NEG_INFINITY, 1.5];
    let draws = 20_000;
    let all: Vec<SamplingParams> = (0..draws).map(|seed| params(|p| p.seed = seed)).collect();
    let rows: Vec<_> = all.iter().map(draw).collect();
    let pool = Pool::new(2).expect("threads");
    let expected = reference::log_softmax(&logits);
    for &isa in Isa::available() {
        let mut counts = [0.0; 7];
        for row in run(&pool, isa, &logits.repeat(draws as usize), 7, &rows) {
            counts[row.token as usize] += 1.0 / draws as f64;
        }
        for (count, expected) in counts.iter().zip(&expected) {
            // Five standard deviations.
            let p = expected.exp();
            assert!((count - p).abs() <= 5.0 * (p * (1.0 - p) / draws as f64).sqrt(), "{count} for {p}");
        }
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lower_token_of_equals() {
    let vocab = 333;
    let mut logits = peaked(vocab, 5);
    (logits[40], logits[41], logits[300]) = (50.0, 60.0, 60.0);
    let greedy = params(|p| p.temperature = 0.0);
    let biased = params(|p| (p.temperature, p.logit_bias) = (0.0, vec![(40, 20.0)]));
    let penalised = params(|p| (p.temperature, p.repetition_penalty) = (0.0, 2.0));
    let with =
        |params, prompt, banned| SampleRow::Draw { params, sample_index: 0, prompt, generated: &[], banned, top: 0 };
    let rows = [
        draw(&greedy),
        draw(&biased),
        with(&penalised, &[41, 41], &[]),
        with(&penalised, &[41, 300], &[]),
        with(&greedy, &[], &[41]),
        with(&greedy, &[], &[41, 300]),
    ];
    for (isa, pool) in machines() {
        let out = run(&pool, isa, &logits.repeat(rows.len()), vocab, &rows);
        assert_eq!(out.iter().map(|row| row.token).collect::<Vec<_>>(), [41, 40, 300, 40, 300, 40]);
    }
}

#[test]
fn alternatives_are_the_raw_best_in_order() {
    let vocab = 2_001;
    let mut logits = peaked(vocab, 6);
    (logits[1_999], logits[3], logits[2_000]) = (11.5, 11.5, 20.0);
    let log_softmax = reference::log_softmax(&logits);
    let mut order: Vec<usize> = (0..vocab).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let biased = params(|p| p.logit_bias = vec![(7, 100.0), (2_000, -100.0)]);
    for (isa, pool) in machines() {
        for top in [0, 1, 5, 20] {
            let biased =
                SampleRow::Draw { params: &biased, sample_index: 0, prompt: &[], generated: &[], banned: &[], top };
            for found in run(&pool, isa, &logits.repeat(2), vocab, &[SampleRow::Score { token: 9, top }, biased]) {
                let tokens: Vec<usize> = found.top.iter().map(|top| top.token as usize).collect();
                assert_eq!(tokens, order[..top], "{}", isa.name());
                for top in &found.top {
                    assert!((f64::from(top.logprob) - log_softmax[top.token as usize]).abs() < 1e-4);
                }
                assert!(found.token == 9 || found.token == 7);
                assert!((f64::from(found.logprob) - log_softmax[found.token as usize]).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn log_probabilities_of_a_large_vocabulary_are_exact_to_a_ten_thousandth() {
    let vocab = 151_936;
    let logits = random(&mut rng(7), vocab, 15.0);
    let expected = reference::log_softmax(&logits);
    let pool = Pool::new(1).expect("threads");
    for &isa in Isa::available() {
        for token in [0, 77_777, 151_935] {
            let [found] = &run(&pool, isa, &logits, vocab, &[SampleRow::Score { token, top: 0 }])[..] else {
                panic!("one row")
            };
            assert!((f64::from(found.logprob) - expected[token as usize]).abs() < 1e-4, "{}", isa.name());
        }
    }
}

#[test]
fn a_draw_depends_on_nothing_in_the_batch() {
    let vocab = 517;
    let all = many_params();
    let logits: Vec<f32> = (0..all.len()).flat_map(|row| peaked(vocab, 50 + row as u64)).collect();
    let history: Vec<Token> = vec![4, 9, 9, 100, 516];
    let row = |params| {
        let (prompt, generated) = (history.as_slice(), history.as_slice());
        SampleRow::Draw { params, sample_index: 1, prompt, generated, banned: &[3], top: 3 }
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    for &isa in Isa::available() {
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).expect("threads"));
        let together = run(&pools[0], isa, &logits, vocab, &rows);
        assert_eq!(run(&pools[1], isa, &logits, vocab, &rows), together);
        assert_eq!(run(&pools[2], isa, &logits, vocab, &rows), together);
        for (row, together) in together.iter().enumerate() {
            let alone = run(&pools[1], isa, &logits[row * vocab..(row + 1) * vocab], vocab, &rows[row..row + 1]);
            assert_eq!(&alone[0], together);
        }
    }
}

#[test]
fn when_every_token_is_banned_the_best_raw_one_is_taken() {
    let banned: Vec<Token> = (0..40).collect();
    let mut logits = random(&mut rng(8), 40, 1.0);
    logits[23] = 5.0;
    let (greedy, cut) = (params(|p| p.temperature = 0.0), params(|p| p.top_p = 0.5));
    for (isa, pool) in machines() {
        for params in [&greedy, &cut, &SamplingParams::default()] {
            let banned = &banned;
            let row = SampleRow::Draw { params, sample_index: 0, prompt: &[], generated: &[], banned, top: 1 };
            let out = run(&pool, isa, &logits, 40, &[row]);
            assert_eq!((out[0].token, out[0].top[0].token), (23, 23), "{}", isa.name());
            assert!(out[0].logprob.is_finite());
        }
    }
}

#[test]
fn not_a_number_and_infinity_are_defined() {
    let greedy = params(|p| p.temperature = 0.0);
    let cut = params(|p| (p.top_p, p.top_k, p.repetition_penalty) = (0.9, 4, 1.5));
    let everything = vec![f32::NAN; 37];
    let nothing = vec![f32::NEG_INFINITY; 37];
    let (mut one, mut infinite) = (everything.clone(), random(&mut rng(9), 37, 1.0));
    one[36] = 1.0;
    (infinite[20], infinite[3]) = (f32::INFINITY, f32::NAN);
    for (isa, pool) in machines() {
        for params in [&greedy, &cut, &SamplingParams::default()] {
            for (logits, token, logprob) in [
                (&everything, 0, f32::NEG_INFINITY),
                (&nothing, 0, f32::NEG_INFINITY),
                (&one, 36, 0.0),
                (&infinite, 20, 0.0),
            ] {
                let row =
                    SampleRow::Draw { params, sample_index: 0, prompt: &[1], generated: &[2], banned: &[5], top: 2 };
                let out = run(&pool, isa, logits, 37, &[row]);
                assert_eq!((out[0].token, out[0].logprob), (token, logprob), "{}", isa.name());
            }
        }
    }
}

#[test]
fn tokens_that_the_head_does_not_have_are_skipped() {
    let params = params(|p| (p.repetition_penalty, p.presence_penalty) = (1.5, 0.5));
    let row = SampleRow::Draw {
        params: &params,
        sample_index: 0,
        prompt: &[50, u32::MAX],
        generated: &[99],
        banned: &[100],
        top: 0,
    };
    for (isa, pool) in machines() {
        assert!(run(&pool, isa, &peaked(50, 10), 50, &[row])[0].token < 50);
    }
}
