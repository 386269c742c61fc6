//! Answers equal those of transformers and PEFT, for the base model and its adapters side by side in one batch.

use openlora_engine::Submit;
use openlora_kernels::Backend;

use crate::rig::{Answer, Expected, Rig, Setup, ask, expected, prompt};

/// Largest difference of a log-probability in f32.
const TOLERANCE: f64 = 2e-3;
/// A greedy token must be equal where the recorded gap between best and second best exceeds this.
const MARGIN: f64 = 1e-2;

/// Every recorded prompt of the model and of two of its adapters, the shortest first.
pub(crate) fn recorded<B: Backend>(rig: &Rig<B>, model: &str, adapters: [&str; 2]) -> (Vec<Submit>, Vec<Expected>) {
    let mut cases: Vec<_> = expected(&format!("models/{model}")).into_iter().map(|entry| (None, entry)).collect();
    for adapter in adapters {
        let entries = expected(&format!("adapters-tiny/{model}/{adapter}"));
        cases.extend(entries.into_iter().map(|entry| (Some(adapter), entry)));
    }
    let request = |(adapter, entry): &(Option<&str>, Expected)| {
        let mut request = ask(&entry.prompt, entry.greedy.len() as u32);
        request.lease = adapter.map(|adapter| rig.lease(adapter));
        request.sampling.logprobs = Some(10);
        request.sampling.prompt_logprobs = Some(0);
        request
    };
    (cases.iter().map(request).collect(), cases.into_iter().map(|(_, entry)| entry).collect())
}

pub(crate) fn check(what: &str, answer: &Answer, recorded: &Expected) {
    let near = |found: f32, recorded: f64, which: &dyn std::fmt::Display| {
        assert!((f64::from(found) - recorded).abs() <= TOLERANCE, "{what}, {which}: {found} is not {recorded}");
    };
    assert_eq!(answer.prompt_logprobs.len(), recorded.prompt.len() - 1, "{what}: scored prompt tokens");
    for (i, (found, logprob)) in answer.prompt_logprobs.iter().zip(&recorded.prompt_logprobs).enumerate() {
        assert_eq!(found.chosen.token, recorded.prompt[i + 1], "{what}, prompt token {}", i + 1);
        near(found.chosen.logprob, *logprob, &format_args!("prompt token {}", i + 1));
    }
    let sample = answer.only();
    let first = &sample.outputs[0];
    assert_eq!(first.top.len(), 10, "{what}: alternatives");
    for (token, logprob) in &recorded.top10 {
        // The tenth and the eleventh may be a tie.
        let found = first.top.iter().find(|top| top.token == *token).map_or(first.top[9].logprob, |top| top.logprob);
        near(found, *logprob, &format_args!("alternative {token}"));
    }
    assert_eq!(sample.outputs.len(), recorded.greedy.len(), "{what}: tokens");
    for (i, (found, token)) in sample.tokens().iter().zip(&recorded.greedy).enumerate() {
        if found != token {
            assert!(recorded.greedy_margin[i] <= MARGIN, "{what}, token {i}: {found} is not {token}");
            return; // A tie within rounding: what follows continues another text.
        }
    }
}

fn check_all(setup: Setup, adapters: [&str; 2]) {
    let model = setup.model;
    let rig = setup.start();
    let (requests, recorded) = recorded(&rig, model, adapters);
    let count = requests.len();
    let answers = rig.answers_in_one_batch(requests);
    for (i, (answer, recorded)) in answers.iter().zip(&recorded).enumerate() {
        check(&format!("{model}, request {i}"), answer, recorded);
    }
    let (segments, sequences) = rig.controls.widest_step();
    assert!(segments >= 3 && sequences >= count - 1, "no step had all: {segments} adapters, {sequences} sequences");
    rig.settle();
}

#[test]
fn base_and_adapters_in_one_batch_answer_as_recorded() {
    for prefix_cache in [true, false] {
        let mut setup = Setup::default();
        setup.config.prefix_cache = prefix_cache;
        check_all(setup, ["all-linear", "embed-head"]);
    }
}

#[test]
fn dora_and_lora_bias_on_biased_linears_answer_as_recorded_beside_the_base() {
    check_all(Setup { model: "qwen2", ..Setup::default() }, ["dora-biased", "lora-bias"]);
}

#[test]
fn prompts_computed_in_chunks_of_five_are_scored_completely() {
    let mut setup = Setup { logit_rows: 4, ..Setup::default() };
    setup.config.long_prefill_chunk = 5;
    check_all(setup, ["all-linear", "embed-head"]);
}

#[test]
fn a_prompt_found_in_the_prefix_cache_gives_the_same_bits() {
    let rig = Setup::default().start();
    let request = || {
        let mut request = ask(&prompt(40), 12);
        request.sampling.logprobs = Some(5);
        request
    };
    let cold = rig.answer(request());
    let warm = rig.answer(request());
    // Two blocks of 16: the third is not full, and the last token is computed in any case.
    assert_eq!((cold.usage.cached_prompt_tokens, warm.usage.cached_prompt_tokens), (0, 32));
    assert_eq!(cold.bits(), warm.bits());
    assert_eq!(rig.stats().prefix_hits_total, 32);

    let salted = rig.answer(Submit { cache_salt: "another".into(), ..request() });
    let adapted = rig.answer(Submit { lease: Some(rig.lease("all-linear")), ..request() });
    let adapted_again = rig.answer(Submit { lease: Some(rig.lease("all-linear")), ..request() });
    assert_eq!((salted.usage.cached_prompt_tokens, adapted.usage.cached_prompt_tokens), (0, 0));
    assert_eq!(adapted_again.usage.cached_prompt_tokens, 32);
    assert_eq!(salted.bits(), cold.bits());
    assert_ne!(adapted.tokens(), cold.tokens(), "the adapter changes the answer");
    assert_eq!(adapted_again.bits(), adapted.bits());
}

#[test]
fn a_prompt_to_be_scored_is_computed_even_where_it_is_cached() {
    let rig = Setup::default().start();
    let mut request = ask(&prompt(40), 2);
    request.sampling.prompt_logprobs = Some(3);
    request.sampling.n = 2;
    let first = rig.answer(request.clone());
    let second = rig.answer(request);
    assert_eq!(second.usage.cached_prompt_tokens, 0);
    assert_eq!(first.prompt_logprobs.len(), 39);
    assert!(first.prompt_logprobs.iter().all(|scored| scored.top.len() == 3));
    assert_eq!(first.bits(), second.bits());
}
