//! A KV cache too small for all: sequences lose their blocks, are recomputed, and nobody can tell.

use openlora_engine::Submit;

use crate::rig::{Rig, Setup, ask, prompt};

/// Requests that want far more than 30 blocks of 4 tokens: greedy and drawn, base and adapters, one and several samples.
fn requests(rig: &Rig) -> Vec<Submit> {
    let adapters = [None, Some("all-linear"), Some("embed-head"), None, Some("all-linear")];
    let prompts = [7, 33, 9, 40, 9];
    let requests = adapters.into_iter().zip(prompts).enumerate().map(|(i, (adapter, tokens))| {
        let mut request = ask(&prompt(tokens), 60);
        request.lease = adapter.map(|adapter| rig.lease(adapter));
        request.sampling.temperature = if i % 2 == 0 { 0.9 } else { 0.0 };
        request.sampling.seed = 100 + i as u64;
        request.sampling.presence_penalty = 0.5;
        request.sampling.n = if i == 2 { 3 } else { 1 };
        request.sampling.logprobs = Some(2);
        request.sampling.prompt_logprobs = (i < 3).then_some(1);
        request
    });
    requests.collect()
}

fn setup(blocks: usize, prefix_cache: bool) -> Setup {
    let mut setup = Setup { blocks, block_size: 4, logit_rows: 8, ..Setup::default() };
    setup.config.prefix_cache = prefix_cache;
    setup.config.long_prefill_chunk = 16;
    setup
}

#[test]
fn recomputation_changes_no_bit_of_any_answer_and_scores_no_prompt_token_twice() {
    let roomy = setup(256, true).start();
    let undisturbed = roomy.answers_in_one_batch(requests(&roomy));
    assert_eq!(roomy.stats().preemptions_total, 0);
    for prefix_cache in [true, false] {
        let rig = setup(30, prefix_cache).start();
        let answers = rig.answers_in_one_batch(requests(&rig));
        assert!(rig.stats().preemptions_total > 0, "the cache was large enough for all");
        for (i, (answer, undisturbed)) in answers.iter().zip(&undisturbed).enumerate() {
            assert_eq!(answer.bits(), undisturbed.bits(), "request {i}, prefix cache {prefix_cache}");
            let scored: Vec<_> = answer.prompt_logprobs.iter().map(|scored| scored.chosen.token).collect();
            let expected = if i < 3 { requests(&rig)[i].prompt[1..].to_vec() } else { Vec::new() };
            assert_eq!(scored, expected, "request {i}: each prompt token but the first, once, in order");
            // What a recomputed sequence finds of its own blocks is not a cached prompt.
            assert_eq!(answer.usage, undisturbed.usage, "request {i}, prefix cache {prefix_cache}");
        }
        rig.settle();
    }
}

#[test]
fn a_recomputed_sequence_does_not_call_its_own_blocks_a_cached_prompt() {
    // 20 blocks of 4: the second has 14 of them when the first wants more, and finds those back that the first did not need.
    let rig = setup(20, true).start();
    let answers = rig.answers_in_one_batch(vec![ask(&prompt(9), 40), ask(&prompt(40), 30)]);
    let stats = rig.stats();
    assert!(stats.preemptions_total > 0 && stats.prefix_hits_total > 0, "{stats:?}");
    for answer in &answers {
        assert_eq!(answer.usage.cached_prompt_tokens, 0);
    }
}
