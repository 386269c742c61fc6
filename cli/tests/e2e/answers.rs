//! What is answered: equal to transformers and PEFT, and to itself in any company.

use futures_util::future::join_all;
use openlora_proto::v1::{GenerateRequest, OutputOptions};

use crate::support::{Case, Client, Server, bits, cases, greedy};

const ADAPTERS: &[&str] = &["all-linear-r4-rslora", "dora", "odd-rank", "patterns", "qv-r8", "r1", "r64", "regex"];
const TRAINED: &[&str] = &["cwe-r8", "wordnet-r8"];

/// Uploads every golden adapter; gives `(alias, cases)`, the base model first.
async fn everything(client: &Client) -> Vec<(String, Vec<Case>)> {
    let mut all = vec![(String::new(), cases("golden/base.json"))];
    for name in ADAPTERS {
        let alias = format!("admin/{name}");
        client.upload(&alias, &format!("golden/adapters/{name}"), false).await.expect(name);
        all.push((alias, cases(&format!("golden/adapters/{name}/expected.json"))));
    }
    for name in TRAINED {
        let alias = format!("admin/{name}");
        client.upload(&alias, &format!("golden/trained/{name}"), false).await.expect(name);
        all.push((alias, cases(&format!("golden/trained/{name}.expected.json"))));
    }
    all
}

