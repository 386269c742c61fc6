//! What a request's samples are and when they end.

use openlora_types::{FinishReason, Usage};

use crate::rig::{Setup, ask, next_token, prompt, read};

/// The end-of-sequence tokens of the fixture `llama3` are 1 and 2.
const EOS: u32 = 1;

#[test]
fn each_sample_ends_once_and_the_usage_counts_all_of_them() {
    let rig = Setup::default().start();
    let mut request = ask(&prompt(33), 6);
    request.sampling.n = 4;
    request.sampling.temperature = 1.5;
    let answer = rig.answer(request);
    assert_eq!(answer.samples.len(), 4);
    for sample in &answer.samples {
        assert_eq!((sample.outputs.len(), sample.reason), (6, Some(FinishReason::Length)));
        assert!(sample.outputs.iter().all(|output| output.top.is_empty()), "alternatives nobody asked for");
    }
    assert_eq!(answer.usage, Usage { prompt_tokens: 33, cached_prompt_tokens: 0, completion_tokens: 24 });
    rig.settle();
    assert_eq!(rig.stats().generation_tokens_total, 24);
}

#[test]
fn a_sample_depends_on_seed_and_index_alone() {
    let rig = Setup::default().start();
    let request = |seed, n| {
        let mut request = ask(&prompt(33), 20);
        request.sampling.temperature = 1.5;
        request.sampling.seed = seed;
        request.sampling.n = n;
        request
    };
    let four = rig.answer(request(7, 4));
    let one = rig.answer(request(7, 1));
    assert_eq!(one.only().outputs, four.samples[0].outputs, "the same seed and index");
    assert_eq!(rig.answer(request(7, 4)).samples, four.samples, "the same request again");
    assert_ne!(four.samples[0].tokens(), four.samples[1].tokens(), "another index");
    assert_ne!(rig.answer(request(8, 1)).tokens(), one.tokens(), "another seed");
}

#[test]
fn log_probabilities_come_sorted_and_as_many_as_asked_for() {
    let rig = Setup::default().start();
    let mut request = ask(&prompt(40), 5);
    request.sampling.logprobs = Some(3);
    let greedy = rig.answer(request.clone());
    for output in &greedy.only().outputs {
        assert_eq!(output.top.len(), 3);
        assert!(output.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        assert_eq!(output.chosen, output.top[0], "the greedy token is the best");
    }
    request.sampling.logprobs = Some(0);
    let none = rig.answer(request);
    assert!(none.only().outputs.iter().all(|output| output.top.is_empty()));
    assert_eq!(none.tokens(), greedy.tokens());
}

#[test]
fn a_stop_token_ends_the_sample_and_is_its_last_token() {
    let rig = Setup::default().start();
    let free = rig.answer(ask(&prompt(40), 12)).tokens();
    let (at, stop) =
        free.iter().enumerate().skip(2).find(|(i, token)| !free[..*i].contains(token)).expect("a new token");
    let mut request = ask(&prompt(40), 12);
    request.sampling.stop_tokens = vec![*stop];
    let answer = rig.answer(request);
    assert_eq!(answer.tokens(), free[..=at]);
    assert_eq!(answer.only().reason, Some(FinishReason::Stop));
    assert_eq!(answer.usage.completion_tokens as usize, at + 1);
}

#[test]
fn end_of_sequence_stops_unless_ignored_and_not_before_min_tokens() {
    let rig = Setup::default().start();
    let request = |ignore_eos, min_tokens| {
        let mut request = ask(&prompt(9), 6);
        request.sampling.ignore_eos = ignore_eos;
        request.sampling.min_tokens = min_tokens;
        request.sampling.logit_bias = vec![(EOS, 100.0)];
        request
    };
    let at_once = rig.answer(request(false, 0));
    assert_eq!((at_once.tokens(), at_once.only().reason), (vec![EOS], Some(FinishReason::Stop)));

    let ignored = rig.answer(request(true, 0));
    assert_eq!((ignored.tokens(), ignored.only().reason), (vec![EOS; 6], Some(FinishReason::Length)));

    let later = rig.answer(request(false, 3));
    let tokens = later.tokens();
    assert_eq!(tokens.len(), 4);
    assert!(!tokens[..3].contains(&EOS), "end of sequence before min_tokens: {tokens:?}");
    assert_eq!((tokens[3], later.only().reason), (EOS, Some(FinishReason::Stop)));

    // A stop token still stops where end of sequence does not, and neither before min_tokens.
    let mut stopped = request(true, 2);
    stopped.sampling.stop_tokens = vec![EOS];
    let stopped = rig.answer(stopped);
    assert_eq!((stopped.tokens().len(), stopped.only().reason), (3, Some(FinishReason::Stop)));
}

#[test]
fn stopping_a_sample_ends_it_within_a_step_and_no_other() {
    let rig = Setup::default().start();
    rig.controls.close();
    let mut request = ask(&prompt(9), 8);
    request.sampling.n = 3;
    request.sampling.temperature = 1.0;
    let mut stream = rig.submit(request.clone());
    rig.controls.wait_for_step(1);
    // Two steps are over when the third has come.
    rig.controls.advance();
    rig.controls.advance();
    next_token(&mut stream);
    next_token(&mut stream);
    stream.stop_sample(1);
    stream.stop_sample(40);
    stream.stop_sample(400);
    rig.controls.open();
    let answer = read(stream);

    let whole = rig.answer(request);
    assert_eq!(answer.samples[1].reason, Some(FinishReason::Stop));
    // The step at the gate was planned with it; the one after is not.
    assert!(answer.samples[1].outputs.len() <= 3, "{} tokens", answer.samples[1].outputs.len());
    for index in [0, 2] {
        assert_eq!(answer.samples[index].reason, Some(FinishReason::Length));
        let (tokens, whole) = (answer.samples[index].tokens(), whole.samples[index].tokens());
        assert!(whole.ends_with(&tokens), "{tokens:?} is not the end of {whole:?}");
    }
    rig.settle();
}

#[test]
fn stopping_every_sample_ends_the_request() {
    let rig = Setup::default().start();
    rig.controls.close();
    let mut request = ask(&prompt(40), 50);
    request.lease = Some(rig.lease("all-linear"));
    request.sampling.n = 2;
    let stream = rig.submit(request);
    rig.controls.wait_for_step(1);
    stream.stop_sample(0);
    stream.stop_sample(1);
    rig.controls.open();
    let answer = read(stream);
    assert!(answer.samples.iter().all(|sample| sample.reason == Some(FinishReason::Stop)));
    assert_eq!(rig.controls.steps(), 1, "steps after the one that was under way");
    rig.settle();
}
