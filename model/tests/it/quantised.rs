//! The default, quantised mode: close to f32 on the golden prompts and on the perplexity text.

use openlora_kernels::Precision;
use openlora_types::Token;
use serde::Deserialize;

use crate::support::{
    Adapter, Case, Host, best, fixture, folders, load_adapter, log_softmax, open, read_cases, read_json, real_model,
};

/// Distances between two modes over rows of logits.
#[derive(Default)]
struct Distance {
    divergence: f64,
    same: usize,
    rows: usize,
}

impl Distance {
    fn add(&mut self, exact: &[f32], quantised: &[f32]) {
        let (exact, quantised) = (log_softmax(exact), log_softmax(quantised));
        self.divergence += exact.iter().zip(&quantised).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.same += usize::from(best(&exact) == best(&quantised));
        self.rows += 1;
    }
}

/// Kullback-Leibler divergence of the quantised from the exact distribution, mean over rows, and the share of rows with the same
/// most probable token.
#[test]
fn quantised_distributions_stay_close_to_f32() {
    let (mut exact, mut quantised) = (open(&real_model(), Precision::F32), open(&real_model(), Precision::Quantised));
    let mut distance = Distance::default();
    compare(&mut exact, &mut quantised, None, &read_cases("golden/base.json", None), &mut distance);
    for name in folders("golden/trained") {
        let folder = format!("golden/trained/{name}");
        let adapters = (load_adapter(&exact, &folder), load_adapter(&quantised, &folder));
        let cases = read_cases(&format!("{folder}.expected.json"), None);
        compare(&mut exact, &mut quantised, Some((&adapters.0, &adapters.1)), &cases, &mut distance);
    }
    let (mean, agreement) = (distance.divergence / distance.rows as f64, distance.same as f64 / distance.rows as f64);
    println!("mean KL {mean:.5}, top-1 agreement {agreement:.4} over {} rows", distance.rows);
    assert!(mean <= 0.01, "mean KL is {mean}");
    assert!(agreement >= 0.97, "top-1 agreement is {agreement} over {} rows", distance.rows);
}

/// Runs prompts and their recorded continuations in both modes; every row counts.
fn compare(
    exact: &mut Host,
    quantised: &mut Host,
    adapters: Option<(&Adapter, &Adapter)>,
    cases: &[Case<'_>],
    distance: &mut Distance,
) {
    let vocab = exact.model.shape().vocab;
    for case in cases {
        let tokens: Vec<Token> = [&case.expected.prompt_ids[..], &case.expected.greedy].concat();
        let exact = exact.prompt(&tokens, adapters.map(|adapters| adapters.0));
        let quantised = quantised.prompt(&tokens, adapters.map(|adapters| adapters.1));
        for (exact, quantised) in exact.chunks_exact(vocab).zip(quantised.chunks_exact(vocab)) {
            distance.add(exact, quantised);
        }
    }
}

#[test]
fn quantised_perplexity_is_within_one_percent_of_f32() {
    #[derive(Deserialize)]
    struct Perplexity {
        chunks: Vec<Vec<Token>>,
        nll_sum: Vec<f64>,
        tokens_scored: usize,
        perplexity: f64,
    }
    let recorded: Perplexity = read_json(&fixture("golden/perplexity.json"));
    let mut host = open(&real_model(), Precision::Quantised);
    let vocab = host.model.shape().vocab;
    let (mut total, mut scored) = (0.0, 0);
    for (chunk, nll) in recorded.chunks.iter().zip(&recorded.nll_sum) {
        let logits = host.prompt(chunk, None);
        let rows = logits.chunks_exact(vocab).zip(&chunk[1..]);
        let found: f64 = rows.map(|(row, next)| -log_softmax(row)[*next as usize]).sum();
        assert!((found / nll - 1.0).abs() < 0.02, "a chunk's loss is {found}, recorded {nll}");
        total += found;
        scored += chunk.len() - 1;
    }
    assert_eq!(scored, recorded.tokens_scored);
    let perplexity = (total / scored as f64).exp();
    println!("perplexity {perplexity:.4}, recorded {}", recorded.perplexity);
    assert!((perplexity / recorded.perplexity - 1.0).abs() <= 0.01, "{perplexity} is not near {}", recorded.perplexity);
}