fn scored(adapter: &str, case: &Case) -> GenerateRequest {
    let mut request = greedy(adapter, &case.prompt_ids, case.greedy.len());
    request.output = Some(OutputOptions { token_ids: Some(true), logprobs: Some(0), prompt_logprobs: Some(0) });
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn in_f32_all_adapters_in_one_batch_answer_as_peft_does() {
    let server = Server::start(&[("OPENLORA_MODEL_PRECISION", "f32")]);
    let client = server.client().await;
    let everything = everything(&client).await;
    let asked = everything.iter().flat_map(|(alias, cases)| cases.iter().map(move |case| (alias, case)));
    let asked: Vec<_> = asked.collect();
    let answers = join_all(asked.iter().map(|(alias, case)| client.generate(scored(alias, case)))).await;
    for ((alias, case), answer) in asked.iter().zip(answers) {
        let answer = answer.expect(alias);
        let ours: Vec<f32> =
            answer.prompt_logprobs.iter().map(|entry| entry.chosen.as_ref().expect("a score").logprob).collect();
        assert_eq!(ours.len(), case.prompt_logprobs.len(), "{alias}");
        for (ours, theirs) in ours.iter().zip(&case.prompt_logprobs) {
            assert!((ours - theirs).abs() <= 2e-3, "{alias}: {ours} against {theirs}");
        }
        // Past a step that is nearly a tie the two continuations need not be the same text.
        let sure = case.greedy_margin.iter().take_while(|margin| **margin > 1e-2).count();
        assert_eq!(answer.samples[0].token_ids[..sure], case.greedy[..sure], "{alias}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_answers_the_same_bits_alone_and_in_any_company() {
    // No prefix cache: company must matter to nothing, and a cached prefix would hide a difference.
    let server = Server::start(&[("OPENLORA_ENGINE_PREFIX_CACHE", "false")]);
    let client = server.client().await;
    let everything = everything(&client).await;
    let requests: Vec<_> =
        everything.iter().flat_map(|(alias, cases)| cases.iter().take(2).map(|case| scored(alias, case))).collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(bits(&client.generate(request.clone()).await.expect("an answer")));
    }
    for round in 0..3 {
        // A different order, and so different neighbours and chunks, every time.
        let order: Vec<_> = (0..requests.len()).map(|i| (i * [1, 5, 11][round] + round) % requests.len()).collect();
        let answers = join_all(order.iter().map(|&i| client.generate(requests[i].clone()))).await;
        for (&i, answer) in order.iter().zip(answers) {
            assert_eq!(bits(&answer.expect("an answer")), alone[i], "round {round}, {:?}", requests[i].adapter);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_prefix_changes_no_bit() {
    let server = Server::start(&[]);
    let client = server.client().await;
    client.upload("admin/cwe", "golden/trained/cwe-r8", false).await.expect("uploaded");
    let case = &cases("golden/trained/cwe-r8.expected.json")[0];
    let request = greedy("admin/cwe", &case.prompt_ids, 24);
    let cold = client.generate(request.clone()).await.expect("an answer");
    let warm = client.generate(request).await.expect("an answer");
    assert_eq!(cold.usage.expect("usage").cached_prompt_tokens, 0);
    assert!(warm.usage.expect("usage").cached_prompt_tokens >= 16);
    assert_eq!(bits(&warm), bits(&cold));
}

#[tokio::test(flavor = "multi_thread")]
async fn new_bytes_under_the_same_alias_answer_as_after_a_cold_start() {
    let server = Server::start(&[]);
    let client = server.client().await;
    let prompt = &cases("golden/base.json")[0].prompt_ids;
    let request = greedy("admin/one", prompt, 16);
    let first = client.upload("admin/one", "golden/adapters/qv-r8", false).await.expect("uploaded");
    let before = client.generate(request.clone()).await.expect("an answer");
    assert_eq!(before.generation, first.generation);
    let second = client.upload("admin/one", "golden/adapters/r64", true).await.expect("replaced");
    let warm = client.generate(request.clone()).await.expect("an answer");
    assert_eq!(warm.generation, second.generation);
    assert_ne!(bits(&warm), bits(&before), "the new adapter answers differently");

    let cold_server = Server::start(&[]);
    let cold_client = cold_server.client().await;
    cold_client.upload("admin/one", "golden/adapters/r64", false).await.expect("uploaded");
    let cold = cold_client.generate(request).await.expect("an answer");
    assert_eq!(bits(&warm), bits(&cold));
    assert_eq!(warm.usage.expect("usage").cached_prompt_tokens, 0, "nothing of the old generation was reused");
}

#[tokio::test(flavor = "multi_thread")]
async fn salts_tenants_and_adapters_never_share_a_prefix() {
    let server = Server::start(&[]);
    let client = server.client().await;
    client.upload("admin/cwe", "golden/trained/cwe-r8", false).await.expect("uploaded");
    let other = server.client_with(&crate::support::create_key(server.home.path(), "app", "other")).await;
    let prompt = &cases("golden/base.json")[1].prompt_ids;
    let with = |adapter: &str, salt: &str| {
        let mut request = greedy(adapter, prompt, 4);
        request.cache_salt = salt.into();
        request
    };
    let cached = async |client: &Client, request: GenerateRequest| {
        client.generate(request).await.expect("an answer").usage.expect("usage").cached_prompt_tokens
    };
    assert_eq!(cached(&client, with("", "")).await, 0);
    assert!(cached(&client, with("", "")).await > 0, "the same tenant, salt and model do share");
    assert_eq!(cached(&client, with("", "salt")).await, 0);
    assert_eq!(cached(&client, with("admin/cwe", "")).await, 0);
    // A salt that reads like another adapter's name is only a salt.
    assert_eq!(cached(&client, with("", "admin/cwe")).await, 0);
    assert_eq!(cached(&other, with("", "")).await, 0, "another tenant cannot probe what was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_samples_and_n_gives_different_ones() {
    let server = Server::start(&[]);
    let client = server.client().await;
    let mut request = greedy("", &cases("golden/base.json")[2].prompt_ids, 16);
    if let Some(sampling) = request.sampling.as_mut() {
        (sampling.temperature, sampling.seed, sampling.n) = (Some(1.0), Some(7), Some(3));
    }
    let first = client.generate(request.clone()).await.expect("an answer");
    let second = client.generate(request).await.expect("an answer");
    assert_eq!(bits(&first), bits(&second));
    let texts: std::collections::BTreeSet<_> = first.samples.iter().map(|sample| sample.text.clone()).collect();
    assert_eq!(first.samples.len(), 3);
    assert!(texts.len() > 1, "three draws at temperature 1 differ: {texts:?}");
}
